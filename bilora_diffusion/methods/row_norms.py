"""The norms of the merged weights' rows, without the merged weights.

    ||W0_i + s B_i A||^2 = ||W0_i||^2 + s B_i . (2 W0_i A' + s B_i A A')

Every product has r columns, and layers of one shape share all of them but W0 A'. That one is taken in the base's
precision.
"""

from collections.abc import Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor

from bilora_diffusion.adapters import PRIMARY, START

__all__ = ["RowNorms", "base_weight"]


class RowNorms:
    """||W'_i|| of W' = W0 + s B A (- s B0 A0, with a start that is not zero).

    Arguments:
        layers: with the primary attached, on one device.
    """

    def __init__(self, layers: Sequence[BaseTunerLayer]) -> None:
        self.layers = layers
        alike: dict[tuple, list[int]] = {}
        for index, layer in enumerate(layers):
            if PRIMARY not in layer.lora_magnitude_vector:
                A, B = _factors(layer)
                alike.setdefault((A.shape, B.shape), []).append(index)
        with torch.no_grad():
            self._groups = [
                (members, torch.stack([base_weight(layers[index]).float().square().sum(1) for index in members]))
                for members in alike.values()
            ]  # ||W0_i||^2 never changes

    @torch.no_grad()
    def now(self) -> list[Tensor]:
        """(out,) of each layer, float32. With DoRA they are the magnitudes."""
        norms: list[Tensor | None] = [None] * len(self.layers)
        for members, squares in self._groups:
            A, B = map(torch.stack, zip(*(_factors(self.layers[index]) for index in members), strict=True))
            projected = torch.stack([_projected(self.layers[index], A[n]) for n, index in enumerate(members)])
            changed = torch.baddbmm(projected, B, A @ A.mT, beta=2)
            for index, norm in zip(members, (squares + (B * changed).sum(2)).clamp_min(0).sqrt().unbind(), strict=True):
                norms[index] = norm
        for index, layer in enumerate(self.layers):
            if norms[index] is None:
                norms[index] = layer.lora_magnitude_vector[PRIMARY].weight.detach().flatten().float().abs()
        return norms


def base_weight(layer: BaseTunerLayer) -> Tensor:
    """W0 as (out, inputs), in the precision that the base has."""
    return dequantize_module_weight(layer.get_base_layer()).detach().flatten(1)


def _projected(layer: BaseTunerLayer, A: Tensor) -> Tensor:
    """W0 A', (out, r), float32."""
    weight = base_weight(layer)
    return (weight @ A.mT.to(weight.dtype)).to(A.dtype)


def _factors(layer: BaseTunerLayer) -> tuple[Tensor, Tensor]:
    """A (r, inputs) and s B (out, r), float32, of the primary and the start side by side."""
    present = [adapter for adapter in (PRIMARY, START) if adapter in layer.lora_A]
    A = [layer.lora_A[adapter].weight.detach().flatten(1).float() for adapter in present]
    B = [layer.lora_B[adapter].weight.detach().flatten(1).float() * layer.scaling[adapter] for adapter in present]
    return (A[0], B[0]) if len(present) == 1 else (torch.cat(A), torch.cat(B, 1))
