"""The primary's optimiser, by the names the stock script uses."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from bilora_diffusion.config import TrainingConfig
from bilora_diffusion.errors import UserError

__all__ = ["auxiliary_learning_rates", "build_optimizer", "has_fused_step", "learning_rates"]


def learning_rates(config: TrainingConfig, parts: Sequence[str], total_batch_size: int) -> dict[str, float]:
    """The primary's learning rate by part.

    Arguments:
        total_batch_size: rows an optimiser step sees, for `--scale_lr`, which scales the UNet's rate alone.
    """
    unet = config.learning_rate * (total_batch_size if config.scale_lr else 1)
    shared = config.optimizer == "prodigy"  # it estimates one step size; the stock script gives it one rate too
    return {part: unet if part == "unet" or shared else config.text_encoder_lr for part in parts}


def auxiliary_learning_rates(config: TrainingConfig, primary: Mapping[str, float]) -> dict[str, float]:
    """The auxiliary's by part: its own flag, else that of the part it sits in."""
    if config.auxiliary_learning_rate is None:
        return dict(primary)
    return dict.fromkeys(primary, config.auxiliary_learning_rate)


def build_optimizer(
    config: TrainingConfig, parameters: Mapping[str, Mapping[str, nn.Parameter]], rates: Mapping[str, float]
) -> torch.optim.Optimizer:
    """AdamW, 8-bit AdamW or Prodigy over the primary's parameters.

    A group for each part; with LoRA+ (Hayou et al., 2024, arXiv 2402.12354) another for its B.

    Arguments:
        parameters: by part and by name.
    """
    groups = []
    for part, named in parameters.items():
        decay = config.adam_weight_decay if part == "unet" else config.adam_weight_decay_text_encoder
        columns = [p for name, p in named.items() if "lora_B" in name and config.loraplus_lr_ratio != 1]
        others = [p for name, p in named.items() if "lora_B" not in name or config.loraplus_lr_ratio == 1]
        for some, rate in ((others, rates[part]), (columns, rates[part] * config.loraplus_lr_ratio)):
            if some:
                groups.append({"params": some, "lr": rate, "weight_decay": decay})
    shared = {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    if config.optimizer == "prodigy":
        try:
            from prodigyopt import Prodigy
        except ImportError:
            raise UserError("--optimizer prodigy needs the package prodigyopt: pip install prodigyopt") from None
        return Prodigy(
            groups,
            **shared,
            beta3=config.prodigy_beta3,
            decouple=config.prodigy_decouple,
            use_bias_correction=config.prodigy_use_bias_correction,
            safeguard_warmup=config.prodigy_safeguard_warmup,
        )
    if config.use_8bit_adam:
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError:
            raise UserError("--use_8bit_adam needs the package bitsandbytes: pip install bitsandbytes") from None
        return AdamW8bit(groups, **shared)
    return torch.optim.AdamW(groups, **shared, fused=has_fused_step(groups[0]["params"][0].device))


def has_fused_step(device: torch.device) -> bool:
    """Whether torch's optimisers can update all tensors in one call there.

    Over a thousand small tensors it is several times faster than the default.
    """
    return device.type in ("cpu", "cuda")
