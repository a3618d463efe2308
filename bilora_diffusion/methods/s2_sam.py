"""S2-SAM: SAM in one pass, along the gradient of the step before.

    g_t = gradient over all micro-batches at theta + rho g_{t-1} / ||g_{t-1}||
    theta goes back, and the optimiser steps with g_t

One pass a step; the extra memory is one gradient and one copy of the adapter. rho = 0 is LoRA; so is the first step.

Reference:
    A Single-Step, Sharpness-Aware Minimization is All You Need to Achieve Efficient and Accurate Sparse Training
    (Ji et al., 2024), NeurIPS; on the LoRA factors.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bilora_diffusion.applied import copy_if
from bilora_diffusion.methods.displacement import displaced
from bilora_diffusion.methods.interface import Method, MicroBatch, unit

__all__ = ["S2SAM"]


class S2SAM(Method):
    """Arguments:
    primary: the primary's parameters.
    rho: length of the climb, in the norm of the parameters.
    """

    perturbs = True

    def __init__(self, primary: Sequence[nn.Parameter], rho: float) -> None:
        super().__init__()
        self.primary = list(primary)
        self.rho = rho
        self._direction = [torch.zeros_like(parameter) for parameter in self.primary]

    @contextmanager
    def perturbed(self, micro_batches: Sequence[MicroBatch]) -> Iterator[None]:
        with displaced(self.primary, self._direction, self.rho):
            yield

    def after_step(self, applied: Tensor) -> None:
        # A common factor, as that of clipping, does not matter.
        latest = unit([torch.zeros_like(p) if p.grad is None else p.grad for p in self.primary])
        copy_if(applied, self._direction, latest)

    def state_dict(self) -> dict[str, Any]:
        return {"direction": self._direction}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        saved: list[Tensor] = state["direction"]
        self._direction = [value.to(old) for value, old in zip(saved, self._direction, strict=True)]
