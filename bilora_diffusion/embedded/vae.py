"""Trains the embedded base's VAE: an encoder that learns the latent space's linear map, a decoder that undoes it.

The loss of pixels trains the decoder only; the encoder is taught the map (`PatchPCA`). The decoder sees latents with
some noise, since those that a diffusion model draws are never exact.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Generator, Tensor
from torch.nn.functional import interpolate, l1_loss, mse_loss

from bilora_diffusion.embedded.architecture import VAE_FACTOR, build_vae
from bilora_diffusion.embedded.fitting import FitSettings, fit
from bilora_diffusion.embedded.patches import PatchPCA
from bilora_diffusion.randomness import generator, stream_seed

__all__ = ["VaeSettings", "reconstruction_db", "train_vae"]


@dataclass(frozen=True)
class VaeSettings(FitSettings):
    """Attributes:
    crop: side in pixels of the crops seen first; four of them cost what one whole picture of 64 px does.
    whole_from: share of the steps after which whole pictures are seen instead, fewer at once.
    log_variance: of the posterior, everywhere: a deviation of 0.03 on latents of size 1.
    latent_noise: largest deviation of the noise that the decoder has to undo.
    """

    steps: int = 3600
    batch: int = 32
    learning_rate: float = 2e-3
    decay_from: float = 0.5
    ema_decay: float = 0.995
    save_every: int = 200
    crop: int = 32
    whole_from: float = 0.75
    log_variance: float = -7.0
    latent_noise: float = 0.15


def train_vae(
    pixels: Tensor,
    space: PatchPCA,
    settings: VaeSettings,
    path: Path,
    device: torch.device,
    log: Callable[[str], None],
) -> None:
    """Trains, or goes on where an earlier call was stopped.

    Arguments:
        pixels: (N, 3, 64, 64), float32 in [-1, 1].
        space: what the encoder's mean is to be.
        path: the checkpoint.
        log: is given a line at each checkpoint.
    """
    vae = build_vae(stream_seed(settings.seed, "embedded", "vae")).to(device).train()
    probed = pixels[:: max(1, len(pixels) // 64)][:64]

    def loss(step: int) -> Tensor:
        random = generator(settings.seed, "embedded", "vae", step)
        if step < settings.whole_from * settings.steps:
            rows = torch.randint(len(pixels), (settings.batch,), generator=random)
            picture = _varied(pixels[rows], settings.crop, random)
        else:
            rows = torch.randint(len(pixels), (settings.batch // 2,), generator=random)
            picture = _recoloured(pixels[rows], random)
        return _loss(vae, space, picture.to(device), settings, random)

    def probe() -> Tensor:
        return _loss(vae, space, probed.to(device), settings, generator(settings.seed, "embedded", "vae probe"))

    data = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
    fit({"vae": vae}, loss, probe, settings, path, data, log)


@torch.no_grad()
def reconstruction_db(vae: AutoencoderKL, pixels: Tensor) -> float:
    """Peak signal-to-noise ratio of pictures after the VAE, the mean over them, in dB."""
    decoded = torch.cat(
        [vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1) for part in pixels.split(32)]
    )
    errors = (decoded - pixels).square().flatten(1).mean(1) / 4
    return round((-10 * errors.log10()).mean().item(), 2)


def _loss(vae: AutoencoderKL, space: PatchPCA, pixels: Tensor, settings: VaeSettings, random: Generator) -> Tensor:
    target = space.encode(pixels.cpu()).to(pixels.device)
    posterior = vae.encode(pixels).latent_dist
    encoder = mse_loss(posterior.mean, target) + 0.01 * (posterior.logvar - settings.log_variance).square().mean()
    # Half of the rows decode what the encoder gives, half the exact map's latents, on which the UNet is trained.
    exact = (torch.rand(len(pixels), 1, 1, 1, generator=random) < 0.5).to(pixels.device)
    strength = settings.latent_noise * torch.rand(len(pixels), 1, 1, 1, generator=random).square()
    noise = (strength * torch.randn(target.shape, generator=random)).to(pixels.device)
    decoded = vae.decode(torch.where(exact, target, posterior.mean.detach()) + noise).sample
    return encoder + l1_loss(decoded, pixels) + mse_loss(decoded, pixels)


def _varied(pixels: Tensor, side: int, random: Generator) -> Tensor:
    """One crop of each picture, some of them enlarged or shrunk, mirrored, recoloured: (B, 3, side, side)."""
    crops = []
    for picture in pixels:
        whole = picture.shape[-1]
        cut = int(torch.randint(side // 2, whole + 1, (), generator=random)) // VAE_FACTOR * VAE_FACTOR
        if torch.rand((), generator=random) < 0.7:
            cut = side
        top, left = torch.randint(whole - cut + 1, (2,), generator=random).tolist()
        crop = picture[None, :, top : top + cut, left : left + cut]
        if cut != side:
            crop = interpolate(crop, size=(side, side), mode="bilinear", antialias=cut > side, align_corners=False)
        crops.append(crop)
    return _recoloured(torch.cat(crops), random)


def _recoloured(pixels: Tensor, random: Generator) -> Tensor:
    """Mirrored by half; of a third of the pictures the channels change places; colours may fade."""
    count = len(pixels)
    mirrored = torch.rand(count, 1, 1, 1, generator=random) < 0.5
    pixels = torch.where(mirrored, pixels.flip(-1), pixels)
    order = torch.rand(count, 3, generator=random).argsort(1)
    same = torch.rand(count, 1, generator=random) < 0.67
    order = torch.where(same, torch.arange(3), order)
    pixels = pixels.gather(1, order[:, :, None, None].expand_as(pixels))
    strength = 1 - 0.5 * torch.rand(count, 1, 1, 1, generator=random).square()
    anchor = torch.rand(count, 1, 1, 1, generator=random) * 2 - 1
    return (pixels - anchor) * strength + anchor
