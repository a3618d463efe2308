"""The page: one HTML file without a reference to anything outside it.

Prompts, captions and file names are the user's: Jinja2 escapes every one of them.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup
from PIL import Image

__all__ = ["PNG_UP_TO_PX", "Cell", "Table", "data_uri", "render"]

MOST_SIDE_PX = 512
PNG_UP_TO_PX = 256
"""Larger pictures are photographs by their size: as JPEG they take a tenth."""


@dataclass(frozen=True)
class Cell:
    """A picture with what it shows, in words."""

    picture: Image.Image
    alt: str
    label: str = ""

    @property
    def uri(self) -> str:
        return data_uri(self.picture)


@dataclass(frozen=True)
class Table:
    """Texts in rows under heads.

    Attributes:
        heads: of all columns, the first that of the rows' names.
        rows: (name, what it means or "", cells).
        plain: how many columns hold a name or a number; the others' texts are longer and may be broken.
    """

    heads: Sequence[str]
    rows: Sequence[tuple[str, str, Sequence[str]]]
    plain: int


def data_uri(picture: Image.Image) -> str:
    """A picture as text to stand in the page, at most `MOST_SIDE_PX` wide and high."""
    picture = picture.convert("RGB")
    picture.thumbnail((MOST_SIDE_PX, MOST_SIDE_PX), Image.Resampling.LANCZOS)
    small = max(picture.size) <= PNG_UP_TO_PX
    buffer = io.BytesIO()
    picture.save(buffer, **({"format": "PNG", "optimize": True} if small else {"format": "JPEG", "quality": 88}))
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def render(values: Mapping[str, Any], svgs: Mapping[str, str]) -> str:
    """The whole page.

    Arguments:
        values: what the template names.
        svgs: plots by title, as `plots.svg` makes them.
    """
    plots = {title: Markup(text) for title, text in svgs.items()}
    return _template().render(values, plots=plots)


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8"))
