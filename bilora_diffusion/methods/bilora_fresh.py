"""Bi-LoRA with a fresh perturbation: the auxiliary is filled anew from each batch, by a cheap pass of its own.

Along the strongest directions of the batch's own gradient (`--ascent_basis gradient`):

    A2 = B2 = 0:  the ascent pass, over a share of the rows, leaves a sketch of rank r of the weights' gradient G
    s B2 A2 = rho G / ||G||_F over all layers
    descent pass over all rows at W0 + s B1 A1 + s B2 A2; afterwards A2 = B2 = 0 again

Along directions that persist (`--ascent_basis tracked`), where the rows of A2 are orthonormal:

    B2 = 0:  gB = s G A2'  over a share of the rows                         a cheap ascent pass
    B2 = rho gB / ||gB||_F over all layers: the maximiser of <G, s B2 A2> over ||s B2 A2||_F <= rho for these rows A2
    descent pass over all rows at W0 + s B1 A1 + s B2 A2: the primary's gradient, and dL/dA2 = s B2' G
    B2 = 0 again;  A2 = the rows of dL/dA2 made orthonormal                 a power iteration on G'G

Why: the auxiliary of Bi-LoRA is a slow perturbation, which the primary compensates; what helps in diffusion is the
ascent direction of the very batch, with its noise and timesteps. Its gradient is needed only in a space of rank r,
and one such space is what the gradients of all batches share. A sketch gets closer to the exact maximiser: it costs
three thin products a layer where the tracked rows cost one, and the descent pass has no gradient of A2 to compute.

1 + share passes a step (the share is of one row at least: 2 passes at a batch of one), in which the ascent pass has no
gradient of the primary to compute; every k-th step only with `--ascent_every`. The extra memory is the auxiliary,
and while the gradient is taken along its sketch, about two adapters. rho = 0 is LoRA.

Reference: this project; the parts are SAM (arXiv 2010.01412), Bi-LoRA (arXiv 2508.19564) and subspace iteration.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bilora_diffusion.adapters import LowRank
from bilora_diffusion.applied import copy_if
from bilora_diffusion.methods.gradient_sketch import GradientSketch, fill
from bilora_diffusion.methods.interface import Method, MicroBatch, backward_each, gradients, unit, without_gradients

__all__ = ["BiLoRAFresh", "orthonormal_rows"]


class BiLoRAFresh(Method):
    """Arguments:
    layers: the auxiliary over all parts; A2 is made orthonormal here, or zero where there is a sketch.
    primary: the primary's parameters, which the ascent pass needs no gradient of.
    rho: ||s B2 A2||_F over all layers, greater than 0.
    share: of the rows that the ascent pass sees, in (0, 1].
    every: steps from one perturbed step to the next; the others are plain LoRA.
    sketch: of the auxiliary's rank; None: along the tracked rows.
    """

    perturbs = True

    def __init__(
        self,
        layers: Sequence[LowRank],
        primary: Sequence[nn.Parameter],
        rho: float,
        share: float = 1.0,
        every: int = 1,
        sketch: GradientSketch | None = None,
    ) -> None:
        super().__init__()
        self.layers = layers
        self.primary = list(primary)
        self.rho = rho
        self.share = share
        self.every = every
        self.sketch = sketch
        self.parameters = [layer.A for layer in layers] if sketch is None else []
        self._columns = [layer.B for layer in layers]
        self._filled = self._columns if sketch is None else [f for layer in layers for f in (layer.A, layer.B)]
        self._scales = [layer.scale for layer in layers]
        self._step = 0
        for layer in layers:
            layer.A.data.copy_(orthonormal_rows(layer.A.data) if sketch is None else torch.zeros_like(layer.A))

    @contextmanager
    def perturbed(self, micro_batches: Sequence[MicroBatch]) -> Iterator[None]:
        """Where the next perturbed step takes its gradient."""
        rows = [layer.A for layer in self.layers]
        try:
            with without_gradients([*self.primary, *rows]):
                self._ascend(micro_batches)
            with without_gradients(self._filled):
                yield
        finally:
            torch._foreach_zero_([factor.data for factor in self._filled])

    def _ascend(self, micro_batches: Sequence[MicroBatch]) -> None:
        if self.sketch is not None:
            with self.sketch.collecting(self._step):
                gradients(micro_batches, self._columns, self.share)  # for the sake of the pass: B2 is where it begins
            fill(self.layers, self.sketch.factors(), self.rho)
            return
        found = gradients(micro_batches, self._columns, self.share)
        # The ball counts C = s B2, in which the gradient is G A2' = gB / s.
        direction = unit(torch._foreach_div(found, self._scales))
        values = [column.data for column in self._columns]
        torch._foreach_add_(values, torch._foreach_div(direction, self._scales), alpha=self.rho)

    def accumulate(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        if self._step % self.every:
            with without_gradients([*self.parameters, *self._filled]):
                return backward_each(micro_batches)
        return super().accumulate(micro_batches)

    @torch.no_grad()
    def after_step(self, applied: Tensor) -> None:
        followed = [layer.A for layer in self.layers if layer.A.grad is not None]
        copy_if(applied, followed, [orthonormal_rows(A.grad) for A in followed])
        for A in followed:
            A.grad = None
        self._step += 1

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step = state["step"]


def orthonormal_rows(matrix: Tensor) -> Tensor:
    """(r, ...) -> the same shape, its r rows orthonormal and spanning the same space, by QR in float32.

    Rows of zeros, and a rank below r, give some orthonormal rows all the same. More rows than entries cannot be
    orthonormal: the surplus is zero.
    """
    flat = matrix.detach().flatten(1).float()
    q, _ = torch.linalg.qr(flat.mT)
    rows = torch.zeros_like(flat)
    rows[: q.shape[1]] = q.mT
    return rows.view_as(matrix)
