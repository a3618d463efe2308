"""Trains the UNet and both text encoders of the embedded base, from nothing, on the flat icons."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from torch import Generator, Tensor, nn

from bilora_diffusion.diffusion import Objective
from bilora_diffusion.embedded.architecture import LATENT_CHANNELS, SCHEDULE, VAE_FACTOR, build_denoiser
from bilora_diffusion.embedded.fitting import FitSettings, fit
from bilora_diffusion.embedded.icons import FLAT_STYLES, SIZE_PX, Icons
from bilora_diffusion.embedded.patches import PatchPCA
from bilora_diffusion.embedded.words import flat_caption, tokenizers, training_captions
from bilora_diffusion.randomness import generator, stream_seed
from bilora_diffusion.sdxl import Conditioning, denoise, tokenize

__all__ = ["DenoiserSettings", "latent_space", "train_denoiser"]


@dataclass(frozen=True)
class DenoiserSettings(FitSettings):
    """Attributes:
    first_style_share: of the pictures; the first style is the one that is drawn unless a prompt says otherwise.
    """

    steps: int = 10_000
    learning_rate: float = 1.2e-3
    snr_gamma: float = 5.0
    first_style_share: float = 0.7


def latent_space(icons: Icons) -> PatchPCA:
    """Fitted to the flat icons of both styles."""
    return PatchPCA(torch.cat([icons.style(style) for style in FLAT_STYLES]), VAE_FACTOR, LATENT_CHANNELS)


def train_denoiser(
    icons: Icons, settings: DenoiserSettings, path: Path, device: torch.device, log: Callable[[str], None]
) -> None:
    """Trains, or goes on where an earlier call was stopped.

    Arguments:
        path: the checkpoint.
        log: is given a line at each checkpoint.
    """
    batches = _Batches(icons, settings, device)
    models = build_denoiser(batches.vocabulary_size, stream_seed(settings.seed, "embedded", "weights"))
    for model in models.values():
        model.to(device).train()
    models["unet"].to(memory_format=torch.channels_last)  # a little faster on a CPU too
    probe = batches.probe()
    fit(
        models,
        lambda step: _loss(models, batches(step), batches.objective),
        lambda: _loss(models, probe, batches.objective),
        settings,
        path,
        icons.sha256,
        log,
    )


@dataclass(frozen=True)
class _Batch:
    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    conditioning: Conditioning


class _Batches:
    """Batch `n` depends on the seed and `n` alone."""

    def __init__(self, icons: Icons, settings: DenoiserSettings, device: torch.device) -> None:
        self.names = icons.names
        self.settings = settings
        self.device = device
        self.tokenizers = tokenizers(icons.names, FLAT_STYLES)
        self.vocabulary_size = len(self.tokenizers[0])
        space = latent_space(icons)
        self.latents = {style: space.encode(icons.style(style)) for style in FLAT_STYLES}
        self.objective = Objective(DDPMScheduler(**SCHEDULE), snr_gamma=settings.snr_gamma)

    def __call__(self, step: int) -> _Batch:
        count = self.settings.batch
        random = generator(self.settings.seed, "embedded", "batch", step)
        rows = torch.randint(len(self.names), (count,), generator=random).tolist()
        first = torch.rand(count, generator=random) < self.settings.first_style_share
        styles = [FLAT_STYLES[0] if is_first else FLAT_STYLES[1] for is_first in first.tolist()]
        captions = training_captions([self.names[row] for row in rows], styles, FLAT_STYLES[0], random)
        return self._batch(rows, styles, captions, _sizes(count, random), random)

    def probe(self) -> _Batch:
        """256 fixed draws of the first style."""
        random = generator(self.settings.seed, "embedded", "probe")
        rows = torch.randperm(len(self.names), generator=random)[:256].tolist()
        captions = [flat_caption(FLAT_STYLES[0], self.names[row]) for row in rows]
        return self._batch(rows, [FLAT_STYLES[0]] * len(rows), captions, _sizes(len(rows), random), random)

    def _batch(
        self, rows: list[int], styles: list[str], captions: list[str], sizes: Tensor, random: Generator
    ) -> _Batch:
        latents = torch.stack([self.latents[style][row] for row, style in zip(rows, styles, strict=True)])
        noise = torch.randn(latents.shape, generator=random)
        # Stratified: each timestep is uniform, and together they cover the schedule.
        strata = (torch.randperm(len(rows), generator=random) + torch.rand(len(rows), generator=random)) / len(rows)
        timesteps = (strata * SCHEDULE["num_train_timesteps"]).long().clamp_max(SCHEDULE["num_train_timesteps"] - 1)
        conditioning = Conditioning(sizes, token_ids=tokenize(self.tokenizers, captions))
        return _Batch(
            latents.to(self.device),
            noise.to(self.device),
            timesteps.to(self.device),
            conditioning.to(self.device),
        )


def _sizes(rows: int, random: Generator) -> Tensor:
    """Micro-conditioning, (rows, 6): any original size and crop, so that a LoRA's pictures may have any too."""
    original = (64 * 2 ** (4 * torch.rand(rows, generator=random))).round()
    cropped = torch.rand(rows, generator=random) < 0.2
    corner = (torch.rand(rows, 2, generator=random) * 64).round() * cropped[:, None]
    target = torch.full((rows, 2), float(SIZE_PX))
    return torch.cat([original[:, None].expand(-1, 2), corner, target], dim=1)


def _loss(models: Mapping[str, nn.Module], batch: _Batch, objective: Objective) -> Tensor:
    noisy = objective.noisy_latents(batch.latents, batch.noise, batch.timesteps)
    output = denoise(models, noisy, batch.timesteps, batch.conditioning)
    return objective.losses(output, batch.latents, batch.noise, noisy, batch.timesteps).mean()
