"""The curves of a report: SVG for the page, in whatever colour its text has, and PNG beside it."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bilora_diffusion.atomic import atomic_write
from bilora_diffusion.curves import Curve, mean_of

__all__ = ["COLOURS", "Line", "Plot", "save_png", "svg"]

COLOURS = ("#6366f1", "#e8590c", "#2b8a3e", "#c2255c", "#0c8599", "#a07800")
"""Of the first, second, ... method; readable on white and on black."""
INK = "#123456"
"""Stands in the SVG where the page's text colour comes."""
SIZE_INCHES = (4.6, 2.9)
MOST_INSIDE = 3
"""More lines than that have their names below the plot, where they hide none."""
LINE_INCHES = 0.18


@dataclass(frozen=True)
class Line:
    """One method in a plot: a thin line a seed and a thick one for their mean.

    Arguments:
        colour: the method's number.
        dashed: the second quantity of the same method.
    """

    label: str
    colour: int
    curves: Sequence[Curve]
    dashed: bool = False


@dataclass(frozen=True)
class Plot:
    """Arguments:
    name: of its file.
    """

    name: str
    title: str
    x: str
    y: str
    lines: Sequence[Line]


def svg(plot: Plot) -> str:
    """An `<svg>` element to stand inside a page. Nothing of the user's is in it."""
    buffer = io.StringIO()
    _draw(plot, INK, buffer, "svg")
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    return text.replace(INK, "currentColor")


def save_png(plot: Plot, folder: Path) -> Path:
    path = folder / f"{plot.name}.png"
    with atomic_write(path) as temporary:
        _draw(plot, "black", temporary, "png")
    return path


def _draw(plot: Plot, ink: str, target: io.StringIO | Path, kind: str) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    names = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    settings = {**dict.fromkeys(names, ink), "svg.hashsalt": plot.name, "font.size": 9}
    with matplotlib.rc_context(settings):
        rows_below = (len(plot.lines) + 1) // 2 if len(plot.lines) > MOST_INSIDE else 0
        figure = Figure(figsize=(SIZE_INCHES[0], SIZE_INCHES[1] + LINE_INCHES * rows_below), layout="constrained")
        axis = figure.subplots()
        for line in plot.lines:
            look = {"color": COLOURS[line.colour % len(COLOURS)], "linestyle": "--" if line.dashed else "-"}
            width = max(1.2, 3 - line.colour)  # one that lies on another leaves its edges in sight
            several = len(line.curves) > 1
            for curve in line.curves if several else ():
                axis.plot(*zip(*curve, strict=True), linewidth=0.7, alpha=0.45, **look)
            mean = mean_of(line.curves)
            marker = "." if len(mean) <= 20 else None
            axis.plot(*zip(*mean, strict=True), linewidth=width, label=line.label, marker=marker, **look)
        axis.set(xlabel=plot.x, ylabel=plot.y)
        axis.spines[["top", "right"]].set_visible(False)
        if rows_below:
            figure.legend(frameon=False, loc="outside lower center", ncols=2)
        else:
            axis.legend(frameon=False)
        transparent = kind == "svg"
        figure.savefig(
            target, format=kind, dpi=150, transparent=transparent, metadata={"Date": None} if transparent else None
        )
