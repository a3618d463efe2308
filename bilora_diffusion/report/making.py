"""The whole of a report: train, draw, measure, write."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from bilora_diffusion.assembly import read_pictures
from bilora_diffusion.atomic import write_text_atomically
from bilora_diffusion.bases import Base
from bilora_diffusion.checkpoint import checkpoints
from bilora_diffusion.command_line import parse
from bilora_diffusion.config import TrainingConfig
from bilora_diffusion.data.pictures import Picture
from bilora_diffusion.diffusion import build_objective
from bilora_diffusion.errors import UserError
from bilora_diffusion.generation.engine import Engine, LoraFile
from bilora_diffusion.generation.settings import PictureSettings, usual_guidance
from bilora_diffusion.measures import Judge, judge_for, measure
from bilora_diffusion.report.contents import contents
from bilora_diffusion.report.drawing import (
    BASE,
    Copy,
    Row,
    concept_rows,
    draw_all,
    most_alike,
    other_prompts,
    other_rows,
)
from bilora_diffusion.report.measuring import Meter
from bilora_diffusion.report.page import render
from bilora_diffusion.report.plan import Training, check_seeds, plan
from bilora_diffusion.report.plots import save_png, svg
from bilora_diffusion.report.results import Results, RunResult, to_json
from bilora_diffusion.report.running import Start, run_all
from bilora_diffusion.report.splitting import split, write_folder
from bilora_diffusion.run_folder import DIFFUSERS_FILE, SUMMARY_FILE
from bilora_diffusion.runs import launch
from bilora_diffusion.strict_json import strict_json

__all__ = ["JSON_FILE", "PAGE_FILE", "Options", "make_report"]

logger = logging.getLogger("bilora_diffusion")

PAGE_FILE = "report.html"
JSON_FILE = "report.json"
MOST_JUDGED = 200
SMALLEST_DRAWN_PX = 64


@dataclass(frozen=True)
class Options:
    """What the command was told; `None` and empty mean its defaults.

    Arguments:
        words: of the trainer's command line, for all runs.
        command: that makes this report, as it is printed on the page.
    """

    words: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: int
    output: Path
    prompts: tuple[str, ...] = ()
    other_prompts: tuple[str, ...] = ()
    pictures: int | None = None
    hold_out: int | None = None
    draws: int = 64
    steps: int = 20
    guidance_scale: float | None = None
    clip: str | None = None
    command: str = ""


@dataclass(frozen=True)
class Setting:
    """What is fixed before the first run."""

    config: TrainingConfig
    base: Base
    resolution: int
    trained: Sequence[Picture]
    held_out: Sequence[Picture]
    rows: Sequence[Row]
    other: Sequence[Row]
    judge: Judge | None


def make_report(options: Options, start: Start = launch) -> Path:
    """Trains, measures, writes `report.html`, `report.json` and PNGs; returns the page's path.

    Arguments:
        start: starts a run of the trainer; see `runs.launch`.

    Raises:
        UserError: whatever in the flags, pictures or runs does not fit.
    """
    config = parse([*options.words, "--output_dir", str(options.output)])
    seeds = check_seeds(config.seed, options.seeds)
    setting = _set_up(options, config)
    folder = None
    if setting.held_out:
        folder = options.output / "pictures" / "training"
        write_folder(setting.trained, folder)
    trainings = plan(options.words, options.methods, seeds, options.output, folder)
    run_all(trainings, start)
    try:
        results = _measure(options, setting, trainings)
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the GPU's memory is too small for measuring: end what else uses it and give the same command again; the "
            "trainings are done and kept"
        ) from error
    return _write(results, options.output)


def _set_up(options: Options, config: TrainingConfig) -> Setting:
    """Finds and checks everything that could be wrong: a mistake should not wait for the trainings to end."""
    found, warnings = read_pictures(config)
    for warning in warnings:
        logger.warning(warning)
    trained, held_out = split(found, options.hold_out, config.seed or 0)
    base = Base.from_flags(vars(config))
    resolution = config.resolution or base.native_resolution()
    side = resolution if resolution >= SMALLEST_DRAWN_PX else None
    shared = PictureSettings(
        steps=options.steps,
        guidance_scale=usual_guidance(base.name) if options.guidance_scale is None else options.guidance_scale,
        width=side,
        height=side,
        base=base.shared_name,
    )
    prompts = options.prompts or tuple(filter(None, [config.validation_prompt or config.instance_prompt]))
    return Setting(
        config,
        base,
        resolution,
        trained,
        held_out,
        concept_rows(prompts, held_out, trained, options.pictures, shared),
        other_rows(other_prompts(options.other_prompts, base.name), shared),
        judge_for(base.name, options.clip),
    )


def _measure(options: Options, setting: Setting, trainings: Sequence[Training]) -> Results:
    """Draws with the base and every run's LoRA, and measures them."""
    columns: dict[str, Sequence[LoraFile]] = {BASE: ()}
    for one in trainings:
        columns[one.name] = [(one.folder / DIFFUSERS_FILE, str(one.folder / DIFFUSERS_FILE), 1.0)]
    engine = Engine(setting.base)
    objective = build_objective(engine.load().scheduler, edm=setting.config.do_edm_style_training)
    rows = [*setting.rows, *setting.other]
    with tqdm(total=len(columns) * (len(rows) + 2), desc="measuring") as bar:

        def tell(text: str) -> None:
            bar.set_postfix_str(text, refresh=False)
            bar.update(1)

        drawn = draw_all(engine, columns, rows, options.output / "pictures", tell)
        meter = Meter(
            engine,
            objective,
            {
                "training": setting.trained,
                "held_out": setting.held_out,
                "other": _pictures_of(drawn[BASE][len(setting.rows) :], setting.other),
            },
            resolution=setting.resolution,
            draws=options.draws,
            # A GPU that could just train a batch may have no room for one in float32.
            batch_size=setting.config.train_batch_size if engine.device.type == "cpu" else 1,
            seed=setting.config.seed or 0,
        )
        known = [picture.load() for picture in setting.trained[:MOST_JUDGED]]
        base = RunResult(None, {}, meter.losses(()), None, (), *_judged(setting, drawn[BASE], known))
        tell("losses of the base")
        tell("losses of the base")
        runs = []
        for training in trainings:
            loras = columns[training.name]
            losses, summary = meter.losses(loras), _summary(training)
            course = [
                (step, meter.losses([(path / DIFFUSERS_FILE, str(path), 1.0)], "training", "held_out"))
                for step, path in checkpoints(training.folder)
                if step < summary["steps"]  # the last one is the file itself
            ]
            tell(f"losses of {training.name}")
            sharpness = meter.sharpness(loras, "training")
            tell(f"sharpness of {training.name}")
            judged = _judged(setting, drawn[training.name], known)
            runs.append(RunResult(training, summary, losses, sharpness, course, *judged))
    return Results(
        command=options.command,
        base_name=setting.base.shared_name,
        resolution=setting.resolution,
        draws=meter.draws,
        trained=setting.trained,
        held_out=setting.held_out,
        rows=setting.rows,
        other=setting.other,
        judge=setting.judge.name if setting.judge else None,
        base=base,
        runs=runs,
        drawn=drawn,
    )


