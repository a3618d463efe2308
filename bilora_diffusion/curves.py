"""The curves of training runs, ready to be drawn: smoothed, thinned, without what is no number. Imports no torch."""

import math
from collections.abc import Sequence

from bilora_diffusion.runs import Run

__all__ = ["CURVE_TITLES", "Curve", "curves"]

CURVE_TITLES = {
    "loss": "Loss, smoothed over a twentieth of the steps",
    "c_over_rho": "c / rho: how far the auxiliary fills its ball",
    "loss_gap": "Loss gap: L(perturbed) - L(clean)",
}
MOST_POINTS = 400
Curve = list[tuple[float, float]]
"""(step, value), by steps."""


def curves(runs: Sequence[Run]) -> dict[str, dict[str, Curve]]:
    """For each of `CURVE_TITLES` the curve of each run; a run without the measure has none."""
    found: dict[str, dict[str, Curve]] = {name: {} for name in CURVE_TITLES}
    for run in runs:
        points = run.curves()
        for name, by_run in found.items():
            curve = [(float(one["step"]), float(one[name])) for one in points if _is_number(one[name])]
            if curve:
                by_run[run.name] = _thinned(_smoothed(curve) if name == "loss" else curve)
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _smoothed(curve: Curve) -> Curve:
    """The mean of the values up to each step, over a window."""
    window, total, smooth = max(1, len(curve) // 20), 0.0, []
    for place, (step, value) in enumerate(curve):
        total += value - (curve[place - window][1] if place >= window else 0.0)
        smooth.append((step, total / min(place + 1, window)))
    return smooth


def _thinned(curve: Curve) -> Curve:
    every = -(-len(curve) // MOST_POINTS)
    return curve[::every]
