"""Which ascent, which start and which radius: Bi-LoRA's open choices, measured against LoRA on the same draws.

    python -m benchmarks.ascent data      fetch the icons (npm), once
    python -m benchmarks.ascent base      train the small base: 20 minutes on one core, can be stopped and goes on
    python -m benchmarks.ascent ablate    train every configuration that has no result yet
    python -m benchmarks.ascent shapes    how soon the ball is filled at SDXL's own shapes, without a model
    python -m benchmarks.ascent report    benchmarks/results/ascent.md from the results

One LoRA of rank 4 on the UNet's attention projections, 23 icons, batch 4. For one seed all configurations see the same
icons, noise and timesteps, so differences to LoRA are paired. What was chosen was chosen on the validation icons.
"""

import argparse
import copy
import json
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import icon_base, icons
from bilora_diffusion import methods
from bilora_diffusion.adapters import (
    AUXILIARY,
    PRIMARY,
    LowRank,
    add_adapter,
    auxiliary_off,
    low_rank_layers,
    parameters_of,
)
from bilora_diffusion.batches import Batch, TrainingMicroBatch
from bilora_diffusion.embedded.patches import PatchPCA
from bilora_diffusion.finishing import package_versions
from bilora_diffusion.loss_gap import measure_loss_gap
from bilora_diffusion.randomness import generator
from bilora_diffusion.sdxl import Conditioning
from bilora_diffusion.training import Trainer

__all__ = ["Configuration", "ablate", "configurations", "fill_times", "report"]

RESULTS = Path(__file__).parent / "results"
STEPS = 240
EVALUATED_AT = (120, 180, 240)
RANK, SCALE, BATCH = 4, 2.0, 4
GAP_EVERY = 10
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Configuration:
    """One training, but for its seed.

    Arguments:
        rate: learning rate of both adapters.
        share: rho as a share of the weights' singular values (`methods.Radius`); None: `rho` is given.
    """

    method: str
    rate: float
    ascent: str | None = None
    init: str | None = None
    share: float | None = None
    rho: float | None = None

    def __str__(self) -> str:
        if self.method == "lora":
            return f"LoRA, lr {self.rate:g}"
        radius = f"share {self.share:g}" if self.share is not None else f"rho {self.rho:g}"
        return f"{self.ascent}, {self.init}, {radius}, lr {self.rate:g}"


def configurations() -> Iterator[Configuration]:
    """LoRA; every ascent over the radius; gaussian starts; the paper's own radius (0.05 s)."""
    for rate in (3e-4, 1e-3):
        yield Configuration("lora", rate)
    for ascent in ("adamw", "sgd", "normalized"):
        for share in (0.01, 0.04, 0.12):
            yield Configuration("bilora", 3e-4, ascent, "kaiming", share)
        yield Configuration("bilora", 3e-4, ascent, "gaussian", 0.04)
    for ascent in ("adamw", "sgd"):
        yield Configuration("bilora", 3e-4, ascent, "gaussian", rho=0.05 * SCALE)
    for ascent in ("adamw", "normalized"):
        yield Configuration("bilora", 3e-4, ascent, "kaiming", 0.2)
        for share in (0.04, 0.12, 0.2):
            yield Configuration("bilora", 1e-3, ascent, "kaiming", share)
    # Does Bi-LoRA only learn faster? LoRA at twice the rates tells what speed alone gains and what it forgets.
    for rate in (2e-3, 6e-4):
        yield Configuration("lora", rate)
    for rate, share in ((1e-3, 0.04), (1e-3, 0.12), (1e-3, 0.2), (3e-4, 0.12)):
        yield Configuration("bilora", rate, "adamw", "gaussian", share)