def _pictures_of(drawn: Sequence[Image.Image], rows: Sequence[Row]) -> list[Picture]:
    return [
        Picture.read(f"the base's picture {number}", picture, row.settings.prompt or " ")
        for number, (picture, row) in enumerate(zip(drawn, rows, strict=True))
    ]


def _judged(
    setting: Setting, drawn: Sequence[Image.Image], training: Sequence[Image.Image]
) -> tuple[Mapping[str, float | None], Copy | None]:
    """The three similarities of a column, and its picture that is most like one of the training."""
    judge, pictures = setting.judge, drawn[: len(setting.rows)]
    if judge is None:
        return {}, None
    known = judge.images(training)
    prompt, likeness, nearest = measure(judge, pictures, [row.settings.prompt for row in setting.rows], known)
    values = {"prompt": prompt.value, "likeness": likeness.value, "nearest": nearest.value}
    return values, most_alike(judge, pictures, known)


def _summary(training: Training) -> dict[str, Any]:
    path = training.folder / SUMMARY_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete {training.folder} to train it again") from None


def _write(results: Results, output: Path) -> Path:
    values, plots, sheets = contents(results)
    for name, sheet in sheets.items():
        sheet.save(output / f"{name}.png")
    for plot in plots:
        save_png(plot, output)
    write_text_atomically(output / JSON_FILE, strict_json(to_json(results), indent=2) + "\n")
    write_text_atomically(output / PAGE_FILE, render(values, {plot.title: svg(plot) for plot in plots}))
    return output / PAGE_FILE
