"""The curves of runs as tables for the plots."""

from collections.abc import Sequence

import pandas as pd

from bilora_diffusion.runs import Run

__all__ = ["CURVE_TITLES", "curves"]

CURVE_TITLES = {
    "loss": "Loss (mean of the last twentieth of the steps)",
    "c_over_rho": "c / rho: how much of its ball the auxiliary fills",
    "loss_gap": "Loss gap: L(perturbed) - L(clean)",
}
MOST_POINTS = 400


def curves(runs: Sequence[Run]) -> dict[str, pd.DataFrame]:
    """For each of `CURVE_TITLES` the columns step, value and run; a run without the measure has no rows."""
    found: dict[str, list[pd.DataFrame]] = {name: [] for name in CURVE_TITLES}
    for run in runs:
        points = pd.DataFrame(run.curves())
        for name, tables in found.items():
            if name in points:
                tables.append(_curve(points, name, run.name))
    columns = {"step": "float64", "value": "float64", "run": "object"}  # a plot takes a column of no type for numbers
    empty = pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in columns.items()})
    return {name: pd.concat(tables) if tables else empty for name, tables in found.items()}


def _curve(points: pd.DataFrame, name: str, run: str) -> pd.DataFrame:
    values = pd.to_numeric(points[name], errors="coerce")
    curve = pd.DataFrame({"step": points["step"], "value": values}).dropna()
    if name == "loss":
        curve["value"] = curve["value"].rolling(max(1, len(curve) // 20), min_periods=1).mean()
    every = -(-len(curve) // MOST_POINTS) or 1
    return curve.iloc[::every].assign(run=run)
