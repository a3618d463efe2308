"""The settings of a picture inside its PNG file, so that the picture can be drawn again from the file alone."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin, UnidentifiedImageError

import bilora_diffusion
from bilora_diffusion.atomic import atomic_write
from bilora_diffusion.errors import UserError
from bilora_diffusion.strict_json import strict_json

__all__ = ["KEY", "read_settings", "save_picture"]

KEY = "bilora_diffusion"
"""The name of the PNG's text entry that holds the settings as JSON."""
MOST_BYTES = 64 * 2**20


def save_picture(path: Path, picture: Image.Image, settings: Mapping[str, Any]) -> None:
    """Writes a PNG with its settings, JSON values.

    Raises:
        UserError: the file cannot be written.
    """
    entries = PngImagePlugin.PngInfo()
    entries.add_itxt(KEY, strict_json(dict(settings)))
    entries.add_text("Software", f"Bi-LoRA Diffusion {bilora_diffusion.__version__}")
    with atomic_write(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=entries)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that `save_picture` put into a file. The pixels are not read. The values are not checked.

    Raises:
        UserError: not a PNG, or one without settings of ours.
    """
    if path.stat().st_size > MOST_BYTES:
        raise UserError(f"{path.name} is larger than {MOST_BYTES // 2**20} MiB: no picture of this program")
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            text = picture.info.get(KEY)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise UserError(f"{path.name} is not a PNG that can be read") from None
    if text is None:
        raise UserError(
            f"{path.name} holds no settings: it was not made here, or another program saved it again without them"
        )
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f"{path.name}: its settings are damaged")
    return settings
