"""The report's section on what its runs took: what whoever wants to repeat them has to expect."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["budget_section"]


def budget_section(stages: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """A row for each stage that has runs, and their sum.

    Arguments:
        stages: the runs of each, by its name on the command line. Those of older versions do not tell their
            `wall_seconds`: they are taken for as long as the median of those of their stage that do.
    """
    rows, hours = [], []
    for stage, runs in stages.items():
        if not runs:
            continue
        told = [run["wall_seconds"] for run in runs if run.get("wall_seconds") is not None]
        median = statistics.median(told) if told else None
        if median is not None:
            hours.append((sum(told) + median * (len(runs) - len(told))) / 3600)
        cells = [f"{median / 60:.1f}", f"{hours[-1]:.1f}"] if median is not None else ["", ""]
        rows.append(f"| `{stage}` | {len(runs)} | {len(told)} | " + " | ".join(cells) + " |")
    if not hours:
        return []
    return [
        "",
        "## What it took",
        "",
        "Runs of one core each, training, evaluating and drawing, beside other work of the machine's; where a stage's "
        "runs do not all tell their time, the median of those that do stands for the others. A stage goes on where it "
        f"was stopped, and trains nothing whose file is there. On two cores the hours below are {sum(hours) / 2:.1f}.",
        "",
        "| stage | runs | that tell their time | minutes a run, median | hours of one core |",
        "|---|---|---|---|---|",
        *rows,
    ]
