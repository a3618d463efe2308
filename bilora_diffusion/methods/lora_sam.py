"""LoRA-SAM: the gradient at the worst point nearby in the space of the factors, found with a pass of its own.

    g  = gradient over all micro-batches at theta = (A1, B1)
    g' = gradient over the same micro-batches at theta + rho g / ||g||        ||.|| over all A1 and B1
    theta goes back, and the optimiser steps with g'

Two passes a step, 1 + share with `--ascent_share`; the extra memory is a copy of the adapter and of its gradient.
rho = 0 is LoRA. The norm is that of the factors: unlike Bi-LoRA's rho it depends on how B A is split.

Reference:
    Sharpness-Aware Minimization for Efficiently Improving Generalization (Foret et al., 2021), arXiv 2010.01412,
    on the LoRA factors as in Bi-LoRA (Liu et al., 2026), arXiv 2508.19564, Eq. 3-6.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from bilora_diffusion.methods.displacement import displaced
from bilora_diffusion.methods.interface import Method, MicroBatch, gradients, unit

__all__ = ["LoRASAM"]


class LoRASAM(Method):
    """Climb, differentiate, come back.

    Arguments:
        primary: the primary's parameters.
        rho: length of the climb, in the norm of the parameters.
        share: of the rows that the ascent direction is taken from, in (0, 1].
    """

    perturbs = True

    def __init__(self, primary: Sequence[nn.Parameter], rho: float, share: float = 1.0) -> None:
        super().__init__()
        self.primary = list(primary)
        self.rho = rho
        self.share = share

    @contextmanager
    def perturbed(self, micro_batches: Sequence[MicroBatch]) -> Iterator[None]:
        direction = unit(gradients(micro_batches, self.primary, self.share))
        with displaced(self.primary, direction, self.rho):
            yield
