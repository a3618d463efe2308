"""What is compared: each quantity of the runs with its meaning, and its paired differences to the first method."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bilora_diffusion.paired import Difference, paired_difference

__all__ = ["QUANTITIES", "Compared", "Quantity", "Values", "amount", "compared", "mean", "number"]

SHARPNESS_SIZE = 0.05
"""Where the rise of the loss is read off: a step of a twentieth of the factors' norm."""

Values = Mapping[str, float | None]
"""The quantities of one run, or of the base, by `Quantity.key`."""
Kind = Literal["loss", "percent", "score", "seconds", "bytes"]


@dataclass(frozen=True)
class Quantity:
    """Attributes:
    title: in a table.
    phrase: in a sentence, behind "LoRA's"; `{held_out}` stands for "4 held-out pictures".
    kind: how its numbers are written.
    relative: differences are shares of the other's value.
    """

    key: str
    title: str
    phrase: str
    meaning: str
    kind: Kind
    relative: bool


def _measure(key: str, title: str, phrase: str, meaning: str) -> Quantity:
    return Quantity(key, title, phrase, meaning, "score", False)


QUANTITIES = (
    Quantity(
        "held_out",
        "loss, held-out pictures",
        "loss on the {held_out}",
        "the denoising loss on pictures that were not trained on: lower generalises better",
        "loss",
        True,
    ),
    Quantity(
        "training",
        "loss, training pictures",
        "loss on the training pictures",
        "the same on the pictures trained on: low here and high on the held-out ones is overfitting",
        "loss",
        True,
    ),
    Quantity(
        "gap",
        "held-out above training",
        "gap between held-out and training loss",
        "by how much the first is above the second: a lower gap is less overfitting only where the training loss is "
        "not higher",
        "percent",
        False,
    ),
    Quantity(
        "drift",
        "drift on other prompts",
        "drift on other prompts",
        "by how much the loss rose on what the base itself draws for prompts without the concept: higher is more "
        "forgotten",
        "percent",
        False,
    ),
    _measure(
        "nearest",
        "likeness to the nearest training picture",
        "likeness to the nearest training picture",
        "near 1 the LoRA copies instead of drawing",
    ),
    _measure(
        "likeness",
        "likeness to the training pictures",
        "likeness to the training pictures",
        "mean similarity to all of them: higher is more of what was taught",
    ),
    _measure(
        "prompt",
        "picture and prompt",
        "agreement of picture and prompt",
        "how much the pictures show what was asked for: higher is more",
    ),
    Quantity(
        "sharpness",
        "sharpness",
        "sharpness",
        f"by how much the loss on the training pictures rises after a step along the gradient, "
        f"{SHARPNESS_SIZE:.0%} of the factors' norm long: higher is sharper",
        "percent",
        False,
    ),
    Quantity(
        "seconds",
        "time of a step",
        "median time of a step",
        "the run's median; previews and checkpoints left out",
        "seconds",
        True,
    ),
    Quantity("memory", "peak memory", "peak memory", "the most the run held at once", "bytes", True),
)
"""In the page's order."""


@dataclass(frozen=True)
class Compared:
    """One quantity of all runs.

    Attributes:
        base: the base's own, without a LoRA; None where that means nothing.
        values: of each method, a value a seed.
        differences: of each method but the first, to the first; None where a value is not finite.
    """

    quantity: Quantity
    base: float | None
    values: Mapping[str, Sequence[float]]
    differences: Mapping[str, Difference | None]

    def to_json(self) -> dict[str, Any]:
        return {
            "quantity": self.quantity.key,
            "meaning": self.quantity.meaning,
            "base": self.base,
            "values": {method: list(values) for method, values in self.values.items()},
            "differences": {
                method: None
                if one is None
                else {
                    "relative": self.quantity.relative,
                    "mean": one.mean,
                    "interval_95": one.interval and list(one.interval),
                }
                for method, one in self.differences.items()
            },
        }


def compared(base: Values, runs: Mapping[str, Sequence[Values]]) -> list[Compared]:
    """Every quantity that was measured in all runs.

    Arguments:
        runs: of each method, its runs by seed; the first is what the others are held against.
    """
    first = next(iter(runs))
    found = []
    for quantity in QUANTITIES:
        values: dict[str, list[float]] = {}
        for method, some in runs.items():
            values[method] = [value for run in some if (value := run.get(quantity.key)) is not None]
        if any(len(values[method]) < len(some) for method, some in runs.items()):
            continue
        differences = {
            method: paired_difference(own, values[first], relative=quantity.relative)
            for method, own in values.items()
            if method != first
        }
        found.append(Compared(quantity, base.get(quantity.key), values, differences))
    return found


def mean(quantity: Quantity, values: Sequence[float]) -> float:
    """Of the seeds: geometric where differences are shares, so that the means differ by what the difference says."""
    if quantity.relative and all(value > 0 and math.isfinite(value) for value in values):
        return statistics.geometric_mean(values)
    return sum(values) / len(values)


def number(kind: Kind, value: float) -> str:
    """A value as a person reads it."""
    if kind == "percent":
        return f"{100 * value:.1f} %"
    if kind == "seconds":
        return f"{value:.3g} s"
    if kind == "bytes":
        return f"{value / 2**20:.0f} MiB"
    return f"{value:.{4 if kind == 'loss' else 3}f}"


def amount(quantity: Quantity, value: float) -> str:
    """A difference in words: "0.8 % lower"."""
    size, unit = abs(value), ""
    if quantity.relative or quantity.kind == "percent":
        size, unit = 100 * size, " %" if quantity.relative else " points"
    digits = ".0f" if size >= 10 else ".1f" if size >= 1 else ".2g"
    return f"{size:{digits}}{unit} {'lower' if value < 0 else 'higher'}"
