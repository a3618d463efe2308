"""Differences between two methods that were run with the same seeds, and how far they can be trusted.

For one seed both see the same pictures, noise and timesteps, so that what the seed does to both cancels in their
difference; Student's t then says how far the mean of a few such differences may be off.

Reference: Student, The Probable Error of a Mean, Biometrika 6(1), 1908.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["MOST_PAIRS", "Difference", "half_width", "paired_difference"]

# fmt: off
T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093,
)
# fmt: on
"""Student's t of a two-sided 95 % interval, for 2, 3, ... values."""
MOST_PAIRS = len(T_95) + 1


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences.

    Attributes:
        values: one a seed.
        half: half the width of the 95 % interval around the mean; None for one seed, which has none.
    """

    values: tuple[float, ...]
    half: float | None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def interval(self) -> tuple[float, float] | None:
        return None if self.half is None else (self.mean - self.half, self.mean + self.half)

    @property
    def is_shown(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.half is not None and abs(self.mean) > self.half


def half_width(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of the mean of 2 to `MOST_PAIRS` values."""
    return T_95[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))


def paired_difference(ours: Sequence[float], theirs: Sequence[float], *, relative: bool = False) -> Difference | None:
    """Ours minus theirs, seed by seed.

    Arguments:
        relative: as a share of theirs.

    Returns:
        None where a value is not finite, or theirs are not above 0 and the shares would mean nothing.
    """
    if not all(map(math.isfinite, (*ours, *theirs))) or (relative and min(theirs) <= 0):
        return None
    values = tuple((a - b) / (b if relative else 1.0) for a, b in zip(ours, theirs, strict=True))
    return Difference(values, half_width(values) if len(values) > 1 else None)
