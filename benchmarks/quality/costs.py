"""What a step of a configuration costs beside LoRA's: its time, and its memory."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks.quality.laboratory import BATCH, training_config
from benchmarks.quality.plan import Configuration
from benchmarks.quality.results import NOISE, REGULARISERS, kind_of
from benchmarks.quality.tasks import solid_icons
from benchmarks.speed.report import ratio_to_baseline
from bilora_diffusion.memory.estimate import estimate
from bilora_diffusion.methods.building import FRESH_ROWS

__all__ = ["step_bytes", "time_cost", "time_ratios"]


def time_ratios(speed: Path) -> dict[str, float]:
    """Time of a step by method, as a share of LoRA's."""
    content = json.loads(speed.read_text())
    return {name: ratio_to_baseline(content, name)[0] for name in content["contenders"]}


def time_cost(configuration: Configuration, ratios: Mapping[str, float], batch: int = BATCH) -> float | None:
    """That of a configuration, from what was measured with a whole second pass, and with looksam's at each fifth step.

    Of a second pass on some rows, or at some steps, so much of what the whole one adds; on top of it the noise's or
    dropout's, in both passes. Of the full space it is the least: the wider sketch comes on top. None where it was not
    measured.
    """
    settings, method, kind = configuration.settings, configuration.method, kind_of(configuration)
    ratio = ratios.get(kind, ratios.get(method))
    on_top = 0.0 if kind in ratios else _on_top(configuration, ratios)
    if ratio is None or on_top is None:
        return None
    fresh = method == "bilora-fresh"
    rows = math.ceil(settings.get("ascent_share", FRESH_ROWS if fresh else 1.0) * batch) / batch
    share = rows * 5 / settings.get("looksam_every", 5) / settings.get("ascent_every", 1)
    return 1 + share * (ratio - 1) + on_top * (1 + share if fresh else 1)


def _on_top(configuration: Configuration, ratios: Mapping[str, float]) -> float | None:
    """What noise or a regulariser adds to a pass, from a row with it and the same without; None if there is none."""
    pair = ("flat-lora", "lora") if kind_of(configuration).endswith(NOISE) else None
    if "lora_dropout" in configuration.settings:
        pair = ("bilora, dropout", "bilora")
    elif REGULARISERS.keys() & configuration.settings:
        return None
    if pair is None:
        return 0.0
    return ratios[pair[0]] - ratios[pair[1]] if ratios.keys() >= set(pair) else None


def step_bytes(configuration: Configuration) -> int:
    """What a training step on the 3D icons holds at its peak, the frozen UNet included.

    Counted without data, in float32, as `python -m bilora_diffusion.memory` does: with CUDA's kernels and blocks.
    """
    phases = estimate(training_config(configuration, solid_icons()), torch.float32).phases
    return next(phase.allocated for phase in phases if phase.name == "training step")
