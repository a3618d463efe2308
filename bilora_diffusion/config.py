"""Everything a run can be told: one flat dataclass whose field names are the flag names.

The command line, the YAML files, `--help` and `docs/flags.md` are all made from `TrainingConfig`, so a flag
is written once. This module imports neither torch nor diffusers: `--help` and a refusal must answer at once.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import yaml

from bilora_diffusion.contradictions import RESOLUTIONS, refuse_contradictions, remarks
from bilora_diffusion.flags import (
    AT_LEAST_ONE,
    BELOW_ONE,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    Flag,
    Range,
    checked,
    flag,
    flag_of,
)
from bilora_diffusion.method_names import FLAGS_OF_METHODS, METHOD_NAMES

__all__ = [
    "FLAGS",
    "GROUPS",
    "RIVALS",
    "TrainingConfig",
    "as_dict",
    "to_yaml",
]

# Two ways to say one thing: never both. On the command line one of them displaces the other of the YAML file.
RIVALS = (("rho", "rho_relative"), ("dataset_name", "instance_data_dir"), ("center_crop", "crops_per_image"))

METHOD = "Method"
BASE = "Base model"
DATA = "Data"
PRIOR = "Prior preservation"
TRAINING = "Training"
OPTIMISER = "Learning rate and optimiser"
PREVIEWS = "Previews"
CHECKPOINTS = "Checkpoints"
OUTPUT = "Output"
LOGGING = "Logging and hub"
MACHINE = "Machine"
GROUPS = (METHOD, BASE, DATA, PRIOR, TRAINING, OPTIMISER, PREVIEWS, CHECKPOINTS, OUTPUT, LOGGING, MACHINE)

RANKS = Range(1, 1024)
"""A slip of the finger should not fill the memory; SDXL's attention projections have 640 to 1,280 outputs."""


