"""From what was measured to what the page shows: texts, tables, pictures and curves."""

import statistics
import time
from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image

from bilora_diffusion.config import FLAGS, as_dict
from bilora_diffusion.curves import CURVE_TITLES, curves
from bilora_diffusion.finishing import package_versions
from bilora_diffusion.grid import Column, grid
from bilora_diffusion.report.drawing import BASE, Row
from bilora_diffusion.report.measuring import SIZES
from bilora_diffusion.report.page import PNG_UP_TO_PX, Cell, Table
from bilora_diffusion.report.plan import title
from bilora_diffusion.report.plots import Line, Plot
from bilora_diffusion.report.quantities import Compared, amount, mean, number
from bilora_diffusion.report.results import Results, RunResult
from bilora_diffusion.report.verdict import caveat, gap_note
from bilora_diffusion.runs import Run

__all__ = ["contents"]

LOSSES = ("held_out", "training", "gap", "drift")
SIMILARITIES = ("nearest", "likeness", "prompt")
COST = ("seconds", "memory")
ROW_PX, SMALL_ROW_PX = 700, 420
"""The least width of a row of pictures; of small ones two stand beside each other where there is room."""
Grid = list[tuple[str, list[Cell]]]


def contents(results: Results) -> tuple[dict[str, Any], list[Plot], dict[str, Image.Image]]:
    """The template's values, the plots, and the grids as pictures by their files' names."""
    losses, training, sharpness = _losses_plots(results), _training_plots(results), _sharpness_plots(results)
    found = results.compared()
    concept = _grid(results, list(enumerate(results.rows)))
    others = [(number_, row) for number_, row in enumerate(results.other, len(results.rows)) if not row.settings.seed]
    other = _grid(results, others)
    values = {
        "title": f"{_listed(map(title, results.methods))} on {_counted(len(results.trained), 'picture')}",
        "subtitle": _subtitle(results),
        "verdict": results.verdict(),
        "caveat": caveat(sum(len(one.differences) for one in found), len(results.seeds), len(results.held_out)),
        "pictures_note": _pictures_note(results),
        "row_px": SMALL_ROW_PX if results.resolution <= PNG_UP_TO_PX else ROW_PX,
        "concept_rows": concept,
        "other_rows": other,
        "losses_note": f"Denoising losses: means over {results.draws} fixed draws of picture, timestep and noise, the "
        "same for every column.",
        "losses": _table(results, found, LOSSES),
        "losses_plots": [plot.title for plot in losses],
        "copying": _table(results, found, SIMILARITIES),
        "copying_note": _copying_note(results),
        "copies": _copies(results),
        "training_notes": _gap_notes(results),
        "training_plots": [plot.title for plot in training],
        "sharpness": _table(results, found, ("sharpness",)),
        "sharpness_plots": [plot.title for plot in sharpness],
        "cost": _table(results, found, COST),
        "cost_note": _cost_note(results),
        "commands": [run.training.command for run in results.runs],
        "command": results.command,
        "details": _details(results),
    }
    sheets = {"pictures": _sheet(concept), "other_prompts": _sheet(other)}
    return values, [*losses, *training, *sharpness], sheets


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _subtitle(results: Results) -> str:
    parts = (
        f"base {results.base_name}",
        f"{results.runs[0].summary['steps']} steps",
        f"{results.resolution} px",
        f"{_counted(len(results.held_out), 'picture')} held out",
        f"{_counted(len(results.seeds), 'seed')} a method",
        time.strftime("%Y-%m-%d"),
    )
    return ", ".join(parts)


# --- Pictures ---


def _first_runs(results: Results) -> list[RunResult]:
    return [some[0] for some in results.by_method.values()]


def _grid(results: Results, rows: Sequence[tuple[int, Row]]) -> Grid:
    """The base and the first seed's LoRAs, and the held-out picture where the prompt is its caption.

    Arguments:
        rows: with their places in `Results.drawn`.
    """
    columns = [(BASE, BASE), *((title(run.training.method), run.training.name) for run in _first_runs(results))]
    found: Grid = []
    for number_, row in rows:
        prompt, seed = row.settings.prompt, row.settings.seed
        cells = [
            Cell(results.drawn[name][number_], f"drawn by {label}, picture seed {seed}: {prompt}", label)
            for label, name in columns
        ]
        if row.true is not None:
            cells.append(Cell(row.true.load(), f"the held-out picture: {prompt}", "held-out picture"))
        found.append((f"{prompt} (picture seed {seed})", cells))
    return found


def _sheet(rows: Grid) -> Image.Image:
    """A grid as one picture."""
    width = min(len(cells) for _, cells in rows)
    columns = []
    for place in range(width):
        pictures = [cells[place].picture for _, cells in rows]
        columns.append(Column(rows[0][1][place].label, pictures))
    return grid(columns, [label for label, _ in rows])


def _pictures_note(results: Results) -> str:
    note = "A row starts from the same noise in every column, so its pictures differ by the weights alone."
    if len(results.seeds) > 1:
        note += f" Shown are the LoRAs of training seed {results.seeds[0]}; those of the others are beside this page."
    return note


def _copies(results: Results) -> Grid:
    """The pair of a drawn and a training picture that are most alike, for each method over all its seeds."""
    cells: Grid = []
    for method, some in results.by_method.items():
        copied = [run for run in some if run.copy is not None]
        if copied:
            run = max(copied, key=lambda run: run.copy.similarity)
            copy, picture = run.copy, results.trained[run.copy.training]
            label = f"{title(method)}, training seed {run.training.seed}: similarity {copy.similarity:.3f}"
            drawn = results.drawn[run.training.name][copy.row]
            prompt = results.rows[copy.row].settings.prompt
            pair = [
                Cell(drawn, f"drawn by {title(method)}: {prompt}", "drawn"),
                Cell(picture.load(), f"training picture {picture.name}", f"trained on: {picture.name}"),
            ]
            cells.append((label, pair))
    return cells


