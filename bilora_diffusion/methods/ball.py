"""The ball that holds the auxiliary's perturbation: ||s B2 A2||_F <= rho over all layers together."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bilora_diffusion.adapters import LowRank, product_norm, wide_dtype

__all__ = ["Ball", "clip_to_ball"]


class Ball:
    """Keeps the auxiliary inside and counts how often it had to.

    Arguments:
        layers: the auxiliary over all parts; one ball holds them all.
        rho: the ball's radius, greater than 0; a schedule may change it.

    Attributes:
        steps: clips so far.
    """

    def __init__(self, layers: Sequence[LowRank], rho: float) -> None:
        self.layers = layers
        self.rho = rho
        device = layers[0].A.device
        # Counted on the device: a step need not wait for the host to know them.
        self._norm = torch.zeros((), dtype=wide_dtype(device), device=device)
        self._clipped = torch.zeros((), dtype=torch.int64, device=device)
        self.steps = 0

    def clip(self, applied: Tensor) -> None:
        """Once a step, after the auxiliary has moved.

        Arguments:
            applied: a scalar of bools on the device; False: it has not, and is not counted as clipped.
        """
        norm = clip_to_ball(self.layers, self.rho)
        self._norm = norm.clamp_max(self.rho)
        self._clipped += (norm > self.rho) & applied
        self.steps += 1

    def measures(self) -> dict[str, Tensor]:
        """`c_over_rho`: the perturbation's norm after the last clip; `clipped_share`: of the steps so far."""
        return {
            "c_over_rho": self._norm / self.rho if self.rho > 0 else self._norm,
            "clipped_share": self._clipped / max(self.steps, 1),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"norm": self._norm, "clipped": self._clipped, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._norm = state["norm"].to(self._norm)
        self._clipped = state["clipped"].to(self._clipped)
        self.steps = state["steps"]


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
