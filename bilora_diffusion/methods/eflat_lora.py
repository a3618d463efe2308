"""EFlat-LoRA (EFMLoRA): a SAM step in the space of the full weights, estimated from the factors and kept as an average.

    gA, gB = gradients at (A, B + E)                                        one pass
    gW = ( gB (A')^+  +  ((B + E)')^+ gA ) / (2 s)                          (Eq. 12), for each layer
    EB = rho / s * gW / ||gW||_F A^+                                        (Eq. 15)
    the optimiser steps from (A, B);  E = (1 - beta) E + beta EB

One pass a step; the extra memory is E, of B's size, and a copy of B. rho = 0 is LoRA. The paper prints sign(gW) gW in
place of gW, which would be |gW|: taken as a slip of the general SAM formula. The numbers it used for rho and beta are
not known to us. gW is never built: everything goes through r x r matrices.

While B is zero the second term is left out, as its pseudo-inverse is; so the first gW is half of what it estimates.

Reference:
    EFlat-LoRA: Efficiently Seeking Flat Minima for Better Generalization (2025), arXiv 2508.00522, Algorithm 2.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bilora_diffusion.adapters import LowRank, wide_dtype
from bilora_diffusion.applied import copy_if
from bilora_diffusion.methods.displacement import displaced
from bilora_diffusion.methods.interface import Method, MicroBatch

__all__ = ["EFlatLoRA"]

RIDGE = 1e-9
"""Added to a Gram matrix, as a share of its trace, before it is inverted: an exact zero and a lost rank stay finite."""


class EFlatLoRA(Method):
    """Arguments:
    layers: the primary over all parts.
    rho: the norm of a layer's step in the space of its weights.
    beta: weight of the newest step in the average, in (0, 1].
    """

    perturbs = True

    def __init__(self, layers: Sequence[LowRank], rho: float, beta: float) -> None:
        super().__init__()
        self.layers = layers
        self.rho = rho
        self.beta = beta
        self._columns = [layer.B for layer in layers]
        self._average = [torch.zeros_like(B) for B in self._columns]
        self._found: list[Tensor] = []

    @contextmanager
    def perturbed(self, micro_batches: Sequence[MicroBatch]) -> Iterator[None]:
        with displaced(self._columns, self._average):
            yield

    def before_step(self, applied: Tensor) -> None:
        """The factors are still those of the gradients. A common factor of the gradients, as clipping's, cancels."""
        self._found = [
            climb(layer, average, self.rho) for layer, average in zip(self.layers, self._average, strict=True)
        ]

    def after_step(self, applied: Tensor) -> None:
        copy_if(applied, self._average, torch._foreach_lerp(self._average, self._found, self.beta))

    def state_dict(self) -> dict[str, Any]:
        return {"average": self._average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        saved: list[Tensor] = state["average"]
        self._average = [value.to(old) for value, old in zip(saved, self._average, strict=True)]


@torch.no_grad()
def climb(layer: LowRank, perturbation: Tensor, rho: float) -> Tensor:
    """EB of one layer, in the shape of its B, from the gradients in `.grad`.

    Arguments:
        perturbation: E, that was added to B when the gradients were taken.
    """
    if layer.A.grad is None or layer.B.grad is None:
        return torch.zeros_like(layer.B)
    dtype = wide_dtype(layer.A.device)
    A, gA = (t.detach().flatten(1).to(dtype) for t in (layer.A, layer.A.grad))
    B, gB = ((t.detach().flatten(1)).to(dtype) for t in (layer.B + perturbation, layer.B.grad))
    of_A, of_B = _inverse(A @ A.mT), _inverse(B.mT @ B)
    # gW = L1 A + L2 gA with two tall factors, up to 1 / (2 s), which the norm takes out.
    L1, L2 = gB @ of_A, B @ of_B
    square = ((L1.mT @ L1) * (A @ A.mT)).sum() + ((L2.mT @ L2) * (gA @ gA.mT)).sum()
    square = square + 2 * ((L1.mT @ L2) * (A @ gA.mT)).sum()
    norm = square.clamp_min(0).sqrt()
    step = (gB + L2 @ (gA @ A.mT)) @ of_A  # gW A' (A A')^-1
    return (step * torch.where(norm > 0, rho / (layer.scale * norm), 0.0)).to(layer.B.dtype).view_as(layer.B)


def _inverse(gram: Tensor) -> Tensor:
    """Of a symmetric r x r matrix; zero for zero. Never waits for the device."""
    size = gram.diagonal().sum()
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    safe = gram + eye * torch.where(size > 0, RIDGE * size, 1.0)
    inverse, _ = torch.linalg.inv_ex(safe)
    return torch.where(size > 0, inverse, 0.0)
