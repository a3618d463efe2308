"""The methods' scores as one Markdown table: means, standard errors, and paired differences to the first method.

Runs that share a subject (DreamBooth's) or a seed (the paper's one concept) are no independent proof, and neither are
the pictures of one run: they are averaged first, and errors and intervals are over these averages.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bilora_diffusion.paired import Difference, paired_difference
from bilora_diffusion.report.plan import title

__all__ = ["Cell", "Score", "cells", "table"]


@dataclass(frozen=True)
class Score:
    """Attributes:
    key: in the results.
    title: of its column.
    meaning: a clause.
    factor: that the table multiplies it by.
    digits: behind the point, in the table.
    """

    key: str
    title: str
    meaning: str
    factor: float
    digits: int


@dataclass(frozen=True)
class Cell:
    """One score of one method.

    Attributes:
        clusters: the mean of each subject or seed, in their order.
        difference: to the first method; None for that one itself.
    """

    clusters: tuple[float, ...]
    difference: Difference | None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.clusters)

    @property
    def error(self) -> float | None:
        """The standard error of the mean; None of one cluster."""
        count = len(self.clusters)
        return statistics.stdev(self.clusters) / math.sqrt(count) if count > 1 else None

    def to_json(self) -> dict[str, Any]:
        one = self.difference
        return {
            "mean": self.mean,
            "standard_error": self.error,
            "clusters": list(self.clusters),
            "difference": one and {"mean": one.mean, "interval_95": one.interval and list(one.interval)},
        }


def cells(values: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Cell]:
    """One score of all methods.

    Arguments:
        values: by method and cluster, the means of the runs in it; all methods have the same clusters.
    """
    means = {method: [statistics.fmean(some) for some in clusters.values()] for method, clusters in values.items()}
    first = next(iter(means))
    return {
        method: Cell(tuple(own), None if method == first else paired_difference(own, means[first]))
        for method, own in means.items()
    }


def table(scores: Sequence[Score], found: Mapping[str, Mapping[str, Cell]], real: Mapping[str, float]) -> list[str]:
    """Lines of Markdown.

    Arguments:
        found: by the score's key and method.
        real: what the real pictures have among themselves, by the score's key; their row is left out if empty.
    """
    methods = list(next(iter(found.values())))
    against = title(methods[0])
    heads = [text for one in scores for text in (one.title, f"{one.title}: difference to {against}")]
    lines = ["| method | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    if real:
        shown = [text for one in scores for text in (_number(one, real.get(one.key)), "")]
        lines.append("| real pictures | " + " | ".join(shown) + " |")
    for method in methods:
        shown = [text for one in scores for text in _shown(one, found[one.key][method])]
        lines.append(f"| {title(method)} | " + " | ".join(shown) + " |")
    return lines


def _shown(score: Score, cell: Cell) -> tuple[str, str]:
    error = "" if cell.error is None else f" (s.e. {_number(score, cell.error)})"
    own = _number(score, cell.mean) + error
    if cell.difference is None:
        return own, ""
    text = _number(score, cell.difference.mean, "+")
    if cell.difference.interval is not None:
        text += " ({} to {})".format(*(_number(score, end, "+") for end in cell.difference.interval))
    return own, text


def _number(score: Score, value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{score.factor * value:{sign}.{score.digits}f}"
