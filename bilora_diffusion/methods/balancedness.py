"""LoRA-oBAR and LoRA-nBAR: what SAM does to the balance of two factors, without its second pass.

Before the optimiser's step, for the factors x, y = A, B of each layer, with m = a eta the strength times the rate:

    oBAR:  ||x|| >= ||y||:      x *= 1 - m,  y *= 1 + m;      else the other way round
    nBAR:  ||gx|| >= ||gy||:    x *= 1 + m,  y *= 1 - m;      else the other way round

One pass a step; no extra memory. Strength 0 is LoRA. B A itself changes in the order of m^2 only, and m is tiny: at the
published 0.25 and a rate of 2e-4, 500 steps move each factor by 2.5 %.

Reference:
    Implicit Regularization of Sharpness-Aware Minimization for Scale-Invariant Problems (Li, Zhang, He, 2024),
    NeurIPS, arXiv 2410.14802, Algorithms 2 and 3.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bilora_diffusion.adapters import LowRank
from bilora_diffusion.methods.interface import Method
from bilora_diffusion.processes import to_device

__all__ = ["SCHEDULES", "Balancedness"]

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}
"""The strength's course, by the share of the run that is done."""


class Balancedness(Method):
    """oBAR, by the factors' norms, or nBAR, by their gradients'.

    Arguments:
        layers: the primary over all parts.
        strength: a at the start.
        schedule: a key of `SCHEDULES`.
        steps: of the whole run.
        rates: the primary's learning rate by part; it follows the run's schedule.
        by_gradients: nBAR.
    """

    def __init__(
        self,
        layers: Sequence[LowRank],
        strength: float,
        schedule: str,
        steps: int,
        rates: Mapping[str, float],
        *,
        by_gradients: bool,
    ) -> None:
        super().__init__()
        self.layers = layers
        self.strength = strength
        self.schedule = SCHEDULES[schedule]
        self.steps = steps
        self.by_gradients = by_gradients
        self._step = 0
        # Of nothing: an optimiser is what the run's schedule knows how to set the rates of.
        self._rates = torch.optim.SGD([{"params": [torch.zeros(())], "lr": rate} for rate in rates.values()])
        self._parts = list(rates)
        self.schedulable = [self._rates]

    @torch.no_grad()
    def before_step(self, applied: Tensor) -> None:
        done = min(self._step / self.steps, 1.0)
        rates = dict(zip(self._parts, (group["lr"] for group in self._rates.param_groups), strict=True))
        layers = [layer for layer in self.layers if layer.A.grad is not None and layer.B.grad is not None]
        A, B = [layer.A for layer in layers], [layer.B for layer in layers]
        if self.by_gradients:
            norms = [torch.stack(torch._foreach_norm([factor.grad for factor in one])) for one in (A, B)]
            sign = torch.where(norms[0] >= norms[1], 1.0, -1.0)
        else:
            norms = [torch.stack(torch._foreach_norm(one)) for one in (A, B)]
            sign = torch.where(norms[0] >= norms[1], -1.0, 1.0)
        moves = torch.tensor([self.strength * self.schedule(done) * rates[layer.part] for layer in layers])
        changes = sign * to_device(moves, sign.device) * applied
        torch._foreach_mul_(A, list(1 + changes))
        torch._foreach_mul_(B, list(1 - changes))

    def after_step(self, applied: Tensor) -> None:
        self._rates.step()  # so that the schedule sees its optimiser at work
        self._step += 1

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step, "rates": self._rates.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step = state["step"]
        self._rates.load_state_dict(state["rates"])
