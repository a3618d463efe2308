"""What was chosen on the 3D icons, trained on other tasks: does what was seen there hold elsewhere?"""

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.quality.files import Run, train_missing
from benchmarks.quality.laboratory import Laboratory
from benchmarks.quality.plan import Configuration
from benchmarks.quality.tasks import STYLES, Task, batch_of_one, more_steps, style, subjects
from benchmarks.quality.words import check_names

__all__ = ["transfer"]

SEED_OF_SUBJECTS = 1
"""Subjects are repeats of each other, as seeds are of a style."""


def transfer(
    folder: Path,
    configurations: Sequence[Configuration],
    *,
    seeds: Sequence[int],
    tasks: Sequence[str] = (),
    subjects_dir: Path | None = None,
    classes: Sequence[str] = (),
    part: tuple[int, int] = (1, 1),
    stack: int = 1,
    device: str = "cpu",
) -> None:
    """Trains what has no file yet in a folder of the task's name.

    Arguments:
        tasks: names; empty: all.
        subjects_dir: of DreamBooth's subjects; None: without them.
        classes: their class words; see `concepts.dreambooth_concepts`.
        part: (i, n): every n-th run, from the i-th.
        stack: so many runs of a task at once.
        device: that trains.

    Raises:
        UserError: a task is not known, or its pictures cannot be had.
    """
    makers: dict[str, Callable[[], Task]] = {"3d-batch-1": batch_of_one, "3d-800-steps": more_steps}
    makers |= {name: lambda name=name: style(name) for name in STYLES}
    runs = [(name, seed, one) for name in makers for seed in seeds for one in configurations]
    if subjects_dir is not None:
        photographed = {task.name: task for task in subjects(subjects_dir, classes)}
        makers |= {name: lambda task=task: task for name, task in photographed.items()}
        runs += [(name, SEED_OF_SUBJECTS, one) for name in photographed for one in configurations]
    check_names("--tasks", tasks, list(makers), "there is no")
    number, of = part
    wanted = [run for run in runs if not tasks or run[0] in tasks]
    mine = wanted[number - 1 :: of]
    for name in dict.fromkeys(name for name, _, _ in mine):
        train_missing(
            lambda name=name: Laboratory(makers[name](), device),
            [Run(folder / name, one, seed) for task, seed, one in mine if task == name],
            stack=stack,
            all_losses=True,
            finished=True,
        )
