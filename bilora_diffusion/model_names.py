"""Whether the name of a model is a path or one for the hub. Imports nothing heavy: the app's command line asks too."""

import re
from pathlib import Path

from bilora_diffusion.errors import UserError

__all__ = ["existing_path", "may_be_hub_id"]

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
FILE_ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def may_be_hub_id(name: str) -> bool:
    """Whether a name has the form `model` or `owner/model`, and is not plainly a file's."""
    return HUB_ID.fullmatch(name) is not None and not name.endswith(FILE_ENDINGS)


def existing_path(name: str, flag: str) -> Path | None:
    """The path if it exists on this disk, None if the name is to be looked up on the hub.

    Raises:
        UserError: it does not exist and cannot be a hub id either.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if "://" in name:
        raise UserError(f"{flag}: {name} is an address; download the file, or give the hub id (owner/name).")
    if may_be_hub_id(name):
        return None
    raise UserError(f"{flag}: there is no file or folder {name}.")
