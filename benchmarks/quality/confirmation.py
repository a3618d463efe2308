"""The report's section on the trainer's defaults, measured on seeds that nothing was chosen by."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.costs import time_cost
from benchmarks.quality.curves import curves
from benchmarks.quality.differences import Row, left_out, share
from benchmarks.quality.finished import drawn_rows, finished_tables, likeness
from benchmarks.quality.measured import losses_table, measured_rows
from benchmarks.quality.plan import CONFIRMED, Configuration
from benchmarks.quality.results import at_best, last, runs

__all__ = ["confirmation_section"]

IN_SHORT: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "unseen icons, best step": lambda run: at_best(run, "test"),
    "unseen icons, last step": lambda run: last(run)["test"],
    "icons it knew, best step": lambda run: at_best(run, "flat"),
    "icons it knew, last step": lambda run: last(run)["flat"],
}


def confirmation_section(folder: Path, ratios: Mapping[str, float], pictures: Path | None = None) -> list[str]:
    """Arguments:
    folder: of the files of `confirm`.
    ratios: times of a step.
    pictures: a folder for the curves; None: without.
    """
    found = runs(folder)
    rows = measured_rows(found, {"lora": CONFIRMED[0]}, telling=False)
    if not rows:
        return left_out(found, rows)
    seeds = ", ".join(str(run["seed"]) for run, _ in rows[0].runs)
    return [
        "## The trainer's defaults, on new seeds",
        "",
        f"Seeds {seeds}. What differed from LoRA below, with the strengths that the trainer has by default, at LoRA's "
        "learning rate, with dropout, and LoRA at half the rate: settings and seeds of each row were named before its "
        "runs, and nothing was chosen by them. Of many intervals at 95 % one in twenty leaves 0 out by chance. "
        "Differences to LoRA (paired, Student's t); LoRA's own row has its values and their standard error.",
        "",
        *_in_short(rows, ratios),
        *losses_table(rows, ratios),
        *curves(rows, pictures, "quality_curves_new_seeds.png"),
        *finished_tables(rows),
        *left_out(found, rows),
    ]


def _in_short(rows: Sequence[Row], ratios: Mapping[str, float]) -> list[str]:
    """What README has of it: by the flags that make a row, as shares of LoRA's mean.

    Arguments:
        rows: LoRA's first.
        ratios: times of a step.
    """
    drawn = drawn_rows(rows)
    lines = [
        "### In short",
        "",
        "Differences to LoRA as shares of its mean: losses, of which less is better, the likeness of pictures of "
        "unseen names to the true icons, of which more is, and the time of a step on a CPU. The tables below have the "
        "same in the measures' own units.",
        "",
        "| | " + " | ".join([*IN_SHORT, *(f"pictures, {when} step" for when in drawn), "a step"]) + " |",
        "|---|" + "---|" * (len(IN_SHORT) + len(drawn) + 1),
    ]
    for row in rows[1:]:
        cells = [share(row.values(measure)) for measure in IN_SHORT.values()]
        cells += [share(some[row.title].values(likeness)) if row.title in some else "" for some in drawn.values()]
        cost = time_cost(row.configuration, ratios)
        fewer = row.title.removeprefix(row.configuration.key)
        lines.append(
            f"| `{_flags(row.configuration)}`{fewer} | "
            + " | ".join([*cells, "" if cost is None else f"x {cost:.2f}"])
            + " |"
        )
    return [*lines, ""]


def _flags(configuration: Configuration) -> str:
    """The trainer's that make it of LoRA at the benchmark's rate."""
    words = [f"--{name} {value}" for name, value in configuration.settings.items()]
    rate = configuration.learning_rate
    if rate != CONFIRMED[0].learning_rate:
        words.append(f"--learning_rate {rate:g}")
    return " ".join([f"--method {configuration.method}", *words])
