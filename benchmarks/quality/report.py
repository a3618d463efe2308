"""The table of the quality benchmark, from the files of its runs."""

import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.budget import budget_section
from benchmarks.quality.confirmation import confirmation_section
from benchmarks.quality.controls import ascents_section, controls_section
from benchmarks.quality.costs import time_ratios
from benchmarks.quality.differences import left_out
from benchmarks.quality.elsewhere import elsewhere_section
from benchmarks.quality.measured import measured_rows, measured_section
from benchmarks.quality.plan import Configuration
from benchmarks.quality.results import (
    CHOOSING_SEED,
    best_step,
    chosen,
    configuration_of,
    device_of,
    is_alone,
    kind,
    last,
    measured_ones,
    runs,
)

__all__ = ["report"]


def report(
    folder: Path,
    rises: Path | None = None,
    stacking: Path | None = None,
    speed: Path | None = None,
    transfer: Path | None = None,
    confirmation: Path | None = None,
    pictures: Path | None = None,
) -> str:
    """Markdown.

    Arguments:
        folder: of the runs' files.
        transfer: of the folders of the files of `transfer`.
        confirmation: of the files of `confirm`.
        rises: of the files of `rises`.
        stacking: the file of `stacking`.
        speed: what `benchmarks.speed` measured, each method's step against LoRA's in turn; the runs' own times are of a
            machine that did other things too.
        pictures: the report's own folder, for the losses' curves; None: without.
    """
    everything = runs(folder)
    best = chosen(folder)
    lines = ["# Which method generalises?", "", *INTRODUCTION, ""]
    measured = [run for run in everything if run["seed"] != CHOOSING_SEED]
    ratios = time_ratios(speed) if speed is not None else {}
    if confirmation is not None and confirmation.is_dir():
        lines += confirmation_section(confirmation, ratios, pictures)
    if measured:
        rows = measured_rows(measured, best)
        lines += measured_section(rows, ratios, pictures) if rows else []
        lines += left_out(measured, rows)
    lines += controls_section(measured, _all_below(confirmation)) + ascents_section(measured, ratios)
    if transfer is not None and transfer.is_dir():
        lines += elsewhere_section(transfer, best, ratios, pictures)
    looked = runs(rises) if rises is not None and rises.is_dir() else []
    if looked:
        lines += _rises(looked)
    candidates = [run for run in everything if run["seed"] == CHOOSING_SEED]
    lines += _candidates(candidates, best)
    stages = {"choose": candidates, "measure": measured, "confirm": _all_below(confirmation)}
    stages |= {"transfer": _all_below(transfer)}
    if stacking is not None and stacking.is_file():
        lines += _stacking(json.loads(stacking.read_text()), [run for some in stages.values() for run in some])
    table = measured_ones(folder, alone=True).values()
    alone = {
        "choose": [run for run in candidates if is_alone(configuration_of(run))],
        "measure": [run for run in measured if [configuration_of(run)] in table],
    }
    lines += budget_section(stages | {"rises": looked}, alone)
    return "\n".join(lines) + "\n"


def _all_below(folder: Path | None) -> list[dict[str, Any]]:
    return [] if folder is None else [json.loads(path.read_text()) for path in sorted(folder.rglob("*.json"))]


def _stacking(found: Mapping[str, Any], above: Sequence[Mapping[str, Any]]) -> list[str]:
    """Arguments:
    found: what `stacking` measured.
    above: all runs of the report.
    """
    made = Counter(
        ("one by one" if run["seconds"] is not None else "stacked") + f" on {device_of(run)}" for run in above
    )
    trained = ", ".join(f"{count} {how}" for how, count in made.most_common())
    shares = [f"{count} runs {share:.0%}" for count, share in found["share_of_separate"].items() if count != "1"]
    return [
        "",
        "## Stacking",
        "",
        f"`--stack` trains several runs over one base, in common batches. On this device ({found['device']}) a step of "
        f"plain LoRA's runs in batches of {found['batch']} rows then takes, of their time one after another: "
        f"{', '.join(shares)}." + (f" The runs above, by how they were trained: {trained}." if made else ""),
    ]


