"""What a picture will be, seen while its noise is still being taken out."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from bilora_diffusion.sampling import decode

__all__ = ["forming_picture", "predicted_latents"]

MOST_LATENT_SIDE = 32
"""SDXL's VAE takes a sixteenth of the time for a picture of 256 px than for one of 1024."""


@contextmanager
def predicted_latents(scheduler: Any) -> Iterator[Callable[[], Tensor | None]]:
    """Inside, the function it gives tells the scheduler's latest estimate of the noiseless latents, (1, 4, H/8, W/8).

    Euler and DDIM give it beside the next latents, DPM-Solver and UniPC keep it; None where neither holds.
    """
    step, latest = scheduler.step, None

    @functools.wraps(step)  # the pipeline asks which arguments it takes
    def watched(*arguments: Any, **options: Any) -> Any:
        nonlocal latest
        result = step(*arguments, **options)
        if isinstance(result, tuple) and len(result) > 1:
            latest = result[1]
        else:
            latest = (getattr(scheduler, "model_outputs", None) or [None])[-1]
        return result

    scheduler.step = watched
    try:
        yield lambda: latest
    finally:
        del scheduler.step  # the class's own shows again


@torch.no_grad()
def forming_picture(pipeline: StableDiffusionXLPipeline, latents: Tensor) -> Image.Image:
    """A small picture of latents (1, 4, H/8, W/8), as the UNet scales them."""
    latents = latents.float()
    longest = max(latents.shape[-2:])
    if longest > MOST_LATENT_SIDE:
        size = [max(1, round(side * MOST_LATENT_SIDE / longest)) for side in latents.shape[-2:]]
        latents = interpolate(latents, size=size, mode="area")
    return decode(pipeline.vae, [latents[0]])[0]
