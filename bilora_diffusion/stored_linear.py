"""A frozen linear layer whose weight is kept in another form than it computes with, or in the computer's memory.

    y = x W0' + b,    W0 restored from what is stored when it is needed, in the forward and in the backward pass

Autograd keeps what is stored for the backward pass, so that on the device there is never more than one layer's weight
in full. A library's own quantised layer would keep the restored one (torchao's), or leave no place for the adapters in
its product: `fused` computes them and this weight together.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["StoredLinear", "StoredWeight", "compute_dtype"]


class StoredWeight(Protocol):
    """W0 in the form it is kept in; its values never change."""

    nbytes: int
    """What it takes where it is kept."""

    def restored(self, dtype: torch.dtype) -> Tensor:
        """W0, (out, in), a new tensor on the device of the computation."""
        ...


class StoredLinear(nn.Linear):
    """To its surroundings an ordinary frozen `nn.Linear`, whose `weight` is made anew at each reading.

    Arguments:
        layer: what it stands for; its bias is kept as it is.
        stored: its weight.
        dtype: of `weight`, the precision that the model around it has.
    """

    def __init__(self, layer: nn.Linear, stored: StoredWeight, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # that of nn.Linear would allocate a weight
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias
        # No parameter or buffer: whoever moves or converts the model must not convert this.
        self.stored = stored
        self.dtype = dtype
        self.train(layer.training)

    @property
    def weight(self) -> Tensor:
        """W0, (out, in), without a gradient."""
        return self.stored.restored(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in autocast's precision, else in that of x."""
        dtype = compute_dtype(x) or x.dtype
        return _Product.apply(x.to(dtype), self.stored, self.bias)


class _Product(torch.autograd.Function):
    """x W0' + b; nothing but x has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: StoredWeight, bias: Tensor | None) -> Tensor:
        ctx.stored = stored
        return nn.functional.linear(x, stored.restored(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ ctx.stored.restored(gradient.dtype), None, None


def compute_dtype(x: Tensor) -> torch.dtype | None:
    """The precision of the products: autocast's, else that of x; None for what autocast leaves alone."""
    if not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return None if x.dtype == torch.float64 else torch.get_autocast_dtype(x.device.type)
