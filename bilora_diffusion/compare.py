"""The same prompts and seeds through several LoRAs: each row of the table differs in the weights alone.

python -m bilora_diffusion.compare outputs/quickstart_lora outputs/quickstart --prompt "a fluent icon of a lion"
python -m bilora_diffusion.compare --settings comparison.json

The settings are the ones that the app's Compare tab reads and writes.
"""

import argparse
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from bilora_diffusion.atomic import write_text_atomically
from bilora_diffusion.bases import Base
from bilora_diffusion.embedded import EMBEDDED
from bilora_diffusion.errors import UserError
from bilora_diffusion.generation.comparison import (
    ComparedColumn,
    ComparisonSettings,
    Sweep,
    column_titles,
    read_comparison,
)
from bilora_diffusion.generation.engine import Drawn, Engine, Report
from bilora_diffusion.generation.files import LoraFiles
from bilora_diffusion.generation.png import save_picture
from bilora_diffusion.generation.settings import FIELDS, SCHEDULERS, LoraUse, PictureSettings
from bilora_diffusion.grid import Column, grid
from bilora_diffusion.measures import Judge, Measure, judge_for, measure, training_pictures
from bilora_diffusion.run_folder import DIFFUSERS_FILE
from bilora_diffusion.strict_json import strict_json

__all__ = ["GRID_FILE", "SETTINGS_FILE", "Comparison", "compare", "main"]

GRID_FILE = "comparison.png"
SETTINGS_FILE = "comparison.json"


@dataclass(frozen=True)
class Comparison:
    """A finished comparison.

    Attributes:
        titles: of the columns.
        rows: labels of the rows; empty texts where there is nothing to tell.
        cells: row by row, the picture of each column.
        measures: column by column.
    """

    settings: ComparisonSettings
    titles: Sequence[str]
    rows: Sequence[str]
    cells: Sequence[Sequence[Drawn]]
    measures: Sequence[Sequence[Measure]]

    def grid(self) -> Image.Image:
        """All pictures as one, labelled."""
        columns = [
            Column(title, [row[number].picture for row in self.cells]) for number, title in enumerate(self.titles)
        ]
        return grid(columns, self.rows if any(self.rows) else ())

    def save_grid(self, path: Path) -> None:
        """Writes it as a PNG that holds the settings. Raises UserError as `save_picture` does."""
        save_picture(path, self.grid(), {"comparison": self.settings.to_json()})


def compare(
    engine: Engine,
    settings: ComparisonSettings,
    files: LoraFiles,
    *,
    judge: Judge | None = None,
    report: Callable[[int, int, Report], None] = lambda row, column, report: None,
    finished: Callable[[int, int, Drawn], None] = lambda row, column, drawn: None,
    previews: bool = False,
    cancelled: threading.Event | None = None,
) -> Comparison:
    """Draws every cell, equal cells once, and measures the columns.

    Arguments:
        files: where the LoRAs are; all are looked at before the first picture.
        judge: None leaves the numbers out.
        report: called with row, column and the engine's report after each step.
        finished: called with row, column and the picture when a cell is done.
        previews, cancelled: as `Engine.draw`.

    Raises:
        UserError: a file cannot be used, or does not fit the base.
        Cancelled: when `cancelled` is set.
    """
    titles = column_titles(settings.columns, files)
    paths = {lora.file: files.path(lora.file) for column in settings.columns for lora in column.loras}
    rows = settings.rows()
    known: dict[str, Drawn] = {}
    cells: list[list[Drawn]] = []
    for row_number, row in enumerate(rows):
        cells.append([])
        for number, column in enumerate(settings.columns):
            one = settings.cell(row, column)
            key = strict_json(one.to_json())
            if key not in known:
                (known[key],) = engine.draw(
                    one,
                    [(paths[lora.file], lora.file, lora.weight) for lora in one.loras],
                    report=lambda step, row=row_number, column=number: report(row, column, step),
                    previews=previews,
                    cancelled=cancelled,
                )
            cells[-1].append(known[key])
            finished(row_number, number, known[key])
    first = cells[0][0].settings
    shared = replace(settings.shared, width=first.width, height=first.height)
    if shared.guidance_scale is None:
        shared = replace(shared, guidance_scale=first.guidance_scale)
    settings = replace(settings, shared=shared)
    measures = _measures(settings, paths, cells, judge)
    return Comparison(settings, titles, [row.label for row in rows], cells, measures)


def _measures(
    settings: ComparisonSettings, paths: Mapping[str, Path], cells: Sequence[Sequence[Drawn]], judge: Judge | None
) -> list[list[Measure]]:
    """Of each column; one without a LoRA is held against the pictures of the first that has some."""
    if judge is None:
        return [measure(None, (), (), None) for _ in settings.columns]
    embedded: dict[str, Any] = {}
    for file, path in paths.items():
        pictures = training_pictures(path)
        embedded[file] = judge.images(pictures) if pictures else None
    fallback = next((one for one in embedded.values() if one is not None), None)
    measured = []
    for number, column in enumerate(settings.columns):
        drawn = [row[number] for row in cells]
        own = next((embedded[lora.file] for lora in column.loras if embedded[lora.file] is not None), None)
        prompts = [one.settings.prompt for one in drawn]
        training = own if column.loras else fallback
        measured.append(measure(judge, [one.picture for one in drawn], prompts, training))
    return measured


