"""Cells of the tables: LoRA's own values, and paired differences to it."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.quality.plan import Configuration
from benchmarks.quality.results import at_best, configuration_of, kind_of, last
from bilora_diffusion.paired import half_width

__all__ = ["Row", "cell", "interval", "test_cells", "title"]


@dataclass(frozen=True)
class Row:
    """Attributes:
    title: as the table has it.
    is_lora: the row that the others are compared to.
    runs: each beside LoRA's of the same seed or subject.
    """

    title: str
    is_lora: bool
    runs: Sequence[tuple[dict[str, Any], dict[str, Any]]]

    @property
    def configuration(self) -> Configuration:
        return configuration_of(self.runs[0][0])

    def values(self, measure: Callable[[dict[str, Any]], float]) -> list[tuple[float, float]]:
        """Of the runs and of LoRA's."""
        return [(measure(run), measure(plain)) for run, plain in self.runs]


def title(configuration: Configuration, best: Mapping[str, Configuration]) -> str:
    """Its settings, and whether another one of its method's was chosen."""
    chosen = best[kind_of(configuration)].key == configuration.key
    return configuration.key if chosen else f"{configuration.key} (not the choice)"


def test_cells(row: Row, cost: float | None) -> list[str]:
    """The test loss at the best step, the same in LoRA's time (nothing where the cost is not known), and at the end."""
    steps = max(map(int, row.runs[0][0]["evaluations"]))
    values = [
        lambda run: at_best(run, "test"),
        lambda run: at_best(run, "test", steps if run["method"] == "lora" or cost is None else steps / cost),
        lambda run: last(run)["test"],
    ]
    cells = [cell(row.values(value), 4, row.is_lora) for value in values]
    if cost is None:
        cells[1] = ""
    return cells


def cell(values: Sequence[tuple[float, float]], digits: int, is_lora: bool) -> str:
    """LoRA's mean and standard error, or the mean paired difference to it; losses' differences in 1e-4."""
    if is_lora:
        own = [a for a, _ in values]
        error = f" (s.e. {statistics.stdev(own) / math.sqrt(len(own)):.{digits}f})" if len(own) > 1 else ""
        return f"{statistics.fmean(own):.{digits}f}{error}"
    if digits == 4:
        return interval([1e4 * (a - b) for a, b in values], 0)
    return interval([a - b for a, b in values], digits)


def interval(values: Sequence[float], digits: int) -> str:
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:+.{digits}f}"
    return f"{mean:+.{digits}f} +- {half_width(values):.{digits}f}"