def _copying_note(results: Results) -> str:
    if results.judge is None:
        return "Not measured: no CLIP for this base is at hand; give one with --clip."
    return (
        f"Cosine similarities by {results.judge}, of the pictures for prompts with the concept. They compare columns "
        "and are no grades. Below, each method's drawn picture that is most like a training picture."
    )


# --- Tables ---


def _table(results: Results, found: Sequence[Compared], keys: Iterable[str]) -> Table:
    methods = results.methods
    several = len(results.seeds) > 1
    heads = ["mean of the seeds" if several else "", *([BASE] if _any_base(found, keys) else []), *map(title, methods)]
    first, plain = title(methods[0]), len(heads)
    heads += [f"{title(method)} against {first}" for method in methods[1:]]
    rows = []
    for one in found:
        if one.quantity.key not in keys:
            continue
        kind = one.quantity.kind
        cells = []
        if BASE in heads:
            cells.append("" if one.base is None else number(kind, one.base))
        cells += [number(kind, mean(one.quantity, values)) for values in one.values.values()]
        cells += [_difference(one, method) for method in methods[1:]]
        rows.append((one.quantity.title, one.quantity.meaning, cells))
    return Table(heads, rows, plain)


def _any_base(found: Sequence[Compared], keys: Iterable[str]) -> bool:
    return any(one.base is not None for one in found if one.quantity.key in keys)


def _difference(one: Compared, method: str) -> str:
    difference = one.differences[method]
    if difference is None:
        return "not comparable"
    text = amount(one.quantity, difference.mean)
    if difference.interval is None:
        return text
    low, high = (amount(one.quantity, end) for end in difference.interval)
    return f"{text}\n({low} to {high})"


def _cost_note(results: Results) -> str:
    devices = sorted({str(run.summary.get("device")) for run in results.runs})
    return (
        f"Measured in these runs, on {', '.join(devices)}, one after another. What else the machine did "
        "meanwhile is in the times too. Means of times and memory are geometric, as their differences are ratios."
    )


# --- Curves ---


def _losses_plots(results: Results) -> list[Plot]:
    """Held-out and training loss at the checkpoints, if there are any before the last step."""
    lines = []
    names = [name for name in ("held_out", "training") if name in results.base.losses]
    for place, (method, some) in enumerate(results.by_method.items()):
        for name in names:
            courses = [[(0.0, results.base.losses[name]), *run.course_of(name)] for run in some]
            label = f"{title(method)}, {'held out' if name == 'held_out' else 'training'}"
            lines.append(Line(label, place, courses, dashed=name == "training"))
    if not any(run.course for run in results.runs):
        return []
    return [Plot("checkpoints", "Loss on the fixed draws, at each checkpoint", "step", "loss", lines)]


def _training_plots(results: Results) -> list[Plot]:
    found = curves([Run(run.training.name, run.training.folder) for run in results.runs])
    plots = []
    for name, by_run in found.items():
        lines = []
        for place, (method, some) in enumerate(results.by_method.items()):
            own = [by_run[run.training.name] for run in some if run.training.name in by_run]
            if own:
                lines.append(Line(title(method), place, own))
        if lines:
            plots.append(Plot(name, CURVE_TITLES[name], "step", name.replace("_over_", " / ").replace("_", " "), lines))
    return plots


def _gap_notes(results: Results) -> list[str]:
    notes = []
    for method, some in results.by_method.items():
        measured = [run for run in some if run.summary.get("loss_gap") is not None]
        if measured:
            gaps = [run.summary["loss_gap"] for run in measured]
            clean = [statistics.fmean(run.summary["clean_losses"]) for run in measured]
            notes.append(gap_note(method, gaps, clean))
    return notes


def _sharpness_plots(results: Results) -> list[Plot]:
    lines = []
    for place, (method, some) in enumerate(results.by_method.items()):
        own = [
            [(0.0, run.losses["training"]), *zip(SIZES, run.sharpness["losses"], strict=True)]
            for run in some
            if run.sharpness is not None
        ]
        lines.append(Line(title(method), place, own))
    return [Plot("sharpness", "Loss along the gradient", "length of the step / norm of the factors", "loss", lines)]


# --- Details ---


def _details(results: Results) -> list[tuple[str, list[tuple[str, str]]]]:
    config = results.runs[0].training.config
    changed = [(f"--{name}", str(value)) for name, value in as_dict(config).items() if value != FLAGS[name].default]
    pictures = [("trained on", _names(results.trained)), ("held out", _names(results.held_out) or "none")]
    asked = [row.settings for row in results.rows]
    rows = [(f"row {n}", f"{one.prompt} (picture seed {one.seed})") for n, one in enumerate(asked, 1)]
    drawing = asked[0]
    settings = [
        ("denoising steps", str(drawing.steps)),
        ("guidance scale", f"{drawing.guidance_scale:g}"),
        ("scheduler", drawing.scheduler),
        ("size", f"{drawing.width or results.resolution} px"),
    ]
    return [
        (f"The flags of {results.runs[0].training.name} that are not the defaults", changed),
        ("The pictures", pictures),
        ("How pictures were drawn", [*settings, *rows]),
        ("Versions", list(package_versions().items())),
    ]


def _names(pictures: Sequence[Any]) -> str:
    return ", ".join(picture.name for picture in pictures)
