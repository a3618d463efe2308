"""The norms of the merged weights' rows, without the merged weights.

    ||W0_i + s B_i A||^2 = ||W0_i||^2 + s B_i . (2 W0_i A' + s B_i A A')

Every product has r columns, and layers of one shape share all of them but W0 A'. That one is taken in the base's
precision.
"""

import math
from collections.abc import Sequence

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor

from bilora_diffusion.adapters import PRIMARY, START

__all__ = ["RowNorms", "base_weight", "noise_dtype"]


class RowNorms:
    """||W'_i|| of W' = W0 + s B A (- s B0 A0, with a start that is not zero). With DoRA they are the magnitudes.

    Arguments:
        layers: with the primary attached, on one device.
    """

    def __init__(self, layers: Sequence[BaseTunerLayer]) -> None:
        self._count = len(layers)
        alike: dict[tuple, list[int]] = {}
        for index, layer in enumerate(layers):
            alike.setdefault(_kind(layer), []).append(index)
        self._groups = [(members, _group([layers[index] for index in members])) for members in alike.values()]

    def now(self) -> list[Tensor]:
        """(out,) of each layer, float32."""
        return self._by_layer([group.norms() for _, group in self._groups])

    def deviations(self, sigma: float) -> list[Tensor]:
        """sigma ||W'_i|| / sqrt(inputs), of noise whose norm is sigma times the weights': (out,), `noise_dtype`."""
        return self._by_layer(
            [(group.norms() * (sigma / math.sqrt(group.inputs))).to(group.dtype) for _, group in self._groups]
        )

    def _by_layer(self, stacks: Sequence[Tensor]) -> list[Tensor]:
        found: list[Tensor | None] = [None] * self._count
        for (members, _), stack in zip(self._groups, stacks, strict=True):
            for index, one in zip(members, stack.unbind(), strict=True):
                found[index] = one
        return found


class _Plain:
    """Layers of one shape: one product with r columns for each, all else together.

    Arguments:
        layers: of one `_kind`.

    Attributes:
        inputs: of a row.
        dtype: `noise_dtype` of each.
    """

    @torch.no_grad()
    def __init__(self, layers: Sequence[LoraLayer]) -> None:
        self.layers = layers
        weights = [base_weight(layer) for layer in layers]
        self.inputs, self.dtype = weights[0].shape[1], noise_dtype(weights[0])
        self._squares = torch.stack([weight.float().square().sum(1) for weight in weights])  # these never change

    @torch.no_grad()
    def norms(self) -> Tensor:
        """(layers, out), float32."""
        A, B = self._factors()
        weights = [base_weight(layer) for layer in self.layers]
        columns = A.mT.to(weights[0].dtype)
        projected = torch.stack([weight @ one for weight, one in zip(weights, columns, strict=True)]).to(A.dtype)
        changed = torch.baddbmm(projected, B, A @ A.mT, beta=2)
        return (self._squares + (B * changed).sum(2)).clamp_min(0).sqrt()

    def _factors(self) -> tuple[Tensor, Tensor]:
        """A (layers, r, inputs) and s B (layers, out, r), float32, of the primary and the start side by side."""
        A, B = [], []
        for adapter in (PRIMARY, START):
            if adapter in self.layers[0].lora_A:
                A.append(torch.stack([layer.lora_A[adapter].weight.flatten(1) for layer in self.layers]).float())
                own = torch.stack([layer.lora_B[adapter].weight.flatten(1) for layer in self.layers]).float()
                B.append(own * self.layers[0].scaling[adapter])
        return (A[0], B[0]) if len(A) == 1 else (torch.cat(A, 1), torch.cat(B, 2))


class _DoRA(_Plain):
    """The same with magnitudes, which are the norms."""

    @torch.no_grad()
    def norms(self) -> Tensor:
        return (
            torch.stack([layer.lora_magnitude_vector[PRIMARY].weight.flatten() for layer in self.layers]).float().abs()
        )


def _group(layers: Sequence[LoraLayer]) -> _Plain:
    return (_DoRA if PRIMARY in layers[0].lora_magnitude_vector else _Plain)(layers)


def _kind(layer: LoraLayer) -> tuple:
    """What layers have in common that are taken together."""
    adapters = [adapter for adapter in (PRIMARY, START) if adapter in layer.lora_A]
    factors = [factor[adapter].weight for adapter in adapters for factor in (layer.lora_A, layer.lora_B)]
    return (
        *(factor.shape for factor in factors),
        *(layer.scaling[adapter] for adapter in adapters),
        PRIMARY in layer.lora_magnitude_vector,
        base_weight(layer).dtype,
    )


def base_weight(layer: BaseTunerLayer) -> Tensor:
    """W0 as (out, inputs), in the precision that the base has."""
    return dequantize_module_weight(layer.get_base_layer()).detach().flatten(1)


def noise_dtype(weight: Tensor) -> torch.dtype:
    """A half precision as the weight has it, so that noise is added to it as it is; else float32."""
    return weight.dtype if weight.itemsize == 2 else torch.float32