class Laboratory:
    """The base, the icons as latents and the fixed evaluation draws."""

    def __init__(self) -> None:
        self.icons = icons.load()
        self.base, self.base_facts = icon_base.load_base(self.icons)
        pca = PatchPCA(self.icons.flat, icon_base.PATCH_PX, icon_base.LATENT_CHANNELS)
        vocabulary = icon_base.Vocabulary(self.icons)
        self.objective = icon_base.objective()
        self.latents = {"flat": pca.encode(self.icons.flat), "solid": pca.encode(self.icons.solid)}
        self.given = {
            style: icon_base.conditioning(self.base, vocabulary, [prompt(name) for name in self.icons.names])
            for style, prompt in (("flat", icon_base.flat_prompt), ("solid", icon_base.solid_prompt))
        }
        every_other = torch.arange(0, len(self.icons.names), 2)
        self.evaluations = {
            "validation": self.batch("solid", self.icons.validation(), "evaluation", 0, 0),
            "test": self.batch("solid", self.icons.test(), "evaluation", 0, 1),
            "flat": self.batch("flat", every_other, "evaluation", 0, 2),
        }

    def batch(self, style: str, rows: Tensor, purpose: str, seed: int, number: int) -> Batch:
        latents, given = self.latents[style], self.given[style]
        noise, timesteps = icon_base.draws(seed, purpose, rows, latents, number)
        conditioning = Conditioning(given.time_ids[rows], given.prompt_embeds[rows], given.pooled_prompt_embeds[rows])
        ones = torch.ones(len(rows))
        return Batch(latents[rows], noise, timesteps, conditioning, ones, ones)

    def micro_batch(self, models: Mapping[str, nn.Module], batch: Batch) -> TrainingMicroBatch:
        disabled = torch.amp.GradScaler("cpu", enabled=False)
        return TrainingMicroBatch(batch, models, self.objective, torch.float32, 1.0, disabled)

    @torch.no_grad()
    def evaluate(self, models: Mapping[str, nn.Module]) -> dict[str, float]:
        """The losses of the primary alone on the fixed draws."""
        models["unet"].eval()
        with auxiliary_off(models.values()):
            losses = {name: self.micro_batch(models, batch).loss().item() for name, batch in self.evaluations.items()}
        models["unet"].train()
        return losses

    def run(self, configuration: Configuration, seed: int) -> dict[str, Any]:
        """Trains one configuration and returns all that was seen."""
        began = time.perf_counter()
        trainer, radius = self._trainer(configuration, seed)
        concept = self.icons.concept(seed)
        losses, gaps, norms, evaluations = [], [], [], {}
        for step in range(STEPS):
            picked = torch.randint(len(concept), (BATCH,), generator=generator(seed, "rows", step))
            rows = self.batch("solid", concept[picked], "training", seed, step)
            micro_batches = [self.micro_batch(trainer.models, rows)]
            if trainer.method.parameters and (step + 1) % GAP_EVERY == 0:
                gaps.append(measure_loss_gap(trainer.models.values(), trainer.method, micro_batches).gap)
            losses.append(trainer.training_step(micro_batches, step).loss)
            norms += [float(value) for name, value in trainer.method.measures().items() if name == "c_over_rho"]
            if step + 1 in EVALUATED_AT:
                evaluations[step + 1] = self.evaluate(trainer.models)
        measures = trainer.method.measures()
        return {
            "configuration": asdict(configuration),
            "seed": seed,
            "radius": None if radius is None else vars(radius),
            "evaluations": evaluations,
            "training_losses": losses,
            "loss_gaps": gaps,
            "c_over_rho": norms,
            "clipped_share": float(measures["clipped_share"]) if measures else None,
            "seconds": time.perf_counter() - began,
        }

    def _trainer(self, configuration: Configuration, seed: int) -> tuple[Trainer, methods.Radius | None]:
        unet = copy.deepcopy(self.base["unet"])
        unet.train()
        models = {"unet": unet}
        add_adapter("unet", unet, PRIMARY, rank=RANK, scale=SCALE, init="gaussian", seed=seed)
        method, radius = self._method(configuration, models, seed)
        primary = {"unet": list(parameters_of(unet, PRIMARY).values())}
        optimizer = torch.optim.AdamW(primary["unet"], lr=configuration.rate, weight_decay=1e-4, fused=True)
        trainer = Trainer(
            models,
            self.objective,
            primary,
            optimizer,
            method,
            [],
            compute_dtype=torch.float32,
            max_grad_norm=1.0,
            seed=seed,
        )
        return trainer, radius

    def _method(
        self, configuration: Configuration, models: Mapping[str, nn.Module], seed: int
    ) -> tuple[methods.Method, methods.Radius | None]:
        if configuration.method == "lora":
            return methods.LoRA(), None
        radius = methods.radius(models, RANK, configuration.rho, singular_share=configuration.share)
        add_adapter("unet", models["unet"], AUXILIARY, rank=RANK, scale=SCALE, init=configuration.init, seed=seed)
        layers = low_rank_layers(models, AUXILIARY)
        return methods.BiLoRA(layers, radius.rho, _ascent(configuration, layers, radius.rho)), radius


