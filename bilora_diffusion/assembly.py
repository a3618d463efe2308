"""Everything a run is made of, built from the configuration in an order that keeps the peak of memory low.

The text encoders embed all prompts and, unless they are trained, are freed; the VAE encodes all pictures and, unless
crops are drawn anew, is freed; only then is the UNet loaded.
"""

import gc
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.optimization import get_scheduler
from torch import nn
from torch.utils.checkpoint import checkpoint

from bilora_diffusion import methods
from bilora_diffusion.adapters import AUXILIARY, PRIMARY, UNET, adapted_layers, add_adapter, parameters_of
from bilora_diffusion.base_precision import precisions, store_base
from bilora_diffusion.base_prediction import check_prior_prompt
from bilora_diffusion.bases import Base
from bilora_diffusion.batches import BatchMaker, TrainingMicroBatch
from bilora_diffusion.channels_last import lay_channels_last
from bilora_diffusion.compilation import compile_blocks
from bilora_diffusion.config import TrainingConfig
from bilora_diffusion.data.buckets import make_buckets
from bilora_diffusion.data.captions import CaptionRule, check_shuffling
from bilora_diffusion.data.dreambooth import DrawBatches, DreamBoothDataset, flatten
from bilora_diffusion.data.embedding_files import EmbeddingFiles
from bilora_diffusion.data.latent_files import LatentFiles
from bilora_diffusion.data.latents import CachedLatents, EncodedLatents, LatentSource
from bilora_diffusion.data.masks import with_alpha_masks, with_mask_files
from bilora_diffusion.data.pictures import Picture, class_pictures, find_pictures, pictures_of_dataset
from bilora_diffusion.diffusion import build_objective
from bilora_diffusion.errors import UserError
from bilora_diffusion.initialisation import attach_start, fill_start, weight_gradients
from bilora_diffusion.lora_files.initial import copy_lora_into, read_lora
from bilora_diffusion.optimizers import auxiliary_learning_rates, build_optimizer, learning_rates
from bilora_diffusion.prior import make_class_pictures, missing_class_pictures
from bilora_diffusion.prompts import EmbeddedPrompts, Prompts, TokenizedPrompts
from bilora_diffusion.sampling import PromptEmbeddings, embed_for_sampling
from bilora_diffusion.training import Trainer

__all__ = [
    "Machine",
    "Parts",
    "assemble",
    "attach_primary",
    "enable_checkpointing",
    "free_memory",
    "narrower_than",
    "read_pictures",
    "used_prompt",
]

logger = logging.getLogger(__name__)

GRADIENT_ROWS = 32
"""Over which --init_lora_weights lora_ga takes the weights' gradient."""
MUCH_MEMORY_BYTES = 1_000_000_000
"""Of cached latents: more is worth a word."""
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Machine:
    """Where and in which precision a run computes.

    Arguments:
        dtype: of the frozen base and of the forward pass; the adapters are float32 in any case.
    """

    device: torch.device
    dtype: torch.dtype
    rank: int
    processes: int
    wait: Any  # a barrier over all processes

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def has_own_memory(self) -> bool:
        """Whether the device's memory is another than the computer's."""
        return self.device.type not in ("cpu", "mps")


@dataclass
class Parts:
    """What `assemble` built."""

    base: Base
    dataset: DreamBoothDataset
    models: dict[str, nn.Module]
    trainer: Trainer
    make_batch: BatchMaker
    method: methods.Method
    radius: methods.Radius | None
    resolution: int
    tokenizers: tuple
    sampling_scheduler: Any
    force_zeros_for_empty_prompt: bool
    sampling_prompts: Mapping[str, PromptEmbeddings] = field(default_factory=dict)
    """Embeddings for pictures by prompt; empty where the text encoders are trained and run themselves."""
    estimated_peak_bytes: int | None = None
    """From `memory.advice.check_memory`, to stand beside the peak that was."""


