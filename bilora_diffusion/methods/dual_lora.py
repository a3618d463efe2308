"""Dual-LoRA: two adapters that both descend, the second held in a ball and thrown away. An ablation of Bi-LoRA.

    B1 -= eta1 G A1'    A1 -= eta1 B1' G        descent
    B2 -= eta2 G A2'    A2 -= eta2 B2' G        descent too, where Bi-LoRA ascends
    c > rho: every B2, A2 times sqrt(rho / c)

One pass a step, the memory of Bi-LoRA; rho = 0 is LoRA. It tells what of Bi-LoRA's effect comes from the sign of the
second adapter's step and not from its being there: the paper finds that it gains nothing.

Reference:
    Bi-LoRA (Liu et al., 2026), arXiv 2508.19564, Table 5 ("two descent branches").
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bilora_diffusion.adapters import LowRank
from bilora_diffusion.applied import step_if
from bilora_diffusion.methods.ball import Ball
from bilora_diffusion.methods.interface import Method
from bilora_diffusion.optimizers import load_state

__all__ = ["DualLoRA"]


class DualLoRA(Method):
    """Primary and auxiliary, both down.

    Arguments:
        layers: the auxiliary over all parts.
        rho: radius of the ball that holds ||s B2 A2||_F over all layers, greater than 0.
        optimizer: descends on the auxiliary.
    """

    perturbs = True

    def __init__(self, layers: Sequence[LowRank], rho: float, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        if any(group["maximize"] for group in optimizer.param_groups):
            raise ValueError("the second adapter of Dual-LoRA descends: its optimiser needs maximize=False")
        self.ball = Ball(layers, rho)
        self.optimizer = optimizer
        self.parameters = [p for layer in layers for p in (layer.A, layer.B)]
        self.schedulable = [optimizer]

    def after_step(self, applied: Tensor) -> None:
        step_if(self.optimizer, applied)
        self.ball.clip(applied)
        for parameter in self.parameters:
            parameter.grad = None

    def measures(self) -> dict[str, Tensor]:
        return self.ball.measures()

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), **self.ball.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        load_state(self.optimizer, state["optimizer"])
        self.ball.load_state_dict(state)
