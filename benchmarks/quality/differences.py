"""Cells of the tables: LoRA's own values, and paired differences to it."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.quality.plan import Configuration
from benchmarks.quality.results import CHOOSING_SEED, at_best, configuration_of, device_of, kind, kind_of, last
from bilora_diffusion.paired import half_width

__all__ = ["Row", "cell", "interval", "left_out", "paired_rows", "share", "test_cells"]


@dataclass(frozen=True)
class Row:
    """Attributes:
    title: as the table has it.
    is_lora: the row that the others are compared to.
    runs: each beside LoRA's of the same seed or subject, from the same kind of device.
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


def paired_rows(
    found: Mapping[tuple[str, Any], dict[str, Any]], best: Mapping[str, Configuration], *, telling: bool = True
) -> list[Row]:
    """Of each configuration that has pairs, LoRA's first; none without LoRA's runs.

    Arguments:
        found: runs by their key and their seed or subject.
        best: what was chosen. If LoRA's has no run here, the others are compared to another one of LoRA's.
        telling: in a row's title, that another one of its method's was chosen.
    """
    loras = sorted({run["key"] for run in found.values() if kind(run) == "lora"})
    if not loras:
        return []
    baseline = best["lora"].key if "lora" in best and best["lora"].key in loras else loras[0]
    clusters = sorted(cluster for key, cluster in found if key == baseline)
    rows = []
    for key in sorted({key for key, _ in found}, key=lambda name: (name != baseline, name)):
        pairs = [(found[key, one], found[baseline, one]) for one in clusters if (key, one) in found]
        pairs = [(run, plain) for run, plain in pairs if device_of(run) == device_of(plain)]
        if pairs:
            fewer = f" ({len(pairs)} of {len(clusters)} runs)" if len(pairs) < len(clusters) else ""
            title = _title(configuration_of(pairs[0][0]), best) if telling else key
            rows.append(Row(title + fewer, key == baseline, pairs))
    return rows


def left_out(some: Iterable[dict[str, Any]], rows: Sequence[Row]) -> list[str]:
    """Says which runs' configurations have no row."""
    missing = sorted({run["key"] for run in some} - {row.configuration.key for row in rows})
    if not missing:
        return []
    return [f"Not compared, for LoRA has no run of the same seed or subject and device: {'; '.join(missing)}.", ""]


def _title(configuration: Configuration, best: Mapping[str, Configuration]) -> str:
    """Its settings, and whether another one of its method's was chosen."""
    chosen = best.get(kind_of(configuration))
    if chosen is None:
        return f"{configuration.key} (no choice: seed {CHOOSING_SEED} was not run)"
    return configuration.key if chosen.key == configuration.key else f"{configuration.key} (not the choice)"


def test_cells(row: Row, cost: float | None) -> list[str]:
    """The test loss at the best step, the same in LoRA's time (nothing where the cost is not known), and at the end."""
    steps = max(map(int, row.runs[0][0]["evaluations"]))
    values = [
        lambda run: at_best(run, "test"),
        lambda run: at_best(run, "test", steps if kind(run) == "lora" or cost is None else steps / cost),
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


def share(values: Sequence[tuple[float, float]]) -> str:
    """The mean paired difference as a share of the mean of the other ones."""
    mean = statistics.fmean(plain for _, plain in values)
    return f"{interval([100 * (own - plain) / mean for own, plain in values], 1)} %"