def read_pictures(config: TrainingConfig) -> tuple[list[Picture], list[str]]:
    """The instance pictures with their masks, found and checked before anything heavy is loaded, and warnings."""
    pictures, warnings = _find_pictures(config)
    if config.instance_prompt is not None and used_prompt(config, pictures) is None:
        warnings = [*warnings, "--instance_prompt is not used: every picture has a caption of its own"]
    if config.mask_dir is not None:
        return with_mask_files(pictures, config.mask_dir), warnings
    if config.alpha_mask:
        pictures, more = with_alpha_masks(pictures)
        return pictures, warnings + more
    return pictures, warnings


def used_prompt(config: TrainingConfig, pictures: Sequence[Picture]) -> str | None:
    """`--instance_prompt`, if some picture has it for its caption; else None."""
    wanted = (config.instance_prompt or "").strip()
    return config.instance_prompt if any(picture.caption.strip() == wanted for picture in pictures) else None


def _find_pictures(config: TrainingConfig) -> tuple[list[Picture], list[str]]:
    if config.dataset_name is not None:
        return pictures_of_dataset(
            config.dataset_name,
            config_name=config.dataset_config_name,
            cache_dir=config.cache_dir,
            image_column=config.image_column,
            caption_column=config.caption_column,
            instance_prompt=config.instance_prompt,
        )
    return find_pictures(
        config.instance_data_dir,
        instance_prompt=config.instance_prompt,
        caption_column=config.caption_column,
    )


def assemble(
    config: TrainingConfig,
    machine: Machine,
    pictures: list[Picture],
    *,
    seed: int,
    steps_of: Callable[[int], int],
    resumed: bool = False,
) -> Parts:
    """Builds a run.

    Arguments:
        pictures: from `read_pictures`.
        seed: the run's, resolved.
        steps_of: gives the number of optimiser steps from the length of the data set.
        resumed: the adapters' values will come from a checkpoint, so no start is read or computed.

    Raises:
        UserError: whatever in the configuration, the base or the pictures does not fit.
    """
    base = Base.from_flags(vars(config))
    resolution = config.resolution or base.native_resolution()
    dataset = _data_set(config, machine, base, pictures, resolution, seed)
    _check_cacheable(config, dataset)
    prior_prompt = config.class_prompt if config.prior_from_base else None
    initial = read_lora(config.init_lora_from, base) if config.init_lora_from and not resumed else None
    trains_text = config.train_text_encoder
    read_as, _ = precisions(config.base_precision, machine.dtype)
    text = base.load(*TEXT_ENCODERS, dtype=read_as if trains_text else machine.dtype)
    encoders = [_text_encoder(config, machine, text, part) for part in TEXT_ENCODERS]
    tokenizers = (text.tokenizer, text.tokenizer_2)
    objective = build_objective(text.scheduler, edm=config.do_edm_style_training, snr_gamma=config.snr_gamma)
    models: dict[str, nn.Module] = {}
    sampling_prompts: dict[str, PromptEmbeddings] = {}
    prompts: Prompts
    texts = list(dict.fromkeys([*dataset.prompts(), *({prior_prompt} - {None})]))
    if trains_text:
        models |= dict(zip(TEXT_ENCODERS, encoders, strict=True))
        prompts = TokenizedPrompts(texts, tokenizers)
    else:
        kept = EmbeddingFiles(config.cache_dir_latents, tokenizers, encoders) if config.cache_dir_latents else None
        prompts = EmbeddedPrompts(texts, tokenizers, encoders, all_known=not config.shuffle_caption, kept=kept)
        if kept is not None and machine.is_main:
            logger.info(f"captions: {kept.found} found in {kept.folder}, {kept.made} embedded and kept there")
        if config.shuffle_caption and machine.is_main:
            logger.info(
                "the text encoders stay in memory: --shuffle_caption makes prompts that cannot be embedded ahead"
            )
        for prompt in {config.validation_prompt, config.final_validation_prompt} - {None}:
            sampling_prompts[prompt] = embed_for_sampling(text, prompt, machine.device)
    scheduler, zeros = text.scheduler, text.config.force_zeros_for_empty_prompt
    del text, encoders
    free_memory()
    latents = _latents(config, machine, base, dataset)
    models = {UNET: _load_unet(config, machine, base), **models}
    attach_primary(config, models, seed)
    narrow = narrower_than(config.rank, models)
    if narrow and machine.is_main:
        logger.warning(narrow)
    if initial is not None:
        copy_lora_into(models, initial, config.init_lora_from)
    make_batch = BatchMaker(
        objective,
        latents,
        prompts,
        seed=seed,
        noise_offset=config.noise_offset,
        prior_loss_weight=config.prior_loss_weight,
        device=machine.device,
        prior_prompt=prior_prompt,
    )
    if config.moves_start:
        attach_start(models, seed)
        if not resumed:
            _compute_start(config, machine, dataset, models, make_batch, seed)
    total_batch = config.train_batch_size * config.gradient_accumulation_steps * machine.processes
    rates = learning_rates(config, list(models), total_batch)
    steps = steps_of(len(dataset))
    method, radius = methods.build(
        config,
        models,
        rates=rates,
        auxiliary_rates=auxiliary_learning_rates(config, rates),
        seed=seed,
        steps=steps,
    )
    named = {part: parameters_of(model, PRIMARY) for part, model in models.items()}
    primary = {part: list(parameters.values()) for part, parameters in named.items()}
    _check_parameters(models, primary, method)
    if config.compile:
        compile_blocks(models.values(), shapes_vary=config.use_aspect_ratio_buckets)
    optimizer = build_optimizer(config, named, rates)
    schedulers = [
        get_scheduler(
            config.lr_scheduler,
            optimizer=one,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=steps,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
        )
        for one in (optimizer, *method.schedulable)
    ]
    trainer = Trainer(
        models,
        objective,
        primary,
        optimizer,
        method,
        schedulers,
        compute_dtype=machine.dtype,
        max_grad_norm=config.max_grad_norm,
        seed=seed,
        base_prior=prior_prompt is not None,
        ema_decay=config.ema_decay,
    )
    return Parts(
        base,
        dataset,
        models,
        trainer,
        make_batch,
        method,
        radius,
        resolution,
        tokenizers,
        scheduler,
        zeros,
        sampling_prompts,
    )


