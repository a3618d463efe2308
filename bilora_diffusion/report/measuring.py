"""The losses of LoRA files on draws that are the same for all of them, and how sharp the loss is around them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bilora_diffusion.adapters import adapted_layers
from bilora_diffusion.batches import Batch, TrainingMicroBatch
from bilora_diffusion.data.pictures import Picture
from bilora_diffusion.diffusion import Objective
from bilora_diffusion.generation.engine import Engine, LoraFile
from bilora_diffusion.loss_gap import float32_computation
from bilora_diffusion.sharpness import measures
from bilora_diffusion.sharpness.landscape import Landscape
from bilora_diffusion.sharpness.setting import fixed_batches

__all__ = ["SIZES", "Meter"]

SIZES = (0.01, 0.02, 0.05, 0.1)
"""Lengths of the steps along the gradient, as shares of the norm of the LoRA's factors."""


class Meter:
    """Measures LoRA files on one base.

    Arguments:
        engine: has the base, and takes the files on and off.
        objective: of the training, built before the engine first drew.
        sets: pictures by the name of their set; an empty set is left out.
        draws: of (picture, timestep, noise) in each set; more are made to fill the last batch.
        batch_size: draws computed at once.
    """

    def __init__(
        self,
        engine: Engine,
        objective: Objective,
        sets: Mapping[str, Sequence[Picture]],
        *,
        resolution: int,
        draws: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self.engine = engine
        pipeline = engine.load()
        pipeline.vae.requires_grad_(False)
        if engine.device.type != "cpu":
            pipeline.unet.enable_gradient_checkpointing()
        self.models = {part: getattr(pipeline, part) for part in ("unet", "text_encoder", "text_encoder_2")}
        self.draws = -(-draws // batch_size) * batch_size
        self.sets = {
            name: self._bind(
                fixed_batches(
                    pictures,
                    pipeline,
                    objective,
                    resolution=resolution,
                    draws=self.draws,
                    batch_size=batch_size,
                    seed=seed,
                    device=engine.device,
                ),
                objective,
            )
            for name, pictures in sets.items()
            if pictures
        }

    def _bind(self, batches: Sequence[Batch], objective: Objective) -> list["_FixedMicroBatch"]:
        share, scaler = 1 / len(batches), torch.amp.GradScaler("cpu", enabled=False)
        return [_FixedMicroBatch(batch, self.models, objective, self.engine.dtype, share, scaler) for batch in batches]

    @torch.no_grad()
    def losses(self, loras: Sequence[LoraFile], *names: str) -> dict[str, float]:
        """The mean denoising loss of each set, or of those that are named, with these files on."""
        self._use(loras)
        return {
            name: torch.stack([one.loss() for one in micro_batches]).mean().item()
            for name, micro_batches in self.sets.items()
            if not names or name in names
        }

    def sharpness(self, loras: Sequence[LoraFile], name: str) -> dict[str, Any]:
        """How the loss of a set rises along its gradient in the space of the factors; see `measures.worst_case`."""
        points = self._use(loras)
        try:
            for model in self.models.values():
                model.requires_grad_(False)
            for point in points:
                point.requires_grad_(True)
            return measures.worst_case(Landscape(points, self.sets[name]), SIZES, lambda text: None)
        finally:
            for point in points:
                point.requires_grad_(False)
                point.grad = None

    def _use(self, loras: Sequence[LoraFile]) -> list[nn.Parameter]:
        """Puts the files on; returns A and B of every layer that is on, in float32 as they were trained."""
        self.engine.use(loras)
        factors = [
            factor[adapter].weight
            for model in self.models.values()
            for _, layer in adapted_layers(model)
            if not layer.disable_adapters
            for adapter in layer.active_adapters
            for factor in (layer.lora_A, layer.lora_B)
            if adapter in factor
        ]
        for factor in factors:
            factor.data = factor.data.float()
        return factors


class _FixedMicroBatch(TrainingMicroBatch):
    """Its loss is computed in float32 where no gradient is wanted: two LoRAs differ by less than bfloat16 rounds."""

    def loss(self, rows: slice = slice(None)) -> Tensor:
        if torch.is_grad_enabled() or self.compute_dtype == torch.float32:
            return super().loss(rows)
        with float32_computation(self.models.values()):
            return TrainingMicroBatch.loss(self.in_float32(), rows)
