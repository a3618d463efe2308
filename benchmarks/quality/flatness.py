"""How flat a finished training lies, by the measures of `bilora_diffusion.sharpness`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from benchmarks.quality.measures import adapted
from bilora_diffusion.adapters import PRIMARY
from bilora_diffusion.methods import MicroBatch
from bilora_diffusion.sharpness.landscape import Landscape
from bilora_diffusion.sharpness.measures import along_random, ky_fan, top_eigenvalue, worst_case

__all__ = ["SIZES", "sharpness"]

SIZES = {"lora": 0.02, "full": 0.01}
"""Of a step along the gradient, as a share of the weights' norm, by space."""
RANDOM_SIZE = 0.25  # of the norm of each row
DIRECTIONS = 2
POWER_STEPS = 6


def sharpness(models: Mapping[str, nn.Module], micro_batches: Sequence[MicroBatch], rank: int) -> dict[str, Any]:
    """Of the loss around the factors of the primary adapter, and around the merged weights.

    Around the merged weights the base's are moved, which moves the merged ones alike; all have their old bits
    afterwards.

    Arguments:
        rank: of the gradient's part that `ky_fan` tells of.

    Returns:
        "loss", and for each space, "lora" and "full": "random", the mean rise after steps of `RANDOM_SIZE`, to either
        side of `DIRECTIONS` filter-normalised directions; "worst_case", the rise after a step of `SIZES` along the
        gradient; "eigenvalue", the Hessian's top one, and "history", its course over the power iteration;
        "gradient", as `ky_fan`.
    """
    layers = adapted(models)
    spaces = {
        "lora": [factor[PRIMARY].weight for layer in layers for factor in (layer.lora_A, layer.lora_B)],
        "full": [layer.get_base_layer().weight for layer in layers],
    }
    found: dict[str, Any] = {}
    for space, points in spaces.items():
        with _only(points, models):
            landscape = Landscape(points, micro_batches)
            at = found.setdefault("loss", landscape.loss())
            random = along_random(landscape, (-RANDOM_SIZE, RANDOM_SIZE), DIRECTIONS, 0, _unsaid)
            worst = worst_case(landscape, (SIZES[space],), _unsaid)
            top = top_eigenvalue(landscape, POWER_STEPS, 0, _unsaid)
            found[space] = {
                "random": sum(random["mean"]) / len(random["mean"]) - at,
                "worst_case": worst["losses"][0] - at,
                **top,
                "gradient": ky_fan(landscape, rank),
            }
    return found


def _unsaid(text: str) -> None:
    """Of steps that take a second."""


@contextmanager
def _only(points: Sequence[nn.Parameter], models: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, gradients are taken of the points and of nothing else."""
    learned = [parameter for model in models.values() for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    for point in points:
        point.requires_grad_(True)
    try:
        yield
    finally:
        for point in points:
            point.requires_grad_(False)
        for parameter in learned:
            parameter.requires_grad_(True)
