"""Would it be cheaper to train several adapters stacked over one base? What the base costs a row in larger batches.

With m adapters stacked, one batch of m x 4 rows goes through the base instead of m batches of 4. What that can save is
what a row gets cheaper in the larger batch; each row's own adapter comes on top, in batched products.
"""

import statistics
import time
from typing import Any

from benchmarks.quality.laboratory import BATCH, Laboratory
from bilora_diffusion.finishing import package_versions
from bilora_diffusion.sdxl import denoise

__all__ = ["ADAPTERS", "stacking"]

ADAPTERS = (1, 2, 4, 8, 12)
ROUNDS = 9


def stacking(laboratory: Laboratory) -> dict[str, Any]:
    """By number of adapters the median CPU seconds of the UNet's forward and backward pass; the sizes take turns."""
    unet = laboratory.pipeline.unet.requires_grad_(False).train()
    batch = laboratory.evaluations["training"][0]
    seconds: dict[int, list[float]] = {count: [] for count in ADAPTERS}
    for _ in range(ROUNDS):
        for count in ADAPTERS:
            rows = slice(0, count * BATCH)
            latents = batch.latents[rows].clone().requires_grad_()
            began = time.process_time()
            predicted = denoise({"unet": unet}, latents, batch.timesteps[rows], batch.conditioning[rows])
            predicted.square().mean().backward()
            seconds[count].append(time.process_time() - began)
    medians = {count: statistics.median(values) for count, values in seconds.items()}
    return {
        "batch": BATCH,
        "seconds": medians,
        "share_of_separate": {count: value / (count * medians[1]) for count, value in medians.items()},
        "versions": package_versions(),
    }
