"""What flags may not, or can hardly, be meant together. Imports neither torch nor diffusers, as `config`."""

import os
import re
from typing import TYPE_CHECKING

from bilora_diffusion.errors import UserError
from bilora_diffusion.flags import Range, show
from bilora_diffusion.method_names import BALL_METHODS

if TYPE_CHECKING:
    from bilora_diffusion.config import TrainingConfig

__all__ = ["RESOLUTIONS", "refuse_contradictions", "remarks"]

RESOLUTIONS = Range(16, multiple_of=8)
"""Sides in px, of squares and of buckets."""

STARTS = re.compile(r"gaussian|kaiming|pissa|pissa_niter_[0-9]{1,3}|olora|lora_ga")


def refuse_contradictions(config: "TrainingConfig") -> None:
    """Raises `UserError` for flags that contradict each other; types and ranges were checked before."""
    for check in (_check_data, _check_method, _check_optimiser, _check_rest):
        check(config)


def _check_data(config: "TrainingConfig") -> None:
    if config.dataset_name is None and config.instance_data_dir is None:
        raise UserError("no pictures to learn: give --instance_data_dir FOLDER or --dataset_name NAME")
    if config.dataset_name is not None and config.instance_data_dir is not None:
        raise UserError("--dataset_name and --instance_data_dir are both set: give only one of them")
    if config.center_crop and config.crops_per_image is not None:
        raise UserError(
            "--center_crop and --crops_per_image are both set: the middle is one crop, give only one of them"
        )
    _check_masks(config)
    _check_buckets(config)
    if config.cache_dir_latents is not None and config.cache_latents is False:
        raise UserError("--cache_dir_latents keeps latents and --cache_latents is off: leave one of them out")
    if config.with_prior_preservation:
        for name in ("class_prompt",) if config.prior_from_base else ("class_data_dir", "class_prompt"):
            if getattr(config, name) is None:
                raise UserError(f"--with_prior_preservation needs --{name}: set it, or leave both out")
    if config.prior_from_base and config.class_prompt == "" and config.caption_dropout:
        raise UserError(
            "--prior_source base_prediction with an empty --class_prompt holds the empty prompt to the base, and "
            "--caption_dropout teaches it the pictures: leave one of them out"
        )
    # What is written into the folder of pictures would be learnt as the subject next time.
    for name in ("class_data_dir", "output_dir"):
        if config.instance_data_dir is not None and _same_folder(getattr(config, name), config.instance_data_dir):
            raise UserError(
                f"--{name} is the folder of --instance_data_dir, {show(config.instance_data_dir)}: give it its own"
            )


def _check_masks(config: "TrainingConfig") -> None:
    if config.mask_dir is None:
        return
    if config.alpha_mask:
        raise UserError("--mask_dir and --alpha_mask are both set: a picture has one mask, give only one of them")
    if config.dataset_name is not None:
        raise UserError("--mask_dir goes by the names of files: with --dataset_name use --alpha_mask")
    if _same_folder(config.mask_dir, config.instance_data_dir):
        raise UserError(
            "--mask_dir is the folder of --instance_data_dir, where masks would be learnt as pictures: give it its own"
        )


def _check_buckets(config: "TrainingConfig") -> None:
    if config.aspect_ratio_buckets is not None:
        if not config.use_aspect_ratio_buckets:
            raise UserError("--aspect_ratio_buckets needs --use_aspect_ratio_buckets: set it, or leave both out")
        side = RESOLUTIONS
        if not all(len(pair) == 2 and all(one in side for one in pair) for pair in config.buckets or ()):
            raise UserError(
                f"--aspect_ratio_buckets is {show(config.aspect_ratio_buckets)}: it must be pairs height,width with "
                f"a semicolon between two, such as 1024,1024;832,1216, each number {side}"
            )
    if config.use_aspect_ratio_buckets and config.with_prior_preservation and not config.prior_from_base:
        raise UserError(
            "--use_aspect_ratio_buckets does not go with class pictures, which are squares: add --prior_source "
            "base_prediction, or leave one of them out"
        )


def _check_method(config: "TrainingConfig") -> None:
    if config.rho is not None and config.rho_relative is not None:
        raise UserError("--rho and --rho_relative are both set: they are one radius, give only one of them")
    if config.lora_layers is not None and not all(name.strip() for name in config.lora_layers.split(",")):
        raise UserError(
            f"--lora_layers is {show(config.lora_layers)}: it must be module names with a comma between "
            "two, such as to_q,to_v"
        )
    if config.method == "bilora-echo" and config.shown_in_a_row == 1:
        raise UserError(
            "--method bilora-echo needs two or more steps on the same pictures: leave --steps_per_draw 1 out"
        )
    _check_start(config)


def _check_start(config: "TrainingConfig") -> None:
    start = config.init_lora_weights
    if not STARTS.fullmatch(start):
        raise UserError(
            f"--init_lora_weights is {show(start)}: it must be one of gaussian, kaiming, pissa, olora, "
            "lora_ga, or pissa_niter_N for N power iterations, such as pissa_niter_16"
        )
    if start == "lora_ga" and (config.base_precision is not None or config.offload_base):
        stored = "--offload_base" if config.base_precision is None else f"--base_precision {config.base_precision}"
        raise UserError(
            f"--init_lora_weights lora_ga needs gradients of the base, and with {stored} it has none: use pissa, "
            "or leave one of them out"
        )
    if config.moves_start and config.use_dora:
        raise UserError(
            f"--use_dora and --init_lora_weights {start} exclude each other: a DoRA's magnitudes are those of the "
            "weights with the start in them; use gaussian or kaiming, or leave --use_dora out"
        )
    if config.moves_start and config.init_lora_from is not None:
        raise UserError(
            f"--init_lora_from and --init_lora_weights {start} are both set: they are two beginnings, give only one"
        )


