"""Running code without data: what a computation would hold on a GPU, counted on tensors of the `meta` device.

Such tensors have shapes, precisions and an autograd graph, and no values. Three things are put around the real code:

    counting       bytes of every storage that lives, and the most there were at once
    autocast       as CUDA's: products in half precision, norms and softmax in float32, `cat` in the widest given
    attention      as CUDA's kernels: q, k, v, the output and one number a row are kept, never the attention matrix

What they do not see: what a kernel needs for itself while it runs (convolutions, attention's backward pass), and the
gaps between the allocator's blocks.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from bilora_diffusion.memory.counting import StorageCounter

__all__ = ["META", "MemoryCounter", "cuda_arithmetic"]

META = torch.device("meta")

aten = torch.ops.aten


@functools.cache
def _is_in_place(func: Any) -> bool:
    """Whether an operation changes its first argument's values and no more."""
    name = func._schema.name
    return name.endswith("_") and not name.endswith("__") and torch.Tag.inplace_view not in func.tags


def _like_first(first: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(first)


def _like_both(first: Tensor, other: Any, **_: Any) -> Tensor | None:
    if isinstance(other, Tensor) and (other.shape, other.dtype) != (first.shape, first.dtype):
        return None
    return torch.empty_like(first) if first.is_floating_point() else None


def _zeros_like(first: Tensor, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return torch.empty_like(first, dtype=dtype)


def _addmm(_: Tensor, one: Tensor, other: Tensor, **__: Any) -> Tensor:
    return one.new_empty(one.shape[0], other.shape[1])


def _layer_norm(x: Tensor, normalized: list[int], *_: Any) -> tuple[Tensor, ...]:
    shape = (*x.shape[: x.ndim - len(normalized)], *[1] * len(normalized))
    return torch.empty_like(x), *(x.new_empty(shape, dtype=torch.float32) for _ in range(2))


def _group_norm(x: Tensor, _: Any, __: Any, rows: int, ___: int, ____: int, groups: int, *_____: Any) -> tuple:
    return torch.empty_like(x), x.new_empty(rows, groups), x.new_empty(rows, groups)


def _layer_norm_backward(*args: Any) -> tuple[Tensor | None, ...]:
    return _gradients_like((args[1], *args[5:7]), args[7])


def _group_norm_backward(*args: Any) -> tuple[Tensor | None, ...]:
    return _gradients_like((args[1], args[4], args[4]), args[9])


def _gradients_like(tensors: tuple[Tensor, ...], wanted: list[bool]) -> tuple[Tensor | None, ...]:
    return tuple(torch.empty_like(one) if needed else None for one, needed in zip(tensors, wanted, strict=True))


OUTPUTS: dict[Any, Callable[..., Any]] = {
    aten.gelu.default: _like_first,
    aten.gelu_backward.default: _like_first,
    aten.silu.default: _like_first,
    aten.silu_backward.default: _like_first,
    aten.zeros_like.default: _zeros_like,
    aten.neg.default: _like_first,
    aten.sqrt.default: _like_first,
    aten.add.Tensor: _like_both,
    aten.mul.Tensor: _like_both,
    aten.div.Tensor: _like_both,
    aten.addmm.default: _addmm,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
    aten.native_group_norm.default: _group_norm,
    aten.native_group_norm_backward.default: _group_norm_backward,
}
"""What these give, where torch's own answer for `meta` takes milliseconds; None leaves it to torch."""


class MemoryCounter(StorageCounter):
    """Counts on `meta`, where values are not computed: numbers that are asked of such a tensor (`.item()`) are 1.

    Arguments:
        known: as `StorageCounter`'s.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__(META, known)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1.0 if args[0].is_floating_point() else 1
        result, on_meta = None, bool(args) and isinstance(args[0], Tensor) and args[0].is_meta
        if on_meta and _is_in_place(func):
            return args[0]
        if on_meta and func in OUTPUTS:
            result = OUTPUTS[func](*args, **(kwargs or {}))
        return self.seen(func(*args, **(kwargs or {})) if result is None else result)


# CUDA's autocast lists (torch/csrc: autocast_mode.h), as far as SDXL's parts call them.
IN_HALF = {
    functional.linear,
    functional.conv2d,
    torch.matmul,
    torch.bmm,
    torch.mm,
    torch.baddbmm,
    torch.addmm,
    Tensor.matmul,
    Tensor.__matmul__,
}
IN_FLOAT32 = {
    functional.layer_norm,
    functional.group_norm,
    functional.softmax,
    torch.softmax,
    Tensor.softmax,
    functional.mse_loss,
}
IN_WIDEST = {torch.cat, torch.stack}


class _Arithmetic(TorchFunctionMode):
    """Arguments: dtype: of autocast; float32: off."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = None if dtype == torch.float32 else dtype

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return _attention(self._cast, *args, **kwargs)
        if self.dtype is not None:
            if func in IN_HALF:
                args, kwargs = _mapped(args, kwargs, lambda tensor: self._cast(tensor))
            elif func in IN_FLOAT32:
                args, kwargs = _mapped(args, kwargs, Tensor.float)
            elif func in IN_WIDEST and len({tensor.dtype for tensor in args[0]}) > 1:
                args = ([tensor.float() for tensor in args[0]], *args[1:])
        return func(*args, **kwargs)

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor if self.dtype is None else tensor.to(self.dtype)


def _mapped(args: tuple, kwargs: dict, change: Callable[[Tensor], Tensor]) -> tuple[tuple, dict]:
    def one(value: Any) -> Any:
        eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return change(value) if eligible else value

    return tuple(map(one, args)), {name: one(value) for name, value in kwargs.items()}


def _attention(
    cast: Callable[[Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    query, key, value = cast(query), cast(key), cast(value)
    bias = None
    if attn_mask is not None:
        shape = (*query.shape[:-1], key.shape[-2])
        bias = torch.empty(attn_mask.shape, dtype=query.dtype, device=META).expand(shape)
    kept = any(tensor.requires_grad for tensor in (query, key, value)) and torch.is_grad_enabled()
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    return attend(query, key, value, bias, kept, dropout_p, is_causal, scale=scale)[0]


@contextmanager
def cuda_arithmetic(dtype: torch.dtype) -> Iterator[None]:
    """Inside, functions of `meta` tensors choose precisions and kernels as on CUDA.

    torch knows no autocast for `meta`; code that asks whether it is on is told so here.

    Arguments:
        dtype: float16 or bfloat16 for autocast in it, float32 for none.
    """
    is_enabled, get_dtype = torch.is_autocast_enabled, torch.get_autocast_dtype

    def enabled(*device: str) -> bool:
        return dtype != torch.float32 if device == (META.type,) else is_enabled(*device)

    def chosen(device: str) -> torch.dtype:
        return dtype if device == META.type else get_dtype(device)

    with (
        mock.patch.object(torch, "is_autocast_enabled", enabled),
        mock.patch.object(torch, "get_autocast_dtype", chosen),
        _Arithmetic(dtype),
    ):
        yield