def attach_primary(config: TrainingConfig, models: Mapping[str, nn.Module], seed: int) -> None:
    """Puts the adapter that is kept on every trained part, and the parts in the mode they are trained in."""
    for part, model in models.items():
        add_adapter(
            part,
            model,
            PRIMARY,
            rank=config.rank,
            scale=(config.lora_alpha or config.rank) / config.rank,
            init="kaiming" if config.init_lora_weights == "kaiming" else "gaussian",
            seed=seed,
            targets=config.unet_targets if part == UNET else None,
            dropout=config.lora_dropout,
            use_dora=config.use_dora,
        )
        model.train()
        if config.gradient_checkpointing:
            enable_checkpointing(part, model)


def narrower_than(rank: int, models: Mapping[str, nn.Module]) -> str | None:
    """One line if the rank is above what some adapted layer can have, None if not."""
    widths = [
        min(layer.lora_A[PRIMARY].weight.shape[1], layer.lora_B[PRIMARY].weight.shape[0])
        for model in models.values()
        for _, layer in adapted_layers(model)
    ]
    too_narrow = sum(width < rank for width in widths)
    if not too_narrow:
        return None
    return (
        f"--rank {rank} is more than {too_narrow} of the {len(widths)} adapted layers can have: the narrowest is "
        f"{min(widths)} wide, and what goes beyond a layer's width costs memory for nothing"
    )


def _compute_start(
    config: TrainingConfig,
    machine: Machine,
    dataset: DreamBoothDataset,
    models: Mapping[str, nn.Module],
    make_batch: BatchMaker,
    seed: int,
) -> None:
    start, gradients = config.init_lora_weights, None
    if machine.is_main:  # decomposing all weights of SDXL takes minutes
        logger.info(f"computing where the LoRA begins (--init_lora_weights {start})")
    if start == "lora_ga":
        gradients = weight_gradients(models, _first_batches(config, machine, dataset, models, make_batch))
    fill_start(models, start, seed, gradients)


