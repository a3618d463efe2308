"""Class pictures for prior preservation: what the base draws for the class prompt, made when there are too few.

Reference:
    DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation (Ruiz et al., 2022),
    arXiv 2208.12242, Section 3.2.
"""

from collections.abc import Callable
from pathlib import Path

from accelerate.utils import broadcast_object_list
from diffusers import StableDiffusionXLPipeline
from tqdm.auto import tqdm

from bilora_diffusion.atomic import atomic_write
from bilora_diffusion.data.folders import SUFFIXES
from bilora_diffusion.errors import UserError
from bilora_diffusion.sampling import sample_pictures

__all__ = ["make_class_pictures", "missing_class_pictures"]


def missing_class_pictures(folder: Path, wanted: int) -> list[int]:
    """The numbers of the class pictures to make so that the folder holds `wanted`; the same on every process.

    Pictures of any name count, hidden files do not.

    Raises:
        UserError: the folder is none, or cannot be read.
    """
    try:
        names = {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        names = set()
    except NotADirectoryError:
        raise UserError(f"--class_data_dir {folder} is a file: name a folder") from None
    except OSError as error:
        raise UserError(f"--class_data_dir {folder} cannot be read: {error.strerror}") from error
    present = sum(Path(name).suffix.lower() in SUFFIXES and not name.startswith(".") for name in names)
    free = (number for number in range(wanted + len(names)) if _name(number) not in names)
    numbers = [next(free) for _ in range(wanted - present)]
    # A process that looked a moment later would see the first pictures of a faster one.
    return broadcast_object_list([numbers])[0]


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

    Raises:
        UserError: the folder or a picture cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--class_data_dir {folder} cannot be made: {error.strerror}") from error
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
