"""Random noise on the adapted weights that lives in the computation: no weight is changed, not even by rounding.

    y = x W'^T + x N^T,    N_ij ~ std_i N(0, 1),    std_i = sigma ||W'_i|| / sqrt(n)

for each output row i of the merged weight W' = W0 + s B A (- s B0 A0, with a start that is not zero), n its number of
inputs. N is drawn from a seed when the product is computed and drawn again when the gradient is, so that it takes the
memory of one layer and works on any base, quantised ones and gradient checkpointing included. Its norm is
sigma ||W'||_F on average. Where the layer is fused the two products are one, x (W0 + N)^T: in half precision the sum is
rounded as any result is, so that a sigma below a few thousandths is lost.

Reference:
    Flat-LoRA: Low-Rank Adaptation over a Flat Loss Landscape (Li et al., 2025), arXiv 2409.14396, Eq. 6-8.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from bilora_diffusion.adapters import PRIMARY, START, adapted_layers
from bilora_diffusion.fused import FusedLinear
from bilora_diffusion.randomness import stream_seed

__all__ = ["WeightNoise"]


class WeightNoise:
    """Noise on every layer that carries the primary.

    Arguments:
        models: the trained parts, the primary attached.
        seed: the run's; the noise of a step depends on it, the step and the layer.
    """

    def __init__(self, models: Mapping[str, nn.Module], seed: int) -> None:
        self.seed = seed
        self.layers = [
            (f"{part}.{name}", layer) for part, model in models.items() for name, layer in adapted_layers(model)
        ]
        with torch.no_grad():
            self._squares = [_weight(layer).square().sum(1) for _, layer in self.layers]  # ||W0_i||^2, never changes

    @contextmanager
    def on(self, step: int, sigma: float) -> Iterator[None]:
        """Inside, every layer computes with the noise of this step, in the backward pass too.

        Arguments:
            sigma: the noise's norm as a share of the weights', at least 0.
        """
        undo: list[Callable[[], object]] = []
        try:
            if sigma > 0:
                for (name, layer), squares in zip(self.layers, self._squares, strict=True):
                    deviation = _row_norms(layer, squares) * (sigma / math.sqrt(_inputs(layer)))
                    noise = _LayerNoise(layer, deviation, stream_seed(self.seed, "weight noise", name, step))
                    undo.append(noise.put_on())
            yield
        finally:
            for take_off in undo:
                take_off()


class _LayerNoise:
    """N of one layer at one step; nothing is kept but its seed.

    Arguments:
        deviation: std_i, (out,), float32.
    """

    def __init__(self, layer: BaseTunerLayer, deviation: Tensor, seed: int) -> None:
        self.layer = layer
        self.deviation = deviation
        self.seed = seed
        self.traced_seed = torch.tensor(seed)  # on the host; --compile takes another number for another program
        self.kernel = _kernel(layer)

    def put_on(self) -> Callable[[], object]:
        """Lets the layer compute with it; returns what takes it off."""
        if isinstance(self.layer, FusedLinear):
            self.layer.perturbation = self
            return lambda: delattr(self.layer, "perturbation")
        hook = self.layer.register_forward_hook(lambda layer, given, y: y + self.product(given[0].to(y.dtype)))
        return hook.remove

    def draw(self) -> Tensor:
        """N as (out, in) or (out, in, k, k), float32."""
        return _draw(self.deviation, self.seed, math.prod(self.kernel)).reshape(-1, *self.kernel)

    def linear(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """x (W0 + N)^T + b, (rows, in) -> (rows, out); without a weight x N^T alone."""
        return self._product(x, weight, bias, transposed=False)

    def backward(self, gradient: Tensor, weight: Tensor | None) -> Tensor:
        """g (W0 + N), (rows, out) -> (rows, in); without a weight g N alone."""
        return self._product(gradient, weight, None, transposed=True)

    def _product(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, *, transposed: bool) -> Tensor:
        if torch.compiler.is_compiling():
            return _opaque_product(x, weight, bias, self.deviation, self.traced_seed, self.kernel[0], transposed)
        return _perturbed_product(x, weight, bias, self.deviation, self.seed, self.kernel[0], transposed)

    def product(self, x: Tensor) -> Tensor:
        """x N^T, or the convolution of x with N."""
        return _NoiseProduct.apply(x, self)


def _draw(deviation: Tensor, seed: int, inputs: int) -> Tensor:
    random = torch.Generator(deviation.device).manual_seed(seed)
    drawn = torch.randn(len(deviation), inputs, generator=random, device=deviation.device)
    return drawn.mul_(deviation[:, None])


def _perturbed_product(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    deviation: Tensor,
    seed: int,
    inputs: int,
    transposed: bool,
) -> Tensor:
    """The sum W0 + N is rounded once."""
    drawn = _draw(deviation, seed, inputs)
    perturbed = (drawn if weight is None else weight + drawn).to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return x @ perturbed if transposed else linear(x, perturbed, None if bias is None else bias.to(x.dtype))


@torch.library.custom_op("bilora_diffusion::perturbed_product", mutates_args=())
def _opaque_product(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    deviation: Tensor,
    seed: Tensor,
    inputs: int,
    transposed: bool,
) -> Tensor:
    """`_perturbed_product` for --compile, which cannot trace generators, and would keep N for the backward pass."""
    return _perturbed_product(x, weight, bias, deviation, int(seed), inputs, transposed)


@_opaque_product.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    deviation: Tensor,
    seed: Tensor,
    inputs: int,
    transposed: bool,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], inputs if transposed else len(deviation))


class _NoiseProduct(torch.autograd.Function):
    """x N^T, or the convolution of x with N; N is drawn anew in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, noise: _LayerNoise) -> Tensor:
        ctx.noise, ctx.shape = noise, x.shape
        if len(noise.kernel) == 1:
            return noise.linear(x, None, None)
        with torch.autocast(x.device.type, enabled=False):
            return conv2d(x, noise.draw().to(x.dtype), None, *_geometry(noise.layer))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        noise = ctx.noise
        if len(noise.kernel) == 1:
            return noise.backward(gradient, None), None
        drawn = noise.draw().to(gradient.dtype)
        with torch.autocast(gradient.device.type, enabled=False):
            return torch.nn.grad.conv2d_input(ctx.shape, drawn, gradient, *_geometry(noise.layer)), None


