"""Flat-LoRA: the gradient under random noise on the full weights, seeded and row by row.

    std_i = f(k / K) sigma ||W'_i|| / sqrt(n)       for each output row i of W' = W0 + s B1 A1
    g     = gradient over all micro-batches at W' + N,   N_ij ~ N(0, std_i^2)
    the optimiser steps on (A1, B1) with g

    f:  cosine  (1 - cos(pi k / K)) / 2, from 0 to 1, as published;   linear  k / K;   constant  1

One pass a step; the extra memory is the norm of each row, a table of random numbers and one layer's weight. sigma = 0
is LoRA. The noise is never added to a weight (see `weight_noise`): the published code adds and subtracts it, which
leaves 1 % of error in bfloat16 weights after 500 steps. All processes and all micro-batches of a step share one noise.

RWP-full is the same without the ramp: random weight perturbation, filter-normalised.

Reference:
    Flat-LoRA: Low-Rank Adaptation over a Flat Loss Landscape (Li et al., 2025), ICML, arXiv 2409.14396, Algorithm 1.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from bilora_diffusion.methods.interface import Method, MicroBatch
from bilora_diffusion.methods.weight_noise import WeightNoise

__all__ = ["SCHEDULES", "FlatLoRA"]

SCHEDULES = {
    "constant": lambda done: 1.0,
    "linear": lambda done: done,
    "cosine": lambda done: (1 - math.cos(math.pi * done)) / 2,
}
"""The noise's share of sigma, by the share of the run that is done."""


class FlatLoRA(Method):
    """Arguments:
    noise: on the layers that carry the primary.
    sigma: the noise's norm as a share of the weights'.
    schedule: a key of `SCHEDULES`.
    steps: K, of the whole run.
    """

    perturbs = True

    def __init__(self, noise: WeightNoise, sigma: float, schedule: str, steps: int) -> None:
        super().__init__()
        self.noise = noise
        self.sigma = sigma
        self.schedule = SCHEDULES[schedule]
        self.steps = steps
        self._step = 0

    def perturbed(self, micro_batches: Sequence[MicroBatch]) -> AbstractContextManager[None]:
        done = min(self._step / self.steps, 1.0)
        return self.noise.on(self._step, self.sigma * self.schedule(done))

    def after_step(self, applied: Tensor) -> None:
        self._step += 1

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step = state["step"]