def _ascent(configuration: Configuration, layers: Sequence[LowRank], rho: float) -> methods.Ascent:
    return methods.build_ascent(
        configuration.ascent,
        layers,
        learning_rates={"unet": configuration.rate},
        rho=rho,
        fraction=0.1,
        weight_decay=0.0,
        betas=(0.9, 0.999),
        eps=1e-8,
    )


def ablate(seeds: Sequence[int]) -> None:
    """Runs what has no result yet; each result is written when it is there."""
    laboratory = Laboratory()
    for seed in seeds:
        path = RESULTS / f"ascent_seed{seed}.json"
        content = json.loads(path.read_text()) if path.exists() else _header(laboratory)
        known = [run["configuration"] for run in content["runs"]]
        for configuration in configurations():
            if asdict(configuration) in known:
                continue
            content["runs"].append(laboratory.run(configuration, seed))
            path.write_text(json.dumps(_rounded(content)) + "\n")
            print(f"seed {seed}: {configuration}: {content['runs'][-1]['evaluations'][STEPS]}", flush=True)


def _header(laboratory: Laboratory) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "versions": package_versions(),
        "device": f"{platform.machine()}, {torch.get_num_threads()} thread(s)",
        "commit": commit,
        "base": laboratory.base_facts,
        "before_tuning": laboratory.evaluate(laboratory.base),
        "icons_sha256": laboratory.icons.sha256,
        "steps": STEPS,
        "rank": RANK,
        "scale": SCALE,
        "batch": BATCH,
        "runs": [],
    }


def _rounded(value: Any) -> Any:
    """Six digits are more than the measurements carry; the files stay small."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return value


SDXL_SHAPES = {(640, 640): 60, (1280, 1280): 360, (2048, 640): 20, (2048, 1280): 120}
"""(in, out) of SDXL's adapted UNet layers and how many there are."""
WEIGHT_STD = 0.03  # of an entry of SDXL's projections, by order of magnitude
FILL_STEPS = 500
GRADIENT_NORM = 1.0  # of dL/dW over all layers, where it matters (sgd): ten times what the small base has
THINNING = 10  # one layer in ten of each shape stands for all; norms are scaled accordingly


def fill_times(rate: float = 1e-4) -> list[dict[str, Any]]:
    """After how many steps c / rho passes 0.9 at SDXL's shapes, for made-up gradients; no model is run.

    Each layer's dL/dW is a random matrix of rank 1, once the same at every step and once drawn anew at every step. Real
    gradients lie between: they turn with the batch, and what they share fills the ball.
    """
    spectral = math.sqrt(sum(n * WEIGHT_STD**2 * max(shape) for shape, n in SDXL_SHAPES.items()))
    rows = []
    for share in (0.01, 0.04, 0.12):
        rho = share * spectral * math.sqrt(RANK)
        for ascent in ("adamw", "sgd", "normalized"):
            for init in ("kaiming", "gaussian"):
                configuration = Configuration("bilora", rate, ascent, init, share)
                filled = {"steady": _fill(configuration, rho, turning=False)}
                filled["turning"] = _fill(configuration, rho, turning=True)
                rows.append({"ascent": ascent, "init": init, "share": share, "rho": rho} | filled)
                print(rows[-1], flush=True)
    return rows


