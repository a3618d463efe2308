"""The losses over the steps of what was measured, a panel each."""

import math
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.differences import Row
from bilora_diffusion.paired import half_width
from bilora_diffusion.report.plots import COLOURS

__all__ = ["curves", "points"]

COLUMNS = 4
WIDTH_LETTERS = 46  # of a panel
LOSSES = {"test": "unseen 3D icons", "training": "the 23 trained ones", "flat": "flat icons"}


def curves(rows: Sequence[Row], folder: Path | None, file: str) -> list[str]:
    """Draws LoRA's losses in the first panel, in the others differences to it, with their 95 % intervals.

    Arguments:
        rows: LoRA's first.
        folder: for the PNG; None: nothing is drawn.
        file: the PNG's name.

    Returns:
        What shows it in the report.
    """
    if not rows or folder is None:
        return []
    from matplotlib.figure import Figure

    count = math.ceil(len(rows) / COLUMNS)
    figure = Figure(figsize=(3.3 * COLUMNS, 2.4 * count), layout="constrained")
    axes = figure.subplots(count, COLUMNS, squeeze=False).flat
    for axis in axes[len(rows) :]:
        axis.set_visible(False)
    shared = next(iter(axes[1:]), None)  # one scale for all differences
    for axis, row in zip(axes, rows, strict=False):
        if not row.is_lora and axis is not shared:
            axis.sharey(shared)
        for (name, told), colour in zip(LOSSES.items(), COLOURS, strict=False):
            _line(axis, row, name, told, colour)
        axis.set_title(_wrapped(row.title), fontsize=8)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False, fontsize=8)
    axes[0].set_ylabel("loss", fontsize=8)
    for axis in axes[1 : len(rows)]:
        axis.axhline(0, color="0.6", linewidth=0.8)
        axis.set_ylabel("difference to lora, 1e-4", fontsize=7)
    figure.supxlabel("steps", fontsize=8)
    figure.savefig(folder / file, dpi=110, metadata={"Software": None})
    return [f"![losses over steps]({file})", ""]


def points(row: Row, name: str) -> list[tuple[int, float, float]]:
    """Where a loss was measured the step, its mean over the seeds, and half of the mean's 95 % interval.

    Of LoRA its own; of others the difference to LoRA's, in 1e-4.
    """
    steps = [step for step, losses in sorted(row.runs[0][0]["evaluations"].items(), key=_number) if name in losses]
    found = []
    for step in steps:
        pairs = row.values(lambda run, step=step: run["evaluations"][step][name])
        values = [own if row.is_lora else 1e4 * (own - plain) for own, plain in pairs]
        found.append((int(step), statistics.fmean(values), half_width(values) if len(values) > 1 else 0.0))
    return found


def _line(axis: Any, row: Row, name: str, told: str, colour: str) -> None:
    steps, means, halves = zip(*points(row, name), strict=True)
    axis.plot(steps, means, color=colour, label=told, marker=".", linewidth=1.3)
    lows, highs = ([m + sign * h for m, h in zip(means, halves, strict=True)] for sign in (-1, 1))
    axis.fill_between(steps, lows, highs, color=colour, alpha=0.18, linewidth=0)


def _number(item: tuple[str, Any]) -> int:
    return int(item[0])


def _wrapped(title: str) -> str:
    """The method on a line of its own."""
    method, _, settings = title.partition(", ")
    return "\n".join([method, *textwrap.wrap(settings, WIDTH_LETTERS)])
