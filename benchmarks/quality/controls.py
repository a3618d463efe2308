"""The report's section on what a method is worth beside the remedies that any trainer has."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.quality.costs import time_cost
from benchmarks.quality.differences import Row, cell, share
from benchmarks.quality.finished import drawn_rows, likeness
from benchmarks.quality.plan import FULL_RANK, Configuration
from benchmarks.quality.results import at_best, device_of, last

__all__ = ["ascents_section", "controls_section"]

HALF = Configuration("lora", 2.5e-4)
DROPOUT = Configuration("lora", 5e-4, {"lora_dropout": 0.7})
FRESH = Configuration("bilora-fresh", 5e-4, {"rho": 1.0, "ascent_share": 0.5})
ASCENTS = (
    Configuration("bilora-fresh", 5e-4, {"rho": 1.0, "ascent_share": 1.0, "auxiliary_rank": FULL_RANK}),
    Configuration("bilora-echo", 5e-4, {"rho": 1.0}),
    Configuration("lora-sam", 5e-4, {"rho": 0.05}),
    Configuration("looksam", 1e-3, {"rho": 0.05}),
)
COLUMNS = {
    "test, best": lambda run: at_best(run, "test"),
    "test, last": lambda run: last(run)["test"],
    "flat, best": lambda run: at_best(run, "flat"),
    "flat, last": lambda run: last(run)["flat"],
}


def controls_section(measured: Sequence[dict[str, Any]], confirmed: Sequence[dict[str, Any]]) -> list[str]:
    """Arguments:
    measured: on the seeds of `measure`.
    confirmed: on those of `confirm`.
    """
    at_half = [run for run in measured if run["learning_rate"] == HALF.learning_rate]
    parts = {
        "The trainer's defaults at LoRA's learning rate, on new seeds, against LoRA at half of it": (confirmed, HALF),
        "The same against LoRA with dropout": (confirmed, DROPOUT),
        "Everything at half the learning rate, LoRA too, on the seeds of the larger table": (at_half, HALF),
    }
    lines = []
    for title, (some, control) in parts.items():
        rows = _rows(some, control)
        if len(rows) > 1:
            lines += [f"### {title}", "", *_table(rows)]
    if not lines:
        return []
    return [
        "## Beside the controls",
        "",
        "The same runs, paired with those of LoRA's that go at half the learning rate or drop much of the input: what "
        "a method adds to what any trainer has. Columns as above, differences as shares of the control's "
        "mean; the first row of each table has its values and their standard error.",
        "",
        *lines,
    ]


def ascents_section(measured: Sequence[dict[str, Any]], ratios: Mapping[str, float]) -> list[str]:
    """`bilora-fresh` as it is by default against other ascents of this batch's gradient, in LoRA's time, too.

    Arguments:
        measured: on the seeds of `measure`.
        ratios: see `costs.time_ratios`.
    """
    rows = [row for row in _rows(measured, FRESH) if row.configuration in (FRESH, *ASCENTS)]
    if len(rows) < 2:
        return []
    lines = [
        "## bilora-fresh against other ascents",
        "",
        "The runs of the seeds above, paired with those of `bilora-fresh` as it is by default. `same time`: at each "
        "one's best step among those that it makes while LoRA makes all of its own. Differences as shares of "
        "`bilora-fresh`'s mean; its own row has its values and their standard error. The whole space (`auxiliary_rank` "
        f"{FULL_RANK}) takes more time than it is counted with.",
        "",
        "| method | test, best | test, same time | test, last | flat, last | time a step |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        costs = time_cost(row.configuration, ratios), time_cost(FRESH, ratios)
        values = [row.values(COLUMNS["test, best"]), _in_time(row, costs)]
        values += [row.values(COLUMNS[name]) for name in ("test, last", "flat, last")]
        cells = [(cell(some, 4, True) if row.is_lora else share(some)) if some else "" for some in values]
        cells.append("" if costs[0] is None else f"x {costs[0]:.2f}")
        lines.append("| " + " | ".join([row.title, *cells]) + " |")
    return [*lines, ""]


def _in_time(row: Row, costs: tuple[float | None, float | None]) -> list[tuple[float, float]]:
    """The test loss in LoRA's time of the row's runs and of those beside them; empty where a cost is not known."""
    own, other = costs
    if own is None or other is None:
        return []
    steps = max(map(int, row.runs[0][0]["evaluations"]))
    return [(at_best(run, "test", steps / own), at_best(beside, "test", steps / other)) for run, beside in row.runs]


def _rows(some: Sequence[dict[str, Any]], control: Configuration) -> list[Row]:
    """The control's first; those that have a run of each of its seeds."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for run in some:
        found.setdefault(run["key"], {})[run["seed"]] = run
    plain = found.get(control.key, {})
    rows = []
    for key in sorted(found, key=lambda key: (key != control.key, key)):
        pairs = [(found[key][seed], run) for seed, run in sorted(plain.items()) if seed in found[key]]
        pairs = [(run, other) for run, other in pairs if device_of(run) == device_of(other)]
        if len(pairs) == len(plain) > 1:
            rows.append(Row(key, key == control.key, pairs))
    return rows


def _table(rows: Sequence[Row]) -> list[str]:
    drawn = drawn_rows(rows)
    heads = [*COLUMNS, *(f"like the true icon, {when}" for when in drawn)]
    lines = ["| method | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for row in rows:
        columns = [(row.values(value), 4) for value in COLUMNS.values()]
        columns += [(some[row.title].values(likeness) if row.title in some else [], 3) for some in drawn.values()]
        cells = [
            (cell(values, digits, True) if row.is_lora else share(values)) if values else ""
            for values, digits in columns
        ]
        lines.append("| " + " | ".join([row.title, *cells]) + " |")
    return [*lines, ""]
