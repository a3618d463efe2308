"""The files of the runs, and what was chosen by them."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.quality.plan import ALSO_MEASURED, EDGES, FULL_RANK, Configuration
from bilora_diffusion.method_names import WITH_NOISE

__all__ = [
    "CHOOSING_SEED",
    "NOISE",
    "REGULARISERS",
    "at_best",
    "best_step",
    "chosen",
    "configuration_of",
    "device_of",
    "finished_at_best",
    "is_alone",
    "kind",
    "kind_of",
    "last",
    "measured_ones",
    "runs",
]

CHOOSING_SEED = 0
NOISE = ", noise on top"
REGULARISERS = {"ema_decay": "averaged", "lora_dropout": "dropout"}
"""What any trainer has against overfitting, by flag."""


def runs(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def best_step(run: Mapping[str, Any]) -> str:
    """The step with the lowest loss on the validation names."""
    return min(run["evaluations"], key=lambda step: run["evaluations"][step]["validation"])


def finished_at_best(run: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What holds "pictures", "sharpness" and "rounded_to_8_bits" of the best step; None: the file is older than it."""
    return run if best_step(run) == max(run["evaluations"], key=int) else run.get("at_best")


def chosen(folder: Path) -> dict[str, Configuration]:
    """Each method's configuration with the lowest loss on the validation names, at its best step, on the first seed."""
    best: dict[str, tuple[float, Configuration]] = {}
    for run in runs(folder):
        if run["seed"] != CHOOSING_SEED:
            continue
        loss = run["evaluations"][best_step(run)]["validation"]
        if kind(run) not in best or loss < best[kind(run)][0]:
            best[kind(run)] = (loss, configuration_of(run))
    return {method: configuration for method, (_, configuration) in best.items()}


def measured_ones(folder: Path, *, alone: bool = False) -> dict[str, list[Configuration]]:
    """By kind: what was chosen, and what `plan.ALSO_MEASURED` adds.

    Arguments:
        alone: only what was chosen of each method by itself.
    """
    found = {kind: [configuration] for kind, configuration in chosen(folder).items()}
    if alone:
        return {kind: ones for kind, ones in found.items() if kind == ones[0].method}
    for one in ALSO_MEASURED:
        if one not in found.get(kind_of(one), [one]):
            found[kind_of(one)].append(one)
    return found


def is_alone(candidate: Configuration) -> bool:
    """Whether it is a method by itself, neither a control nor with another's part, and in the grid without `EDGES`."""
    return kind_of(candidate) == candidate.method and candidate not in EDGES


def configuration_of(run: Mapping[str, Any]) -> Configuration:
    """What was trained in a run."""
    return Configuration(run["method"], run["learning_rate"], run["settings"])


def device_of(run: Mapping[str, Any]) -> str:
    """Its kind: "cpu" or "cuda". A file that does not say is older than --device, from when all was on the CPU."""
    return run.get("device", "cpu").partition(":")[0]


def kind(run: Mapping[str, Any]) -> str:
    """As `kind_of` its configuration."""
    return kind_of(configuration_of(run))


def kind_of(configuration: Configuration) -> str:
    """The method, and what sets a control or another form of it apart: those have a row to themselves."""
    method, settings = configuration.method, configuration.settings
    for flag, name in REGULARISERS.items():
        if flag in settings:
            return f"{method}, {name}"
    if settings.get("steps_per_draw", 1) > 1:
        return f"{method}, {settings['steps_per_draw']} steps a draw"
    if settings.get("ascent_basis") == "tracked":
        return f"{method}, tracked"
    if settings.get("auxiliary_rank") == FULL_RANK:
        return f"{method}, full space"
    return f"{method}{NOISE}" if settings.get("sigma") and method in WITH_NOISE else method


def at_best(run: Mapping[str, Any], kind: str, within: float = math.inf) -> float:
    """The loss at the step of lowest validation loss among those up to `within`, itself one by interpolation."""
    points = sorted((int(step), losses) for step, losses in run["evaluations"].items())
    reached = [losses for step, losses in points if step <= within]
    later = [(step, losses) for step, losses in points if step > within]
    if not reached:
        return points[0][1][kind]  # before the first evaluation nothing is known
    if later:
        (end, after), (start, before) = later[0], points[len(reached) - 1]
        share = (within - start) / (end - start)
        reached.append({name: before[name] + share * (after[name] - before[name]) for name in ("validation", kind)})
    return min(reached, key=lambda losses: losses["validation"])[kind]


def last(run: Mapping[str, Any]) -> dict[str, float]:
    """The losses after the last step."""
    return run["evaluations"][max(run["evaluations"], key=int)]
