"""Which pictures are held out: a loss on pictures that were trained on says nothing of overfitting."""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from bilora_diffusion.atomic import write_text_atomically
from bilora_diffusion.data.pictures import DatasetCell, Picture
from bilora_diffusion.errors import UserError
from bilora_diffusion.randomness import generator
from bilora_diffusion.strict_json import strict_json

__all__ = ["LEAST_PICTURES", "split", "write_folder"]

LEAST_PICTURES = 8
"""With fewer, each one is worth more for training than for measuring."""
SHARE = 0.2
METADATA_FILE = "metadata.jsonl"


def split(pictures: Sequence[Picture], wanted: int | None, seed: int) -> tuple[list[Picture], list[Picture]]:
    """Pictures to train on, and those held out, both in their old order.

    Arguments:
        wanted: how many to hold out; None: a fifth, two at least, and none of fewer than `LEAST_PICTURES`.

    Raises:
        UserError: nothing would be left to train on.
    """
    count = wanted
    if count is None:
        count = max(2, int(SHARE * len(pictures))) if len(pictures) >= LEAST_PICTURES else 0
    if not 0 <= count < len(pictures):
        raise UserError(f"--hold_out is {count}, of {len(pictures)} pictures: at least one must be left to train on")
    order = torch.randperm(len(pictures), generator=generator(seed, "held out")).tolist()
    held = set(order[:count])
    return (
        [picture for number, picture in enumerate(pictures) if number not in held],
        [picture for number, picture in enumerate(pictures) if number in held],
    )


def write_folder(pictures: Sequence[Picture], folder: Path) -> None:
    """Copies pictures, and their captions into `metadata.jsonl`, so that the trainer sees these and no others.

    A folder that holds the same already is left as it is.

    Raises:
        UserError: it holds others, or cannot be written.
    """
    try:
        names = [_name(picture, number) for number, picture in enumerate(pictures)]
        folder.mkdir(parents=True, exist_ok=True)
        metadata = folder / METADATA_FILE
        known = metadata.read_text(encoding="utf-8") if metadata.exists() else None
        lines = []
        for name, picture in zip(names, pictures, strict=True):
            if known is None:
                _copy(picture, folder / name)
            digest = _digest(picture)
            lines.append(strict_json({"file_name": name, "text": picture.caption, "sha256": digest}) + "\n")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}; name another --output_dir") from error
    if known is None:
        write_text_atomically(metadata, "".join(lines))
    elif known != "".join(lines):
        raise UserError(
            f"{folder} holds other pictures or captions, of an earlier report: name another --output_dir, or delete "
            f"{folder.parent.parent}"
        )


def _name(picture: Picture, number: int) -> str:
    return picture.name if isinstance(picture.source, Path) else f"{number:05d}.png"


def _copy(picture: Picture, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(picture.source, Path):
        shutil.copyfile(picture.source, target)
    else:
        picture.load().save(target)


def _digest(picture: Picture) -> str:
    source = picture.source
    source = source.read() if isinstance(source, DatasetCell) else source
    content = source.read_bytes() if isinstance(source, Path) else source
    return hashlib.sha256(content if isinstance(content, bytes) else content.tobytes()).hexdigest()
