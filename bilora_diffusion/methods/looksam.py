"""LookSAM: SAM's second pass on every k-th step only; in between, what it changed is used again.

    every k-th step:  g at theta;  g' at theta + rho g / ||g||;  v = g' - (<g', g> / ||g||^2) g;  step with g'
    other steps:      g at theta;  step with g + alpha (||g|| / ||v||) v

1 + 1 / k passes a step; the extra memory is one gradient, and a copy of the adapter in every k-th step. k = 1 is
LoRA-SAM. alpha = 0 leaves plain steps in between; rho = 0 makes v nothing but rounding, so give alpha = 0 too. After a
k-th step that was skipped the ones in between use the v before.

Reference:
    Towards Efficient and Scalable Sharpness-Aware Minimization (Liu et al., 2022), CVPR, arXiv 2203.02714,
    Algorithm 1; on the LoRA factors.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from bilora_diffusion.applied import copy_if
from bilora_diffusion.methods.displacement import displaced
from bilora_diffusion.methods.interface import Method, MicroBatch, backward_each, gradients, unit
from bilora_diffusion.processes import average_gradients

__all__ = ["LookSAM"]


class LookSAM(Method):
    """Arguments:
    primary: the primary's parameters.
    rho: length of the climb, in the norm of the parameters.
    every: k, at least 1.
    alpha: weight of the direction that is used again.
    """

    perturbs = True

    def __init__(self, primary: Sequence[nn.Parameter], rho: float, every: int, alpha: float) -> None:
        super().__init__()
        self.primary = list(primary)
        self.rho = rho
        self.every = every
        self.alpha = alpha
        self._steps = 0
        self._across = [torch.zeros_like(parameter) for parameter in self.primary]  # v / ||v||
        self._found: list[Tensor] | None = None  # the same of a step that may be skipped

    @contextmanager
    def perturbed(self, micro_batches: Sequence[MicroBatch]) -> Iterator[None]:
        """Where the next step with two passes takes its gradient."""
        with displaced(self.primary, unit(gradients(micro_batches, self.primary)), self.rho):
            yield

    def accumulate(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        looks = self._steps % self.every == 0
        along = unit(gradients(micro_batches, self.primary)) if looks else []
        with displaced(self.primary, along, self.rho) if looks else nullcontext():
            loss = backward_each(micro_batches)
        average_gradients(self.primary)  # the same v and the same norm for all processes
        held = [place for place, parameter in enumerate(self.primary) if parameter.grad is not None]
        found = [self.primary[place].grad for place in held]
        if looks:
            self._found = self._across_from([along[place] for place in held], found, held)
        else:
            again = torch._foreach_mul([self._across[place] for place in held], self.alpha * get_total_norm(found))
            torch._foreach_add_(found, again)
        return loss

    def _across_from(self, along: list[Tensor], found: list[Tensor], held: list[int]) -> list[Tensor]:
        """The unit vector of g' - (<g', g> / ||g||^2) g, given g / ||g||; a zero where there is no gradient."""
        inner = torch.stack([(one * other).sum() for one, other in zip(along, found, strict=True)]).sum()
        across = unit(torch._foreach_sub(found, torch._foreach_mul(along, inner)))
        whole = [torch.zeros_like(parameter) for parameter in self.primary]
        for place, value in zip(held, across, strict=True):
            whole[place] = value
        return whole

    def after_step(self, applied: Tensor) -> None:
        if self._found is not None:
            copy_if(applied, self._across, self._found)
            self._found = None
        self._steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps, "across": self._across}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._steps = state["steps"]
        saved: list[Tensor] = state["across"]
        self._across = [value.to(old) for value, old in zip(saved, self._across, strict=True)]
