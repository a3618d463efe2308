"""The loss as a function of a displacement of the weights, on draws that never change.

Two spaces: `lora`, the factors A and B of every layer, and `full`, the merged weights W0 + s B A of the same layers.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from bilora_diffusion.methods import MicroBatch
from bilora_diffusion.methods.displacement import displaced

__all__ = ["SPACES", "Landscape", "norm"]

SPACES = ("lora", "full")


class Landscape:
    """A loss and its gradient around the present weights.

    Arguments:
        points: the tensors that are displaced, in float32.
        micro_batches: fixed draws; the loss is the mean over them.
    """

    def __init__(self, points: Sequence[nn.Parameter], micro_batches: Sequence[MicroBatch]) -> None:
        self.points = list(points)
        self.micro_batches = micro_batches

    @torch.no_grad()
    def loss(self) -> float:
        """At the present weights."""
        return torch.stack([micro_batch.loss() for micro_batch in self.micro_batches]).mean().item()

    def gradient(self) -> list[Tensor]:
        """dL/dpoint for every point, at the present weights."""
        for point in self.points:
            point.grad = None
        for micro_batch in self.micro_batches:
            micro_batch.add_gradient()
        found = [torch.zeros_like(point) if point.grad is None else point.grad for point in self.points]
        for point in self.points:
            point.grad = None
        return found

    def displaced(self, direction: Sequence[Tensor], size: float) -> AbstractContextManager[None]:
        """Inside, every point is moved by `size` times its direction; after it, it has its old bits."""
        return displaced(self.points, direction, size)


def norm(tensors: Sequence[Tensor]) -> float:
    """The Frobenius norm of all together, in float64."""
    return torch.stack([tensor.double().square().sum() for tensor in tensors]).sum().sqrt().item()
