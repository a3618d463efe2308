"""Three ways to make the auxiliary's ascent from its gradients, before the clip to the ball.

The paper writes plain gradient ascent (Eq. 9) and names no optimiser; which of these is the default, and on what
evidence, is told in docs/method.md.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from bilora_diffusion.adapters import LowRank, wide_dtype
from bilora_diffusion.applied import copy_if, step_if
from bilora_diffusion.optimizers import load_state

__all__ = ["Ascent", "NormalizedAscent", "OptimizerAscent"]


class Ascent(Protocol):
    """One ascent step on (A2, B2), from the gradients in their `.grad`."""

    schedulable: Sequence[torch.optim.Optimizer]

    def step(self, applied: Tensor) -> None:
        """Arguments: applied: a scalar of bools on the device; False: nothing moves, whatever the gradients hold."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class OptimizerAscent:
    """Ascent by a torch optimiser made with `maximize=True`: the usual update on the sign-flipped gradients.

    sgd:   B2 += eta2 dL/dB2,  A2 += eta2 dL/dA2     (Eq. 9 as it is printed)
    adamw: the same through AdamW's moments: an entry moves by about eta2 whatever the gradient's size.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        if not all(group["maximize"] for group in optimizer.param_groups):
            raise ValueError("the auxiliary ascends: its optimiser needs maximize=True")
        self.optimizer = optimizer
        self.schedulable = [optimizer]

    def step(self, applied: Tensor) -> None:
        step_if(self.optimizer, applied)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        load_state(self.optimizer, state)


class NormalizedAscent:
    """A gradient step whose length is counted in the perturbation, not in the factors.

        B2 += eta dL/dB2,  A2 += eta dL/dA2,   eta = fraction rho / ||s (dL/dB2 A2 + B2 dL/dA2)||_F

    so that s B2 A2 moves by `fraction * rho` to first order, in the Frobenius norm over all layers. Neither the
    gradient's size nor the width of the model nor a learning rate enters.

    Arguments:
        layers: the auxiliary.
        distance: fraction * rho.
    """

    def __init__(self, layers: Sequence[LowRank], distance: float) -> None:
        self.layers = layers
        self.distance = distance
        self.schedulable: list[torch.optim.Optimizer] = []

    @torch.no_grad()
    def step(self, applied: Tensor) -> None:
        layers = [layer for layer in self.layers if layer.A.grad is not None and layer.B.grad is not None]
        if not layers:
            return
        speed = torch.stack([_squared_speed(layer) for layer in layers]).sum().sqrt()
        # No gradient, no step: 0 / 0 would put NaN in the auxiliary.
        eta = torch.where(speed > 0, self.distance / speed.clamp_min(torch.finfo(speed.dtype).tiny), 0.0).float()
        factors = [factor for layer in layers for factor in (layer.A, layer.B)]
        steps = torch._foreach_mul([factor.grad for factor in factors], eta)
        copy_if(applied, factors, torch._foreach_add(factors, steps))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def _squared_speed(layer: LowRank) -> Tensor:
    """||s (gB A + B gA)||_F^2 of one layer through r x r products."""
    dtype = wide_dtype(layer.A.device)
    A, B, gA, gB = (t.detach().flatten(1).to(dtype) for t in (layer.A, layer.B, layer.A.grad, layer.B.grad))
    from_B = ((gB.mT @ gB) * (A @ A.mT)).sum()
    from_A = ((B.mT @ B) * (gA @ gA.mT)).sum()
    cross = ((gB.mT @ B) * (A @ gA.mT)).sum()
    return layer.scale**2 * (from_B + from_A + 2 * cross).clamp_min(0)
