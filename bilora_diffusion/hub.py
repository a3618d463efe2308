"""PLACEHOLDER by the lead: helper C's hub.py was overwritten by accident; helper C, please write yours again here."""

import re
from pathlib import Path

from bilora_diffusion.errors import UserError


def existing_path(name: str, flag: str):
    path = Path(name).expanduser()
    return path if path.exists() else None


def may_be_hub_id(name: str) -> bool:
    return bool(re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name))


def fetch(name, patterns, flag, revision, cache_dir):
    raise UserError(f"{flag} {name}: not found")
