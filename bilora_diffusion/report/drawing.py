"""Pictures from the same seeds by the base and by every LoRA, and which of them copy a training picture."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from bilora_diffusion.data.pictures import Picture
from bilora_diffusion.embedded import EMBEDDED
from bilora_diffusion.embedded.lists import LIKE_THE_PAPER
from bilora_diffusion.embedded.words import flat_caption
from bilora_diffusion.generation.engine import Engine, LoraFile
from bilora_diffusion.generation.settings import PictureSettings
from bilora_diffusion.measures import Judge

__all__ = ["BASE", "Copy", "Row", "concept_rows", "draw_all", "most_alike", "other_prompts", "other_rows"]

BASE = "base"
"""The column without a LoRA."""
LEAST_ROWS = 4
OTHER_PROMPTS = (
    "a photo of a mountain lake at sunrise",
    "a portrait photo of an old man",
    "a red car in a city street",
    "a watercolour of a bowl of fruit",
)
"""Of everyday things; whoever teaches one of these gives others with `--other_prompts`."""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """What is drawn in one row of the grid.

    Attributes:
        true: the held-out picture that this is the caption of, if it is one.
    """

    settings: PictureSettings
    true: Picture | None = None


@dataclass(frozen=True)
class Copy:
    """A drawn picture and the training picture that is most like it.

    Attributes:
        row, training: their numbers.
        similarity: cosine, at most 1.
    """

    row: int
    training: int
    similarity: float


def concept_rows(
    prompts: Sequence[str], held_out: Sequence[Picture], trained: Sequence[Picture], count: int | None, shared: Any
) -> list[Row]:
    """Rows of what the LoRA was taught.

    Arguments:
        prompts: the user's; none: the captions of held-out pictures, or of trained ones if none were held out.
        count: pictures a prompt, with seeds one apart; None: as many as give `LEAST_ROWS` rows.
        shared: the `PictureSettings` of all rows, but for prompt and seed.
    """
    asked: list[tuple[str, Picture | None]] = [(prompt, None) for prompt in prompts]
    if not asked:
        pictures = (held_out or trained)[:LEAST_ROWS]
        own = len({picture.caption for picture in pictures}) == len(pictures)
        # One instance prompt for all pictures names none of them.
        asked = [(one.caption, one if own and held_out else None) for one in pictures]
        asked = list(dict(asked).items())
    count = count or -(-LEAST_ROWS // len(asked))
    return [Row(replace(shared, prompt=prompt, seed=seed), true) for prompt, true in asked for seed in range(count)]


def other_prompts(given: Sequence[str], base: str) -> list[str]:
    """Prompts without the concept: the user's, or some that suit the base."""
    if given:
        return list(given)
    if base == EMBEDDED:
        return [flat_caption("noto", name) for name in LIKE_THE_PAPER[:LEAST_ROWS]]
    return list(OTHER_PROMPTS)


def other_rows(prompts: Sequence[str], shared: PictureSettings) -> list[Row]:
    """Rows without the concept, two seeds a prompt: what the base draws here is also what drift is measured on."""
    return [Row(replace(shared, prompt=prompt, seed=seed)) for prompt in prompts for seed in range(2)]


def draw_all(
    engine: Engine, columns: Mapping[str, Sequence[LoraFile]], rows: Sequence[Row], folder: Path, tell: Tell
) -> dict[str, list[Image.Image]]:
    """Draws every row for every column and writes the pictures.

    Arguments:
        columns: the LoRA files that are on, by name.
        folder: gets `<column>/<row>.png`.
        tell: called after each picture.
    """
    from bilora_diffusion.generation.png import save_picture

    drawn: dict[str, list[Image.Image]] = {}
    for name, loras in columns.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        drawn[name] = []
        for number, row in enumerate(rows):
            (one,) = engine.draw(row.settings, loras)
            save_picture(folder / name / f"{number}.png", one.picture, one.settings.to_json())
            drawn[name].append(one.picture)
            tell(f"pictures of {name}")
    return drawn


def most_alike(judge: Judge, pictures: Sequence[Image.Image], training: Tensor) -> Copy:
    """The pair of a drawn and a training picture that are nearest to each other.

    Arguments:
        training: the training pictures as `judge.images` gives them.
    """
    similarities = judge.images(pictures) @ training.T
    row, other = divmod(int(similarities.argmax()), similarities.shape[1])
    return Copy(row, other, similarities[row, other].item())
