"""Trains what has no file yet, and writes each run when it is done: a stopped command goes on where it was."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.laboratory import Laboratory
from benchmarks.quality.plan import Configuration
from benchmarks.recording import rounded
from bilora_diffusion.atomic import write_text_atomically
from bilora_diffusion.errors import UserError

__all__ = ["Run", "train_missing"]


@dataclass(frozen=True)
class Run:
    """One training and where its file belongs."""

    folder: Path
    configuration: Configuration
    seed: int

    @property
    def path(self) -> Path:
        return self.folder / f"{self.configuration.slug}-seed{self.seed}.json"

    def write(self, found: dict[str, Any]) -> None:
        """What came of it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(self.path, json.dumps(rounded(found)) + "\n")


def train_missing(
    make_laboratory: Callable[[], Laboratory],
    runs: Sequence[Run],
    *,
    stack: int,
    all_losses: bool,
    finished: bool = False,
) -> None:
    """Arguments:
        make_laboratory: called if a file is missing.
        stack: so many runs at once. What one of them raises is raised when the others are written.
        all_losses, finished: as of `Laboratory.train`.

    Raises:
        UserError: a stack below 1.
    """
    if stack < 1:
        raise UserError(f"--stack is {stack}: give 1 or more")
    missing = [run for run in runs if not run.path.exists()]
    if not missing:
        return
    laboratory = make_laboratory()
    for first in range(0, len(missing), stack):
        group = missing[first : first + stack]

        def done(number: int, found: dict[str, Any], group: Sequence[Run] = group) -> None:
            run = group[number]
            run.write(found | {"task": laboratory.task.name})
            losses = ", ".join(f"{k} {v:.4f}" for k, v in found["evaluations"][max(found["evaluations"])].items())
            print(f"{laboratory.task.name}, seed {run.seed}: {run.configuration}: {losses}", flush=True)

        trainings = [(run.configuration, run.seed) for run in group]
        laboratory.train_all(trainings, all_losses=all_losses, finished=finished, done=done)
