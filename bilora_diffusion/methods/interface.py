"""What a training method is: where the gradient is taken, and what happens around the optimiser's step.

The trainer draws everything random first (noise, timesteps, prompt dropout) and hands the method all micro-batches of
one optimiser step, each with its loss callable as often as the method likes: a method of two passes sees the same
draws twice, which is what its derivation assumes.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bilora_diffusion.processes import average_gradients

__all__ = ["Method", "MicroBatch", "backward_each", "gradients", "unit", "without_gradients"]


class MicroBatch(Protocol):
    """Rows of one micro-batch with their noise and timesteps already drawn.

    Attributes:
        is_repeat: the step before had the same rows at the same timesteps, under another noise (`--steps_per_draw`).
    """

    is_repeat: bool

    def __len__(self) -> int:
        """The number of rows."""

    def loss(self, rows: slice = slice(None)) -> Tensor:
        """The mean loss over some of its rows at the model's present weights: a float32 scalar with its graph."""

    def add_gradient(self, rows: slice = slice(None), weight: float = 1.0) -> Tensor:
        """One forward and one backward pass: adds the gradient of `weight` times `loss(rows)` to `.grad`.

        As this micro-batch's share of the step's mean: 1 / micro-batches, times fp16's loss scale.

        Returns:
            the loss, detached.
        """


class Method:
    """One way to use a step's gradients. As it stands here it is plain LoRA; `methods.build` makes the others.

    Attributes:
        parameters: what the method trains beside the primary (the auxiliary's factors). The trainer averages these
            gradients over processes, takes fp16's loss scale off them and clears them, as it does the primary's.
        schedulable: optimisers of its own, whose learning rates follow the run's schedule.
        perturbs: whether `perturbed` changes anything, so that there is a loss gap to measure.
        settings: the method's own knobs by the names of their flags, resolved; what files and summaries tell.
    """

    perturbs = False

    def __init__(self) -> None:
        self.parameters: list[nn.Parameter] = []
        self.schedulable: list[torch.optim.Optimizer] = []
        self.settings: dict[str, float | int | str] = {}

    def perturbed(self, micro_batches: Sequence[MicroBatch]) -> AbstractContextManager[None]:
        """Inside, the models are at the weights whose gradient the method takes for these draws.

        May be entered outside a step too, to look at the loss there; it leaves everything as it found it.
        """
        return nullcontext()

    def accumulate(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Adds the step's gradients to `.grad`. Returns the mean of the losses that were back-propagated, detached."""
        with self.perturbed(micro_batches):
            return backward_each(micro_batches)

    def before_step(self, applied: Tensor) -> None:
        """Runs once per optimiser step, before the primary's update, the gradients averaged and clipped.

        Arguments:
            applied: a scalar of bools on the device: False where the step is skipped. Then nothing that was learnt may
                change, here or in `after_step`, and the gradients may hold anything; what the host counts goes on, and
                with it radii and ramps.
        """

    def after_step(self, applied: Tensor) -> None:
        """Runs once per optimiser step, after the primary's update; the gradients are still there."""

    def measures(self) -> dict[str, Tensor]:
        """Scalars about the last step and the run so far, on the device: `c_over_rho`, `clipped_share`."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs beside the adapters' weights."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""


def backward_each(micro_batches: Sequence[MicroBatch]) -> Tensor:
    """One forward and one backward pass for each micro-batch; returns their mean loss, detached."""
    return torch.stack([micro_batch.add_gradient() for micro_batch in micro_batches]).mean()


def gradients(
    micro_batches: Sequence[MicroBatch], parameters: Sequence[nn.Parameter], share: float = 1.0
) -> list[Tensor]:
    """The gradient of the mean loss at the present weights, the mean over processes; `.grad` is left empty.

    Scaled by fp16's loss scale where there is one: good for directions, and not finite where a step will be skipped.

    Arguments:
        parameters: what it is taken for; one that the loss does not depend on has a gradient of zero.
        share: of the rows, in (0, 1]: the first so many over all micro-batches, at least one.
    """
    left = max(1, math.ceil(share * sum(map(len, micro_batches)) - 1e-9))
    with torch.enable_grad():  # the loss gap is measured without
        for micro_batch in micro_batches:
            rows = min(left, len(micro_batch))
            if rows:
                some = slice(None) if rows == len(micro_batch) else slice(0, rows)
                micro_batch.add_gradient(some, rows / len(micro_batch))
            left -= rows
    average_gradients(parameters)
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return found


@contextmanager
def without_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, the backward pass computes no gradients of these."""
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def unit(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors over their common norm; zeros stay zeros. Never waits for the device."""
    norm = torch.nn.utils.get_total_norm(tensors)
    # Not where the norm is nan or inf: such a step has to be seen as not finite, and is skipped.
    return torch._foreach_mul(list(tensors), torch.where(norm == 0, 0.0, 1 / norm))
