"""The factors of a layer's adapters side by side, in the precision of its products, for many layers at once.

    down = [A1; A2]  (r1 + r2, in),     up = [B1, B2]  (out, r1 + r2)

Joined and converted layer by layer, the small copies of SDXL's 560 layers would be a quarter of all that a step asks of
a GPU, which waits for each; layers of one shape, and there are four, take the same few copies together. So do their
gradients on the way back.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Joined", "LayerFactors", "join"]

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


def join(layers: Sequence[LayerFactors], dtype: torch.dtype) -> list[Joined]:
    """Joins each layer's factors. They are the factors themselves, no copies, where there is nothing to do.

    The gradients come to the factors in their own precision; a layer that the loss does not see leaves its factors
    without.
    """
    joined: list[Joined | None] = [None] * len(layers)
    groups: dict[tuple, list[int]] = {}
    for index, adapters in enumerate(layers):
        groups.setdefault(tuple(_kind(*adapter) for adapter in adapters), []).append(index)
    for members in groups.values():
        A, B, scales = zip(*(zip(*layers[index], strict=True) for index in members), strict=True)
        common = scales[0][0] if len(set(scales[0])) == 1 else None
        ones = (1.0,) * len(scales[0])
        downs = _side_by_side(A, 0, ones, dtype)
        ups = _side_by_side(B, 1, ones if common is not None else scales[0], dtype)
        ranks = tuple(len(one) for one in A[0])
        for index, down, up in zip(members, downs, ups, strict=True):
            joined[index] = Joined(down, up, 1.0 if common is None else common, ranks)
    return joined


def _kind(A: Tensor, B: Tensor, scale: float) -> tuple:
    """What layers have in common that are joined together."""
    return A.shape, B.shape, A.requires_grad, B.requires_grad, A.dtype, A.device, scale


def _side_by_side(
    factors: Sequence[Sequence[Tensor]], dim: int, scales: Sequence[float], dtype: torch.dtype
) -> Sequence[Tensor]:
    """Arguments: factors: of each layer, those of its adapters, times their scales."""
    if len(scales) == 1 and factors[0][0].dtype == dtype:
        return [one for (one,) in factors]
    by_adapter = [factor for of_one_adapter in zip(*factors, strict=True) for factor in of_one_adapter]
    return _Join.apply(dim, scales, dtype, *by_adapter)


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
