"""Train, draw, score, write: what the stages `paper` and `dreambench` do."""

import logging
from pathlib import Path

import torch

from benchmarks.quality.drawing import DrawnRun, draw_missing
from benchmarks.quality.scorers import find_model
from benchmarks.quality.setting import STAGES, Options
from benchmarks.quality.writing import write_results
from bilora_diffusion.assembly import free_memory, read_pictures
from bilora_diffusion.bases import Base
from bilora_diffusion.command_line import parse
from bilora_diffusion.errors import UserError
from bilora_diffusion.generation.settings import PictureSettings, usual_guidance
from bilora_diffusion.report.plan import plan
from bilora_diffusion.report.running import Start, run_all
from bilora_diffusion.runs import launch

__all__ = ["compare_methods"]

logger = logging.getLogger("bilora_diffusion")

SMALLEST_DRAWN_PX = 64


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
    return write_results(options, base, runs, models, scores, device)


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
