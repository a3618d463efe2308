"""What is learned, and what the loss is then measured on.

The settings of all methods are chosen on the 3D icons. The other tasks tell whether what was seen there holds
elsewhere: another style, of which the base knows as little; photographs of one subject, two or three to learn and two
to hold out; the 3D icons in batches of one, and for more steps.
"""

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks.quality.concepts import dreambooth_concepts
from bilora_diffusion.data.folders import SUFFIXES
from bilora_diffusion.data.images import load_image, prepare
from bilora_diffusion.embedded import CONCEPT_FOLDER
from bilora_diffusion.embedded.icons import SOLID_STYLE, Icons, drawings_of, from_bytes, shipped_lists, slug
from bilora_diffusion.embedded.words import concept_caption, flat_caption
from bilora_diffusion.errors import UserError
from bilora_diffusion.randomness import generator

__all__ = ["STYLES", "Held", "Task", "batch_of_one", "more_steps", "solid_icons", "style", "subjects"]

DRAWS = 2  # (timestep, noise) for each icon, the same for all
DRAWS_OF_PHOTO = 64
SUBJECT_EVALUATED_AT = (10, 25, 50, 100, 150, 200, 300, 400)  # so few pictures are soon known by heart
SIZE_PX = 64
WORK = Path("outputs/benchmarks")

STYLES = {
    "high-contrast": ("@iconify-json/fluent-emoji-high-contrast", "1.2.6"),
    "openmoji": ("@iconify-json/openmoji", "1.2.29"),
}
"""npm packages by the task's name: black silhouettes (MIT), outlines with flat colours (CC BY-SA 4.0; not shipped)."""


@dataclass(frozen=True)
class Held:
    """Attributes:
    pixels: (N, 3, 64, 64), float32 in [-1, 1].
    captions: N.
    draws: of timestep and noise, for each picture.
    """

    pixels: Tensor
    captions: Sequence[str]
    draws: int = DRAWS


@dataclass(frozen=True)
class Task:
    """Attributes:
    name: of its folder among the results.
    folder: of the training pictures.
    held: what losses are measured on: "validation", "test", "training" and "flat", icons that the base knows.
    settings: of `TrainingConfig`, beside a method's own.
    evaluated_at: steps; the last one is the training's length.
    icons: all names in the style that is learned, (N, 3, 64, 64), uint8; None for photographs.
    """

    name: str
    folder: Path
    held: Mapping[str, Held]
    settings: Mapping[str, Any] = field(default_factory=dict)
    evaluated_at: Sequence[int] = (50, 100, 150, 200, 300, 400)
    icons: Tensor | None = None

    @property
    def steps(self) -> int:
        """Of the training."""
        return self.evaluated_at[-1]


def solid_icons() -> Task:
    """The 23 3D icons that ship with the embedded base."""
    icons = Icons.shipped()
    held = _icons(icons.style(SOLID_STYLE), concept_caption)
    return Task("3d", CONCEPT_FOLDER, held, icons=icons.pixels[SOLID_STYLE])


def batch_of_one() -> Task:
    """The same, a picture a step."""
    return replace(solid_icons(), name="3d-batch-1", settings={"train_batch_size": 1})


def more_steps() -> Task:
    """The same for twice as long: further into overfitting."""
    return replace(solid_icons(), name="3d-800-steps", evaluated_at=(100, 200, 300, 400, 500, 600, 700, 800))


def style(name: str) -> Task:
    """The same 23 names in one of `STYLES`; fetched, and drawn at 64 px.

    Raises:
        UserError: a package cannot be fetched.
    """
    names, lists = Icons.shipped().names, shipped_lists()
    pixels = drawings_of(STYLES[name], names, WORK)

    def fill(folder: Path) -> None:
        lines = []
        for one in lists["concept"]:
            file = f"{slug(one)}.png"
            Image.fromarray(pixels[names.index(one)].permute(1, 2, 0).numpy()).save(folder / file)
            lines.append(json.dumps({"file_name": file, "text": concept_caption(one)}))
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    return Task(name, _made_once(name, fill), _icons(from_bytes(pixels), concept_caption), icons=pixels)


def subjects(folder: Path, classes: Sequence[str] = ()) -> list[Task]:
    """Of each in DreamBooth's layout: the last photo to test, the last but one to validate, the others to learn.

    Arguments:
        classes: class words; see `dreambooth_concepts`.

    Raises:
        UserError: no subjects, or one without a known class.
    """
    found = dreambooth_concepts(folder, (), classes, "TOK")
    return [_subject(one.name, folder / one.name, one.words[-1]) for one in found]


def _subject(name: str, photos: Path, prompt: str) -> Task:
    paths = sorted(path for path in photos.iterdir() if path.suffix.lower() in SUFFIXES)
    if len(paths) < 3:
        raise UserError(f"{photos} has {len(paths)} pictures: a subject needs three, to learn, to validate and to test")
    *learned, validation, test = paths

    def fill(folder: Path) -> None:
        for path in learned:
            shutil.copy(path, folder / path.name)

    folder = _made_once(f"{name}-{_digest(learned)}", fill)
    held = {
        "validation": Held(_photos([validation]), [prompt], DRAWS_OF_PHOTO),
        "test": Held(_photos([test]), [prompt], DRAWS_OF_PHOTO),
        "training": Held(_photos(learned), [prompt] * len(learned), DRAWS_OF_PHOTO // len(learned)),
        "flat": _flat(),
    }
    return Task(name, folder, held, {"instance_prompt": prompt}, SUBJECT_EVALUATED_AT)


def _photos(paths: Sequence[Path]) -> Tensor:
    """Each as the trainer sees it: the middle square."""
    random = generator(0)
    return torch.stack([prepare(load_image(path), SIZE_PX, True, False, "lanczos", random).pixels for path in paths])


def _icons(pixels: Tensor, caption) -> dict[str, Held]:
    """Those of all names in one style, by the shipped lists."""
    names, lists = Icons.shipped(), shipped_lists()

    def of(kind: str, draws: int = DRAWS) -> Held:
        return Held(pixels[names.rows(lists[kind])], [caption(name) for name in lists[kind]], draws)

    return {"validation": of("validation"), "test": of("test"), "training": of("concept", 4), "flat": _flat()}


def _flat() -> Held:
    icons, names = Icons.shipped(), shipped_lists()["check"]
    return Held(icons.style("noto")[icons.rows(names)], [flat_caption("noto", name) for name in names])


def _digest(paths: Sequence[Path]) -> str:
    """Of names and contents: a folder made for other photos may hold one that is now held out."""
    found = hashlib.sha256()
    for path in paths:
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


def _made_once(name: str, fill: Callable[[Path], None]) -> Path:
    """A folder of training pictures; whole, or not there: another process may look."""
    parent = WORK / "tasks"
    parent.mkdir(parents=True, exist_ok=True)
    if not (parent / name).exists():
        with tempfile.TemporaryDirectory(dir=parent) as temporary:
            made = Path(temporary) / name
            made.mkdir()
            fill(made)
            with contextlib.suppress(OSError):  # the other process was first
                made.rename(parent / name)
    return parent / name
