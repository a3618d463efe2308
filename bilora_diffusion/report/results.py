"""What a report measured, and how it stands in `report.json`."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from bilora_diffusion.config import as_dict
from bilora_diffusion.curves import Curve
from bilora_diffusion.data.pictures import Picture
from bilora_diffusion.finishing import package_versions
from bilora_diffusion.report.drawing import Copy, Row
from bilora_diffusion.report.measuring import SIZES
from bilora_diffusion.report.plan import Training
from bilora_diffusion.report.quantities import SHARPNESS_SIZE, Compared, Values, compared
from bilora_diffusion.report.verdict import Sentence, overfitting, verdict

__all__ = ["Results", "RunResult", "to_json"]

NOTES = ("inert", "too_strong", "leaning")
"""Of a run's summary: what its perturbation did wrong, None where nothing."""


@dataclass(frozen=True)
class RunResult:
    """Of one run, or of the base.

    Attributes:
        training: None for the base.
        summary: of the run's `summary.json`.
        losses: of the sets `training`, `held_out` and `other`.
        sharpness: see `measures.worst_case`.
        course: (step, losses) at each checkpoint before the last step.
        similarities: `prompt`, `likeness`, `nearest`; empty without a CLIP.
        copy: the drawn picture most like a training picture.
    """

    training: Training | None
    summary: Mapping[str, Any]
    losses: Mapping[str, float]
    sharpness: Mapping[str, Any] | None
    course: Sequence[tuple[int, Mapping[str, float]]]
    similarities: Mapping[str, float | None]
    copy: Copy | None

    def course_of(self, name: str) -> Curve:
        """(step, loss) of a set at the checkpoints and after the last step."""
        points = [*((step, losses[name]) for step, losses in self.course), (self.summary["steps"], self.losses[name])]
        return sorted((float(step), loss) for step, loss in points)

    def values(self, base: "RunResult") -> Values:
        """The quantities that are compared."""
        losses = self.losses
        values: dict[str, float | None] = {
            "training": losses["training"],
            "held_out": losses.get("held_out"),
            "gap": losses["held_out"] / losses["training"] - 1 if "held_out" in losses else None,
            "seconds": self.summary.get("seconds_per_step"),
            "memory": self.summary.get("peak_memory_bytes"),
            **self.similarities,
        }
        if self.training is not None:
            values["drift"] = losses["other"] / base.losses["other"] - 1
        if self.sharpness is not None:
            values["sharpness"] = self.sharpness["losses"][SIZES.index(SHARPNESS_SIZE)] / losses["training"] - 1
        return values


@dataclass(frozen=True)
class Results:
    """Attributes:
    runs: seed by seed, in each the methods in their order.
    rows, other: what was drawn, with the concept and without.
    drawn: by column (`base` and the runs' names), the pictures of `rows` and then of `other`.
    """

    command: str
    base_name: str
    resolution: int
    draws: int
    trained: Sequence[Picture]
    held_out: Sequence[Picture]
    rows: Sequence[Row]
    other: Sequence[Row]
    judge: str | None
    base: RunResult
    runs: Sequence[RunResult]
    drawn: Mapping[str, Sequence[Image.Image]]

    @property
    def methods(self) -> list[str]:
        return list(self.by_method)

    @property
    def by_method(self) -> dict[str, list[RunResult]]:
        """The runs of each method by seed, the one that the others are held against first."""
        found: dict[str, list[RunResult]] = {}
        for run in self.runs:
            found.setdefault(run.training.method, []).append(run)
        return found

    @property
    def seeds(self) -> list[int]:
        return [run.training.seed for run in self.by_method[self.methods[0]]]

    def compared(self) -> list[Compared]:
        runs = {method: [run.values(self.base) for run in some] for method, some in self.by_method.items()}
        return compared(self.base.values(self.base), runs)

    def verdict(self) -> list[Sentence]:
        notes = []
        for method, some in self.by_method.items():
            for name in NOTES:
                said = [run.summary[name] for run in some if run.summary.get(name)]
                if said:
                    notes.append((method, f"in {len(said)} of {len(some)} runs {said[0]}"))
        said = verdict(self.compared(), self.methods, held_out=len(self.held_out), notes=notes)
        if self.held_out:
            courses = {name: [run.course_of("held_out") for run in some] for name, some in self.by_method.items()}
            said += filter(None, (overfitting(name, some) for name, some in courses.items()))
        return said


def to_json(results: Results) -> dict[str, Any]:
    """JSON values: everything that the page tells, and the runs' own numbers."""
    return {
        "command": results.command,
        "versions": package_versions(),
        "base": results.base_name,
        "resolution": results.resolution,
        "methods": results.methods,
        "seeds": results.seeds,
        "pictures": {
            "training": [picture.name for picture in results.trained],
            "held_out": [picture.name for picture in results.held_out],
        },
        "draws": results.draws,
        "rows": [row.settings.to_json() for row in (*results.rows, *results.other)],
        "judge": results.judge,
        "verdict": [one.to_json() for one in results.verdict()],
        "compared": [one.to_json() for one in results.compared()],
        "base_measured": _run_json(results.base),
        "runs": {run.training.name: _run_json(run) for run in results.runs},
    }


NOT_REPEATED = ("losses", "verification", "versions")
"""Of a run's summary: long, and in its own folder."""


def _run_json(run: RunResult) -> dict[str, Any]:
    found: dict[str, Any] = {
        "losses": dict(run.losses),
        "similarities": dict(run.similarities),
        "most_alike": dataclasses.asdict(run.copy) if run.copy else None,
    }
    if run.training is not None:
        found |= {
            "method": run.training.method,
            "seed": run.training.seed,
            "command": run.training.command,
            "config": as_dict(run.training.config),
            "summary": {name: value for name, value in run.summary.items() if name not in NOT_REPEATED},
            "sharpness": run.sharpness,
            "checkpoints": [{"step": step, **losses} for step, losses in run.course],
        }
    return found
