"""From a LoRA file, a base and a folder of pictures to landscapes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from torch import nn

from bilora_diffusion.adapters import adapted_layers
from bilora_diffusion.bases import Base
from bilora_diffusion.batches import Batch, BatchMaker, TrainingMicroBatch
from bilora_diffusion.data.dreambooth import DreamBoothDataset, flatten
from bilora_diffusion.data.latents import CachedLatents
from bilora_diffusion.data.pictures import Picture, find_pictures
from bilora_diffusion.diffusion import Objective, build_objective
from bilora_diffusion.generation.loras import load_adapter
from bilora_diffusion.prompts import TokenizedPrompts
from bilora_diffusion.sharpness.landscape import Landscape

__all__ = ["Scene", "fixed_batches", "load_scene"]

PARTS = ("unet", "text_encoder", "text_encoder_2")
ADAPTER = "measured"


@dataclass(frozen=True)
class Scene:
    """The base with the LoRA on, and the draws its loss is measured on.

    Arguments:
        rank: the largest of the LoRA's layers.
    """

    models: dict[str, nn.Module]
    objective: Objective
    batches: list[Batch]
    rank: int
    layers: int

    def lora(self) -> Landscape:
        """Around the factors of the LoRA."""
        points = [
            factor[ADAPTER].weight
            for model in self.models.values()
            for _, layer in adapted_layers(model)
            for factor in (layer.lora_A, layer.lora_B)
        ]
        return self._around(points)

    def full(self) -> Landscape:
        """Around the merged weights of the same layers. The LoRA is merged for good: ask for this last."""
        points = []
        for model in self.models.values():
            for _, layer in adapted_layers(model):
                if not layer.merged:
                    with torch.no_grad():
                        layer.merge()
                points.append(layer.get_base_layer().weight)
        return self._around(points)

    def _around(self, points: Sequence[nn.Parameter]) -> Landscape:
        for model in self.models.values():
            model.requires_grad_(False)
        for point in points:
            point.requires_grad_(True)
        share, scaler = 1 / len(self.batches), torch.amp.GradScaler("cpu", enabled=False)
        micro_batches = [
            TrainingMicroBatch(batch, self.models, self.objective, torch.float32, share, scaler)
            for batch in self.batches
        ]
        return Landscape(points, micro_batches)


def load_scene(
    lora: Path,
    base: Base,
    data: Path,
    *,
    instance_prompt: str | None,
    resolution: int | None,
    draws: int,
    batch_size: int,
    seed: int,
    device: torch.device,
) -> Scene:
    """Loads everything in float32; a loss that is measured to a thousandth needs it.

    Arguments:
        data: folder of pictures, with captions or `instance_prompt`.
        draws: of (picture, timestep, noise), spread over the pictures.

    Raises:
        UserError: a file or folder is missing or not what it should be.
    """
    pictures, _ = find_pictures(str(data), instance_prompt=instance_prompt, flag="--data")
    resolution = resolution or base.native_resolution()
    pipeline = base.load(*PARTS, "vae", dtype=torch.float32)
    objective = build_objective(pipeline.scheduler)
    pipeline.vae.requires_grad_(False).to(device)
    batches = fixed_batches(
        pictures,
        pipeline,
        objective,
        resolution=resolution,
        draws=draws,
        batch_size=batch_size,
        seed=seed,
        device=device,
    )
    pipeline.vae = None
    models = {part: getattr(pipeline, part).to(device).eval() for part in PARTS}
    rank, layers = _put_on(pipeline, lora)
    return Scene(models, objective, batches, rank, layers)


def fixed_batches(
    pictures: Sequence[Picture],
    pipeline: StableDiffusionXLPipeline,
    objective: Objective,
    *,
    resolution: int,
    draws: int,
    batch_size: int,
    seed: int,
    device: torch.device,
) -> list[Batch]:
    """Draws of (picture, timestep, noise) that a loss can be measured on again and again; each picture as often.

    Arguments:
        pictures: cut in the middle to the square.
        pipeline: its VAE, which must be frozen and on the device, and its tokenizers are used.
        draws: how many, spread over the pictures.
        batch_size: of all batches but perhaps the last.
    """
    dataset = DreamBoothDataset(pictures, resolution=resolution, center_crop=True, seed=seed)
    make_batch = BatchMaker(
        objective,
        CachedLatents(dataset, pipeline.vae),
        TokenizedPrompts(dataset.prompts(), (pipeline.tokenizer, pipeline.tokenizer_2)),
        seed=seed,
        noise_offset=0.0,
        prior_loss_weight=1.0,
        device=device,
    )
    return [
        make_batch(flatten([dataset[draw] for draw in range(first, min(first + batch_size, draws))]))
        for first in range(0, draws, batch_size)
    ]


def _put_on(pipeline, lora: Path) -> tuple[int, int]:
    load_adapter(pipeline, lora, ADAPTER, str(lora))
    layers = [layer for part in PARTS for _, layer in adapted_layers(getattr(pipeline, part))]
    return max(layer.lora_A[ADAPTER].weight.shape[0] for layer in layers), len(layers)
