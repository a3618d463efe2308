"""The table of the quality benchmark, from the files of its runs."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.plan import Configuration
from benchmarks.speed.report import ratio_to_baseline
from bilora_diffusion.method_names import WITH_NOISE
from bilora_diffusion.paired import half_width

__all__ = ["PICTURE_MEASURES", "at_best", "chosen", "report"]

CHOOSING_SEED = 0
NOISE = ", noise on top"


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
        if kind(run) not in best or loss < best[kind(run)][0]:
            best[kind(run)] = (loss, Configuration(run["method"], run["learning_rate"], run["settings"]))
    return {method: configuration for method, (_, configuration) in best.items()}


def kind(run: Mapping[str, Any]) -> str:
    """As `kind_of` its configuration."""
    return kind_of(Configuration(run["method"], run["learning_rate"], run["settings"]))


def kind_of(configuration: Configuration) -> str:
    """The method, and what sets a control or another form of it apart: those have a row to themselves."""
    method, settings = configuration.method, configuration.settings
    if settings.get("steps_per_draw", 1) > 1:
        return f"{method}, {settings['steps_per_draw']} steps a draw"
    if settings.get("ascent_basis") == "tracked":
        return f"{method}, tracked"
    return f"{method}{NOISE}" if settings.get("sigma") and method in WITH_NOISE else method


def report(
    folder: Path,
    rises: Path | None = None,
    stacking: Path | None = None,
    speed: Path | None = None,
    transfer: Path | None = None,
) -> str:
    """Markdown.

    Arguments:
        folder: of the runs' files.
        transfer: of the folders of the files of `transfer`.
        rises: of the files of `rises`.
        stacking: the file of `stacking`.
        speed: what `benchmarks.speed` measured, each method's step against LoRA's in turn; the runs' own times are of a
            machine that did other things too.
    """
    everything = runs(folder)
    best = chosen(folder)
    lines = ["# Which method generalises?", "", *INTRODUCTION, ""]
    measured = [run for run in everything if run["seed"] != CHOOSING_SEED]
    ratios = costs(speed) if speed is not None else {}
    if measured:
        lines += _measured(measured, best, ratios)
    if transfer is not None and transfer.is_dir():
        lines += _elsewhere(transfer, best, ratios)
    looked = runs(rises) if rises is not None and rises.is_dir() else []
    if looked:
        lines += _rises(looked)
    lines += _candidates([run for run in everything if run["seed"] == CHOOSING_SEED], best)
    if stacking is not None and stacking.is_file():
        lines += _stacking(json.loads(stacking.read_text()))
    return "\n".join(lines) + "\n"


def costs(speed: Path) -> dict[str, float]:
    """Time of a step by method, as a share of LoRA's."""
    content = json.loads(speed.read_text())
    return {name: ratio_to_baseline(content, name)[0] for name in content["contenders"]}


def _cost(configuration: Configuration, ratios: Mapping[str, float], batch: int = 4) -> float | None:
    """That of a configuration, from what was measured with a whole second pass, and with looksam's at each fifth step.

    Of a second pass on some rows so much of what the whole one adds; on top of it the noise's.
    """
    ratio = ratios.get(kind_of(configuration), ratios.get(configuration.method))
    if ratio is None:
        return None
    settings = configuration.settings
    rows = math.ceil(settings.get("ascent_share", 1.0) * batch) / batch
    noise = ratios["flat-lora"] - 1 if kind_of(configuration).endswith(NOISE) else 0.0
    return 1 + rows * 5 / settings.get("looksam_every", 5) * (ratio - 1) + noise


def _stacking(found: Mapping[str, Any]) -> list[str]:
    shares = [f"{count} adapters {share:.0%}" for count, share in found["share_of_separate"].items() if count != "1"]
    return [
        "",
        "## Why the runs are not stacked",
        "",
        "Adapters of several methods could be trained over one base in one larger batch. Its forward and backward "
        f"passes would then take, of what they take in batches of {found['batch']} rows: {', '.join(shares)}; the "
        "adapters' own products, in batched form, are not counted. As that is all there is to gain, each run is the "
        "trainer's own.",
    ]


