"""Bi-LoRA: the primary descends and the auxiliary ascends the same loss, from the same backward pass.

    min_{B1,A1} max_{||s B2 A2||_F <= rho} L(W0 + s B1 A1 + s B2 A2)                          (Eq. 8)

    B1 -= eta1 G A1'    A1 -= eta1 B1' G        descent: the trainer's optimiser              (Eq. 9)
    B2 += eta2 G A2'    A2 += eta2 B2' G        ascent, with the gradients of the same pass   (Eq. 9)
    c = sqrt(sum_j ||s_j B2_j A2_j||_F^2);  if c > rho: every B2, A2 times sqrt(rho / c)      (Eq. 10)

One pass a step; the extra memory is the auxiliary, its gradient and the ascent's moments. rho = 0 is LoRA. The ball
counts the effective perturbation, s included; the paper leaves s = alpha / r out of its formulas, so ours is s times
the paper's (`configs/paper_3d_icons.yaml` does the sum).

The primary learns to make up for a perturbation that turns slowly, and what is kept then misses what is thrown away:
seldom, and then badly. With the schedule `anneal` (ours) the radius falls linearly to 0 over the last tenth of the
steps, so that the primary ends on its own.

With several processes the gradients are averaged before the ascent: all share one auxiliary, no m-sharpness.

Reference:
    Bi-LoRA: Efficient Sharpness-Aware Minimization for Fine-Tuning Large-Scale Models (Liu et al., 2026),
    arXiv 2508.19564, Eq. 7-10, Algorithm 1.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from bilora_diffusion.adapters import LowRank
from bilora_diffusion.methods.ascent import Ascent
from bilora_diffusion.methods.ball import Ball
from bilora_diffusion.methods.interface import Method

__all__ = ["SCHEDULES", "BiLoRA"]

ANNEALED = 0.1
"""The share of the steps over which the radius falls."""
SCHEDULES = {
    "constant": lambda done: 1.0,
    "anneal": lambda done: min(1.0, (1 - done) / ANNEALED),
}
"""The radius' share of rho, by the share of the run that is done."""


class BiLoRA(Method):
    """Primary and auxiliary in one pass. The perturbation is always on: the auxiliary is an active adapter.

    Arguments:
        layers: the auxiliary over all parts; one ball holds them all.
        rho: the ball's radius, ||s B2 A2||_F over all layers, greater than 0.
        ascent: makes the auxiliary's step before the clip.
        schedule: a key of `SCHEDULES`.
        steps: of the whole run; read by `anneal` alone.
    """

    perturbs = True

    def __init__(
        self, layers: Sequence[LowRank], rho: float, ascent: Ascent, schedule: str = "constant", steps: int = 1
    ) -> None:
        super().__init__()
        self.ball = Ball(layers, rho)
        self.rho = rho
        self.schedule = SCHEDULES[schedule]
        self.steps = steps
        self.ascent = ascent
        self.parameters = [p for layer in layers for p in (layer.A, layer.B)]
        self.schedulable = list(ascent.schedulable)

    def after_step(self, applied: Tensor) -> None:
        self.ascent.step(applied)
        # Never 0, not after the last step either: from an auxiliary of zeros no longer run could go on.
        self.ball.rho = self.rho * self.schedule(min(self.ball.steps / self.steps, 1 - 1 / self.steps))
        self.ball.clip(applied)
        for parameter in self.parameters:
            parameter.grad = None  # no optimiser of the trainer's clears these

    def measures(self) -> dict[str, Tensor]:
        return self.ball.measures()

    def state_dict(self) -> dict[str, Any]:
        return {"ascent": self.ascent.state_dict(), **self.ball.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.ascent.load_state_dict(state["ascent"])
        self.ball.load_state_dict(state)
