"""The report's tables of what is measured of finished trainings: what they draw, and how flat they lie."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.quality.differences import Row, cell, interval
from benchmarks.quality.flatness import DIRECTIONS, POWER_STEPS, RANDOM_SIZE, SIZES
from benchmarks.quality.laboratory import RANK, SHARPNESS_DRAWS
from benchmarks.quality.measures import FEWER
from benchmarks.quality.results import finished_at_best

__all__ = ["PICTURE_MEASURES", "at_best_step", "drawn_rows", "finished_tables", "likeness"]

PICTURE_MEASURES = {
    "similarity_to_true": ("like the true icon", "similarity of colours and shapes to the true icon, in [-2, 2]"),
    "similarity_to_true_few_steps": ("in 8 steps", "the same with 8 sampling steps instead of 20"),
    "distance_to_true": ("squared error", "mean squared difference of colours to the true icon, less is better"),
    "retrieval_rank": ("rank", "mean place of the name's own icon among all 506 by similarity; 1 is best"),
    "retrieved_top_10": ("found in 10", "share of names whose own icon is among the nearest 10"),
    "nearest_training_picture": ("like a training icon", "similarity to the nearest of the 23: copying"),
    "diversity": ("diversity", "2 less the similarity between two seeds' pictures of a name"),
    "scorer_3d": ("scorer", "similarity to the name in 3D by the embedded scorer, in [-1, 1]"),
    "flat_kept": ("flat kept", "similarity of flat icons to those the base draws: what is not forgotten"),
}
"""Title and meaning by name."""
LIKENESS = "similarity_to_true"
DIGITS = {"retrieval_rank": 2}

WHEN = {"best": "each run at its step of lowest validation loss", "last": "after the last step"}
"""When something is measured, by the name of a step."""

FLATNESS = {
    ("lora", "random"): "random",
    ("lora", "worst_case"): "gradient",
    ("lora", "eigenvalue"): "eigenvalue",
    ("full", "random"): "merged, random",
    ("full", "worst_case"): "merged, gradient",
    ("full", "eigenvalue"): "merged, eigenvalue",
    ("full", "gradient"): f"merged, top {RANK}",
}
"""Title by space and name."""


def finished_tables(rows: Sequence[Row], level: str = "###") -> list[str]:
    """What was measured of the best step, where it was, and of the last; nothing if it was not of LoRA's.

    Arguments:
        rows: LoRA's first.
        level: of the headings.
    """
    measured = [row for row in rows if all("pictures" in run for pair in row.runs for run in pair)]
    best = at_best_step(measured)
    lines = []
    for table in (_pictures_table, _flatness_table):
        for when, some in (("best", best), ("last", measured)):
            shown, found = table(some, when) if some and some[0].is_lora else ([], [])
            lines += [f"{level} {found[0]}, {when} step", *found[1:], *_without(rows, shown)] if found else []
    return lines


def at_best_step(rows: Sequence[Row]) -> list[Row]:
    """Of the rows that have it, what was measured of each run at its step of lowest validation loss."""
    found = []
    for row in rows:
        pairs = [(finished_at_best(run), finished_at_best(plain)) for run, plain in row.runs]
        if all(one is not None for pair in pairs for one in pair):
            found.append(Row(row.title, row.is_lora, pairs))
    return found


def _pictures_table(rows: Sequence[Row], when: str) -> tuple[list[Row], list[str]]:
    """Arguments:
        rows: LoRA's first.
        when: a key of `WHEN`.

    Returns:
        (the rows that have all that LoRA's has; the title and the table of them).
    """
    names = _names(rows[0].runs[0][0])
    measures = [name for name in PICTURE_MEASURES if all(name in run["pictures"] for run, _ in rows[0].runs)]
    drawn = _drawn_alike(rows, measures)
    lines = [
        "Pictures",
        "",
        f"{names} unseen names, drawn {WHEN[when]} (in 8 steps, of two seeds, and flat: {FEWER} of them). "
        + "; ".join(f"`{PICTURE_MEASURES[name][0]}`: {PICTURE_MEASURES[name][1]}" for name in measures)
        + ".",
        "",
        *_head([PICTURE_MEASURES[name][0] for name in measures]),
    ]
    for row in drawn:
        cells = [
            cell(row.values(lambda run, name=name: run["pictures"][name]), DIGITS.get(name, 3), row.is_lora)
            for name in measures
        ]
        lines.append("| " + " | ".join([row.title, *cells]) + " |")
    return drawn, [*lines, ""]


def drawn_rows(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """The rows whose likeness to the true icons was measured, by `WHEN` and title; their runs have "pictures".

    Arguments:
        rows: LoRA's first.
    """
    found = {"best": at_best_step(rows), "last": rows}
    return {when: {row.title: row for row in _drawn_alike(some, [LIKENESS])} for when, some in found.items()}


def likeness(run: Mapping[str, Any]) -> float:
    """To the true icon: the measure that stands for all of what is drawn."""
    return run["pictures"][LIKENESS]


def _drawn_alike(rows: Sequence[Row], measures: Sequence[str]) -> list[Row]:
    """Those that have these measures, of as many names as LoRA's.

    Arguments:
        rows: LoRA's first.
    """
    names = _names(rows[0].runs[0][0]) if rows else 0
    return [row for row in rows if all(_names(run) == names and _has(run, measures) for run, _ in row.runs)]


def _flatness_table(rows: Sequence[Row], when: str) -> tuple[list[Row], list[str]]:
    """Arguments:
        rows: LoRA's first.
        when: a key of `WHEN`.

    Returns:
        (the rows that it was measured of; the title and the table of them), both empty if LoRA's is not one.
    """
    found = [row for row in rows if all("lora" in run["sharpness"] for run, _ in row.runs)]
    if not found or not found[0].is_lora:
        return [], []
    lines = [
        "Sharpness",
        "",
        f"Of the training loss {WHEN[when]}, on {SHARPNESS_DRAWS} fixed draws, by `bilora_diffusion.sharpness`: "
        "first in the space of LoRA's factors, then in that of the merged weights; less is flatter. `random`: the mean "
        f"rise after steps of {RANDOM_SIZE:g} of each row's norm, to either side of {DIRECTIONS} filter-normalised "
        f"directions; `gradient`: the rise after a step along it of {100 * SIZES['lora']:g} % of the factors' norm, "
        f"{100 * SIZES['full']:g} % of the merged weights'; `eigenvalue`: the Hessian's top one after {POWER_STEPS} "
        f"steps of power iteration; `top {RANK}`: the root of the sum of the squares of each layer's gradient's top "
        f"{RANK} singular values. Differences as shares of LoRA's mean.",
        "",
        *_head(list(FLATNESS.values())),
    ]
    for row in found:
        cells = [_share_cell(row.values(lambda run, at=at: _flatness(run, *at)), row.is_lora) for at in FLATNESS]
        lines.append("| " + " | ".join([row.title, *cells]) + " |")
    return found, [*lines, ""]


def _share_cell(values: Sequence[tuple[float, float]], is_lora: bool) -> str:
    """LoRA's mean and standard error, or the mean paired difference to it as a share of its mean."""
    plain = [b for _, b in values]
    mean = statistics.fmean(plain)
    if is_lora:
        error = f" (s.e. {statistics.stdev(plain) / math.sqrt(len(plain)):.1g})" if len(plain) > 1 else ""
        return f"{mean:.2g}{error}"
    return f"{interval([100 * (a - b) / mean for a, b in values], 0)} %"


def _names(run: Mapping[str, Any]) -> int:
    """How many were drawn. A file that does not say is older than the count, from when it was 48."""
    return run["pictures"].get("names", 48)


def _has(run: Mapping[str, Any], measures: Sequence[str]) -> bool:
    return all(name in run["pictures"] for name in measures)


def _flatness(run: Mapping[str, Any], space: str, name: str) -> float:
    found = run["sharpness"][space][name]
    return found["top"] if name == "gradient" else found


def _head(titles: Sequence[str]) -> list[str]:
    return ["| method | " + " | ".join(titles) + " |", "|---|" + "---|" * len(titles)]


def _without(rows: Sequence[Row], shown: Sequence[Row]) -> list[str]:
    missing = [row.title for row in rows if row.title not in {one.title for one in shown}]
    return [f"Trained before this was measured so: {'; '.join(missing)}.", ""] if missing else []
