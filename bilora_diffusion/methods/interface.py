"""What a training method is: two verbs around the optimiser's step.

The trainer draws everything random first (noise, timesteps, prompt dropout) and hands the method all micro-batches of
one optimiser step, each with its loss callable as often as the method likes: a method of two passes sees the same
draws twice, which is what its derivation assumes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

__all__ = ["Method", "MicroBatch", "backward_each"]


class MicroBatch(Protocol):
    """Rows of one micro-batch with their noise and timesteps already drawn."""

    def __len__(self) -> int:
        """The number of rows."""

    def loss(self, rows: slice = slice(None)) -> Tensor:
        """The mean loss over some of its rows at the model's present weights: a float32 scalar with its graph."""

    def backward(self, loss: Tensor) -> None:
        """Adds this loss's share of the step's mean (1 / micro-batches, times fp16's loss scale) to `.grad`."""


class Method(Protocol):
    """One way to use a step's gradients. `methods.build` makes them."""

    parameters: Sequence[nn.Parameter]
    """What the method trains beside the primary (the auxiliary's factors). The trainer averages these gradients over
    processes, takes fp16's loss scale off them and clears them, as it does the primary's."""

    schedulable: Sequence[torch.optim.Optimizer]
    """Optimisers of its own, whose learning rates follow the run's schedule."""

    def accumulate(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Adds the step's gradients to `.grad`. Returns the mean of the losses that were back-propagated, detached."""

    def after_step(self) -> None:
        """Runs once per optimiser step, after the primary's update. Not called for a step that is skipped."""

    def measures(self) -> dict[str, Tensor]:
        """Scalars about the last step and the run so far, on the device: `c_over_rho`, `clipped_share`."""

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs beside the adapters' weights."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""


def backward_each(micro_batches: Sequence[MicroBatch]) -> Tensor:
    """One forward and one backward for each micro-batch; returns their mean loss, detached."""
    losses = []
    for micro_batch in micro_batches:
        loss = micro_batch.loss()
        micro_batch.backward(loss)
        losses.append(loss.detach())
    return torch.stack(losses).mean()
