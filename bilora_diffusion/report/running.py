"""Runs of the trainer, one after another, each in a process of its own; a finished one is not repeated."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from tqdm.auto import tqdm

from bilora_diffusion.atomic import write_text_atomically
from bilora_diffusion.config import to_yaml
from bilora_diffusion.errors import UserError
from bilora_diffusion.report.plan import Training
from bilora_diffusion.runs import LOG_FILE, RESUMED, START_FILE, Run, launch

__all__ = ["Process", "run_all"]

LOOK_EVERY_SECONDS = 0.3
INTERRUPTED = 130


class Process(Protocol):
    """What is used of `subprocess.Popen`."""

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


Start = Callable[[Path, Sequence[str]], Process]


def run_all(trainings: Sequence[Training], start: Start = launch) -> int:
    """Trains what is not trained yet, and goes on with what was stopped. Returns how many runs were needed.

    Ctrl-C ends the run at hand after its step, with everything saved; a second one at once.

    Raises:
        UserError: a run failed, is still at work in another process, or its folder holds another run.
        KeyboardInterrupt: after Ctrl-C.
    """
    due = [training for training in trainings if not _is_done(training)]
    for number, training in enumerate(due, 1):
        _train(training, f"{training.name}, run {number} of {len(due)}", start)
    return len(due)


def _is_done(training: Training) -> bool:
    """Whether the run is finished; `UserError` if its folder is not this run's."""
    run, asked = Run(training.name, training.folder), to_yaml(training.config)
    if not training.folder.exists():
        return False
    start_file = training.folder / START_FILE
    try:
        known = start_file.read_text(encoding="utf-8")
    except FileNotFoundError:
        known = None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise UserError(f"{start_file} cannot be read: {reason}") from error
    if known != asked:
        raise UserError(
            f"{training.folder} holds {'a run with other settings' if known else 'something else'}: name another "
            "--output_dir, or delete that folder"
        )
    process = run.process()
    if process is not None:
        raise UserError(f"{training.folder} is still being trained, by process {process.pid}: wait for it, or end it")
    return run.state()["state"] == "finished"


def _train(training: Training, label: str, start: Start) -> None:
    run = Run(training.name, training.folder)
    resumed = training.folder.exists()
    try:
        training.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {training.folder.parent} cannot be written: {error.strerror}") from error
    write_text_atomically(training.folder / START_FILE, to_yaml(training.config))
    process = start(training.folder, [*training.words, *(RESUMED if resumed else ())])
    try:
        code = _follow(process, run, label)
    except KeyboardInterrupt:
        _end(process)
        raise
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        lines = [line.strip() for line in run.log().splitlines() if line.strip()]
        reason = (lines[-1] if lines else f"it ended with code {code}").removeprefix("error: ")
        raise UserError(f"the run {run.name} failed: {reason} (its log: {training.folder / LOG_FILE})")


def _follow(process: Process, run: Run, label: str) -> int:
    """Shows the run's steps until it has ended; returns its exit code."""
    with tqdm(desc=label, unit="step", mininterval=1) as bar:
        while (code := process.poll()) is None:
            _show(bar, run)
            time.sleep(LOOK_EVERY_SECONDS)
        _show(bar, run)
    return code


def _show(bar: tqdm, run: Run) -> None:
    state = run.state()
    if state["steps"]:
        bar.total = state["steps"]
        bar.set_postfix_str(state["state"], refresh=False)
        bar.update((state["step"] or 0) - bar.n)


def _end(process: Process) -> None:
    process.terminate()
    try:
        process.wait()
    except KeyboardInterrupt:
        process.kill()
        process.wait()