def _check_optimiser(config: "TrainingConfig") -> None:
    for name in ("use_8bit_adam", "paged_adam"):
        if getattr(config, name) and config.optimizer != "AdamW":
            raise UserError(
                f"--{name} works only with --optimizer AdamW, not with {config.optimizer}: leave one of them out"
            )
    if config.optimizer != "prodigy":
        return
    if config.loraplus_lr_ratio != 1:
        raise UserError(
            "--loraplus_lr_ratio does not go with --optimizer prodigy, which estimates one step size for all: "
            "leave it out, or use AdamW"
        )
    if config.method == "dual-lora" and config.auxiliary_learning_rate is None:
        raise UserError(
            "--optimizer prodigy with --method dual-lora needs --auxiliary_learning_rate, as Prodigy's own rate "
            "suits no other optimiser: set it (1e-4, say)"
        )
    needs_rate = config.method == "bilora" and config.ascent in ("adamw", "sgd")
    if needs_rate and config.auxiliary_learning_rate is None:
        raise UserError(
            f"--optimizer prodigy with --ascent {config.ascent} needs --auxiliary_learning_rate, as "
            "Prodigy's own rate suits no other optimiser: set it (1e-4, say), or use --ascent normalized"
        )


def _check_rest(config: "TrainingConfig") -> None:
    stored = "--offload_base" if config.offload_base else f"--base_precision {config.base_precision}"
    if config.compile and not config.gradient_checkpointing and (config.base_precision or config.offload_base):
        raise UserError(
            f"--compile with {stored} would keep the restored weights for the backward pass: add "
            "--gradient_checkpointing, or leave one of them out"
        )
    if config.do_edm_style_training and config.snr_gamma is not None:
        raise UserError("--snr_gamma cannot be used with --do_edm_style_training, which has its own weights")
    if config.report_to == "wandb" and config.hub_token is not None:
        raise UserError(
            "--report_to wandb and --hub_token exclude each other, as the token could reach the tracker: "
            "leave the token out and log in with the hub's own command"
        )


def remarks(config: "TrainingConfig") -> list[tuple[bool, str]]:
    """What is allowed but hardly meant: whether it is so, and the line that says it."""
    prodigy = config.optimizer == "prodigy"
    ball = config.method in BALL_METHODS
    steps = config.max_train_steps
    no_warmup = config.lr_scheduler == "constant"
    no_prompt = config.validation_prompt is None
    return [
        (
            config.class_data_dir is not None and not config.with_prior_preservation,
            "--class_data_dir has no effect without --with_prior_preservation",
        ),
        (
            config.class_prompt is not None and not config.with_prior_preservation,
            "--class_prompt has no effect without --with_prior_preservation",
        ),
        (
            config.prior_source != "class_images" and not config.with_prior_preservation,
            f"--prior_source {config.prior_source} has no effect without --with_prior_preservation",
        ),
        (
            config.prior_from_base and config.class_data_dir is not None,
            "--class_data_dir has no effect with --prior_source base_prediction, which uses no class pictures",
        ),
        (
            config.keep_tokens > 0 and not config.shuffle_caption,
            f"--keep_tokens {config.keep_tokens} has no effect without --shuffle_caption",
        ),
        (
            prodigy and config.learning_rate <= 0.1,
            f"--learning_rate {config.learning_rate:g} is low for Prodigy, which wants about 1",
        ),
        (
            prodigy and config.train_text_encoder,
            f"--text_encoder_lr {config.text_encoder_lr:g} has no effect with Prodigy: --learning_rate "
            f"{config.learning_rate:g} holds for the text encoders too",
        ),
        (
            ball and 0 in (config.rho, config.rho_relative),
            "the radius is 0: this run is plain LoRA, without a perturbation",
        ),
        (
            config.method == "bilora-fresh"
            and config.ascent_basis == "gradient"
            and config.auxiliary_init != "gaussian",
            f"--auxiliary_init {config.auxiliary_init} has no effect with --ascent_basis gradient, which fills the "
            "auxiliary anew",
        ),
        (
            config.method == "bilora" and config.ascent == "normalized" and config.auxiliary_learning_rate is not None,
            "--auxiliary_learning_rate has no effect with --ascent normalized; --ascent_fraction has",
        ),
        (
            not no_warmup and steps is not None and config.lr_warmup_steps >= steps,
            f"--lr_warmup_steps {config.lr_warmup_steps} is not below --max_train_steps {steps}: the "
            "learning rate never reaches its peak",
        ),
        (
            no_prompt and config.validation_steps is not None,
            "--validation_steps has no effect without --validation_prompt",
        ),
        (
            config.dataset_config_name is not None and config.dataset_name is None,
            "--dataset_config_name has no effect without --dataset_name",
        ),
        (
            config.overwrite_output_dir and config.resume_from_checkpoint is not None,
            "--overwrite_output_dir with --resume_from_checkpoint: a run that is found is continued; if there is "
            "none, the folder is replaced",
        ),
    ]


def _same_folder(one: str | None, other: str) -> bool:
    return one is not None and os.path.realpath(one) == os.path.realpath(other)
