"""The curves of training runs, ready to be drawn: smoothed, thinned, without what is no number. Imports no torch."""

import math
from collections.abc import Sequence

from bilora_diffusion.runs import Run

__all__ = ["CURVE_TITLES", "Curve", "curves", "mean_of"]

CURVE_TITLES = {
    "loss": "Training loss, with the method's own perturbation; smoothed",
    "c_over_rho": "c / rho: how far the auxiliary fills its ball",
    "loss_gap": "Loss gap: L(perturbed) - L(clean)",
}
MOST_POINTS = 400
Curve = list[tuple[float, float]]
"""(step, value), by steps."""


def curves(runs: Sequence[Run]) -> dict[str, dict[str, Curve]]:
    """For each of `CURVE_TITLES` the curve of each run; a run without the measure has none."""
    found: dict[str, dict[str, Curve]] = {name: {} for name in CURVE_TITLES}
    read = [(run, run.curves()) for run in runs]
    window = max(1, max((len(points) for _, points in read), default=0) // 20)  # one for all, so that they compare
    for run, points in read:
        for name, by_run in found.items():
            curve = [(float(one["step"]), float(one[name])) for one in points if _is_number(one[name])]
            if curve:
                by_run[run.name] = _thinned(_smoothed(curve, window) if name == "loss" else curve)
    return found


def mean_of(curves: Sequence[Curve]) -> Curve:
    """The mean at the steps that all curves have."""
    tables = [dict(curve) for curve in curves]
    return [
        (step, sum(table[step] for table in tables) / len(tables))
        for step, _ in curves[0]
        if all(step in table for table in tables)
    ]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _smoothed(curve: Curve, window: int) -> Curve:
    """The mean of the values up to each step, over a window."""
    total, smooth = 0.0, []
    for place, (step, value) in enumerate(curve):
        total += value - (curve[place - window][1] if place >= window else 0.0)
        smooth.append((step, total / min(place + 1, window)))
    return smooth


def _thinned(curve: Curve) -> Curve:
    every = -(-len(curve) // MOST_POINTS)
    return curve[::every]
