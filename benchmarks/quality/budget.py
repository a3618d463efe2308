"""The report's section on what its runs took: what whoever wants to repeat them has to expect."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["budget_section"]


def budget_section(
    stages: Mapping[str, Sequence[Mapping[str, Any]]], alone: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[str]:
    """A row for each stage that has runs, and their sum.

    Arguments:
        stages: the runs of each, by its name on the command line. Those of older versions do not tell their
            `wall_seconds`: they are taken for as long as the median of those of their stage that do.
        alone: those of them that `--alone` trains.
    """
    medians, hours, rows = {}, {}, []
    for stage, runs in stages.items():
        times = [run["wall_seconds"] for run in runs if run.get("wall_seconds") is not None]
        if times:
            medians[stage] = statistics.median(times)
    for stage, runs in [*stages.items(), *((f"{stage} --alone", runs) for stage, runs in alone.items())]:
        if not runs:
            continue
        median = medians.get(stage.partition(" ")[0])
        cells = ["", ""]
        if median is not None:
            hours[stage] = sum(run.get("wall_seconds") or median for run in runs) / 3600
            cells = [f"{median / 60:.1f}", f"{hours[stage]:.1f}"]
        told = sum(run.get("wall_seconds") is not None for run in runs)
        rows.append(f"| `{stage}` | {len(runs)} | {told} | " + " | ".join(cells) + " |")
    if not hours:
        return []
    whole = sum(hours.get(stage, 0) for stage in stages)
    lines = [
        "",
        "## What it took",
        "",
        "Runs of one core each, training, evaluating and drawing, beside other work of the machine's; where a stage's "
        "runs do not all tell their time, the median of those that do stands for the others. Where a run of `measure` "
        "or `confirm` is older than the measures of its best step, its time is without them: about what those of the "
        "last step take, if that is another. A stage goes on where it "
        f"was stopped, and trains nothing whose file is there. On two cores all stages take {whole / 2:.1f} hours",
    ]
    parts = [hours.get(f"{stage} --alone") for stage in alone]
    if parts and None not in parts:
        lines[-1] += f"; {sum(parts) / 2:.1f} of them are each method by itself (`make benchmark-quality`)"
    lines[-1] += "."
    head = ["", "| stage | runs | that tell their time | minutes a run, median | hours of one core |"]
    return [*lines, *head, "|---|---|---|---|---|", *rows]
