"""Train, draw, score, write: what the stages `paper` and `dreambench` do."""

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.concepts import Concept
from benchmarks.quality.drawing import DrawnRun, draw_missing
from benchmarks.quality.scorers import Model, find_model
from benchmarks.quality.scoring import Scores, score_dreambench, score_paper
from benchmarks.quality.tables import Cell, Score, cells, table
from bilora_diffusion.assembly import free_memory, read_pictures
from bilora_diffusion.atomic import write_text_atomically
from bilora_diffusion.bases import Base
from bilora_diffusion.command_line import parse
from bilora_diffusion.config import as_dict
from bilora_diffusion.errors import UserError
from bilora_diffusion.finishing import package_versions
from bilora_diffusion.generation.engine import Engine
from bilora_diffusion.generation.settings import PictureSettings, usual_guidance
from bilora_diffusion.report.plan import plan, title
from bilora_diffusion.report.results import NOT_REPEATED
from bilora_diffusion.report.running import Start, run_all
from bilora_diffusion.runs import launch
from bilora_diffusion.strict_json import strict_json

__all__ = ["JSON_FILE", "TABLE_FILE", "Options", "compare_methods"]

logger = logging.getLogger("bilora_diffusion")

JSON_FILE = "results.json"
TABLE_FILE = "results.md"
SMALLEST_DRAWN_PX = 64


@dataclass(frozen=True)
class Stage:
    """Attributes:
    cluster: what runs are averaged over before errors are computed: "seed" or "subject".
    """

    heading: str
    scores: tuple[Score, ...]
    cluster: str
    score: Callable[[Sequence[DrawnRun], Mapping[str, Model], torch.device], Scores]


STAGES = {
    "paper": Stage(
        "The paper's SDXL experiment",
        (
            Score("image_text", "CLIP image-text x 100", "cosine of picture and prompt", 100, 2),
            Score("text_text", "CLIP text-text x 100", "cosine of the captioner's words and the prompt", 100, 2),
        ),
        "seed",
        score_paper,
    ),
    "dreambench": Stage(
        "DreamBooth's subjects",
        (
            Score("dino", "DINO", "mean cosine of drawn and real pictures, in DINO's space", 1, 3),
            Score("clip_i", "CLIP-I", "the same in CLIP's space", 1, 3),
            Score("clip_t", "CLIP-T", "cosine of picture and prompt, the rare token left out", 1, 3),
        ),
        "subject",
        score_dreambench,
    ),
}


@dataclass(frozen=True)
class Options:
    """What the command was told.

    Arguments:
        stage: a key of `STAGES`.
        words: of the trainer's command line, for all runs.
        pictures: of each prompt.
        models: what the scorers' flags name.
        command: that makes these results, as it is printed in them.
    """

    stage: str
    words: tuple[str, ...]
    concepts: tuple[Concept, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    output: Path
    pictures: int
    steps: int
    guidance_scale: float | None
    models: Mapping[str, str]
    command: str = ""


def compare_methods(options: Options, start: Start = launch) -> Path:
    """Does what is not done yet and writes `results.json` and `results.md`; returns the table's path.

    Arguments:
        start: starts a run of the trainer; see `runs.launch`.

    Raises:
        UserError: whatever in the flags, pictures, models or runs does not fit.
    """
    runs, base = _set_up(options)
    models = {flag: find_model(flag, text) for flag, text in options.models.items()}
    run_all([run.training for run in runs], start)
    draw_missing(base, runs)
    free_memory()  # the base goes before the scorers come
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        scores = STAGES[options.stage].score(runs, models, device)
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the GPU's memory is too small for a scorer: end what else uses it, or name a smaller one, and give the "
            "same command again; runs and pictures are kept"
        ) from error
    return _write(options, base, runs, models, scores, device)


def _set_up(options: Options) -> tuple[list[DrawnRun], Base]:
    """All runs, seed by seed and method by method, and the base; a mistake should not wait for the trainings to end."""
    config = parse([*options.words, *options.concepts[0].words, "--output_dir", str(options.output)])
    base = Base.from_flags(vars(config))
    resolution = config.resolution or base.native_resolution()
    side = resolution if resolution >= SMALLEST_DRAWN_PX else None
    guidance = usual_guidance(base.name) if options.guidance_scale is None else options.guidance_scale
    shared = PictureSettings(
        steps=options.steps, guidance_scale=guidance, width=side, height=side, base=base.shared_name
    )
    runs = []
    for concept in options.concepts:
        folder = options.output / concept.name
        words = (*options.words, *concept.words)
        trainings = plan(words, options.methods, options.seeds, folder, None)
        real, warnings = read_pictures(trainings[0].config)
        for warning in warnings:
            logger.warning(warning)
        runs += [DrawnRun(concept, training, real, options.pictures, shared) for training in trainings]
    return runs, base


def _write(
    options: Options,
    base: Base,
    runs: Sequence[DrawnRun],
    models: Mapping[str, Model],
    scores: Scores,
    device: torch.device,
) -> Path:
    stage = STAGES[options.stage]
    found = {one.key: _cells(stage, one.key, runs, scores) for one in stage.scores}
    content = {
        "stage": options.stage,
        "command": options.command,
        "versions": package_versions(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "dtype_of_drawing": str(Engine(base).dtype).removeprefix("torch."),
        "base": {"name": base.shared_name, "revision": base.revision, "variant": base.variant},
        "models": {flag: model.to_json() for flag, model in models.items()},
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
    real = _real(options, scores) if options.stage == "dreambench" else None
    lines = [
        f"# {stage.heading}",
        "",
        f"`{options.command}`",
        "",
        *table(stage.scores, found, real),
        "",
        *_notes(options, base, runs, models),
    ]
    write_text_atomically(options.output / TABLE_FILE, "\n".join(lines) + "\n")
    return options.output / TABLE_FILE


def _cells(stage: Stage, key: str, runs: Sequence[DrawnRun], scores: Scores) -> dict[str, Cell]:
    """One score of all methods, from the means of the runs."""
    values: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        cluster = run.concept.name if stage.cluster == "subject" else str(run.training.seed)
        mean = statistics.fmean(scores.runs[run.name][key])
        values.setdefault(run.training.method, {}).setdefault(cluster, []).append(mean)
    return cells(values)


def _real(options: Options, scores: Scores) -> dict[str, float]:
    """The mean over subjects, of those with more than one real picture."""
    values: dict[str, list[float]] = {}
    for concept in options.concepts:
        for key, value in scores.real[concept.name].items():
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
    spread = f"are over {clusters} {stage.cluster}s" if clusters > 1 else f"need more than one {stage.cluster}"
    lines = [
        f"{told}. Higher is more. Standard errors, and the 95 % intervals of the paired differences (Student's t), "
        f"{spread}; where an interval holds 0 no difference was shown.",
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
