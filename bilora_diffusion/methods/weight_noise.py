"""Random noise on the adapted weights that lives in the computation: no weight is changed, not even by rounding.

    y = x W'^T + x N^T,    N_ij = std_i T[o + i n + j],    std_i = sigma ||W'_i|| / sqrt(n)

for each output row i of the merged weight W' = W0 + s B A (- s B0 A0, with a start that is not zero), n its number of
inputs. T is a table of standard normal numbers, drawn once; o, where a layer's noise begins in it, is drawn anew for
each layer and step. N is made in the forward pass and again in the backward pass: it takes the memory of one layer and
works on any base, quantised ones and gradient checkpointing included, and reading it takes less time than drawing it
twice. Its norm is sigma ||W'||_F on average. Where the layer is fused the two products are one, x (W0 + N)^T: in half
precision the sum is rounded as any result is, so that a sigma below a few thousandths is lost.

Reference:
    Flat-LoRA: Low-Rank Adaptation over a Flat Loss Landscape (Li et al., 2025), arXiv 2409.14396, Eq. 6-8.
    Evolution Strategies as a Scalable Alternative to Reinforcement Learning (Salimans et al., 2017), arXiv 1703.03864,
    section 2.1: perturbations of a network read at random places of one block of Gaussian noise.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from bilora_diffusion.adapters import PRIMARY, adapted_layers
from bilora_diffusion.fused import FusedLinear
from bilora_diffusion.methods.row_norms import RowNorms, base_weight, noise_dtype
from bilora_diffusion.randomness import generator, stream_seed

__all__ = ["WeightNoise", "table_length"]

PLACES = 1 << 19
"""Where a layer's noise may begin."""
STRIDE = 8
"""Numbers from one place to the next: 16 bytes in half precision, which a GPU reads at once."""


def table_length(largest: int) -> int:
    """Numbers in the table for a largest layer of so many weights."""
    return PLACES * STRIDE + largest


class WeightNoise:
    """Noise on every layer that carries the primary.

    Arguments:
        models: the trained parts, the primary attached.
        seed: the run's; the noise of a step depends on it, the step and the layer.
    """

    def __init__(self, models: Mapping[str, nn.Module], seed: int) -> None:
        self.seed = seed
        self._layers = [
            (f"{part}.{name}", _LayerNoise(layer))
            for part, model in models.items()
            for name, layer in adapted_layers(model)
        ]
        self._norms = RowNorms([noise.layer for _, noise in self._layers])
        largest = max((noise.size for _, noise in self._layers), default=0)
        numbers = torch.randn(table_length(largest), generator=generator(seed, "noise table"))
        tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        for _, noise in self._layers:
            if noise.place not in tables:
                tables[noise.place] = numbers.to(*noise.place)
            noise.table = tables[noise.place]

    @contextmanager
    def on(self, step: int, sigma: float) -> Iterator[None]:
        """Inside, every layer computes with the noise of this step, in the backward pass too.

        Arguments:
            sigma: the noise's norm as a share of the weights', at least 0.
        """
        undo: list[Callable[[], object]] = []
        try:
            if sigma > 0:
                for (name, noise), deviation in zip(self._layers, self._norms.deviations(sigma), strict=True):
                    offset = STRIDE * (stream_seed(self.seed, "weight noise", name, step) % PLACES)
                    undo.append(noise.at(offset, deviation).put_on())
            yield
        finally:
            for take_off in undo:
                take_off()


