"""Class pictures for prior preservation: what the base draws for the class prompt, made when there are too few.

Reference:
    DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation (Ruiz et al., 2022),
    arXiv 2208.12242, Section 3.2.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from tqdm.auto import tqdm

from bilora_diffusion.atomic import atomic_write
from bilora_diffusion.data.images import SUFFIXES
from bilora_diffusion.errors import UserError
from bilora_diffusion.sampling import sample_pictures

__all__ = ["make_class_pictures", "missing_class_pictures"]


def missing_class_pictures(folder: Path, wanted: int) -> list[int]:
    """The numbers of the class pictures to make so that the folder holds `wanted`."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--class_data_dir {folder} is a file: name a folder")
    present = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES] if folder.exists() else []
    taken = {path.name for path in present}
    free = (number for number in range(wanted + len(taken)) if _name(number) not in taken)
    return [next(free) for _ in range(wanted - len(present))]


def _name(number: int) -> str:
    return f"class-{number:05d}.png"


def make_class_pictures(
    folder: Path,
    numbers: list[int],
    load_pipeline: Callable[[], StableDiffusionXLPipeline],
    *,
    prompt: str,
    seed: int,
    resolution: int,
    batch_size: int,
    rank: int,
    processes: int,
) -> None:
    """Makes this process's share of the missing pictures. A run that is stopped here goes on where it was.

    Arguments:
        numbers: from `missing_class_pictures`; the same list on every process.
        load_pipeline: gives the whole base, on the device.
        prompt: `--class_prompt`.
        batch_size: `--sample_batch_size`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    share = numbers[rank::processes]
    if not share:
        return
    pipeline = load_pipeline()
    vae = pipeline.vae
    for start in tqdm(range(0, len(share), batch_size), desc="Class pictures", disable=rank != 0):
        group = share[start : start + batch_size]
        pictures = sample_pictures(
            pipeline,
            prompt,
            numbers=group,
            seed=seed,
            resolution=resolution,
            load_vae=lambda: vae,
            steps=50,
            batch_size=batch_size,
        )
        for number, picture in zip(group, pictures, strict=True):
            with atomic_write(folder / _name(number)) as path:
                picture.save(path, format="PNG")
    del pipeline, vae
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
