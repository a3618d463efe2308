"""Folders of any number of pictures, drawn from a seed."""

from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["write_pictures"]

_GRAIN = 12


def write_pictures(folder: Path, count: int, side_px: int) -> None:
    """JPEGs of soft colours under grain, as photos have, each with a caption of its own; every second one is wide."""
    folder.mkdir(parents=True)
    for number in range(count):
        random = np.random.default_rng(number)
        width = side_px + side_px // 4 * (number % 2)
        soft = Image.fromarray(random.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        soft = soft.resize((width, side_px), Image.Resampling.BICUBIC)
        grain = random.integers(-_GRAIN, _GRAIN + 1, (side_px, width, 1), dtype=np.int16)
        pixels = (np.asarray(soft) + grain).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:05d}.jpg", quality=85)
        (folder / f"{number:05d}.txt").write_text(f"picture {number} of many, {width} px wide")
