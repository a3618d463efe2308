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
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)
# fmt: on
"""Student's t of a two-sided 95 % interval, for 2, 3, ... 31 values."""
MOST_PAIRS = 20
"""Runs of a method: more are seldom worth their time."""


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences.

    Attributes:
        apart: one a seed; of a relative difference the logarithm of the ratio, so that no interval passes -100 %.
        half: half the width of the 95 % interval around their mean; None for one seed, which has none.
        relative: whether `mean` and `interval` are shares of the other's value.
    """

    apart: tuple[float, ...]
    half: float | None
    relative: bool

    @property
    def mean(self) -> float:
        return self._shown(statistics.fmean(self.apart))

    @property
    def interval(self) -> tuple[float, float] | None:
        if self.half is None:
            return None
        mean = statistics.fmean(self.apart)
        return self._shown(mean - self.half), self._shown(mean + self.half)

    @property
    def is_shown(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.half is not None and abs(statistics.fmean(self.apart)) > self.half

    @property
    def is_one_sided(self) -> bool:
        """Whether every seed went the same way."""
        return all(one > 0 for one in self.apart) or all(one < 0 for one in self.apart)

    @property
    def is_zero(self) -> bool:
        """Whether both are the same in every seed."""
        return not any(self.apart)

    def _shown(self, apart: float) -> float:
        return math.expm1(apart) if self.relative else apart


def half_width(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of the mean of 2 or more values; of more than 31 a little too wide."""
    return T_95[min(len(values) - 2, len(T_95) - 1)] * statistics.stdev(values) / math.sqrt(len(values))


def paired_difference(ours: Sequence[float], theirs: Sequence[float], *, relative: bool = False) -> Difference | None:
    """Ours minus theirs, seed by seed.

    Arguments:
        relative: as a share of theirs.

    Returns:
        None where a value is not finite, or is not above 0 and a share would mean nothing.
    """
    both = (*ours, *theirs)
    if not all(map(math.isfinite, both)) or (relative and min(both) <= 0):
        return None
    apart = tuple(math.log(a / b) if relative else a - b for a, b in zip(ours, theirs, strict=True))
    return Difference(apart, half_width(apart) if len(apart) > 1 else None, relative)