def _geometry(layer: BaseTunerLayer) -> tuple[Any, ...]:
    base = layer.get_base_layer()
    return base.stride, base.padding, base.dilation, base.groups


def _kernel(layer: BaseTunerLayer) -> tuple[int, ...]:
    """What follows `out` in the weight's shape. A quantised weight has another shape than it stands for."""
    base = layer.get_base_layer()
    return (base.in_features,) if hasattr(base, "in_features") else tuple(base.weight.shape[1:])


def _inputs(layer: BaseTunerLayer) -> int:
    return math.prod(_kernel(layer))


def _weight(layer: BaseTunerLayer) -> Tensor:
    """W0 as (out, inputs), float32."""
    return dequantize_module_weight(layer.get_base_layer()).detach().flatten(1).float()


@torch.no_grad()
def _row_norms(layer: BaseTunerLayer, squares: Tensor) -> Tensor:
    """||W'_i|| of the merged weight, (out,), float32.

    ||W0_i + s B_i A||^2 = ||W0_i||^2 + s B_i . (2 W0_i A' + s B_i A A'), with products of rank r only.
    """
    if PRIMARY in layer.lora_magnitude_vector:
        return layer.lora_magnitude_vector[PRIMARY].weight.detach().flatten().float().abs()  # a DoRA's rows have it
    present = [adapter for adapter in (PRIMARY, START) if adapter in layer.lora_A]
    A = torch.cat([layer.lora_A[adapter].weight.detach().flatten(1).float() for adapter in present])
    B = torch.cat(
        [layer.lora_B[adapter].weight.detach().flatten(1).float() * layer.scaling[adapter] for adapter in present],
        dim=1,
    )
    return (squares + (B * (2 * (_weight(layer) @ A.mT) + B @ (A @ A.mT))).sum(1)).clamp_min(0).sqrt()
