"""RWP-LoRA: the gradient under random noise on the factors, row by row.

    theta = (A1, B1);  N_i = sigma ||theta_i|| / sqrt(n) * N(0, I)      for each row i of n entries of each factor
    g  = gradient over all micro-batches at theta + N
    theta goes back, and the optimiser steps with g

One pass a step; the extra memory is the noise and a copy of the adapter. sigma = 0 is LoRA. Filter-normalised: noise of
one size everywhere, as in the original, would swamp B1, which begins at zero; here B1 has none as long as it is zero.

Reference:
    Random weight perturbation as a baseline in Bi-LoRA (Liu et al., 2026), arXiv 2508.19564, Section 4.1;
    filter normalisation: Visualizing the Loss Landscape of Neural Nets (Li et al., 2018), arXiv 1712.09913.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bilora_diffusion.methods.displacement import displaced
from bilora_diffusion.methods.interface import Method, MicroBatch
from bilora_diffusion.randomness import stream_seed

__all__ = ["RWPLoRA"]


class RWPLoRA(Method):
    """Arguments:
    primary: the primary's parameters.
    sigma: the noise's norm as a share of each row's.
    seed: the run's; the noise of a step depends on it and the step alone, so that all processes share it.
    """

    perturbs = True

    def __init__(self, primary: Sequence[nn.Parameter], sigma: float, seed: int) -> None:
        super().__init__()
        self.primary = list(primary)
        self.sigma = sigma
        self.seed = seed
        self._step = 0

    @contextmanager
    def perturbed(self, micro_batches: Sequence[MicroBatch]) -> Iterator[None]:
        with displaced(self.primary, self._noise(), self.sigma):
            yield

    @torch.no_grad()
    def _noise(self) -> list[Tensor]:
        device = self.primary[0].device
        random = torch.Generator(device).manual_seed(stream_seed(self.seed, "factor noise", self._step))
        noise = []
        for parameter in self.primary:
            rows = parameter.detach().reshape(len(parameter), -1)
            drawn = torch.randn(rows.shape, generator=random, device=device)
            scale = rows.norm(dim=1, keepdim=True) / math.sqrt(rows.shape[1])
            noise.append((drawn * scale).view_as(parameter))
        return noise

    def after_step(self, applied: Tensor) -> None:
        self._step += 1

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step = state["step"]
