"""Bi-LoRA whose perturbation is an ascent, in one pass: it follows the gradient of a step on the same pictures.

Each draw of pictures and timesteps serves two steps in a row (`--steps_per_draw`), each with a noise of its own:

    first step:   descent at W0 + s B1 A1; the same backward pass leaves a sketch of rank r of the weights' gradient G
    second step:  descent at W0 + s B1 A1 + s B2 A2, where s B2 A2 = rho G / ||G||_F over all layers

Why: Bi-LoRA's auxiliary follows the gradients of steps on other pictures and timesteps, and hardly raises the loss of
the one at hand. The sharp directions of a diffusion loss belong to the picture and its timestep, much less to the
noise: the gradient under another noise raises the loss by most of what the exact one does (`benchmarks.quality rises`).
The first step gives it for nothing.

One pass a step. The extra memory is the auxiliary, and while the gradient is taken along its sketch, about two
adapters. rho = 0 is LoRA on the same draws.

Reference: this project; the parts are SAM (arXiv 2010.01412) and Bi-LoRA (arXiv 2508.19564).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bilora_diffusion.adapters import LowRank, auxiliary_off
from bilora_diffusion.methods.gradient_sketch import GradientSketch, fill
from bilora_diffusion.methods.interface import Method, MicroBatch, backward_each, without_gradients

__all__ = ["BiLoRAEcho"]


class BiLoRAEcho(Method):
    """Arguments:
    models: the trained parts, the auxiliary attached.
    layers: the auxiliary over all parts, in the order of the models' adapted layers.
    rho: ||s B2 A2||_F over all layers, greater than 0.
    sketch: of the auxiliary's rank.
    steps_per_draw: optimiser steps on the same rows, 2 or more.
    """

    perturbs = True

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        layers: Sequence[LowRank],
        rho: float,
        sketch: GradientSketch,
        steps_per_draw: int,
    ) -> None:
        super().__init__()
        self.models = models
        self.layers = layers
        self.rho = rho
        self.sketch = sketch
        self.steps_per_draw = steps_per_draw
        self._step = 0
        self._collected = False
        self._empty()

    @contextmanager
    def perturbed(self, micro_batches: Sequence[MicroBatch]) -> Iterator[None]:
        """The auxiliary holds the gradient of the step before: it is of use to a step that repeats its rows."""
        repeats = all(micro_batch.is_repeat for micro_batch in micro_batches)
        factors = [factor for layer in self.layers for factor in (layer.A, layer.B)]  # no gradient trains them
        with without_gradients(factors), nullcontext() if repeats else auxiliary_off(self.models.values()):
            yield

    def accumulate(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        repeats = all(micro_batch.is_repeat for micro_batch in micro_batches)
        if not repeats:
            self._empty()
        self._collected = not (repeats and self.steps_per_draw == 2)  # else the next step has other rows
        with self.perturbed(micro_batches):
            if not self._collected:
                return backward_each(micro_batches)
            with self.sketch.collecting(self._step):
                return backward_each(micro_batches)

    @torch.no_grad()
    def after_step(self, applied: Tensor) -> None:
        self._step += 1
        if not self._collected:
            self._empty()
            return
        fill(self.layers, self.sketch.factors(), self.rho, applied)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step = state["step"]

    @torch.no_grad()
    def _empty(self) -> None:
        torch._foreach_zero_([layer.B for layer in self.layers])
