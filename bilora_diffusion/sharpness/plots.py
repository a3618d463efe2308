"""The curves of a sharpness report as pictures."""

from pathlib import Path
from typing import Any

from bilora_diffusion.atomic import atomic_write
from bilora_diffusion.errors import UserError

__all__ = ["SPACES", "draw", "need_matplotlib"]

SPACES = {"lora": "factors", "full": "merged weights"}
"""As people read them, by their names in the report."""
ENDINGS = ("png", "svg")


def need_matplotlib(what: str = "the plots need", way_out: str = "") -> None:
    """Raises: UserError: it is not installed; told before an hour of measuring."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(f"{what} matplotlib: pip install 'bilora-diffusion[plots]'{way_out}") from None


def draw(report: dict[str, Any], folder: Path) -> list[Path]:
    """Writes `sharpness.png` and `.svg`, with `--run` also `course.png` and `.svg`; returns their paths."""
    from matplotlib.figure import Figure

    spaces = [space for space in SPACES if space in report]
    figure = Figure(figsize=(5 * len(spaces), 6.5), layout="constrained")
    axes = figure.subplots(2, len(spaces), squeeze=False)
    for column, space in enumerate(spaces):
        random, worst = report[space]["random"], report[space]["worst_case"]
        above, below = axes[0, column], axes[1, column]
        name = SPACES[space].capitalize()
        for number, losses in enumerate(random["losses"]):
            above.plot(random["sizes"], losses, color="0.7", linewidth=1, label=None if number else "one direction")
        above.plot(random["sizes"], random["mean"], color="tab:blue", label=f"mean of {len(random['losses'])}")
        above.set(title=f"{name}: random directions", xlabel="size (1 = the norm of each row)", ylabel="loss")
        above.legend(frameon=False)
        below.plot([0.0, *worst["sizes"]], [report["loss"], *worst["losses"]], color="tab:red", marker=".")
        below.set(title=f"{name}: along the gradient", xlabel="length / norm of the weights", ylabel="loss")
        below.text(0.03, 0.97, _numbers(report[space]), transform=below.transAxes, va="top", fontsize="small")
    written = _save(figure, folder, "sharpness")
    if "course" in report:
        course = report["course"]
        figure = Figure(figsize=(5, 3.5), layout="constrained")
        axis = figure.subplots()
        for name in ("primary", "auxiliary"):
            if name in course:
                axis.plot(course["steps"], course[name], marker=".", label=name)
        axis.set(xlabel="step", ylabel="cosine to the last checkpoint")
        axis.legend()
        written += _save(figure, folder, "course")
    return written


def _numbers(found: dict[str, Any]) -> str:
    lines = []
    if "hessian" in found:
        lines.append(f"top Hessian eigenvalue: {found['hessian']['eigenvalue']:.3g}")
    if "gradient" in found:
        lines.append(
            f"share of the gradient that has rank {found['gradient']['rank']}: {found['gradient']['share']:.0%}"
        )
    return "\n".join(lines)


def _save(figure, folder: Path, name: str) -> list[Path]:
    paths = [folder / f"{name}.{ending}" for ending in ENDINGS]
    for path in paths:
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:], dpi=150)
    return paths
