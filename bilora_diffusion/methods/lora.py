"""Plain LoRA, the baseline: one forward, one backward, the optimiser's step.

    B1 -= eta G A1'    A1 -= eta B1' G        (through AdamW or Prodigy)

One pass a step; no extra memory.

Reference:
    LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021), arXiv 2106.09685.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bilora_diffusion.methods.interface import MicroBatch, backward_each

__all__ = ["LoRA"]


class LoRA:
    """The primary alone."""

    def __init__(self) -> None:
        self.parameters: list[nn.Parameter] = []
        self.schedulable: list[torch.optim.Optimizer] = []

    def accumulate(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        return backward_each(micro_batches)

    def after_step(self) -> None:
        pass

    def measures(self) -> dict[str, Tensor]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass
