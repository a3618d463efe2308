"""Bi-LoRA: the primary descends and the auxiliary ascends the same loss, from the same backward pass.

    min_{B1,A1} max_{||s B2 A2||_F <= rho} L(W0 + s B1 A1 + s B2 A2)                          (Eq. 8)

    B1 -= eta1 G A1'    A1 -= eta1 B1' G        descent: the trainer's optimiser              (Eq. 9)
    B2 += eta2 G A2'    A2 += eta2 B2' G        ascent, with the gradients of the same pass   (Eq. 9)
    c = sqrt(sum_j ||s_j B2_j A2_j||_F^2);  if c > rho: every B2, A2 times sqrt(rho / c)      (Eq. 10)

One pass a step; the extra memory is the auxiliary, its gradient and the ascent's moments. rho = 0 is LoRA. The ball
counts the effective perturbation, s included; the paper leaves s = alpha / r out of its formulas, so ours is s times
the paper's (`configs/paper_3d_icons.yaml` does the sum).

With several processes the gradients are averaged before the ascent: all share one auxiliary, no m-sharpness.

Reference:
    Bi-LoRA: Efficient Sharpness-Aware Minimization for Fine-Tuning Large-Scale Models (Liu et al., 2026),
    arXiv 2508.19564, Eq. 7-10, Algorithm 1.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bilora_diffusion.adapters import LowRank, product_norm, wide_dtype
from bilora_diffusion.methods.ascent import Ascent
from bilora_diffusion.methods.interface import MicroBatch, backward_each

__all__ = ["BiLoRA", "clip_to_ball"]


class BiLoRA:
    """Primary and auxiliary in one pass.

    Arguments:
        layers: the auxiliary over all parts; one ball holds them all.
        rho: the ball's radius, ||s B2 A2||_F over all layers, greater than 0.
        ascent: makes the auxiliary's step before the clip.
    """

    def __init__(self, layers: Sequence[LowRank], rho: float, ascent: Ascent) -> None:
        self.layers = layers
        self.rho = rho
        self.ascent = ascent
        self.parameters: list[nn.Parameter] = [p for layer in layers for p in (layer.A, layer.B)]
        self.schedulable = ascent.schedulable
        device = layers[0].A.device
        # Counted on the device: a step need not wait for the host to know them.
        self._norm = torch.zeros((), dtype=wide_dtype(device), device=device)
        self._clipped = torch.zeros((), dtype=torch.int64, device=device)
        self._steps = 0

    def accumulate(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        return backward_each(micro_batches)

    def after_step(self) -> None:
        self.ascent.step()
        norm = clip_to_ball(self.layers, self.rho)
        self._norm = norm.clamp_max(self.rho)
        self._clipped += norm > self.rho
        self._steps += 1
        for parameter in self.parameters:
            parameter.grad = None  # no optimiser of the trainer's clears these

    def measures(self) -> dict[str, Tensor]:
        return {
            "c_over_rho": self._norm / self.rho if self.rho > 0 else self._norm,
            "clipped_share": self._clipped / max(self._steps, 1),
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "ascent": self.ascent.state_dict(),
            "norm": self._norm,
            "clipped": self._clipped,
            "steps": self._steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.ascent.load_state_dict(state["ascent"])
        self._norm = state["norm"].to(self._norm)
        self._clipped = state["clipped"].to(self._clipped)
        self._steps = state["steps"]


@torch.no_grad()
def clip_to_ball(layers: Sequence[LowRank], rho: float) -> Tensor:
    """Scales every factor by sqrt(rho / c) where c > rho (Eq. 10), and by exactly 1 where it is not.

    Returns:
        c before the clip, a scalar on the layers' device.
    """
    norm = product_norm(layers)
    radius = torch.full_like(norm, rho)
    factor = torch.where(norm > radius, (radius / norm).sqrt(), 1.0).float()
    torch._foreach_mul_([factor_ for layer in layers for factor_ in (layer.A, layer.B)], factor)
    return norm