class _LayerNoise:
    """N of one layer, which `at` makes that of a step.

    Attributes:
        size: how many numbers it has.
        place: the table's device and precision: the device of the factors, and `noise_dtype`.
        table: T, given afterwards.
        offset: o of the step.
        deviation: std_i of the step, (out,), in the table's precision.
    """

    table: Tensor
    offset: int
    traced_offset: Tensor
    deviation: Tensor

    def __init__(self, layer: BaseTunerLayer) -> None:
        self.layer = layer
        self.kernel = _kernel(layer)
        self.inputs = math.prod(self.kernel)
        weight = base_weight(layer)
        self.size = weight.numel()
        self.place = layer.lora_A[PRIMARY].weight.device, noise_dtype(weight)

    def at(self, offset: int, deviation: Tensor) -> "_LayerNoise":
        """The noise of these deviations that begins there in the table."""
        noise = copy.copy(self)
        noise.deviation = deviation
        noise.offset = offset
        noise.traced_offset = torch.tensor(offset)  # on the host; --compile takes another number for another program
        return noise

    def put_on(self) -> Callable[[], object]:
        """Lets the layer compute with it; returns what takes it off."""
        if isinstance(self.layer, FusedLinear):
            self.layer.perturbation = self
            return lambda: delattr(self.layer, "perturbation")
        hook = self.layer.register_forward_hook(lambda layer, given, y: y + self.product(given[0].to(y.dtype)))
        return hook.remove

    def whole(self) -> Tensor:
        """N as (out, in) or (out, in, k, k), in the table's precision."""
        rows = _rows(self.table, self.deviation, self.offset, self.inputs)
        return (rows * self.deviation[:, None]).view(-1, *self.kernel)

    def linear(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """x (W0 + N)^T + b, (rows, in) -> (rows, out); without a weight x N^T alone."""
        return self._product(x, weight, bias, transposed=False)

    def backward(self, gradient: Tensor, weight: Tensor | None) -> Tensor:
        """g (W0 + N), (rows, out) -> (rows, in); without a weight g N alone."""
        return self._product(gradient, weight, None, transposed=True)

    def _product(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, *, transposed: bool) -> Tensor:
        noise = self.table, self.deviation
        if torch.compiler.is_compiling():
            return _opaque_product(x, weight, bias, *noise, self.traced_offset, self.inputs, transposed)
        return _perturbed_product(x, weight, bias, *noise, self.offset, self.inputs, transposed)

    def product(self, x: Tensor) -> Tensor:
        """x N^T, or the convolution of x with N."""
        return _NoiseProduct.apply(x, self)


def _rows(table: Tensor, deviation: Tensor, offset: int, inputs: int) -> Tensor:
    """Standard normal numbers, (out, inputs); a view."""
    return table.narrow(0, offset, len(deviation) * inputs).view(-1, inputs)


def _perturbed_product(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    table: Tensor,
    deviation: Tensor,
    offset: int,
    inputs: int,
    transposed: bool,
) -> Tensor:
    """The sum W0 + N is rounded once."""
    rows, deviations = _rows(table, deviation, offset, inputs), deviation[:, None]
    perturbed = rows * deviations if weight is None else torch.addcmul(weight, rows, deviations)
    perturbed = perturbed.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return x @ perturbed if transposed else linear(x, perturbed, None if bias is None else bias.to(x.dtype))


@torch.library.custom_op("bilora_diffusion::perturbed_product", mutates_args=())
def _opaque_product(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    table: Tensor,
    deviation: Tensor,
    offset: Tensor,
    inputs: int,
    transposed: bool,
) -> Tensor:
    """`_perturbed_product` for --compile, which would keep N for the backward pass."""
    return _perturbed_product(x, weight, bias, table, deviation, int(offset), inputs, transposed)


@_opaque_product.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    table: Tensor,
    deviation: Tensor,
    offset: Tensor,
    inputs: int,
    transposed: bool,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], inputs if transposed else len(deviation))


class _NoiseProduct(torch.autograd.Function):
    """x N^T, or the convolution of x with N; N is made anew in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, noise: _LayerNoise) -> Tensor:
        ctx.noise, ctx.shape = noise, x.shape
        if len(noise.kernel) == 1:
            return noise.linear(x, None, None)
        with torch.autocast(x.device.type, enabled=False):
            return conv2d(x, noise.whole().to(x.dtype), None, *_geometry(noise.layer))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        noise = ctx.noise
        if len(noise.kernel) == 1:
            return noise.backward(gradient, None), None
        whole = noise.whole().to(gradient.dtype)
        with torch.autocast(gradient.device.type, enabled=False):
            return torch.nn.grad.conv2d_input(ctx.shape, whole, gradient, *_geometry(noise.layer)), None


def _geometry(layer: BaseTunerLayer) -> tuple[Any, ...]:
    base = layer.get_base_layer()
    return base.stride, base.padding, base.dilation, base.groups


def _kernel(layer: BaseTunerLayer) -> tuple[int, ...]:
    """What follows `out` in the weight's shape. A quantised weight has another shape than it stands for."""
    base = layer.get_base_layer()
    return (base.in_features,) if hasattr(base, "in_features") else tuple(base.weight.shape[1:])