INTRODUCTION = [
    "Written by `python -m benchmarks.quality report`. A LoRA of rank 4 on the UNet of the embedded base, 23 3D icons, "
    "batch 4, 400 steps; for one seed all runs see the same icons, noise and timesteps, so differences to LoRA are "
    "paired. Losses are means over fixed draws: of 3D icons that were never trained on (validation names to choose "
    "by, test names to report), of the 23 (training), and of flat icons (what is forgotten). Where a candidate is "
    "missing below it was not run. `time a step` is of a UNet of 59 million parameters ([speed.md](speed.md)); with "
    "half the rows, dropout or noise on top it is put together from steps that were measured there. Each run's file "
    "has its flags, seed, losses and versions; to files older than the flags these were added later, by the function "
    "that writes them now.",
]


def _candidates(some: Sequence[dict[str, Any]], best: Mapping[str, Configuration]) -> list[str]:
    lines = [
        f"## Choosing: {len(some)} candidates, seed {CHOOSING_SEED}",
        "",
        "Validation loss at each one's best step, the other losses after the last. Bold: the method's best, which is "
        "measured above if there were more seeds.",
        "",
        "| configuration | best step | validation, best | test, last | training, last | flat, last | gap |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in sorted(some, key=lambda run: run["evaluations"][best_step(run)]["validation"]):
        step = best_step(run)
        losses = last(run) | {"validation": run["evaluations"][step]["validation"]}
        gap = f"{statistics.fmean(run['loss_gaps']):+.4f}" if run["loss_gaps"] else ""
        name = f"**{run['key']}**" if best[kind(run)].key == run["key"] else run["key"]
        cells = [f"{losses[kind]:.4f}" for kind in ("validation", "test", "training", "flat")]
        lines.append("| " + " | ".join([name, str(step), *cells, gap]) + " |")
    return lines


def _rises(some: Sequence[dict[str, Any]]) -> list[str]:
    """A row for each direction: first those that any method could have, seen in LoRA's runs, then the methods' own."""
    shares = some[0]["shares"]
    place = len(shares) // 2
    rows: dict[str, list[list[float]]] = {}
    of_gradient: dict[str, list[float]] = {}
    sizes: dict[str, list[float]] = {}
    for run in sorted(some, key=lambda run: not run["configuration"].startswith("lora,")):
        plain = run["configuration"].startswith("lora,")
        for seen in run["seen"].values():
            for name, title in GENERAL_DIRECTIONS.items():
                if plain:
                    rows.setdefault(title, []).append(seen[name])
                    of_gradient.setdefault(title, []).append(seen[name][place] / seen["gradient"][place])
            if "own" in seen:
                title = run["configuration"]
                rows.setdefault(title, []).append(seen["own"])
                of_gradient.setdefault(title, []).append(seen["own"][place] / seen["gradient"][place])
                sizes.setdefault(title, []).append(seen["own_share"])
    lines = [
        "## How far each perturbation raises the loss of the batch at hand",
        "",
        "Rise of the batch's loss in 1e-4 (mean and standard error over steps and seeds) when the merged weights move "
        "by a share of their norm along each direction, all scaled to the same norm. The gradient's is the most that "
        "any direction reaches to first order; a method is an ascent as far as it is above `random`. `of the "
        f"gradient's`: the rise at {100 * shares[place]:g} % as a share of the gradient's at the same step of the same "
        "run. Last: the norm that the method itself gave its perturbation.",
        "",
        "| direction | "
        + " | ".join(f"{100 * share:g} %" for share in shares)
        + " | of the gradient's | its own norm |",
        "|---|" + "---|" * (len(shares) + 2),
    ]
    for title, found in rows.items():
        cells = []
        for column in zip(*found, strict=True):
            error = statistics.stdev(column) / math.sqrt(len(column)) if len(column) > 1 else math.nan
            cells.append(f"{1e4 * statistics.fmean(column):+.1f} (s.e. {1e4 * error:.1f})")
        cells.append(f"{statistics.fmean(of_gradient[title]):.3f}")
        own = f"{100 * statistics.fmean(sizes[title]):.2g} %" if title in sizes else ""
        lines.append("| " + " | ".join([title, *cells, own]) + " |")
    return [*lines, ""]


GENERAL_DIRECTIONS = {
    "gradient": "this batch's gradient",
    "gradient_rank_4": "its top 4 singular directions in each layer",
    "gradient_rank_1": "its top singular direction in each layer",
    "half_rows": "the gradient of half its rows (half a pass more)",
    "quarter_rows": "of a quarter of its rows (a quarter)",
    "half_size": "of its latents at half the size (about a quarter)",
    "other_noise": "of its pictures at its timesteps, with other noise",
    "other_times": "of its pictures, with other noise and timesteps",
    "previous": "the gradient of the batch before",
    "random": "random, rows as large as the weight's",
}
