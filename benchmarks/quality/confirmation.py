"""The report's section on the trainer's defaults, measured on seeds that nothing was chosen by."""

from collections.abc import Mapping
from pathlib import Path

from benchmarks.quality.differences import left_out
from benchmarks.quality.finished import flatness_table, pictures_table
from benchmarks.quality.measured import losses_table, measured_rows
from benchmarks.quality.plan import CONFIRMED
from benchmarks.quality.results import runs

__all__ = ["confirmation_section"]


def confirmation_section(folder: Path, ratios: Mapping[str, float]) -> list[str]:
    """Arguments:
    folder: of the files of `confirm`.
    ratios: times of a step.
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
        *losses_table(rows, ratios),
        *pictures_table(rows),
        *flatness_table(rows),
        *left_out(found, rows),
    ]
