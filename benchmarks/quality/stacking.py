"""Is it cheaper to train several runs stacked over one base? The steps of 2, 4 and 8 of them, against their number."""

import statistics
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.quality.laboratory import BATCH, Laboratory
from benchmarks.quality.plan import Configuration
from benchmarks.quality.stacked import Member, stacked
from bilora_diffusion.assembly import Parts
from bilora_diffusion.finishing import package_versions

__all__ = ["RUNS", "stacking"]

RUNS = (1, 2, 4, 8)
ROUNDS = 5
STEPS = 5


def stacking(laboratory: Laboratory) -> dict[str, Any]:
    """By number of runs the median seconds of a step of all of them; the numbers take turns.

    Of the processor on a CPU, which other work disturbs less; elapsed on a GPU. From when all stand at their first
    step: the common base is copied, and the threads are started, once a training.
    """
    assembled = [laboratory.assembled(Configuration("lora", 5e-4), seed) for seed in range(max(RUNS))]
    seconds: dict[int, list[float]] = {count: [] for count in RUNS}
    for round_ in range(ROUNDS):
        for count in RUNS:
            seconds[count].append(_seconds(laboratory, assembled[:count], round_ * STEPS))
    medians = {count: statistics.median(values) for count, values in seconds.items()}
    return {
        "batch": BATCH,
        "device": str(laboratory.device),
        "seconds": medians,
        "samples": seconds,
        "share_of_separate": {count: value / (count * medians[1]) for count, value in medians.items()},
        "versions": package_versions(),
    }


def _seconds(laboratory: Laboratory, assembled: Sequence[Parts], first: int) -> float:
    """Of a step of all."""
    began: list[float] = []
    ready = threading.Barrier(len(assembled), action=lambda: began.append(_now(laboratory.device)))

    def steps(number: int, member: Member | None = None) -> None:
        parts = assembled[number]
        ready.wait()
        for step in range(first, first + STEPS):
            micro_batches = laboratory.drawn(parts, step)
            parts.trainer.training_step(member.bind(micro_batches) if member else micro_batches, step)

    if len(assembled) == 1:
        steps(0)
    else:
        stacked(laboratory.pipeline.unet, [parts.models["unet"] for parts in assembled], steps)
    return (_now(laboratory.device) - began[0]) / STEPS


def _now(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()
