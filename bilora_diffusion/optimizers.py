"""The primary's optimiser, by the names the stock script uses."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.optimization import Adafactor

from bilora_diffusion.config import TrainingConfig
from bilora_diffusion.errors import UserError

__all__ = ["auxiliary_learning_rates", "build_optimizer", "has_fused_step", "learning_rates", "load_state"]


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
    """AdamW, also in 8 bits or paged, Prodigy or Adafactor over the primary's parameters.

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
    if config.optimizer == "adafactor":
        # As LoRAs are trained with it: by the learning rate and schedule given, not by rates of its own.
        return Adafactor(groups, scale_parameter=False, relative_step=False, warmup_init=False)
    if config.optimizer == "prodigy":
        return _prodigy(config, groups, shared)
    if config.use_8bit_adam or config.paged_adam:
        return _bitsandbytes_adam(config)(groups, **shared)
    return torch.optim.AdamW(groups, **shared, fused=has_fused_step(groups[0]["params"][0].device))


def _prodigy(config: TrainingConfig, groups: list[dict[str, Any]], shared: dict[str, Any]) -> torch.optim.Optimizer:
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


def _bitsandbytes_adam(config: TrainingConfig) -> type[torch.optim.Optimizer]:
    flag = "use_8bit_adam" if config.use_8bit_adam else "paged_adam"
    try:
        from bitsandbytes import optim
    except ImportError:
        raise UserError(f"--{flag} needs the package bitsandbytes: pip install bitsandbytes") from None
    if config.paged_adam:
        return optim.PagedAdamW8bit if config.use_8bit_adam else optim.PagedAdamW
    return optim.AdamW8bit


def load_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """`load_state_dict`, but that the optimiser stays fused, or not, as this machine and version have it."""
    groups = [
        {**saved, **({"fused": own["fused"]} if "fused" in own else {})}
        for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups})


def has_fused_step(device: torch.device) -> bool:
    """Whether torch's optimisers can update all tensors in one call there.

    Over a thousand small tensors it is several times faster than the default.
    """
    return device.type in ("cpu", "cuda")
