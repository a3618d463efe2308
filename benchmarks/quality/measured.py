"""The table's section on the names that were held back, of what was chosen; and the table of losses."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.costs import step_bytes, time_cost
from benchmarks.quality.curves import curves
from benchmarks.quality.differences import Row, cell, interval, paired_rows, test_cells
from benchmarks.quality.finished import at_best_step, finished_tables
from benchmarks.quality.plan import Configuration
from benchmarks.quality.results import at_best, last

__all__ = ["losses_table", "measured_rows", "measured_section"]


def measured_rows(
    some: Sequence[dict[str, Any]], best: Mapping[str, Configuration], *, telling: bool = True
) -> list[Row]:
    """Of each configuration, LoRA's first; see `paired_rows`."""
    return paired_rows({(run["key"], run["seed"]): run for run in some}, best, telling=telling)


def measured_section(rows: Sequence[Row], ratios: Mapping[str, float], pictures: Path | None = None) -> list[str]:
    """Arguments:
    rows: LoRA's first.
    ratios: times of a step.
    pictures: a folder for the curves; None: without.
    """
    seeds = [run["seed"] for run, _ in rows[0].runs]
    return [
        "## Measured on the test names",
        "",
        f"Seeds {', '.join(map(str, seeds))}. Differences to LoRA with a 95 % interval (paired, Student's t; where it "
        "holds 0 no difference was shown); LoRA's own row has its values and their standard error. Each method is here "
        "as seed 0's validation names chose it; of a row that says so they chose another one.",
        "",
        *losses_table(rows, ratios),
        *curves(rows, pictures, "quality_curves.png"),
        *finished_tables(rows),
    ]


def losses_table(rows: Sequence[Row], ratios: Mapping[str, float]) -> list[str]:
    lines = [
        "### Losses",
        "",
        "Differences in 1e-4; before each of the test losses its mean and standard error. `best`: each run at its "
        "step of lowest validation loss; `equal time`: the same among the steps that it makes while LoRA makes all "
        "of its own; `last`: at the end; `last, to best`: that less LoRA's at LoRA's own best step; `gap`: test "
        "less training, at the end; `raised`: how much the perturbation raises the loss of the batch at hand, mean "
        "over the run, in 1e-4; `8 bits`: test with the adapted weights rounded to 8 bits, nothing where that was "
        "not measured; `time a step`: "
        "as a share of LoRA's, at least that for full space; LoRA's seconds are the median of its runs, on one core "
        "of a machine that did other things too; `memory`: the most that a step holds at once, in MB of 10^6 bytes, "
        "LoRA's with the frozen UNet, the others' on top of LoRA's. Memory is counted, not measured: "
        "`bilora_diffusion.memory` runs the trainer's step on tensors without data, in float32, and adds up what CUDA "
        "would hold.",
        "",
        "| method | mean, best | mean, last | test, best | test, equal time | test, last | last, to best "
        "| gap | raised | flat, best | flat, last | 8 bits, best | 8 bits, last | time a step | memory |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    plain = rows[0]
    best = {row.title: row for row in at_best_step(rows)}
    plain_bytes = step_bytes(plain.configuration)
    for row in rows:
        cells = _loss_cells(row, best.get(row.title), time_cost(row.configuration, ratios))
        memory = 0 if row.is_lora else step_bytes(row.configuration) - plain_bytes
        cells.append(f"{plain_bytes / 1e6:.1f}" if row.is_lora else f"{memory / 1e6:+.1f}")
        lines.append("| " + " | ".join([row.title, *cells]) + " |")
    return [*lines, ""]


def _loss_cells(row: Row, then: Row | None, cost: float | None) -> list[str]:
    """Arguments:
    then: what was measured at each run's best step.
    """
    means = [
        cell(row.values(value), 4, True) for value in (lambda run: at_best(run, "test"), lambda run: last(run)["test"])
    ]
    gap = cell(row.values(lambda run: last(run)["test"] - last(run)["training"]), 4, row.is_lora)
    gaps = [1e4 * statistics.fmean(run["loss_gaps"]) for run, _ in row.runs if run["loss_gaps"]]
    raised = f"{statistics.fmean(gaps):+.1f}" if gaps else ""
    values = [
        lambda run: at_best(run, "flat"),
        lambda run: last(run)["flat"],
    ]
    cells = [cell(row.values(value), 4, row.is_lora) for value in values]
    rounded = [None if some is None else some.values(lambda run: run["rounded_to_8_bits"]) for some in (then, row)]
    cells += ["" if values is None else cell(values, 4, row.is_lora) for values in rounded]
    beyond = interval([1e4 * (last(run)["test"] - at_best(plain, "test")) for run, plain in row.runs], 0)
    differences = [*([""] * 3 if row.is_lora else test_cells(row, cost)), beyond]
    seconds = [run["seconds"] / len(run["training_losses"]) for run, _ in row.runs if run["seconds"] is not None]
    own = f" ({statistics.median(seconds):.2g} s)" if row.is_lora and seconds else ""
    return [*means, *differences, gap, raised, *cells, "" if cost is None else f"x {cost:.2f}{own}"]