def _first_batches(
    config: TrainingConfig,
    machine: Machine,
    dataset: DreamBoothDataset,
    models: Mapping[str, nn.Module],
    make_batch: BatchMaker,
) -> list[TrainingMicroBatch]:
    """The run's first draws, `GRADIENT_ROWS` or a few more, the same on every process."""
    size = config.train_batch_size
    batches = list(islice(DrawBatches(batch_size=size, rows_in=dataset.rows_in), math.ceil(GRADIENT_ROWS / size)))
    scaler = torch.amp.GradScaler(machine.device.type, enabled=False)
    return [
        TrainingMicroBatch(
            make_batch(flatten([dataset[draw] for draw in draws])),
            models,
            make_batch.objective,
            machine.dtype,
            1 / len(batches),
            scaler,
        )
        for draws in batches
    ]


def _data_set(
    config: TrainingConfig, machine: Machine, base: Base, pictures: list[Picture], resolution: int, seed: int
) -> DreamBoothDataset:
    captions = CaptionRule(config.caption_dropout, config.shuffle_caption, config.keep_tokens)
    check_shuffling(captions, pictures)
    if config.prior_from_base:
        check_prior_prompt(config.class_prompt, pictures)
    return DreamBoothDataset(
        pictures,
        class_pictures=_class_pictures(config, machine, base, resolution, seed),
        resolution=resolution,
        center_crop=config.center_crop,
        crops_per_image=config.crops_per_image,
        random_flip=config.random_flip,
        interpolation=config.image_interpolation_mode,
        seed=seed,
        repeats=config.repeats,
        captions=captions,
        buckets=(config.buckets or make_buckets(resolution)) if config.use_aspect_ratio_buckets else None,
        batch_size=config.train_batch_size,
        steps_per_draw=config.shown_in_a_row,
        rows_a_step=config.train_batch_size * config.gradient_accumulation_steps * machine.processes,
    )


def _class_pictures(
    config: TrainingConfig, machine: Machine, base: Base, resolution: int, seed: int
) -> list[Picture] | None:
    if not config.with_prior_preservation or config.prior_from_base:
        return None
    folder = Path(config.class_data_dir)
    missing = missing_class_pictures(folder, config.num_class_images)
    if missing:
        dtype = _prior_dtype(config.prior_generation_precision, machine.device)
        make_class_pictures(
            folder,
            missing,
            lambda: base.load("unet", "vae", *TEXT_ENCODERS, dtype=dtype).to(machine.device),
            prompt=config.class_prompt,
            seed=seed,
            resolution=resolution,
            batch_size=config.sample_batch_size,
            rank=machine.rank,
            processes=machine.processes,
        )
        free_memory()
        machine.wait()
    pictures, warnings = class_pictures(folder, config.class_prompt, config.num_class_images)
    if machine.is_main:
        for warning in warnings:
            logger.warning(warning)
    if not pictures:
        raise UserError(f"--class_data_dir {folder} holds no usable picture and --num_class_images is 0")
    return pictures


def _prior_dtype(wanted: str | None, device: torch.device) -> torch.dtype:
    named = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    unset = torch.float32 if device.type == "cpu" else torch.float16
    return named.get(wanted or "no", unset)


def _check_cacheable(config: TrainingConfig, dataset: DreamBoothDataset) -> None:
    if (config.cache_latents or config.cache_dir_latents) and not dataset.cacheable:
        flag = "cache_latents" if config.cache_latents else "cache_dir_latents"
        raise UserError(
            f"--{flag}: random crops are drawn anew each time, so there is nothing to keep: "
            f"add --crops_per_image 4 or --center_crop, or leave --{flag} out"
        )