# --- The command ---


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the paths of the grid and of the settings, and the numbers."""
    arguments = _parser().parse_args(argv)
    try:
        files = LoraFiles.below(Path(folder) for folder in arguments.lora_dir or ["outputs"])
        settings = _read_settings(arguments.settings) if arguments.settings else _settings(arguments, files)
        base = Base(arguments.base or settings.shared.base or EMBEDDED)
        settings = replace(settings, shared=replace(settings.shared, base=base.shared_name))
        judge = judge_for(base.name, arguments.clip)
        comparison = compare(Engine(base), settings, files, judge=judge, finished=_tell(settings))
        output = Path(arguments.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        comparison.save_grid(output / GRID_FILE)
        write_text_atomically(output / SETTINGS_FILE, strict_json(comparison.settings.to_json(), indent=2) + "\n")
    except UserError as error:
        error.tell()
        return 2
    except KeyboardInterrupt:
        return 130
    print(output / GRID_FILE)
    print(output / SETTINGS_FILE)
    for title, measures in zip(comparison.titles, comparison.measures, strict=True):
        for one in measures:
            print(f"{title}: {one.name} {'-' if one.value is None else format(one.value, '.3f')} ({one.meaning})")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bilora_diffusion.compare",
        description="Draws base | LoRA | LoRA for the same prompts and seeds.",
    )
    parser.add_argument("loras", nargs="*", help="run folders or LoRA files below --lora_dir, a column each")
    parser.add_argument("--settings", metavar="FILE", help="all of the comparison: the app's JSON, or its table's PNG")
    parser.add_argument(
        "--lora_dir",
        action="append",
        help="folder that LoRAs are below; several times as in the app [default: outputs]",
    )
    parser.add_argument("--base", help="built-in name, folder, .safetensors file or hub id [default: embedded]")
    parser.add_argument("--clip", help="a CLIP for the numbers, a folder or hub id")
    parser.add_argument("--output_dir", default="outputs/comparison", help="[default: outputs/comparison]")
    parser.add_argument("--prompt", nargs="+", default=[], help="a row each")
    parser.add_argument("--seed", nargs="+", default=["0"], help="a row each [default: 0]")
    parser.add_argument("--weight", default="1", help="of every LoRA [default: 1]")
    parser.add_argument("--sweep", nargs="+", metavar=("VARIABLE", "VALUE"), help="such as: weight 0.5 1 1.5")
    for name in ("negative_prompt", "steps", "guidance_scale", "width", "height"):
        parser.add_argument(f"--{name}", help=FIELDS[name].help)
    parser.add_argument("--scheduler", help=f"one of: {', '.join(SCHEDULERS)}")
    return parser


def _settings(arguments: argparse.Namespace, files: LoraFiles) -> ComparisonSettings:
    if not arguments.loras or not arguments.prompt:
        raise UserError("name one or more LoRAs and a --prompt, or give --settings FILE.json")
    names = ("negative_prompt", "steps", "guidance_scale", "width", "height", "scheduler")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    weight = _number(arguments.weight, "weight")
    columns = [ComparedColumn(loras=(LoraUse(file=_name_of(one, files), weight=weight),)) for one in arguments.loras]
    if len(columns) < 4:
        columns.insert(0, ComparedColumn())
    return ComparisonSettings(
        columns=tuple(columns),
        prompts=tuple(arguments.prompt),
        seeds=tuple(_number(seed, "seed") for seed in arguments.seed),
        sweep=_sweep(arguments.sweep) if arguments.sweep else None,
        shared=PictureSettings(**{name: _number(value, name) for name, value in given.items()}),
    )


def _sweep(words: Sequence[str]) -> Sweep:
    variable, *values = words
    return Sweep(variable=variable, values=tuple(_number(value, variable) for value in values))


def _number(text: str, name: str) -> Any:
    """A word as the field wants it; what is no number stays as it is and is refused with the field's own words."""
    kind = FIELDS[name].kind if name in FIELDS else str
    try:
        return kind(text) if kind in (int, float) else text
    except ValueError:
        return text


def _name_of(text: str, files: LoraFiles) -> str:
    """The name in `files` of a run's folder or a LoRA file on this disk."""
    path = Path(text) / DIFFUSERS_FILE if Path(text).is_dir() else Path(text)
    if not path.is_file():
        raise UserError(f"{text} is no LoRA file, and no folder with {DIFFUSERS_FILE}")
    name = files.name_of(path)
    if name is None:
        folders = ", ".join(map(str, files.folders.values()))
        raise UserError(f"{text} is not below --lora_dir {folders}: name a folder that is above it")
    return name


def _read_settings(path: str) -> ComparisonSettings:
    try:
        return read_comparison(Path(path))
    except UserError as error:
        raise UserError(f"--settings {path}: {error}") from None


def _tell(settings: ComparisonSettings) -> Callable[[int, int, Drawn], None]:
    cells = len(settings.rows()) * len(settings.columns)

    def tell(row: int, column: int, _drawn: Drawn) -> None:
        done = row * len(settings.columns) + column + 1
        print(f"\r{done} of {cells} pictures", end="\n" if done == cells else "", file=sys.stderr)

    return tell


if __name__ == "__main__":
    sys.exit(main())
