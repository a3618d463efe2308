"""Weights moved for a while and put back, the very same bits."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["displaced"]


@contextmanager
def displaced(parameters: Sequence[nn.Parameter], by: Sequence[Tensor], factor: float = 1.0) -> Iterator[None]:
    """Inside, each parameter is larger by `factor` times its displacement.

    The extra memory is one copy of the parameters: subtracting what was added would leave its rounding behind.
    """
    values = [parameter.data for parameter in parameters]
    kept = torch._foreach_mul(values, 1.0)  # on a GPU in a few calls, where a clone of each would take a thousand
    try:
        torch._foreach_add_(values, list(by), alpha=factor)
        yield
    finally:
        torch._foreach_copy_(values, kept)