INTRODUCTION = [
    "Written by `python -m benchmarks.quality report`. A LoRA of rank 4 on the UNet of the embedded base, 23 3D icons, "
    "batch 4, 400 steps; for one seed all runs see the same icons, noise and timesteps, so differences to LoRA are "
    "paired. Losses are means over fixed draws: of 3D icons that were never trained on (validation names to choose "
    "by, test names to report), of the 23 (training), and of flat icons (what is forgotten). Where a candidate is "
    "missing below it was not run. [speed.md](speed.md) has where `time a step` comes from.",
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
    rows: dict[str, list[list[float]]] = {}
    sizes: dict[str, list[float]] = {}
    for run in sorted(some, key=lambda run: not run["configuration"].startswith("lora,")):
        plain = run["configuration"].startswith("lora,")
        for seen in run["seen"].values():
            for name, title in GENERAL_DIRECTIONS.items():
                if plain:
                    rows.setdefault(title, []).append(seen[name])
            if "own" in seen:
                rows.setdefault(run["configuration"], []).append(seen["own"])
                sizes.setdefault(run["configuration"], []).append(seen["own_share"])
    lines = [
        "## How far each perturbation raises the loss of the batch at hand",
        "",
        "Rise of the batch's loss in 1e-4 (mean and standard error over steps and seeds) when the merged weights move "
        "by a share of their norm along each direction, all scaled to the same norm. The gradient's is the most that "
        "any direction reaches to first order; a method is an ascent as far as it is above `random`. Last: the norm "
        "that the method itself gave its perturbation.",
        "",
        "| direction | " + " | ".join(f"{100 * share:g} %" for share in shares) + " | its own norm |",
        "|---|" + "---|" * (len(shares) + 1),
    ]
    for title, found in rows.items():
        cells = []
        for column in zip(*found, strict=True):
            error = statistics.stdev(column) / math.sqrt(len(column)) if len(column) > 1 else math.nan
            cells.append(f"{1e4 * statistics.fmean(column):+.1f} (s.e. {1e4 * error:.1f})")
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


def _measured(
    some: Sequence[dict[str, Any]], best: Mapping[str, Configuration], ratios: Mapping[str, float]
) -> list[str]:
    by = {(kind(run), run["seed"]): run for run in some if run["key"] == best[kind(run)].key}
    seeds = sorted(seed for method, seed in by if method == "lora")
    pairs = {
        method: [(by[method, seed], by["lora", seed]) for seed in seeds if (method, seed) in by]
        for method in sorted({method for method, _ in by}, key=lambda name: (name != "lora", name))
    }
    pairs = {method: some for method, some in pairs.items() if some}
    lines = [
        "## Measured on the test names",
        "",
        f"Seeds {', '.join(map(str, seeds))}. Differences to LoRA with a 95 % interval (paired, Student's t; where it "
        "holds 0 no difference was shown); LoRA's own row has its values and their standard error.",
        "",
        "### Losses",
        "",
        "Differences in 1e-4. `best`: each run at its step of lowest validation loss; `equal time`: the same among the "
        "steps that it makes while LoRA makes all of its own; `last`: at the end; `gap`: test less training, at the "
        "end; `8 bits`: test at the end, the adapted weights rounded to 8 bits; `sharpness`: the rise of the training "
        "loss after a step of 1 % of the merged weights' norm along the gradient.",
        "",
        "| method | test, best | test, equal time | test, last | gap | flat, best | 8 bits | sharpness | time a step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method, runs_ in pairs.items():
        lines.append(
            "| " + " | ".join([str(best[method]), *_loss_cells(method, runs_, _cost(best[method], ratios))]) + " |"
        )
    plain = [run for run, _ in pairs["lora"]]
    stopped = _interval([1e4 * (at_best(run, "test") - last(run)["test"]) for run in plain], 0)
    lines += ["", f"LoRA's own test loss at its best step, less that after its last: {stopped}."]
    lines += [
        "",
        "### Pictures",
        "",
        f"{len(PICTURE_MEASURES)} measures of 48 unseen names, drawn after the last step. "
        + "; ".join(f"`{title}`: {told}" for title, told in PICTURE_MEASURES.values())
        + ".",
        "",
        "| method | " + " | ".join(title for title, _ in PICTURE_MEASURES.values()) + " |",
        "|---|" + "---|" * len(PICTURE_MEASURES),
    ]
    for method, runs_ in pairs.items():
        cells = [
            _cell(method, [(a["pictures"][name], b["pictures"][name]) for a, b in runs_], 3)
            for name in PICTURE_MEASURES
        ]
        lines.append("| " + " | ".join([str(best[method]), *cells]) + " |")
    return [*lines, ""]


ELSEWHERE = {
    "3d-batch-1": "the same icons, a picture a step",
    "high-contrast": "black silhouettes of the same 23 names",
    "openmoji": "outlines with flat colours, of the same 23 names",
}
SUBJECTS = "photographs of one subject: two or three to learn, one to validate, one to test"


def _elsewhere(folder: Path, best: Mapping[str, Configuration], ratios: Mapping[str, float]) -> list[str]:
    """A table for each task; all subjects are one. A row is one configuration, whatever is chosen by now."""
    groups: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        for run in runs(place):
            cluster = str(run["seed"]) if place.name in ELSEWHERE else place.name
            groups.setdefault(ELSEWHERE.get(place.name, SUBJECTS), {})[run["key"], cluster] = run
    lines = [
        "## Elsewhere, with the settings chosen above",
        "",
        "Nothing was chosen here: learning rates and strengths are those that the 3D icons' validation names chose; "
        "where they have chosen another one since, the row says so. "
        "Columns as above; `flat, last`: what is forgotten, at the end. LoRA's rows have its values, in the losses' "
        "own units, and their standard error.",
        "",
    ]
    for title, found in groups.items():
        (baseline,) = {run["key"] for run in found.values() if kind(run) == "lora"}
        clusters = sorted({cluster for key, cluster in found if key == baseline})
        batch = 1 if title == ELSEWHERE["3d-batch-1"] else 4
        lines += [
            f"### {title[0].upper()}{title[1:]}",
            "",
            ("Subjects: " if title == SUBJECTS else "Seeds: ") + ", ".join(clusters) + ".",
            "",
            "| method | test, best | test, equal time | test, last | training, last | flat, best | flat, last |",
            "|---|---|---|---|---|---|---|",
        ]
        for key in sorted({key for key, _ in found}, key=lambda name: (name != baseline, name)):
            pairs = [(found[key, one], found[baseline, one]) for one in clusters if (key, one) in found]
            if pairs:
                run = pairs[0][0]
                cost = _cost(Configuration(run["method"], run["learning_rate"], run["settings"]), ratios, batch)
                cells = _transferred_cells("lora" if key == baseline else key, pairs, cost)
                name = key if best[kind(run)].key == key else f"{key} (the choice before)"
                lines.append("| " + " | ".join([name, *cells]) + " |")
        lines.append("")
    return lines


def _transferred_cells(method: str, pairs: Sequence[tuple[dict, dict]], cost: float | None) -> list[str]:
    return [
        *_test_cells(method, pairs, cost),
        *(
            _cell(method, [(value(a), value(b)) for a, b in pairs], 4)
            for value in (
                lambda run: last(run)["training"],
                lambda run: at_best(run, "flat"),
                lambda run: last(run)["flat"],
            )
        ),
    ]


def _test_cells(method: str, pairs: Sequence[tuple[dict, dict]], cost: float | None) -> list[str]:
    """The test loss at the best step, the same in LoRA's time (nothing where the cost is not known), and at the end."""
    steps = max(map(int, pairs[0][0]["evaluations"]))
    values = [
        lambda run: at_best(run, "test"),
        lambda run: at_best(run, "test", steps if run["method"] == "lora" or cost is None else steps / cost),
        lambda run: last(run)["test"],
    ]
    cells = [_cell(method, [(value(a), value(b)) for a, b in pairs], 4) for value in values]
    if cost is None:
        cells[1] = ""
    return cells


PICTURE_MEASURES = {
    "similarity_to_true": ("like the true icon", "similarity of colours and shapes to the true 3D icon, in [-2, 2]"),
    "similarity_to_true_few_steps": ("in 8 steps", "the same with 8 sampling steps instead of 20"),
    "distance_to_true": ("squared error", "mean squared difference of colours to the true icon, less is better"),
    "retrieved_top_10": ("found in 10", "share of names whose own 3D icon is among the nearest 10 of all 506"),
    "nearest_training_picture": ("like a training icon", "similarity to the nearest of the 23: copying"),
    "diversity": ("diversity", "2 less the similarity between two seeds' pictures of a name"),
    "scorer_3d": ("scorer", "similarity to the name in 3D by the embedded scorer, in [-1, 1]"),
    "flat_kept": ("flat kept", "similarity of flat icons to those the base draws: what is not forgotten"),
}
"""Title and meaning by name."""


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


def _loss_cells(method: str, pairs: Sequence[tuple[dict, dict]], cost: float | None) -> list[str]:
    values = [
        lambda run: last(run)["test"] - last(run)["training"],
        lambda run: at_best(run, "flat"),
        lambda run: run["rounded_to_8_bits"],
        lambda run: run["sharpness"]["rises"][run["sharpness"]["sizes"].index(0.01)],
    ]
    cells = [_cell(method, [(value(a), value(b)) for a, b in pairs], 4) for value in values]
    return [*_test_cells(method, pairs, cost), *cells, "" if cost is None else f"x {cost:.2f}"]


def _cell(method: str, pairs: Sequence[tuple[float, float]], digits: int) -> str:
    """LoRA's mean and standard error, or the mean paired difference to it; losses' differences in 1e-4."""
    if method == "lora":
        own = [a for a, _ in pairs]
        error = f" (s.e. {statistics.stdev(own) / math.sqrt(len(own)):.{digits}f})" if len(own) > 1 else ""
        return f"{statistics.fmean(own):.{digits}f}{error}"
    if digits == 4:
        return _interval([1e4 * (a - b) for a, b in pairs], 0)
    return _interval([a - b for a, b in pairs], digits)


def _interval(values: Sequence[float], digits: int) -> str:
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:+.{digits}f}"
    return f"{mean:+.{digits}f} +- {half_width(values):.{digits}f}"