@dataclass(kw_only=True)
class TrainingConfig:
    """One run. Making one checks it: `UserError` for a wrong type, a number out of range, a contradiction.

    `None` means "unset"; each field says what then holds. Whoever resolves such a value (a drawn seed, the
    base's resolution) makes a new configuration with `dataclasses.replace`, which checks again.
    """

    # --- Method ---
    method: str = flag(
        "bilora",
        "bilora = a LoRA that descends beside an auxiliary adapter that ascends; lora = plain LoRA; the others: "
        "docs/methods.md",
        group=METHOD,
        choices=METHOD_NAMES,
        origin="bilora",
    )
    rank: int = flag(4, "rank of the LoRA update matrices", group=METHOD, within=RANKS)
    lora_alpha: float | None = flag(
        None,
        "the update is scaled by alpha / rank; unset: the rank, so the scale is 1",
        group=METHOD,
        within=POSITIVE,
        origin="diffusers",
    )
    lora_layers: str | None = flag(
        None,
        "names of the UNet's modules to adapt, comma separated; unset: to_q,to_k,to_v,to_out.0",
        group=METHOD,
        origin="diffusers",
    )
    lora_dropout: float = flag(
        0.0, "probability that an input of the primary adapter is dropped", group=METHOD, within=BELOW_ONE
    )
    init_lora_weights: str = flag(
        "gaussian",
        "how the LoRA begins: gaussian (A has standard deviation 1 / rank) or kaiming (as peft), with B = 0; from the "
        "weights: pissa, pissa_niter_N, olora; from their gradient: lora_ga (docs/methods.md)",
        group=METHOD,
        origin="bilora",
    )
    use_dora: bool = flag(
        False,
        "train a DoRA (arXiv 2402.09353): direction and magnitude apart; no Kohya file can hold it",
        group=METHOD,
    )
    train_text_encoder: bool = flag(
        False, "train LoRAs on both text encoders too (q_proj, k_proj, v_proj, out_proj)", group=METHOD
    )
    rho: float | None = flag(
        None,
        "size of the perturbation, for bilora the radius of the ball that holds ||s B2 A2||_F over all layers "
        "(others: docs/methods.md); 0 = plain LoRA; unset: the method's default",
        group=METHOD,
        within=NOT_NEGATIVE,
        origin="bilora",
    )
    rho_relative: float | None = flag(
        None,
        "the same radius as a share of the adapted weights' Frobenius norm, in place of --rho",
        group=METHOD,
        within=NOT_NEGATIVE,
        origin="bilora",
    )
    rho_schedule: Literal["constant", "anneal"] = flag(
        "constant",
        "course of bilora's radius over the run: rho all the time, or falling to 0 over the last tenth of the steps, "
        "so that the LoRA learns to do without the auxiliary",
        group=METHOD,
        origin="bilora",
    )
    auxiliary_rank: int | None = flag(
        None,
        "rank of the auxiliary adapter; unset: that of --rank",
        group=METHOD,
        within=RANKS,
        origin="bilora",
    )
    auxiliary_init: Literal["kaiming", "gaussian"] = flag(
        "gaussian",
        "how the auxiliary's A begins: kaiming = uniform, standard deviation 1 / sqrt(3 inputs), as peft; "
        "gaussian = standard deviation 1 / rank",
        group=METHOD,
        origin="bilora",
    )
    ascent: Literal["adamw", "sgd", "normalized"] = flag(
        "adamw",
        "the auxiliary's step: AdamW or SGD on the sign-flipped gradients, or a step of fixed length",
        group=METHOD,
        origin="bilora",
    )
    ascent_fraction: float = flag(
        0.1,
        "share of rho that one normalized step moves ||s B2 A2||_F",
        group=METHOD,
        within=Range(0, 1, open_low=True),
        origin="bilora",
    )
    auxiliary_learning_rate: float | None = flag(
        None,
        "learning rate of the adamw and sgd ascent; unset: that of the part it sits in (UNet or text "
        "encoders), on the same schedule; must be set with Prodigy",
        group=METHOD,
        within=NOT_NEGATIVE,
        origin="bilora",
    )
    auxiliary_weight_decay: float = flag(
        0.0, "weight decay of the adamw and sgd ascent", group=METHOD, within=NOT_NEGATIVE, origin="bilora"
    )
    ascent_share: float | None = flag(
        None,
        "share of the step's rows that the ascent pass of bilora-fresh and lora-sam sees: less is faster; unset: 0.5 "
        "for bilora-fresh, 1 for lora-sam",
        group=METHOD,
        within=Range(0, 1, open_low=True),
        origin="bilora",
    )
    ascent_every: int = flag(
        1,
        "bilora-fresh perturbs every so many steps; the others are plain LoRA",
        group=METHOD,
        within=AT_LEAST_ONE,
        origin="bilora",
    )
    ascent_basis: Literal["gradient", "tracked"] = flag(
        "gradient",
        "directions that bilora-fresh climbs along: the strongest of the batch's own gradient, or those that persist "
        "in the gradients from step to step, which climb less high",
        group=METHOD,
        origin="bilora",
    )
    sigma: float | None = flag(
        None,
        "norm of the noise as a share of the weights', unset: 0.5 for flat-lora and rwp-full, 0.1 for rwp-lora; with "
        "bilora, bilora-fresh and bilora-echo flat-lora's noise on top, unset: none",
        group=METHOD,
        within=NOT_NEGATIVE,
        origin="bilora",
    )
    sigma_schedule: Literal["constant", "linear", "cosine"] = flag(
        "constant",
        "course of flat-lora's noise over the run: sigma all the time, or from 0 to sigma",
        group=METHOD,
        origin="bilora",
    )
    looksam_every: int = flag(
        5, "looksam makes its second pass every so many steps", group=METHOD, within=AT_LEAST_ONE, origin="bilora"
    )
    looksam_alpha: float = flag(
        0.7,
        "weight of the direction that looksam uses again in the steps between",
        group=METHOD,
        within=NOT_NEGATIVE,
        origin="bilora",
    )
    eflat_beta: float = flag(
        0.9,
        "weight of the newest perturbation in eflat-lora's average",
        group=METHOD,
        within=Range(0, 1, open_low=True),
        origin="bilora",
    )
    bar_strength: float = flag(
        2.0,
        "obar and nbar: what one factor gains and the other loses in a step, in learning rates",
        group=METHOD,
        within=NOT_NEGATIVE,
        origin="bilora",
    )
    bar_schedule: Literal["constant", "linear", "cosine"] = flag(
        "constant", "course of --bar_strength over the run, falling to 0", group=METHOD, origin="bilora"
    )
    loss_gap_steps: int | None = flag(
        None,
        "every how many optimiser steps the loss gap L(perturbed) - L(clean) is measured (bilora-echo: as a draw "
        "ends); 0 = never; unset: ten times a run, and every 200 steps in a long one",
        group=METHOD,
        within=NOT_NEGATIVE,
        origin="bilora",
    )

    # --- Base model ---
    pretrained_model_name_or_path: str = flag(
        dataclasses.MISSING,
        "the SDXL base: a hub id, a folder in diffusers' layout, one .safetensors checkpoint, or embedded",
        group=BASE,
    )
    pretrained_vae_model_name_or_path: str | None = flag(
        None,
        "another VAE (hub id or folder), such as one that is stable in fp16; unset: the base's",
        group=BASE,
    )
    revision: str | None = flag(None, "revision of the base on the hub (branch, tag or commit)", group=BASE)
    variant: str | None = flag(None, "which weight files of the base, such as fp16", group=BASE)
    cache_dir: str | None = flag(
        None, "where downloaded models and data sets are kept; unset: the hub's own cache", group=BASE
    )
    init_lora_from: str | None = flag(
        None,
        "begin with this LoRA file (or folder), not with an update of zero; ignored by a resumed run",
        group=BASE,
        origin="bilora",
    )

    # --- Data ---
    instance_data_dir: str | None = flag(
        None,
        "folder with the pictures to learn (and metadata.jsonl or .txt captions); or --dataset_name",
        group=DATA,
    )
    dataset_name: str | None = flag(
        None,
        "data set of the pictures to learn: a hub id or a local path; or --instance_data_dir",
        group=DATA,
    )
    dataset_config_name: str | None = flag(None, "configuration of --dataset_name, if it has several", group=DATA)
    image_column: str = flag("image", "column of --dataset_name that holds the picture", group=DATA)
    caption_column: str | None = flag(
        None, "column of the data set, or key in metadata.jsonl, that holds the caption", group=DATA
    )
    instance_prompt: str | None = flag(
        None,
        "prompt that names the subject, such as 'a photo of sks dog', for pictures without a caption",
        group=DATA,
        departure="may be left out when every picture has a caption (required there)",
        may_be_empty=True,
    )
    repeats: int = flag(1, "how often each picture counts in an epoch", group=DATA, within=AT_LEAST_ONE)
    resolution: int | None = flag(
        None,
        "side of the square training crop in pixels; unset: the base's own, 1024 for SDXL",
        group=DATA,
        within=RESOLUTIONS,
        departure="unset means the base's own, 1024 for SDXL (1024 there, whatever the base)",
    )
    use_aspect_ratio_buckets: bool = flag(
        False,
        "train each picture at the shape nearest to its own, not at a square: about as many pixels as --resolution "
        "squared, on SDXL's 64 px grid",
        group=DATA,
        origin="diffusers",
    )
    aspect_ratio_buckets: str | None = flag(
        None, "these shapes for the buckets: height,width;height,width;...", group=DATA, origin="diffusers"
    )
    center_crop: bool = flag(
        False, "crop the middle; off: a place drawn anew each time the picture is seen", group=DATA
    )
    crops_per_image: int | None = flag(
        None,
        "crop at so many places, spread evenly, one of them drawn each time, so that latents can be cached as with "
        "--center_crop; unset: anywhere",
        group=DATA,
        within=AT_LEAST_ONE,
        origin="bilora",
    )
    random_flip: bool = flag(False, "mirror left-right at random, drawn anew each time", group=DATA)
    image_interpolation_mode: Literal[
        "bicubic", "bilinear", "box", "hamming", "lanczos", "nearest", "nearest_exact"
    ] = flag("lanczos", "filter that resizes the pictures", group=DATA)
    mask_dir: str | None = flag(
        None,
        "folder of masks named as their pictures: white is learnt, black is not, grey in between",
        group=DATA,
        origin="bilora",
    )
    alpha_mask: bool = flag(
        False, "each picture's transparency is its mask: what is opaque is learnt", group=DATA, origin="kohya"
    )
    caption_dropout: float = flag(
        0.0,
        "probability that a caption is replaced by the empty one",
        group=DATA,
        within=FRACTION,
        origin="diffusers",
    )
    shuffle_caption: bool = flag(
        False,
        "put a caption's comma-separated tags into a random order, drawn anew each time",
        group=DATA,
        origin="kohya",
    )
    keep_tokens: int = flag(
        0,
        "tags at a caption's head that --shuffle_caption leaves in place",
        group=DATA,
        within=NOT_NEGATIVE,
        origin="kohya",
    )
    cache_latents: bool | None = flag(
        None,
        "encode each picture (and crop) once and free the VAE; unset: on where the augmentation allows it",
        group=DATA,
        origin="diffusers",
    )
    cache_dir_latents: str | None = flag(
        None,
        "folder that keeps the encoded pictures and embedded captions for the next run, on disk instead of in memory; "
        "any number of runs may share it; unset: none",
        group=DATA,
        origin="bilora",
    )
    dataloader_num_workers: int = flag(
        0, "processes that read pictures; 0 = the main process", group=DATA, within=NOT_NEGATIVE
    )

    # --- Prior preservation ---
    with_prior_preservation: bool = flag(False, "train on the class too, so that it is not forgotten", group=PRIOR)
    prior_source: Literal["class_images", "base_prediction"] = flag(
        "class_images",
        "what the class is held to: pictures that the base draws, or (needing no pictures) what the base predicts "
        "for the instance's own latents under the class prompt",
        group=PRIOR,
        origin="bilora",
    )
    class_data_dir: str | None = flag(
        None, "folder with the class pictures; missing ones are generated into it", group=PRIOR
    )
    class_prompt: str | None = flag(
        None, "prompt of the class, such as 'a photo of a dog'", group=PRIOR, may_be_empty=True
    )
    prior_loss_weight: float = flag(
        1.0, "weight of the class's loss beside the instance's 1", group=PRIOR, within=NOT_NEGATIVE
    )
    num_class_images: int = flag(
        100, "how many class pictures there must be; the rest is generated", group=PRIOR, within=AT_LEAST_ONE
    )
    sample_batch_size: int = flag(
        4, "class pictures generated at once, for each process", group=PRIOR, within=AT_LEAST_ONE
    )
    prior_generation_precision: Literal["no", "fp32", "fp16", "bf16"] | None = flag(
        None,
        "precision in which class pictures are generated; unset or no: fp16 on an accelerator, fp32 on a CPU",
        group=PRIOR,
    )

    # --- Training ---
    num_train_epochs: int = flag(
        1, "passes over the data, unless --max_train_steps is set", group=TRAINING, within=AT_LEAST_ONE
    )
    max_train_steps: int | None = flag(
        None,
        "optimiser steps in all; set, it overrides --num_train_epochs",
        group=TRAINING,
        within=AT_LEAST_ONE,
    )
    steps_per_draw: int | None = flag(
        None,
        "optimiser steps in a row on the same pictures, crops and timesteps, each with a noise of its own; unset: 1, "
        "2 for bilora-echo",
        group=TRAINING,
        within=AT_LEAST_ONE,
        origin="bilora",
    )
    train_batch_size: int = flag(
        4, "instance pictures in a micro-batch, for each process", group=TRAINING, within=AT_LEAST_ONE
    )
    gradient_accumulation_steps: int = flag(
        1, "micro-batches in an optimiser step", group=TRAINING, within=AT_LEAST_ONE
    )
    gradient_checkpointing: bool = flag(
        False, "recompute activations in the backward pass: less memory, slower", group=TRAINING
    )
    seed: int | None = flag(
        None,
        "seed of the run's every random number; unset: one is drawn and recorded",
        group=TRAINING,
        within=Range(0, 2**32 - 1),
        departure="unset, a seed is drawn and recorded, so that any run can be repeated",
    )
    noise_offset: float = flag(
        0.0,
        "standard deviation of a constant added to each channel's noise; 0 = off, 0.05 to 0.1 is usual",
        group=TRAINING,
        within=NOT_NEGATIVE,
        origin="diffusers",
    )
    snr_gamma: float | None = flag(
        None,
        "min-SNR weight of the loss (arXiv 2303.09556), 5 is usual; unset: every timestep counts the same",
        group=TRAINING,
        within=POSITIVE,
    )
    do_edm_style_training: bool = flag(False, "train in the EDM formulation (arXiv 2206.00364)", group=TRAINING)
    max_grad_norm: float = flag(
        1.0,
        "the primary's gradient is scaled down to this norm; the auxiliary's does not count",
        group=TRAINING,
        within=POSITIVE,
    )
    max_bad_steps: int = flag(
        25,
        "so many non-finite losses in a row stop the run; a single one only skips its step",
        group=TRAINING,
        within=AT_LEAST_ONE,
        origin="bilora",
    )

    # --- Learning rate and optimiser ---
    learning_rate: float = flag(1e-4, "peak learning rate (about 1 with Prodigy)", group=OPTIMISER, within=NOT_NEGATIVE)
    text_encoder_lr: float = flag(
        5e-6,
        "peak learning rate of the text encoders; with Prodigy --learning_rate is used for them too",
        group=OPTIMISER,
        within=NOT_NEGATIVE,
        departure="0 means 0 (there it means --learning_rate)",
    )
    scale_lr: bool = flag(False, "multiply --learning_rate by processes, accumulation and batch size", group=OPTIMISER)
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = flag("constant", "course of the learning rate", group=OPTIMISER)
    lr_warmup_steps: int = flag(
        500,
        "optimiser steps in which the learning rate climbs to its peak; ignored by constant",
        group=OPTIMISER,
        within=NOT_NEGATIVE,
    )
    lr_num_cycles: int = flag(1, "cycles of cosine_with_restarts", group=OPTIMISER, within=AT_LEAST_ONE)
    lr_power: float = flag(1.0, "exponent of polynomial", group=OPTIMISER, within=POSITIVE)
    optimizer: str = flag(
        "AdamW",
        "optimiser of the primary adapter",
        group=OPTIMISER,
        choices=("AdamW", "prodigy", "adafactor"),
        departure="an unknown name is refused (there AdamW is taken silently)",
    )
    loraplus_lr_ratio: float = flag(
        1.0,
        "LoRA+ (arXiv 2402.12354): the learning rate of every B is so many times that of its A; 16 is usual there",
        group=OPTIMISER,
        within=POSITIVE,
        origin="bilora",
    )
    ema_decay: float | None = flag(
        None,
        "keep an exponential moving average of the primary and write that; its decay, at most (1 + n) / (10 + n) after "
        "n steps: 0.98 and more are the same for a run of 400 steps; unset: the last weights",
        group=OPTIMISER,
        within=BELOW_ONE,
        origin="bilora",
    )
    use_8bit_adam: bool = flag(
        False,
        "8-bit AdamW of bitsandbytes",
        group=OPTIMISER,
        departure="refused with other optimisers (ignored there)",
    )
    paged_adam: bool = flag(
        False,
        "AdamW of bitsandbytes whose state moves to the computer's memory while the card is full; with or without "
        "--use_8bit_adam",
        group=OPTIMISER,
        origin="bilora",
    )
    adam_beta1: float = flag(0.9, "beta1 of AdamW and Prodigy", group=OPTIMISER, within=BELOW_ONE)
    adam_beta2: float = flag(0.999, "beta2 of AdamW and Prodigy", group=OPTIMISER, within=BELOW_ONE)
    adam_weight_decay: float = flag(1e-4, "weight decay of the UNet's LoRA", group=OPTIMISER, within=NOT_NEGATIVE)
    adam_weight_decay_text_encoder: float = flag(
        1e-3, "weight decay of the text encoders' LoRA", group=OPTIMISER, within=NOT_NEGATIVE
    )
    adam_epsilon: float = flag(1e-8, "epsilon of AdamW and Prodigy", group=OPTIMISER, within=POSITIVE)
    prodigy_beta3: float | None = flag(
        None,
        "decay of the running averages in Prodigy's step size; unset: sqrt(beta2)",
        group=OPTIMISER,
        within=BELOW_ONE,
    )
    prodigy_decouple: bool = flag(
        True,
        "decoupled weight decay in Prodigy, as in AdamW",
        group=OPTIMISER,
        departure="`--prodigy_decouple False` is false (true there)",
    )
    prodigy_use_bias_correction: bool = flag(
        True,
        "Adam's bias correction in Prodigy",
        group=OPTIMISER,
        departure="`--prodigy_use_bias_correction False` is false (true there)",
    )
    prodigy_safeguard_warmup: bool = flag(
        True,
        "keep the warm-up's learning rate out of Prodigy's estimate of the distance",
        group=OPTIMISER,
        departure="`--prodigy_safeguard_warmup False` is false (true there)",
    )

    # --- Previews ---
    validation_prompt: str | None = flag(
        None, "prompt of the previews; unset: no previews", group=PREVIEWS, may_be_empty=True
    )
    num_validation_images: int = flag(4, "pictures in a preview", group=PREVIEWS, within=AT_LEAST_ONE)
    validation_epochs: int = flag(
        50,
        "a preview every so many epochs, unless --validation_steps is set",
        group=PREVIEWS,
        within=AT_LEAST_ONE,
    )
    validation_steps: int | None = flag(
        None,
        "a preview every so many optimiser steps, in place of --validation_epochs",
        group=PREVIEWS,
        within=AT_LEAST_ONE,
        origin="diffusers",
    )
    final_validation_prompt: str | None = flag(
        None,
        "prompt of the pictures made at the end; unset: --validation_prompt",
        group=PREVIEWS,
        origin="diffusers",
        may_be_empty=True,
    )
    skip_final_inference: bool = flag(False, "make no pictures at the end", group=PREVIEWS, origin="diffusers")

    # --- Checkpoints ---
    checkpointing_steps: int = flag(
        500, "a checkpoint every so many optimiser steps", group=CHECKPOINTS, within=AT_LEAST_ONE
    )
    checkpoints_total_limit: int | None = flag(
        None, "checkpoints kept, the newest ones; unset: all", group=CHECKPOINTS, within=AT_LEAST_ONE
    )
    resume_from_checkpoint: str | None = flag(
        None, "continue from this checkpoint folder, or from the newest: latest", group=CHECKPOINTS
    )

    # --- Output ---
    output_dir: str = flag("lora-dreambooth-model", "folder that gets everything the run writes", group=OUTPUT)
    overwrite_output_dir: bool = flag(
        False,
        "allow an --output_dir that holds another run; nothing is overwritten by a resumed run",
        group=OUTPUT,
        origin="bilora",
    )
    output_kohya_format: bool = flag(
        True,
        "write the LoRA in Kohya's format too, the one ComfyUI and A1111 read",
        group=OUTPUT,
        departure="on (off there)",
    )
    upcast_before_saving: bool = flag(
        True,
        "write the LoRA in float32, as the stock SDXL script does; off: in --mixed_precision, half the size",
        group=OUTPUT,
        origin="diffusers",
    )

    # --- Logging and hub ---
    report_to: str = flag(
        "tensorboard",
        "where the curves go; all = every tracker installed, none = only metrics.jsonl",
        group=LOGGING,
        choices=(
            "tensorboard",
            "wandb",
            "trackio",
            "comet_ml",
            "aim",
            "mlflow",
            "clearml",
            "dvclive",
            "swanlab",
            "all",
            "none",
        ),
        departure="none is understood too",
    )
    logging_dir: str = flag("logs", "folder of the tracker's files, inside --output_dir", group=LOGGING)
    push_to_hub: bool = flag(False, "upload the result to the model hub", group=LOGGING)
    hub_model_id: str | None = flag(None, "repository to upload to; unset: the name of --output_dir", group=LOGGING)
    hub_token: str | None = flag(
        None,
        "token for the upload, never saved; better: log in once with the hub's own command",
        group=LOGGING,
    )

    # --- Machine ---
    mixed_precision: Literal["no", "fp16", "bf16"] | None = flag(
        None,
        "precision of the arithmetic, and of the frozen base, never of the adapters; unset: accelerate's setting",
        group=MACHINE,
        departure="the adapters are float32 at every setting",
    )
    base_precision: Literal["fp32", "bf16", "fp16", "nf4", "int8", "fp8"] | None = flag(
        None,
        "how the large layers of the frozen base are stored: nf4 (4 bits a weight) needs bitsandbytes, int8 and fp8 "
        "torchao; unset: as --mixed_precision",
        group=MACHINE,
        origin="bilora",
    )
    offload_base: bool = flag(
        False,
        "keep the large layers of the frozen base in the computer's memory and copy each to the GPU when it is used: "
        "slower, for small cards",
        group=MACHINE,
        origin="bilora",
    )
    allow_tf32: bool = flag(False, "allow TF32 matrix products: faster on Ampere and newer", group=MACHINE)
    channels_last: bool = flag(
        False,
        "lay the weights of the UNet's convolutions out with the channels last, and compute so: faster on some devices "
        "and models and slower on others, not measured on a GPU (docs/methods.md)",
        group=MACHINE,
        origin="bilora",
    )
    compile: bool = flag(
        False,
        "compile the transformer blocks with torch.compile, which takes a minute or more at the start "
        "(docs/methods.md)",
        group=MACHINE,
        origin="bilora",
    )
    enable_xformers_memory_efficient_attention: bool = flag(
        False, "attention of xFormers in place of PyTorch's own", group=MACHINE
    )
    local_rank: int = flag(
        -1, "set by old launchers, not used: accelerate knows the rank", group=MACHINE, within=Range(-1)
    )

    def __post_init__(self) -> None:
        for one in FLAGS.values():
            setattr(self, one.name, checked(one, getattr(self, one.name)))
        refuse_contradictions(self)

    @property
    def moves_start(self) -> bool:
        """Whether the primary begins with B A that is not zero; see `initialisation`."""
        return self.init_lora_weights not in ("gaussian", "kaiming")

    @property
    def file_rank(self) -> int:
        """r of the written LoRA: a change since a start has twice the rank that is trained."""
        return self.rank * (2 if self.moves_start else 1)

    @property
    def unet_targets(self) -> list[str] | None:
        """--lora_layers as a list; None for the attention projections."""
        return None if self.lora_layers is None else [name.strip() for name in self.lora_layers.split(",")]

    @property
    def buckets(self) -> list[tuple[int, ...]] | None:
        """--aspect_ratio_buckets as (height, width) in px; None: by --resolution. A number that is none is -1."""
        if self.aspect_ratio_buckets is None:
            return None
        return [
            tuple(int(word) if word.strip().isdecimal() else -1 for word in pair.split(","))
            for pair in self.aspect_ratio_buckets.strip().strip(";").split(";")
        ]

    @property
    def prior_from_base(self) -> bool:
        """Whether class rows are held to the frozen base's prediction, not to class pictures."""
        return self.with_prior_preservation and self.prior_source == "base_prediction"

    @property
    def shown_in_a_row(self) -> int:
        """--steps_per_draw, or what the method needs."""
        return self.steps_per_draw or (2 if self.method == "bilora-echo" else 1)

    def warnings(self) -> list[str]:
        """What is allowed but hardly meant, one line each, to be shown once by the main process."""
        # Not of lora: it is what every other configuration is compared with, by this one flag.
        unread = [
            name for name, methods in FLAGS_OF_METHODS.items() if self.method not in methods and self.method != "lora"
        ]
        return [
            *(
                f"--{name} has no effect with --method {self.method}"
                for name in unread
                if getattr(self, name) != FLAGS[name].default
            ),
            *(text for applies, text in remarks(self) if applies),
        ]


FLAGS: dict[str, Flag] = {field.name: flag_of(field) for field in dataclasses.fields(TrainingConfig)}


def as_dict(config: TrainingConfig) -> dict[str, bool | int | float | str | None]:
    """Every field but `hub_token`, which is saved nowhere."""
    values = dataclasses.asdict(config)
    del values["hub_token"]
    return values


def to_yaml(config: TrainingConfig) -> str:
    """A file for `--config` that gives this configuration again (without `hub_token`)."""
    return yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True, width=math.inf)
