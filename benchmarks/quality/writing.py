"""What was measured as JSON, every score of it, and as one Markdown table."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.drawing import DrawnRun
from benchmarks.quality.scorers import Model
from benchmarks.quality.scoring import Scores
from benchmarks.quality.setting import STAGES, Options, Stage
from benchmarks.quality.tables import Cell, cells, table
from bilora_diffusion.atomic import write_text_atomically
from bilora_diffusion.bases import Base
from bilora_diffusion.config import as_dict
from bilora_diffusion.finishing import package_versions
from bilora_diffusion.generation.engine import Engine
from bilora_diffusion.report.plan import title
from bilora_diffusion.report.results import NOT_REPEATED
from bilora_diffusion.strict_json import strict_json

__all__ = ["JSON_FILE", "TABLE_FILE", "write_results"]

JSON_FILE = "results.json"
TABLE_FILE = "results.md"


def write_results(
    options: Options,
    base: Base,
    runs: Sequence[DrawnRun],
    models: Mapping[str, Model],
    scores: Scores,
    device: torch.device,
) -> Path:
    """Writes both files; returns the table's path.

    Raises:
        UserError: one cannot be written, or a run's summary cannot be read.
    """
    stage = STAGES[options.stage]
    found = {one.key: _cells(stage, one.key, runs, scores) for one in stage.scores}
    content = {
        **_header(options, base, models, device),
        "picture_settings": {"pictures": options.pictures, **runs[0].shared.to_json()},
        "concepts": {
            concept.name: {
                "prompts": [vars(prompt) for prompt in concept.prompts],
                "real": scores.real.get(concept.name),
            }
            for concept in options.concepts
        },
        "clusters": stage.cluster,
        "compared": {
            key: {method: cell.to_json() for method, cell in by_method.items()} for key, by_method in found.items()
        },
        "runs": {run.name: _run_json(run, scores) for run in runs},
    }
    write_text_atomically(options.output / JSON_FILE, strict_json(content, indent=2) + "\n")
    lines = [
        f"# {stage.heading}",
        "",
        f"`{options.command}`",
        "",
        *table(stage.scores, found, _real(scores)),
        "",
        *_notes(options, base, runs, models),
    ]
    write_text_atomically(options.output / TABLE_FILE, "\n".join(lines) + "\n")
    return options.output / TABLE_FILE


def _header(options: Options, base: Base, models: Mapping[str, Model], device: torch.device) -> dict[str, Any]:
    return {
        "stage": options.stage,
        "command": options.command,
        "versions": package_versions(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "dtype_of_drawing": str(Engine(base).dtype).removeprefix("torch."),
        "base": {"name": base.shared_name, "revision": base.revision, "variant": base.variant},
        "models": {flag: model.to_json() for flag, model in models.items()},
    }


def _cells(stage: Stage, key: str, runs: Sequence[DrawnRun], scores: Scores) -> dict[str, Cell]:
    """One score of all methods, from the means of the runs."""
    values: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        cluster = run.concept.name if stage.cluster == "subject" else str(run.training.seed)
        mean = statistics.fmean(scores.runs[run.name][key])
        values.setdefault(run.training.method, {}).setdefault(cluster, []).append(mean)
    return cells(values)


def _real(scores: Scores) -> dict[str, float]:
    """What real pictures have among themselves: the mean over the subjects that have more than one."""
    values: dict[str, list[float]] = {}
    for by_key in scores.real.values():
        for key, value in by_key.items():
            values.setdefault(key, []).append(value)
    return {key: statistics.fmean(some) for key, some in values.items()}


def _run_json(run: DrawnRun, scores: Scores) -> dict[str, Any]:
    """The scores are in the order of the prompts, and of the pictures of each."""
    training = run.training
    return {
        "concept": run.concept.name,
        "method": training.method,
        "seed": training.seed,
        "command": training.command,
        "config": as_dict(training.config),
        "summary": {name: value for name, value in run.summary.items() if name not in NOT_REPEATED},
        "trained_on": [picture.name for picture in run.real],
        "scores": dict(scores.runs[run.name]),
        "captions": scores.captions.get(run.name),
    }


def _notes(options: Options, base: Base, runs: Sequence[DrawnRun], models: Mapping[str, Model]) -> list[str]:
    stage = STAGES[options.stage]
    told = "; ".join(f"*{one.title}*: {one.meaning}" for one in stage.scores)
    named = ", ".join(f"{one.name} ({one.revision or 'a folder'})" for one in models.values())
    clusters = len(options.concepts) if stage.cluster == "subject" else len(options.seeds)
    spread = (
        f"are over {clusters} {stage.cluster}s; where an interval holds 0 no difference was shown"
        if clusters > 1
        else f"need more than one {stage.cluster}: one shows nothing"
    )
    lines = [
        f"{told}. Higher is more. Standard errors, and the 95 % intervals of the paired differences (Student's t), "
        f"{spread}.",
        "",
        f"Base {base.shared_name}; seeds {', '.join(map(str, options.seeds))}; "
        f"{sum(len(run.concept.prompts) for run in runs) * options.pictures} pictures in {options.steps} steps with "
        f"guidance {runs[0].shared.guidance_scale:g}. Scorers: {named}. Scores by other models cannot be compared with "
        "these.",
    ]
    for method in options.methods:
        own = [run for run in runs if run.training.method == method]
        if said := [run.summary["inert"] for run in own if run.summary.get("inert")]:
            lines += ["", f"{title(method)}: in {len(said)} of {len(own)} runs {said[0]}."]
    return lines
