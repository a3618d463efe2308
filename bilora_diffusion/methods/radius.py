"""How large the ball is that holds the auxiliary's perturbation."""

import math
from collections.abc import Mapping

import torch

from bilora_diffusion.adapters import weight_norms

__all__ = ["SINGULAR_SHARE", "Radius", "radius"]

SINGULAR_SHARE = 0.12
"""Bi-LoRA's radius when neither --rho nor --rho_relative is given: the perturbation's r singular values are this share
of a typical singular value of the weights. Chosen on an earlier, unshipped base; on the shipped one 0.126 is the best
of those tried (docs/method.md)."""


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
