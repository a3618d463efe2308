"""The curves of runs, as plots in SVG: small, sharp on every screen, and light or dark with the page."""

import math
from collections.abc import Mapping, Sequence
from html import escape

from bilora_diffusion.curves import CURVE_TITLES, Curve, curves

__all__ = ["CURVE_TITLES", "Curve", "curves", "plot"]

COLOURS = ("#6366f1", "#e8590c", "#2b8a3e", "#c2255c")
"""Of the first, second, ... run; readable on white and on black."""
WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 34


def plot(title: str, by_run: Mapping[str, Curve], runs: Sequence[str]) -> str:
    """An SVG with a line for each run and a legend.

    Arguments:
        runs: all that are shown, so that each keeps its colour from plot to plot.
    """
    if not by_run:
        return f'<figure class="plot"><figcaption>{escape(title)}</figcaption><p class="quiet">no data</p></figure>'
    points = [point for curve in by_run.values() for point in curve]
    x_low, x_high = _range([x for x, _ in points])
    y_low, y_high = _range([y for _, y in points])

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    marks = []
    for tick in _ticks(y_low, y_high):
        _, y = place(x_low, tick)
        marks.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in _ticks(x_low, x_high):
        x, _ = place(tick, y_low)
        marks.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    marks.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">step</text>')
    for run, curve in by_run.items():
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in curve))
        colour = COLOURS[list(runs).index(run) % len(COLOURS)]
        marks.append(f'<polyline points="{line}" stroke="{colour}"><title>{escape(run)}</title></polyline>')
        if len(curve) == 1:
            x, y = place(*curve[0])
            marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
    legend = "".join(
        f'<span><i style="background:{COLOURS[number % len(COLOURS)]}"></i>{escape(run)}</span>'
        for number, run in enumerate(runs)
        if run in by_run
    )
    return (
        f'<figure class="plot"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(marks)}</svg>'
        f'<div class="legend">{legend}</div></figure>'
    )


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis; never of length 0."""
    low, high = min(values), max(values)
    if high - low < 1e-12 * max(1.0, abs(high)):
        return low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    return low, high


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers between two."""
    step = 10 ** math.floor(math.log10((high - low) / 3))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step) + 1)]
