"""The table of the quality benchmark, from the files of its runs."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.plan import Configuration
from bilora_diffusion.paired import half_width

__all__ = ["chosen", "report"]

CHOOSING_SEED = 0


def runs(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def best_step(run: Mapping[str, Any]) -> str:
    """The step with the lowest loss on the validation names."""
    return min(run["evaluations"], key=lambda step: run["evaluations"][step]["validation"])


def chosen(folder: Path) -> dict[str, Configuration]:
    """Each method's configuration with the lowest loss on the validation names, at its best step, on the first seed."""
    best: dict[str, tuple[float, Configuration]] = {}
    for run in runs(folder):
        if run["seed"] != CHOOSING_SEED:
            continue
        loss = run["evaluations"][best_step(run)]["validation"]
        if run["method"] not in best or loss < best[run["method"]][0]:
            best[run["method"]] = (
                loss,
                Configuration(run["method"], run["learning_rate"], run["settings"]),
            )
    return {method: configuration for method, (_, configuration) in best.items()}


def report(folder: Path) -> str:
    """Markdown."""
    everything = runs(folder)
    best = chosen(folder)
    lines = ["# Which method generalises?", "", *INTRODUCTION, ""]
    measured = [run for run in everything if run["seed"] != CHOOSING_SEED]
    if measured:
        lines += _measured(measured, best)
    lines += _candidates([run for run in everything if run["seed"] == CHOOSING_SEED], best)
    return "\n".join(lines) + "\n"


INTRODUCTION = [
    "Written by `python -m benchmarks.quality report`. A LoRA of rank 4 on the UNet of the embedded base, 23 3D icons, "
    "batch 4, 400 steps; for one seed all runs see the same icons, noise and timesteps, so differences to LoRA are "
    "paired. Losses are means over fixed draws: of 3D icons that were never trained on (validation names to choose "
    "by, test names to report), of the 23 (training), and of flat icons (what is forgotten).",
]


def _candidates(some: Sequence[dict[str, Any]], best: Mapping[str, Configuration]) -> list[str]:
    lines = [
        f"## Choosing: {len(some)} candidates, seed {CHOOSING_SEED}",
        "",
        "Each at its step of lowest validation loss. Bold: the method's best, which is measured above if there were "
        "more seeds.",
        "",
        "| configuration | step | validation | test | training | flat | loss gap | s a step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in sorted(some, key=lambda run: run["evaluations"][best_step(run)]["validation"]):
        step = best_step(run)
        losses = run["evaluations"][step]
        gap = f"{statistics.fmean(run['loss_gaps']):+.4f}" if run["loss_gaps"] else ""
        name = f"**{run['key']}**" if best[run["method"]].key == run["key"] else run["key"]
        cells = [f"{losses[kind]:.4f}" for kind in ("validation", "test", "training", "flat")]
        seconds = f"{run['seconds'] / len(run['training_losses']):.3f}"
        lines.append("| " + " | ".join([name, str(step), *cells, gap, seconds]) + " |")
    return lines


def _measured(some: Sequence[dict[str, Any]], best: Mapping[str, Configuration]) -> list[str]:
    by = {(run["method"], run["seed"]): run for run in some if run["key"] == best[run["method"]].key}
    seeds = sorted(seed for method, seed in by if method == "lora")
    lines = [
        "## Measured on the test names",
        "",
        f"Seeds {', '.join(map(str, seeds))}. Differences to LoRA in 1e-4 of the loss with a 95 % interval (paired, "
        "Student's t); LoRA's own row has its values. `best`: each run at its step of lowest validation loss.",
        "",
        "| method | test, best | test, last | flat, best | like the true icon | retrieved in 10 | like a training "
        "icon | flat kept | time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method in sorted({method for method, _ in by}, key=lambda name: (name != "lora", name)):
        pairs = [(by[method, seed], by["lora", seed]) for seed in seeds if (method, seed) in by]
        if not pairs:
            continue
        lines.append("| " + " | ".join([str(best[method]), *_cells(method, pairs)]) + " |")
    return [*lines, ""]


def _cells(method: str, pairs: Sequence[tuple[dict, dict]]) -> list[str]:
    def value(run: Mapping[str, Any], kind: str, best: bool) -> float:
        step = best_step(run) if best else max(run["evaluations"], key=int)
        return run["evaluations"][step][kind]

    own = method == "lora"
    cells = []
    for kind, at_best in (("test", True), ("test", False), ("flat", True)):
        if own:
            cells.append(f"{statistics.fmean(value(run, kind, at_best) for run, _ in pairs):.4f}")
        else:
            cells.append(_interval([1e4 * (value(a, kind, at_best) - value(b, kind, at_best)) for a, b in pairs], 0))
    for name in ("similarity_to_true", "retrieved_top_10", "nearest_training_picture", "flat_kept"):
        if own:
            cells.append(f"{statistics.fmean(run['pictures'][name] for run, _ in pairs):.3f}")
        else:
            cells.append(_interval([a["pictures"][name] - b["pictures"][name] for a, b in pairs], 3))
    cells.append(f"x {statistics.median(a['seconds'] / b['seconds'] for a, b in pairs):.2f}")
    return cells


def _interval(values: Sequence[float], digits: int) -> str:
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:+.{digits}f}"
    return f"{mean:+.{digits}f} +- {half_width(values):.{digits}f}"
