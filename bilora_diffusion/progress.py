"""How far a run is and what it saw: what the summary tells and a checkpoint carries on."""

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from bilora_diffusion.loss_gap import LossGap
from bilora_diffusion.training import Step

__all__ = ["Progress"]

ALIVE_ABOVE = 0.1
"""A perturbation that never reaches this share of its radius hardly perturbs."""

FEWEST_GAPS = 5
"""Measurements of the loss gap below which nothing is said of its sign."""

TOO_STRONG_ABOVE = 3
"""Loss with the perturbation over that without; of what gained anything in `benchmarks.quality`, none came to 2."""

LEANING_BELOW = 1e-3
"""Share of the loss: a gap closer to zero costs the LoRA nothing that its user could see."""

LEANING_AT_THE_END = 0.05
"""The same of the last measurement alone. In `benchmarks.quality` runs of Bi-LoRA that ended spoilt were 8 % or more
below 0 there, of the others one, in a batch of one picture."""


@dataclass
class Progress:
    """Counters and curves, JSON values throughout.

    Arguments:
        seed: of all the run's random numbers.
        step: optimiser steps done, skipped ones included.
        draws: instance rows consumed, over all processes.
        rows_a_step: instance rows of the last step, over all processes; 0 before the first.
        losses: the back-propagated loss of each step; None where it was not finite.
        gap_steps, perturbed_losses, clean_losses: the loss gap's measurements, each on the rows of its step (from 1)
            and with the perturbation that step was taken under.
        skipped: steps whose loss or gradient was not finite; `skipped_in_a_row` up to now.
        highest_c_over_rho: over all steps, None for a method without a ball.
        seconds: of each step of this process, from the end of the one before. Left out are previews, checkpoints and
            loss gaps, with which goes the reading of that step's rows. Starts anew when a run is resumed.
    """

    seed: int = 0
    step: int = 0
    draws: int = 0
    rows_a_step: int = 0
    losses: list[float | None] = field(default_factory=list)
    gap_steps: list[int] = field(default_factory=list)
    perturbed_losses: list[float] = field(default_factory=list)
    clean_losses: list[float] = field(default_factory=list)
    skipped: int = 0
    skipped_in_a_row: int = 0
    highest_c_over_rho: float | None = None
    last_measures: dict[str, float | None] = field(default_factory=dict)
    gap_above_noise: bool = False
    seconds: list[float] = field(default_factory=list)

    def add_step(self, step: Step, rows: int, seconds: float) -> None:
        """Arguments: rows: instance rows of this step, over all processes."""
        self.step += 1
        self.draws += rows
        self.rows_a_step = rows
        self.losses.append(step.loss if math.isfinite(step.loss) else None)
        self.skipped += not step.applied
        self.skipped_in_a_row = 0 if step.applied else self.skipped_in_a_row + 1
        self.last_measures = {name: value if math.isfinite(value) else None for name, value in step.measures.items()}
        share = self.last_measures.get("c_over_rho")
        if share is not None:
            self.highest_c_over_rho = max(share, self.highest_c_over_rho or 0.0)
        self.seconds.append(seconds)

    def add_gap(self, gap: LossGap) -> None:
        """A measurement made before the step that comes next."""
        if not (math.isfinite(gap.perturbed) and math.isfinite(gap.clean)):
            return
        self.gap_steps.append(self.step + 1)
        self.perturbed_losses.append(gap.perturbed)
        self.clean_losses.append(gap.clean)
        self.gap_above_noise |= not gap.is_noise

    @property
    def loss_gap(self) -> float | None:
        """The mean over the run of L(perturbed) - L(clean)."""
        if not self.gap_steps:
            return None
        return statistics.fmean(self.perturbed_losses) - statistics.fmean(self.clean_losses)

    @property
    def last_gap(self) -> float | None:
        return self.perturbed_losses[-1] - self.clean_losses[-1] if self.gap_steps else None

    @property
    def seconds_per_step(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    def is_inert(self) -> str | None:
        """One line if the auxiliary did nothing, None if it was alive or there was none."""
        if self.highest_c_over_rho is None:
            return None
        if self.highest_c_over_rho < ALIVE_ABOVE:
            return (
                f"the auxiliary was inert: c / rho never passed {self.highest_c_over_rho:.3g}, so this is nearly plain "
                "LoRA; train longer or raise --auxiliary_learning_rate, and use --ascent adamw if it is another"
            )
        if self.gap_steps and not self.gap_above_noise:
            return (
                "the auxiliary was inert: the loss it added never left the noise of the arithmetic, so this is nearly "
                "plain LoRA; raise --rho or --rho_relative"
            )
        return None

    def is_too_strong(self) -> str | None:
        """One line if the perturbation raised the loss so far that the steps descended from somewhere else."""
        if not self.gap_steps:
            return None
        ratio = statistics.fmean(self.perturbed_losses) / max(statistics.fmean(self.clean_losses), 1e-12)
        if ratio < TOO_STRONG_ABOVE:
            return None
        return (
            f"the perturbation is too strong: with it the loss was {ratio:.1f} times what it was without; lower --rho "
            "or --rho_relative (or --sigma, where that is what perturbs)"
        )

    def leans_on_auxiliary(self) -> str | None:
        """One line if the loss was lower with the auxiliary than without it, as far as its measurements can tell."""
        gaps = [a - b for a, b in zip(self.perturbed_losses, self.clean_losses, strict=True)]
        if self.highest_c_over_rho is None or not gaps:
            return None
        at_the_end = gaps[-1] / max(self.clean_losses[-1], 1e-12)
        if at_the_end < -LEANING_AT_THE_END:
            return (
                f"the LoRA came to lean on the auxiliary: at the last look the loss was {-at_the_end:.1%} lower with "
                "it than without it, and the LoRA that was saved is the one without it; take an earlier checkpoint, or "
                "train again with a lower --rho or, with --method bilora, with --rho_schedule anneal"
            )
        if len(gaps) < FEWEST_GAPS:
            return None
        mean, error = statistics.fmean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))
        share = mean / statistics.fmean(self.clean_losses)
        if share > -LEANING_BELOW or mean > -3 * error:
            return None
        return (
            f"the auxiliary did not ascend: the loss was {-share:.1%} lower with it than without it, and the LoRA that "
            "was saved is the one without it; lower --auxiliary_learning_rate (a tenth of --learning_rate, say) or "
            "--rho"
        )

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {name: value for name, value in asdict(self).items() if name != "seconds"}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Progress":
        """From a checkpoint. Bad steps in a row are counted anew: whoever resumes has changed something."""
        return cls(**(values | {"skipped_in_a_row": 0}))