def _latents(config: TrainingConfig, machine: Machine, base: Base, dataset: DreamBoothDataset) -> LatentSource:
    cached = dataset.cacheable if config.cache_latents is None else config.cache_latents
    if not cached and config.cache_latents is None and machine.is_main:
        logger.info(
            "latents are not cached: crops are drawn anew; --crops_per_image 4 or --center_crop saves the VAE's memory "
            "and time"
        )
    vae = base.load("vae", dtype=torch.float32).vae.requires_grad_(False).to(machine.device)
    vae.enable_slicing()
    if not cached:
        return EncodedLatents(dataset, vae)
    files = None
    if config.cache_dir_latents is not None:
        files = LatentFiles(config.cache_dir_latents, vae, dataset.interpolation)
    latents = CachedLatents(dataset, vae, files, machine.rank, machine.processes)
    if files is not None and machine.is_main:
        logger.info(f"latents: {files.found} found in {files.folder}, {files.made} encoded and kept there")
    if machine.is_main and latents.bytes_in_memory > MUCH_MEMORY_BYTES:
        logger.info(
            f"the latents take {latents.bytes_in_memory / 1e9:.1f} GB of memory: --cache_dir_latents keeps them on disk"
        )
    dataset.stop_decoding()
    del vae
    free_memory()
    return latents


def _place(config: TrainingConfig, machine: Machine, part: str, model: nn.Module) -> None:
    _, stored = precisions(config.base_precision, machine.dtype)
    offload = config.offload_base and machine.has_own_memory
    store_base(part, model, stored, machine.device, offload=offload)


def _text_encoder(config: TrainingConfig, machine: Machine, text: StableDiffusionXLPipeline, part: str) -> nn.Module:
    """Stored as the base is where it stays; otherwise it is only run once."""
    encoder = getattr(text, part).requires_grad_(False)
    if config.train_text_encoder:
        _place(config, machine, part, encoder)
    return encoder.to(machine.device)


def _load_unet(config: TrainingConfig, machine: Machine, base: Base) -> nn.Module:
    read_as, _ = precisions(config.base_precision, machine.dtype)
    unet = base.load("unet", dtype=read_as).unet.requires_grad_(False)
    _place(config, machine, UNET, unet)
    if config.channels_last:
        lay_channels_last(unet)
    if config.enable_xformers_memory_efficient_attention:
        try:
            unet.enable_xformers_memory_efficient_attention()
        except (ImportError, ModuleNotFoundError, ValueError) as error:
            raise UserError(
                "--enable_xformers_memory_efficient_attention: xFormers is not usable here "
                f"({str(error).splitlines()[0]}); leave the flag out, PyTorch's own attention is as good"
            ) from None
    return unet


def enable_checkpointing(part: str, model: nn.Module, **options: Any) -> None:
    """Lets a part compute its activations again in the backward pass.

    Arguments:
        options: of `torch.utils.checkpoint.checkpoint`.
    """
    # The reentrant kind needs an input that requires a gradient, which token ids are not.
    options = {"use_reentrant": False, **options}
    if part == UNET:
        model.enable_gradient_checkpointing(lambda module, *given: checkpoint(module.__call__, *given, **options))
    else:
        # transformers 5.20 renamed the method; the older name warns there.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(options)


def _check_parameters(
    models: Mapping[str, nn.Module], primary: Mapping[str, list[nn.Parameter]], method: methods.Method
) -> None:
    """Every trainable parameter belongs to exactly one of the two adapters, in float32, and none of the base does."""
    ours = [id(parameter) for part in primary.values() for parameter in part]
    theirs = [id(parameter) for model in models.values() for parameter in parameters_of(model, AUXILIARY).values()]
    trainable = {id(p): p for model in models.values() for p in model.parameters() if p.requires_grad}
    if len({*ours, *theirs}) != len(ours) + len(theirs) or {*ours, *theirs} != set(trainable):
        raise RuntimeError("the adapters' parameters are not exactly the trainable ones")
    if {id(parameter) for parameter in method.parameters} - set(theirs):
        raise RuntimeError("the method trains parameters that are not the auxiliary's")
    if any(parameter.dtype != torch.float32 for parameter in trainable.values()):
        raise RuntimeError("an adapter is not float32")


def free_memory() -> None:
    """Gives back what nothing refers to any more, on the GPU too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def steps_in_epoch(length: int, batch_size: int, processes: int, accumulation: int) -> int:
    """Optimiser steps until every picture was seen, rounded up as the stock script rounds."""
    return math.ceil(math.ceil(math.ceil(length / batch_size) / processes) / accumulation)