@torch.no_grad()
def _fill(configuration: Configuration, rho: float, *, turning: bool) -> dict[str, Any]:
    random = generator(0, "fill")
    layers = [
        _auxiliary(width, height, configuration.init, random)
        for (width, height), number in SDXL_SHAPES.items()
        for _ in range(number // THINNING)
    ]
    radius = rho / math.sqrt(THINNING)
    method = methods.BiLoRA(layers, radius, _ascent(configuration, layers, radius))
    for step in range(1, FILL_STEPS + 1):
        if turning or step == 1:
            gradients = _rank_one_gradients(layers, random)
        for layer, (column, row) in zip(layers, gradients, strict=True):
            layer.B.grad = column @ (row @ layer.A.T)
            layer.A.grad = (layer.B.T @ column) @ row
        method.after_step()
        filled = float(method.measures()["c_over_rho"])
        if filled > 0.9:
            break
    return {"steps": step if filled > 0.9 else None, "c_over_rho": filled}


def _auxiliary(width: int, height: int, init: str, random: torch.Generator) -> LowRank:
    """As `add_adapter` starts it: B = 0, s = 1 (alpha unset)."""
    if init == "gaussian":
        A = torch.randn(RANK, width, generator=random) / RANK
    else:
        A = (2 * torch.rand(RANK, width, generator=random) - 1) / math.sqrt(width)
    return LowRank("unet", "", nn.Parameter(A), nn.Parameter(torch.zeros(height, RANK)), 1.0)


def _rank_one_gradients(layers: Sequence[LowRank], random: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """A column and a row for each layer, whose products have the norm `GRADIENT_NORM` over all 560 layers."""
    share = GRADIENT_NORM / math.sqrt(len(layers) * THINNING)
    gradients = []
    for layer in layers:
        column, row = (torch.randn(size, generator=random) for size in (layer.B.shape[0], layer.A.shape[1]))
        gradients.append((share * column[:, None] / column.norm(), row[None] / row.norm()))
    return gradients


def report() -> str:
    """The tables of `ascent.md`, from the JSON files beside it."""
    contents = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("ascent_seed*.json"))]
    runs = {(Configuration(**run["configuration"]), run["seed"]): run for c in contents for run in c["runs"]}
    seeds = sorted({seed for _, seed in runs})
    base, before = contents[0]["base"], contents[0]["before_tuning"]
    lines = [
        "# Which ascent, which start, which radius",
        "",
        f"Made by `python -m benchmarks.ascent report`. Base: {base['pictures']:,} pictures, probe loss "
        f"{base['probe_losses'][-1][1]:.4f}; before tuning unseen {before['validation']:.4f}, test "
        f"{before['test']:.4f}, flat {before['flat']:.4f}. {len(seeds)} seeds, {STEPS} steps, batch {BATCH}, rank "
        f"{RANK}, s = {SCALE:g}. Losses are differences to LoRA at the same learning rate and step, in 1e-4, mean and "
        "standard error over seeds; negative is better. *unseen*: the validation icons, to choose by; *test*: others; "
        "*flat*: what the base knew (forgetting); *training*: the last 40 steps, with the perturbation on.",
        "",
        "| ascent, start, radius | rho / norm of W | c / rho at the end | steps to c > 0.9 rho | clipped | gap, 1e-4 | "
        + " | ".join(f"unseen @{step}" for step in EVALUATED_AT)
        + f" | test @{STEPS} | flat @{STEPS} | training |",
        "|---" * (6 + len(EVALUATED_AT) + 3) + "|",
    ]
    for configuration in configurations():
        mine = [runs[configuration, seed] for seed in seeds if (configuration, seed) in runs]
        if len(mine) == len(seeds):
            lines.append(_row(configuration, mine, [runs[Configuration("lora", configuration.rate), s] for s in seeds]))
    lines += ["", "## Against the best LoRA there is", "", *_best_rows(runs, seeds)]
    shapes = RESULTS / "ascent_shapes.json"
    if shapes.exists():
        lines += ["", "## SDXL's shapes, without a model", "", *_shape_rows(json.loads(shapes.read_text()))]
    return "\n".join(lines) + "\n"


