"""The table's section on other tasks, for which nothing was chosen."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.controls import DROPOUT, HALF
from benchmarks.quality.costs import time_cost
from benchmarks.quality.curves import curves
from benchmarks.quality.differences import Row, cell, left_out, paired_rows, test_cells
from benchmarks.quality.finished import finished_tables
from benchmarks.quality.plan import Configuration
from benchmarks.quality.results import at_best, device_of, last, runs

__all__ = ["ELSEWHERE", "elsewhere_section"]

ELSEWHERE = {
    "3d-batch-1": "the same icons, a picture a step",
    "3d-800-steps": "the same icons, twice as many steps",
    "high-contrast": "black silhouettes of the same 23 names",
    "openmoji": "outlines with flat colours, of the same 23 names",
}
DRAWN = {ELSEWHERE["3d-800-steps"]: "quality_curves_800_steps.png"}
"""What the losses over the steps are drawn of, and the PNG's name."""
CONTROLS = {"half the rate": HALF, "dropout": DROPOUT}
COLUMNS = {
    "test, best": lambda run: at_best(run, "test"),
    "test, last": lambda run: last(run)["test"],
}
SUBJECTS = "photographs of one subject: two or three to learn, one to validate, one to test"


def elsewhere_section(
    folder: Path, best: Mapping[str, Configuration], ratios: Mapping[str, float], pictures: Path | None = None
) -> list[str]:
    """A table for each task; all subjects are one. A row is one configuration, whatever is chosen by now.

    Arguments:
        pictures: a folder for the curves of `DRAWN`; None: without.
    """
    groups: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        for run in runs(place):
            cluster = str(run["seed"]) if place.name in ELSEWHERE else place.name
            groups.setdefault(ELSEWHERE.get(place.name, SUBJECTS), {})[run["key"], cluster] = run
    lines = [
        "## Elsewhere, with the settings chosen above",
        "",
        "Nothing was chosen here: learning rates and strengths are those that the 3D icons' validation names chose; "
        "of a row that says so they chose another one. "
        "Columns as above; `flat, last`: what is forgotten, at the end. LoRA's rows have its values, in the losses' "
        "own units, and their standard error. Below, the same rows paired with the controls: LoRA at half the learning "
        "rate, and with dropout. Where pictures were drawn, their tables follow.",
        "",
    ]
    for task, found in groups.items():
        rows = paired_rows(found, best)
        batch = 1 if task == ELSEWHERE["3d-batch-1"] else 4
        lines += [f"### {task[0].upper()}{task[1:]}", "", *left_out(found.values(), rows)]
        if not rows:
            continue
        plain = rows[0].configuration.key
        clusters = sorted(cluster for key, cluster in found if key == plain)
        lines += [
            ("Subjects: " if task == SUBJECTS else "Seeds: ") + ", ".join(clusters) + ".",
            "",
            "| method | test, best | test, equal time | test, last | training, last | flat, best | flat, last |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            cells = _transferred_cells(row, time_cost(row.configuration, ratios, batch))
            lines.append("| " + " | ".join([row.title, *cells]) + " |")
        drawn = curves(rows, pictures, DRAWN[task]) if task in DRAWN else []
        lines += ["", *drawn, *_beside_controls(found, rows), *finished_tables(rows, "####")]
    return lines


def _beside_controls(found: Mapping[tuple[str, str], dict[str, Any]], rows: Sequence[Row]) -> list[str]:
    """The test losses of the same rows, paired with those of the controls; nothing where no control was run."""
    controls = {name: one.key for name, one in CONTROLS.items() if any(key == one.key for key, _ in found)}
    if not controls:
        return []
    heads = [f"{when}, to {name}" for name in controls for when in COLUMNS]
    lines = ["| method | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for row in rows:
        cells = []
        for control in controls.values():
            mine = [one for key, one in found if key == row.configuration.key and (control, one) in found]
            pairs = [(found[row.configuration.key, one], found[control, one]) for one in mine]
            pairs = [(run, other) for run, other in pairs if device_of(run) == device_of(other)]
            paired = Row(row.title, False, pairs)
            same = row.configuration.key == control
            cells += [cell(paired.values(value), 4, False) if pairs and not same else "" for value in COLUMNS.values()]
        lines.append("| " + " | ".join([row.title, *cells]) + " |")
    return [*lines, ""]


def _transferred_cells(row: Row, cost: float | None) -> list[str]:
    values = [lambda run: last(run)["training"], lambda run: at_best(run, "flat"), lambda run: last(run)["flat"]]
    return [*test_cells(row, cost), *(cell(row.values(value), 4, row.is_lora) for value in values)]
