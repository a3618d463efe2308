"""Trains the UNet and both text encoders of the embedded base on the flat icons, in two stages.

First from nothing on two styles, until the names are known; then on all styles and on variations of them, so that
style and name come apart. Names are learned late and all at once, so beginning with everything takes far longer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from torch import Generator, Tensor, nn

from bilora_diffusion.diffusion import Objective
from bilora_diffusion.embedded.architecture import LATENT_CHANNELS, SCHEDULE, VAE_FACTOR, build_denoiser
from bilora_diffusion.embedded.fitting import FitSettings, fit, load_averages
from bilora_diffusion.embedded.icons import FIRST_STYLES, FLAT_STYLES, SIZE_PX, Icons
from bilora_diffusion.embedded.patches import PatchPCA
from bilora_diffusion.embedded.variations import VARIATIONS, vary
from bilora_diffusion.embedded.words import flat_caption, tokenizers, training_captions
from bilora_diffusion.randomness import generator, stream_seed
from bilora_diffusion.sdxl import Conditioning, denoise, tokenize

__all__ = ["DenoiserSettings", "StyleSettings", "latent_space", "train_denoiser", "train_styles"]

PROBE_ROWS = 256


@dataclass(frozen=True)
class DenoiserSettings(FitSettings):
    """Attributes:
    first_style_share: of the pictures; the first style is the one that is drawn unless a prompt says otherwise.
    """

    steps: int = 10_000
    learning_rate: float = 1.2e-3
    snr_gamma: float = 5.0
    first_style_share: float = 0.7


@dataclass(frozen=True)
class StyleSettings(DenoiserSettings):
    """Attributes:
    style_shares: how often each of `FLAT_STYLES` is seen.
    varied_share: of the pictures that are seen as a variation; without a caption none is.
    """

    steps: int = 4_500
    learning_rate: float = 1e-3
    decay_from: float = 0.45
    style_shares: tuple[float, ...] = (0.27, 0.23, 0.5)
    varied_share: float = 0.35


def latent_space(icons: Icons) -> PatchPCA:
    """Fitted to the flat icons of the first two styles; the third does as well in it (see `build.json`)."""
    return PatchPCA(torch.cat([icons.style(style) for style in FIRST_STYLES]), VAE_FACTOR, LATENT_CHANNELS)


def train_denoiser(
    icons: Icons, settings: DenoiserSettings, path: Path, device: torch.device, log: Callable[[str], None]
) -> None:
    """The first stage, from nothing. Trains, or goes on where an earlier call was stopped.

    Arguments:
        path: the checkpoint.
        log: is given a line at each checkpoint.
    """
    batches = _Batches(icons, settings, device)
    models = build_denoiser(len(batches.tokenizers[0]), stream_seed(settings.seed, "embedded", "weights"))
    _fit(models, batches, settings, path, icons.sha256_of(batches.styles), device, log)


def train_styles(
    icons: Icons,
    settings: StyleSettings,
    start: Path,
    path: Path,
    device: torch.device,
    log: Callable[[str], None],
) -> None:
    """The second stage, from the averaged weights of the first.

    Arguments:
        start: the checkpoint of `train_denoiser`.
        path, log: as there.
    """
    batches = _StyledBatches(icons, settings, device)
    known = _Batches(icons, settings, device).tokenizers
    first = build_denoiser(len(known[0]), 0)
    load_averages(first, start)
    models = build_denoiser(len(batches.tokenizers[0]), stream_seed(settings.seed, "embedded", "more words"))
    for name, model in models.items():
        _take_over(model, first[name], known[0].get_vocab(), batches.tokenizers[0].get_vocab())
    _fit(models, batches, settings, path, icons.sha256_of(batches.styles), device, log)


@torch.no_grad()
def _take_over(model: nn.Module, other: nn.Module, known: Mapping[str, int], words: Mapping[str, int]) -> None:
    """All weights of the other; embeddings by their tokens, those of new tokens stay random."""
    state = other.state_dict()
    for key, value in model.state_dict().items():
        if key.endswith("token_embedding.weight"):
            for token in known.keys() & words.keys():
                value[words[token]] = state[key][known[token]]
        else:
            value.copy_(state[key])


def _fit(
    models: dict[str, nn.Module],
    batches: "_Batches",
    settings: DenoiserSettings,
    path: Path,
    data: str,
    device: torch.device,
    log: Callable[[str], None],
) -> None:
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
        data,
        log,
    )


@dataclass(frozen=True)
class _Batch:
    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    conditioning: Conditioning


class _Batches:
    """Of the first stage. Batch `n` depends on the seed and `n` alone."""

    styles = FIRST_STYLES

    def __init__(self, icons: Icons, settings: DenoiserSettings, device: torch.device) -> None:
        self.names = icons.names
        self.settings = settings
        self.device = device
        self.tokenizers = tokenizers(icons.names, self.styles)
        self.space = latent_space(icons)
        self.pixels = {style: icons.style(style) for style in self.styles}
        self.objective = Objective(DDPMScheduler(**SCHEDULE), snr_gamma=settings.snr_gamma)

    def __call__(self, step: int) -> _Batch:
        count = self.settings.batch
        random = generator(self.settings.seed, "embedded", "batch", step)
        rows = torch.randint(len(self.names), (count,), generator=random).tolist()
        first = torch.rand(count, generator=random) < self.settings.first_style_share
        styles = [self.styles[0] if is_first else self.styles[1] for is_first in first.tolist()]
        captions = training_captions([self.names[row] for row in rows], styles, random, plain=self.styles[:1])
        pixels = torch.stack([self.pixels[style][row] for row, style in zip(rows, styles, strict=True)])
        return self._batch(pixels, captions, _sizes(count, random), random)

    def probe(self) -> _Batch:
        """`PROBE_ROWS` fixed draws of the first style."""
        random = generator(self.settings.seed, "embedded", "probe")
        rows = torch.randperm(len(self.names), generator=random)[:PROBE_ROWS].tolist()
        captions = [flat_caption(self.styles[0], self.names[row]) for row in rows]
        return self._batch(self.pixels[self.styles[0]][rows], captions, _sizes(len(rows), random), random)

    def _batch(self, pixels: Tensor, captions: list[str], sizes: Tensor, random: Generator) -> _Batch:
        latents, rows = self.space.encode(pixels), len(pixels)
        noise = torch.randn(latents.shape, generator=random)
        # Stratified: each timestep is uniform, and together they cover the schedule.
        strata = (torch.randperm(rows, generator=random) + torch.rand(rows, generator=random)) / rows
        timesteps = (strata * SCHEDULE["num_train_timesteps"]).long().clamp_max(SCHEDULE["num_train_timesteps"] - 1)
        conditioning = Conditioning(sizes, token_ids=tokenize(self.tokenizers, captions))
        return _Batch(
            latents.to(self.device),
            noise.to(self.device),
            timesteps.to(self.device),
            conditioning.to(self.device),
        )


class _StyledBatches(_Batches):
    """Of the second stage: all styles, and variations of some pictures; prompts without a style go with all."""

    styles = FLAT_STYLES

    def __init__(self, icons: Icons, settings: StyleSettings, device: torch.device) -> None:
        super().__init__(icons, settings, device)
        self.shares = torch.tensor(settings.style_shares)
        self.varied_share = settings.varied_share

    def __call__(self, step: int) -> _Batch:
        count, words = self.settings.batch, list(VARIATIONS)
        random = generator(self.settings.seed, "embedded", "styles", step)
        rows = torch.randint(len(self.names), (count,), generator=random).tolist()
        places = torch.multinomial(self.shares, count, replacement=True, generator=random).tolist()
        varied = (torch.rand(count, generator=random) < self.varied_share).tolist()
        drawn = torch.randint(len(words), (count,), generator=random).tolist()
        styles = [self.styles[place] for place in places]
        variations = [words[place] if is_varied else None for place, is_varied in zip(drawn, varied, strict=True)]
        names = [self.names[row] for row in rows]
        captions = training_captions(names, styles, random, plain=self.styles, variations=variations)
        pictures = []
        for row, style, variation, caption in zip(rows, styles, variations, captions, strict=True):
            picture = self.pixels[style][row]
            # What "" draws is what guidance leads away from: plain icons, so that it leads to no variation.
            pictures.append(vary(picture, variation, random) if variation and caption else picture)
        return self._batch(torch.stack(pictures), captions, _sizes(count, random), random)


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
