"""The factors of a layer's adapters side by side, in the precision of its products, for many layers at once.

    down = [A1; A2]  (r1 + r2, in),     up = [B1, B2]  (out, r1 + r2)

Joined and converted layer by layer, the small copies of SDXL's 560 layers would be a quarter of all that a step asks of
a GPU, which waits for each; layers of one shape, and there are four, take the same few copies together. So do their
gradients on the way back.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Joined", "Joiner", "LayerFactors", "join"]

LayerFactors = Sequence[tuple[Tensor, Tensor, float]]
"""A (r, in), B (out, r) and s of each of a layer's adapters, one or more."""


class Joined(NamedTuple):
    """All adapters of a layer as one: s_1 B_1 A_1 + s_2 B_2 A_2 + ... = scale up down.

    Arguments:
        down, up: see above; with different s_i they are in `up`.
        scale: the s that all have, else 1.
        ranks: r of each adapter.
    """

    down: Tensor
    up: Tensor
    scale: float
    ranks: tuple[int, ...]


class Joiner:
    """Joins the factors of some layers, as often as their values change.

    Arguments:
        layers: none of which may change but for the factors' values.
    """

    def __init__(self, layers: Sequence[LayerFactors]) -> None:
        self._count = len(layers)
        alike: dict[tuple, list[int]] = {}
        for index, adapters in enumerate(layers):
            alike.setdefault(tuple(_kind(*adapter) for adapter in adapters), []).append(index)
        self._groups = [(members, _Group([layers[index] for index in members])) for members in alike.values()]

    def join(self, dtype: torch.dtype) -> list[Joined]:
        """They are the factors themselves, no copies, where there is nothing to do.

        The gradients come to the factors in their own precision; a layer that the loss does not see leaves its factors
        without.
        """
        joined: list[Joined | None] = [None] * self._count
        for members, group in self._groups:
            for index, one in zip(members, group.join(dtype), strict=True):
                joined[index] = one
        return joined


def join(adapters: LayerFactors, dtype: torch.dtype) -> Joined:
    """Of one layer; see `Joiner`."""
    return next(_Group([adapters]).join(dtype))


class _Group:
    """Layers of one kind. Factors are by adapter first: all layers' of the first, all of the second."""

    def __init__(self, layers: Sequence[LayerFactors]) -> None:
        by_adapter = [list(zip(*some, strict=True)) for some in zip(*layers, strict=True)]
        self.A = [A for A, _, _ in by_adapter]
        self.B = [B for _, B, _ in by_adapter]
        self.scales = tuple(scales[0] for _, _, scales in by_adapter)
        self.ranks = tuple(len(A[0]) for A in self.A)

    def join(self, dtype: torch.dtype) -> Iterator[Joined]:
        ones = (1.0,) * len(self.scales)
        has_common = len(set(self.scales)) == 1
        downs = _side_by_side(self.A, 0, ones, dtype)
        ups = _side_by_side(self.B, 1, ones if has_common else self.scales, dtype)
        scale = self.scales[0] if has_common else 1.0
        return (Joined(down, up, scale, self.ranks) for down, up in zip(downs, ups, strict=True))


def _kind(A: Tensor, B: Tensor, scale: float) -> tuple:
    """What layers have in common that are joined together."""
    return A.shape, B.shape, A.requires_grad, B.requires_grad, A.dtype, A.device, scale


def _side_by_side(
    factors: Sequence[Sequence[Tensor]], dim: int, scales: Sequence[float], dtype: torch.dtype
) -> Sequence[Tensor]:
    """Those of all adapters, times their scales, as one tensor a layer."""
    if len(factors) == 1 and factors[0][0].dtype == dtype:
        return factors[0]
    return _Join.apply(dim, scales, dtype, *itertools.chain.from_iterable(factors))


class _Join(torch.autograd.Function):
    """From all layers' factors of the first adapter, then all of the second, to one tensor a layer."""

    @staticmethod
    def forward(
        ctx: Any, dim: int, scales: Sequence[float], dtype: torch.dtype, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        count = len(factors) // len(scales)
        stacks = [_stack(factors[first : first + count]) for first in range(0, len(factors), count)]
        ctx.dim, ctx.scales, ctx.dtype = dim, scales, stacks[0].dtype
        ctx.ranks = [stack.shape[dim + 1] for stack in stacks]
        ctx.set_materialize_grads(False)  # zeros would bring a layer that the loss does not see weight decay
        stacks = [stack if s == 1 else stack * s for stack, s in zip(stacks, scales, strict=True)]
        whole = stacks[0] if len(stacks) == 1 else torch.cat(stacks, dim + 1)
        return whole.to(dtype).unbind()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        seen = [index for index, gradient in enumerate(gradients) if gradient is not None]
        found: list[Tensor | None] = [None] * (len(gradients) * len(ctx.scales))
        if seen:
            whole = _stack([gradients[index] for index in seen]).to(ctx.dtype)
            pieces = whole.split(ctx.ranks, ctx.dim + 1)
            for place, (piece, s) in enumerate(zip(pieces, ctx.scales, strict=True)):
                first = place * len(gradients)
                if ctx.needs_input_grad[3 + first]:
                    # Contiguous: autograd would copy the others, one by one.
                    own = (piece if s == 1 else piece * s).contiguous().unbind()
                    for index, gradient in zip(seen, own, strict=True):
                        found[first + index] = gradient
        return None, None, None, *found


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))