def _row(configuration: Configuration, runs: list[dict[str, Any]], baselines: list[dict[str, Any]]) -> str:
    def at(step: int, name: str) -> str:
        key = str(step)
        if configuration.method == "lora":
            return f"{statistics.fmean(run['evaluations'][key][name] for run in runs):.4f}"
        pairs = zip(runs, baselines, strict=True)
        return _mean([1e4 * (run["evaluations"][key][name] - b["evaluations"][key][name]) for run, b in pairs])

    def last_losses(run: dict[str, Any]) -> float:
        return statistics.fmean(run["training_losses"][-40:])

    cells = [str(configuration)]
    if configuration.method == "lora":
        cells += [""] * 5
        training = f"{statistics.fmean(map(last_losses, runs)):.4f}"
    else:
        fills = [next((i + 1 for i, c in enumerate(run["c_over_rho"]) if c > 0.9), None) for run in runs]
        cells += [
            f"{runs[0]['radius']['relative']:.4f}",
            f"{statistics.fmean(run['c_over_rho'][-1] for run in runs):.2f}",
            "never" if None in fills else f"{statistics.fmean(fills):.0f}",
            f"{statistics.fmean(run['clipped_share'] for run in runs):.2f}",
            _mean([1e4 * statistics.fmean(run["loss_gaps"]) for run in runs]),
        ]
        training = _mean([1e4 * (last_losses(r) - last_losses(b)) for r, b in zip(runs, baselines, strict=True)])
    cells += [at(step, "validation") for step in EVALUATED_AT] + [at(STEPS, "test"), at(STEPS, "flat"), training]
    return "| " + " | ".join(cells) + " |"


def _best_rows(runs: Mapping[tuple[Configuration, int], dict[str, Any]], seeds: Sequence[int]) -> list[str]:
    """Each configuration at its best step against LoRA at its best rate and step, both chosen on validation by seed."""
    loras = [configuration for configuration in configurations() if configuration.method == "lora"]
    rates = ", ".join(f"{configuration.rate:g}" for configuration in loras)
    lines = [
        "A perturbed run may only seem better because LoRA's rate was too low. So here each is at its best step, and "
        f"LoRA at the best of its steps and rates ({rates}), both chosen on each seed's validation icons. In 1e-4.",
        "",
        "| ascent, start, radius | unseen | test | flat |",
        "|---|---|---|---|",
    ]

    def best(configuration: Configuration, seed: int) -> dict[str, float]:
        return min(runs[configuration, seed]["evaluations"].values(), key=lambda losses: losses["validation"])

    for configuration in configurations():
        if configuration.method == "lora" or any((configuration, seed) not in runs for seed in seeds):
            continue
        pairs = [
            (
                best(configuration, seed),
                min((best(one, seed) for one in loras), key=lambda losses: losses["validation"]),
            )
            for seed in seeds
        ]
        cells = [
            _mean([1e4 * (ours[name] - theirs[name]) for ours, theirs in pairs])
            for name in ("validation", "test", "flat")
        ]
        lines.append(f"| {configuration} | " + " | ".join(cells) + " |")
    return lines


def _mean(values: Sequence[float]) -> str:
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):+.0f} +- {spread:.0f}"


def _shape_rows(content: Mapping[str, Any]) -> list[str]:
    def steps(filled: Mapping[str, Any]) -> str:
        return str(filled["steps"] or f"> {FILL_STEPS} (reached {filled['c_over_rho']:.2g})")

    return [
        f"Steps until c / rho > 0.9 at the shapes of SDXL's {sum(SDXL_SHAPES.values())} layers, learning rate "
        f"{content['rate']:g}, s = 1, weights of standard deviation {WEIGHT_STD}. Random gradients of norm "
        f"{GRADIENT_NORM:g} (it matters to sgd alone; the small base has 0.1): steady, the same at every step; "
        "turning, new at every step.",
        "",
        "| ascent | start | share | rho | steady | turning |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row['ascent']} | {row['init']} | {row['share']:g} | {row['rho']:.2f} "
            f"| {steps(row['steady'])} | {steps(row['turning'])} |"
            for row in content["rows"]
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("data", "base", "ablate", "shapes", "report"))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of `ablate`; a process each, say")
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    if arguments.stage == "data":
        print(icons.build())
    elif arguments.stage == "base":
        icon_base.train(icons.load())
    elif arguments.stage == "ablate":
        ablate(arguments.seeds)
    elif arguments.stage == "shapes":
        rate = 1e-4
        content = {"rate": rate, "versions": package_versions(), "rows": fill_times(rate)}
        (RESULTS / "ascent_shapes.json").write_text(json.dumps(_rounded(content)) + "\n")
    else:
        (RESULTS / "ascent.md").write_text(report())
        print(RESULTS / "ascent.md")


if __name__ == "__main__":
    main()
