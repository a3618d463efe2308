"""The pictures of every run as PNG files in the run's folder; one that is there is not drawn again."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from benchmarks.quality.concepts import Concept, Prompt
from bilora_diffusion.bases import Base
from bilora_diffusion.data.pictures import Picture
from bilora_diffusion.errors import UserError
from bilora_diffusion.generation.engine import Engine
from bilora_diffusion.generation.png import read_settings, save_picture
from bilora_diffusion.generation.settings import PictureSettings
from bilora_diffusion.report.plan import Training
from bilora_diffusion.run_folder import DIFFUSERS_FILE, SUMMARY_FILE
from bilora_diffusion.strict_json import strict_json

__all__ = ["DrawnRun", "Place", "draw_missing"]

FOLDER = "benchmark"
"""In the run's: whoever deletes the run to train it anew deletes its pictures too."""


@dataclass(frozen=True)
class Place:
    """Where one picture is, and what it must be."""

    path: Path
    prompt: Prompt
    settings: PictureSettings

    @property
    def caption_path(self) -> Path:
        """Where the captioner's words for it are kept."""
        return self.path.with_suffix(".json")

    def is_drawn(self) -> bool:
        """Whether the file is there and was drawn with these settings."""
        try:
            return read_settings(self.path) == json.loads(strict_json(self.settings.to_json()))
        except (UserError, OSError):
            return False


@dataclass(frozen=True)
class DrawnRun:
    """A training and all pictures that are wanted of it.

    Attributes:
        real: the pictures of the concept that it was trained on.
    """

    concept: Concept
    training: Training
    real: Sequence[Picture]
    count: int
    shared: PictureSettings

    @property
    def name(self) -> str:
        return f"{self.concept.name}/{self.training.name}"

    @property
    def folder(self) -> Path:
        return self.training.folder / FOLDER

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What the trainer wrote about it."""
        path = self.training.folder / SUMMARY_FILE
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}): delete {path.parent} to train it again") from None

    def places(self) -> Iterator[Place]:
        """Prompt by prompt; picture n of a prompt begins with the same noise in every run."""
        for row, prompt in enumerate(self.concept.prompts):
            for number in range(self.count):
                settings = replace(self.shared, prompt=prompt.drawn, seed=number)
                yield Place(self.folder / f"{row:02}-{number:03}.png", prompt, settings)


def draw_missing(base: Base, runs: Sequence[DrawnRun]) -> int:
    """Draws what is not there yet; returns how many pictures that were. The base is loaded only if there are some.

    Raises:
        UserError: the base or a LoRA cannot be loaded, the GPU's memory is too small, a file cannot be written.
    """
    due: Mapping[str, list[Place]] = {
        run.name: [place for place in run.places() if not place.is_drawn()] for run in runs
    }
    total = sum(map(len, due.values()))
    if not total:
        return 0
    engine = Engine(base)
    with tqdm(total=total, desc="drawing", unit="picture") as bar:
        for run in runs:
            bar.set_postfix_str(run.name, refresh=False)
            if due[run.name]:
                _draw(engine, run, due[run.name], bar)
    return total


def _draw(engine: Engine, run: DrawnRun, places: Sequence[Place], bar: tqdm) -> None:
    file = run.training.folder / DIFFUSERS_FILE
    if not file.is_file():
        raise UserError(f"{file} is gone: delete {run.training.folder} to train it again")
    run.folder.mkdir(exist_ok=True)
    for place in places:
        place.caption_path.unlink(missing_ok=True)  # of another picture
        (drawn,) = engine.draw(place.settings, [(file, run.name, 1.0)])
        save_picture(place.path, drawn.picture, place.settings.to_json())
        bar.update()
