"""Previews while training: the primary alone, as it would be exported at that moment."""

import logging
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from bilora_diffusion.assembly import Machine, Parts, free_memory
from bilora_diffusion.atomic import atomic_write
from bilora_diffusion.config import TrainingConfig
from bilora_diffusion.errors import UserError
from bilora_diffusion.run_folder import PREVIEWS, RunFolder
from bilora_diffusion.sampling import sample_pictures, use_sampling_scheduler
from bilora_diffusion.tracking import log_pictures

__all__ = ["Previews", "draw_or_warn", "pipeline_around", "save_pictures"]

logger = logging.getLogger("bilora_diffusion")


class Previews:
    """Pictures of --validation_prompt, by step if --validation_steps is given, else by epoch.

    By epoch as in the stock script: after the first, and then after every so many; the last may be a part of one.
    Every preview starts from the same noise, so that two of them differ by the training alone.
    """

    def __init__(
        self,
        config: TrainingConfig,
        machine: Machine,
        accelerator: Accelerator,
        parts: Parts,
        folder: RunFolder,
        steps: int,
        steps_per_epoch: int,
    ) -> None:
        self.config = config
        self.machine = machine
        self.accelerator = accelerator
        self.parts = parts
        self.folder = folder
        self.steps = steps
        self.steps_per_epoch = steps_per_epoch

    def after_step(self, step: int) -> None:
        """Makes a preview if one is due after optimiser step number `step` (from 1)."""
        if not self.is_due(step):
            return
        if self.machine.is_main:
            pictures = self._sample(self.config.validation_prompt)
            save_pictures(self.folder, f"step_{step:06d}", pictures)
            if pictures:
                log_pictures(self.accelerator, "validation", pictures, self.config.validation_prompt, step)
        self.machine.wait()

    def is_due(self, step: int) -> bool:
        """Whether there is one after optimiser step number `step` (from 1)."""
        if self.config.validation_prompt is None:
            return False
        if self.config.validation_steps:
            return step % self.config.validation_steps == 0
        epoch = (step - 1) // self.steps_per_epoch
        ends = step % self.steps_per_epoch == 0 or step == self.steps
        return ends and epoch % self.config.validation_epochs == 0

    def _sample(self, prompt: str) -> list[Image.Image]:
        parts, config = self.parts, self.config
        pipeline = pipeline_around(parts)

        def load_vae():
            return parts.base.load("vae").vae.to(self.machine.device)

        with parts.trainer.as_exported():
            pictures = draw_or_warn(
                pipeline,
                parts.sampling_prompts.get(prompt, prompt),
                numbers=range(config.num_validation_images),
                seed=self.parts.trainer.seed,
                resolution=parts.resolution,
                load_vae=load_vae,
            )
        free_memory()
        return pictures


def draw_or_warn(*arguments, **options) -> list[Image.Image]:
    """`sample_pictures`, but no pictures and a warning where the GPU's memory does not suffice: a run is worth more."""
    try:
        return sample_pictures(*arguments, **options)
    except torch.OutOfMemoryError:
        logger.warning("the GPU's memory is too small for these pictures beside the training: they are left out")
        return []


def pipeline_around(parts: Parts) -> StableDiffusionXLPipeline:
    """A pipeline of the very models that are trained, without a VAE, and without text encoders that were freed."""
    pipeline = StableDiffusionXLPipeline(
        vae=None,
        unet=parts.models["unet"],
        text_encoder=parts.models.get("text_encoder"),
        text_encoder_2=parts.models.get("text_encoder_2"),
        tokenizer=parts.tokenizers[0],
        tokenizer_2=parts.tokenizers[1],
        scheduler=parts.sampling_scheduler,
        add_watermarker=False,
        force_zeros_for_empty_prompt=parts.force_zeros_for_empty_prompt,
    )
    use_sampling_scheduler(pipeline)
    return pipeline


def save_pictures(folder: RunFolder, name: str, pictures: Sequence[Image.Image]) -> list[str]:
    """Writes PNGs under the output folder; returns their paths relative to it."""
    try:
        (folder.path / PREVIEWS).mkdir(exist_ok=True)
    except OSError as error:
        path = folder.path / PREVIEWS
        raise UserError(f"{path} cannot be made: {error.strerror}; name another --output_dir") from error
    names = [f"{PREVIEWS}/{name}_{number}.png" for number in range(len(pictures))]
    for path, picture in zip(names, pictures, strict=True):
        with atomic_write(folder.path / path) as temporary:
            picture.save(temporary, format="PNG")
    return names
