"""The training methods, one file each, behind the two verbs of `methods.interface.Method`."""

import math
from collections.abc import Mapping, Sequence

import torch

from bilora_diffusion.adapters import AUXILIARY, LowRank, add_adapter, low_rank_layers, weight_norms
from bilora_diffusion.config import METHOD_NAMES, TrainingConfig
from bilora_diffusion.methods.ascent import Ascent, NormalizedAscent, OptimizerAscent
from bilora_diffusion.methods.bilora import BiLoRA
from bilora_diffusion.methods.interface import Method, MicroBatch
from bilora_diffusion.methods.lora import LoRA

__all__ = [
    "SINGULAR_SHARE",
    "BiLoRA",
    "LoRA",
    "Method",
    "MicroBatch",
    "Radius",
    "build",
    "build_ascent",
    "radius",
]

SINGULAR_SHARE = 0.12
"""Bi-LoRA's radius when neither --rho nor --rho_relative is given: the perturbation's r singular values are this share
of a typical singular value of the weights. docs/method.md tells the measurements behind it."""


class Radius:
    """rho in the units people compare it in.

    Arguments:
        rho: ||s B2 A2||_F over all layers.
        weight_norm: ||W||_F of the adapted weights.
        spectral_norm: the second value of `weight_norms`.
        rank: the auxiliary's.
    """

    def __init__(self, rho: float, weight_norm: float, spectral_norm: float, rank: int) -> None:
        self.rho = rho
        self.relative = rho / weight_norm
        self.singular_share = rho / (spectral_norm * math.sqrt(rank))


def radius(
    models: Mapping[str, torch.nn.Module],
    rank: int,
    rho: float | None = None,
    relative: float | None = None,
    singular_share: float = SINGULAR_SHARE,
) -> Radius:
    """Bi-LoRA's rho: as given, as a share of ||W||_F, else as a share of the singular values.

    The default is a share of the weights' singular values because that should carry over between widths: a
    perturbation of rank r has all its energy in r directions, a weight of width d in d, so a fixed share of ||W||_F
    is a sqrt(d / r) times larger share of a singular value.
    """
    weight_norm, spectral_norm = weight_norms(models)
    if rho is None and relative is not None:
        rho = relative * weight_norm
    elif rho is None:
        rho = singular_share * spectral_norm * math.sqrt(rank)
    return Radius(rho, weight_norm, spectral_norm, rank)


def build_ascent(
    name: str,
    layers: Sequence[LowRank],
    *,
    learning_rates: Mapping[str, float],
    rho: float,
    fraction: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> Ascent:
    """The auxiliary's ascent by its name in `--ascent`.

    Arguments:
        learning_rates: eta2 by part.
        fraction: share of rho that one `normalized` step covers.
        weight_decay, betas, eps: of the AdamW ascent; the decay applies to SGD too.
    """
    if name == "normalized":
        return NormalizedAscent(layers, fraction * rho)
    groups = [
        {"params": [p for layer in layers if layer.part == part for p in (layer.A, layer.B)], "lr": rate}
        for part, rate in learning_rates.items()
    ]
    if name == "sgd":
        return OptimizerAscent(torch.optim.SGD(groups, weight_decay=weight_decay, maximize=True))
    return OptimizerAscent(torch.optim.AdamW(groups, betas=betas, eps=eps, weight_decay=weight_decay, maximize=True))


def build(
    config: TrainingConfig, models: Mapping[str, torch.nn.Module], rates: Mapping[str, float], seed: int
) -> tuple[Method, Radius | None]:
    """The method of `--method`, with whatever it adds to the models beside the primary.

    Arguments:
        models: the trained parts, the primary already attached.
        rates: the auxiliary's learning rate by part.

    Returns:
        the method, and the radius of its ball where it has one.
    """
    return _BUILDERS[config.method](config, models, rates, seed)


def _build_lora(config, models, rates, seed) -> tuple[Method, None]:
    return LoRA(), None


def _build_bilora(config, models, rates, seed) -> tuple[Method, Radius]:
    rank = config.auxiliary_rank or config.rank
    ball = radius(models, rank, config.rho, config.rho_relative)
    if ball.rho == 0:
        return LoRA(), ball  # the limit case: nothing to add, and the very numbers of LoRA
    for part, model in models.items():
        add_adapter(
            part,
            model,
            AUXILIARY,
            rank=rank,
            scale=(config.lora_alpha or config.rank) / config.rank,
            init=config.auxiliary_init,
            seed=seed,
            targets=config.unet_targets if part == "unet" else None,
        )
    layers = low_rank_layers(models, AUXILIARY)
    ascent = build_ascent(
        config.ascent,
        layers,
        learning_rates=rates,
        rho=ball.rho,
        fraction=config.ascent_fraction,
        weight_decay=config.auxiliary_weight_decay,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
    )
    return BiLoRA(layers, ball.rho, ascent), ball


_BUILDERS = {"bilora": _build_bilora, "lora": _build_lora}
assert set(_BUILDERS) == set(METHOD_NAMES)  # the names live in config, which must import fast
