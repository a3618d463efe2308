"""Pictures from a pipeline: previews while training, the final pictures, class pictures.

The UNet may run in half precision; the VAE always decodes in float32 (SDXL's overflows in float16, which shows as black
pictures) and need not exist while the UNet runs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor, nn

from bilora_diffusion.randomness import generator

__all__ = ["PromptEmbeddings", "embed_for_sampling", "sample_pictures", "use_sampling_scheduler"]


@dataclass(frozen=True)
class PromptEmbeddings:
    """A prompt for guided sampling, both sides: keys are the pipeline's own argument names, values on the CPU."""

    tensors: Mapping[str, Tensor]

    def arguments(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: tensor.to(device, dtype) for name, tensor in self.tensors.items()}


@torch.no_grad()
def embed_for_sampling(pipeline: StableDiffusionXLPipeline, prompt: str, device: torch.device) -> PromptEmbeddings:
    """What the pipeline would make of a prompt and an empty negative one; the text encoders can be freed after it."""
    names = (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )
    tensors = pipeline.encode_prompt(prompt, device=device, do_classifier_free_guidance=True)
    return PromptEmbeddings({name: tensor.cpu() for name, tensor in zip(names, tensors, strict=True)})


def use_sampling_scheduler(pipeline: StableDiffusionXLPipeline) -> None:
    """DPM-Solver++ for the base's schedule, as the stock script's previews. An EDM base keeps its own scheduler."""
    if type(pipeline.scheduler).__name__.startswith("EDM"):
        return
    changes = {}
    if getattr(pipeline.scheduler.config, "variance_type", None) in ("learned", "learned_range"):
        changes["variance_type"] = "fixed_small"  # the loss trains no variance
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, **changes)


@torch.no_grad()
def sample_pictures(
    pipeline: StableDiffusionXLPipeline,
    prompt: str | PromptEmbeddings,
    *,
    numbers: Sequence[int],
    seed: int,
    resolution: int | tuple[int, int],
    load_vae: Callable[[], nn.Module],
    steps: int = 25,
    guidance_scale: float = 5.0,
    batch_size: int = 1,
    negative_prompt: str | None = None,
    after_step: Callable[[int, Tensor], None] | None = None,
) -> list[Image.Image]:
    """Pictures of one prompt.

    Arguments:
        pipeline: its VAE is not used; with text encoders if the prompt is text. Its scheduler is used as it is.
        numbers: one a picture; picture i starts from the noise of (seed, i), whatever the batch size.
        resolution: side in pixels, or (width, height).
        load_vae: gives the VAE, in float32 on the device; called once, after the UNet is done.
        steps: denoising steps; 25 is the stock script's.
        guidance_scale: of classifier-free guidance; 5 is the pipeline's own.
        negative_prompt: what to keep away from, if the prompt is text; None is the base's own way to have none.
        after_step: called with the number of steps done and the latents (B, 4, H/8, W/8), noise and all.
    """
    device, dtype = pipeline.unet.device, pipeline.unet.dtype
    width, height = resolution if isinstance(resolution, tuple) else (resolution, resolution)
    arguments: dict = prompt.arguments(device, dtype) if isinstance(prompt, PromptEmbeddings) else {"prompt": prompt}
    if negative_prompt is not None:
        arguments["negative_prompt"] = negative_prompt
    if after_step is not None:
        arguments["callback_on_step_end"] = _calling(after_step)
    pipeline.set_progress_bar_config(disable=True)
    latents: list[Tensor] = []
    with _evaluation_mode(pipeline):
        for start in range(0, len(numbers), batch_size):
            group = numbers[start : start + batch_size]
            batch = pipeline(
                **arguments,
                num_images_per_prompt=len(group),
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                height=height,
                width=width,
                generator=[generator(seed, "sample", number) for number in group],
                output_type="latent",
            ).images
            latents.extend(batch.float())
    return decode(load_vae(), latents)


def _calling(after_step: Callable[[int, Tensor], None]) -> Callable:
    """As the pipeline calls back: numbers from 0, and the latents among its tensors."""

    def callback(_pipeline, number: int, _timestep, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        after_step(number + 1, tensors["latents"])
        return {}

    return callback


@contextmanager
def _evaluation_mode(pipeline: StableDiffusionXLPipeline) -> Iterator[None]:
    """Inside, no adapter's dropout, in the text encoders neither; afterwards every module has the mode it had."""
    parts = [part for part in (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2) if part is not None]
    training = [module for part in parts for module in part.modules() if module.training]
    try:
        for part in parts:
            part.eval()
        yield
    finally:
        for module in training:
            module.training = True


def decode(vae: nn.Module, latents: Sequence[Tensor]) -> list[Image.Image]:
    """Latents (4, H/8, W/8) as the UNet scales them to pictures, one at a time to spare memory."""
    mean, std = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
    pictures = []
    for latent in latents:
        latent = latent / vae.config.scaling_factor
        if mean is not None and std is not None:
            shape = (-1, 1, 1)
            latent = latent * torch.tensor(std).view(shape).to(latent) + torch.tensor(mean).view(shape).to(latent)
        pixels = vae.decode(latent[None].to(vae.device, vae.dtype)).sample[0]
        pixels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte()
        pictures.append(Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()))
    return pictures
