"""Training runs under a folder as others see them: read while they go on, started, stopped. Imports no torch.

A run is a folder that the trainer wrote into; what is read here is what `run_folder` writes. The trainer is started as
a process of its own that nothing of this one's can take along.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from bilora_diffusion.command_line import parse
from bilora_diffusion.config import to_yaml
from bilora_diffusion.errors import UserError
from bilora_diffusion.flags import show

__all__ = [
    "LOG_FILE",
    "RESUMED",
    "START_FILE",
    "Run",
    "find_run",
    "launch",
    "list_runs",
    "resume_run",
    "start_run",
    "stop_run",
]

# The names are run_folder's and checkpoint's, which import torch.
CONFIG_FILE, METRICS_FILE, STATE_FILE = "config.yaml", "metrics.jsonl", "state.json"
LORA_FILE = "pytorch_lora_weights.safetensors"
LOG_FILE = "train.log"
"""What a run started from here prints, in its folder."""
START_FILE = "start.yaml"
"""The configuration that a run started from here was given."""
PID_FILE = "start.pid"
SCRIPT = "train_dreambooth_bilora.py"
TRAINERS = ("bilora_diffusion.cli", "train_dreambooth_bilora", "train-dreambooth-bilora")
MOST_RUNS = 200
MOST_DEPTH = 3
MOST_SECONDS_OF_ENDING = 20.0
MOST_LOG_BYTES = 64 * 2**10
MOST_METRICS_BYTES = 64 * 2**20
RESUMED = ("--resume_from_checkpoint", "latest")
CURVES = ("loss", "c_over_rho", "loss_gap", "lr")


@dataclass(frozen=True)
class Run:
    """A run's folder.

    Attributes:
        name: its path below the folder of runs, with forward slashes.
    """

    name: str
    path: Path

    def state(self) -> dict[str, Any]:
        """`state`, `step`, `steps`, and `updated` in seconds since 1970.

        States are the trainer's (`running`, `finishing`, `finished`, `interrupted`, `failed`); `starting` before the
        trainer has said anything; `stopped` for one that says it is running while its process is gone.
        """
        values = _read_json(self.path / STATE_FILE)
        process = self.process()
        state = values.get("state")
        if state is None:
            state = "starting" if process else "finished" if (self.path / LORA_FILE).is_file() else "failed"
        elif state in ("running", "finishing") and process is None:
            state = "stopped"
        elif process and _time_of(self.path / PID_FILE) > _time_of(self.path / STATE_FILE):
            state = "starting"  # resumed, and not heard of yet
        return {"state": state, "step": values.get("step"), "steps": values.get("steps"), "updated": self.updated()}

    def updated(self) -> float:
        """When something of it was last written, in seconds since 1970."""
        names = (STATE_FILE, METRICS_FILE, LOG_FILE, CONFIG_FILE, START_FILE, PID_FILE)
        return max(_time_of(self.path / name) for name in names)

    def config(self) -> dict[str, Any]:
        """The configuration; empty if it cannot be read."""
        for name in (CONFIG_FILE, START_FILE):
            try:
                values = yaml.safe_load((self.path / name).read_text(encoding="utf-8"))
            except (OSError, ValueError, yaml.YAMLError):
                continue
            if isinstance(values, dict):
                return values
        return {}

    def command(self) -> str:
        """The trainer's command that goes on with this run, for a terminal; empty if its configuration is not there."""
        words = self._words()
        return shlex.join(["accelerate", "launch", SCRIPT, *words, *RESUMED]) if words else ""

    def _words(self) -> list[str]:
        """The command line of this run; what it was asked for goes before what the trainer wrote of it."""
        for name in (START_FILE, CONFIG_FILE):
            if (self.path / name).is_file():
                return ["--config", str(self.path / name), "--output_dir", str(self.path)]
        return []

    def curves(self) -> list[dict[str, float | None]]:
        """A mapping a step: `step` and those of `CURVES` that were written; a line cut short is passed over."""
        path, points = self.path / METRICS_FILE, []
        try:
            if path.stat().st_size > MOST_METRICS_BYTES:
                return []
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError):
            return []
        for line in lines:
            try:
                values = json.loads(line)
                points.append({"step": int(values["step"]), **{name: values.get(name) for name in CURVES}})
            except (ValueError, TypeError, KeyError, AttributeError):
                continue
        return points

    def previews(self) -> list[Path]:
        """The preview pictures, the newest last."""
        pictures = [*self.path.glob("previews/step_*.png"), *self.path.glob("previews/final_*.png")]
        own = [path for path in pictures if path.resolve().is_relative_to(self.path.resolve())]
        return sorted(own, key=lambda path: (path.name.startswith("final"), path.name))

    def lora_files(self) -> list[Path]:
        """The finished LoRA first, then those of the checkpoints, the latest first."""
        checkpoints = sorted(self.path.glob(f"checkpoint-*/{LORA_FILE}"), key=lambda path: -_number(path.parent))
        finished = self.path / LORA_FILE
        return [*([finished] if finished.is_file() else []), *checkpoints]

    def log(self) -> str:
        """The end of what a run started from here printed, bars as their last state."""
        try:
            with (self.path / LOG_FILE).open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - MOST_LOG_BYTES))
                text = file.read().decode("utf-8", errors="replace")
        except OSError:
            return ""
        return "\n".join(line.rsplit("\r", 1)[-1] for line in text.replace("\r\n", "\n").split("\n"))

    def process(self) -> psutil.Process | None:
        """The trainer that works in this folder now, if there is one."""
        numbers = [_read_json(self.path / STATE_FILE).get("pid")]
        with suppress(OSError, ValueError):
            numbers.append(int((self.path / PID_FILE).read_text()))
        for number in numbers:
            with suppress(psutil.Error):
                if isinstance(number, int) and number > 0:
                    process = psutil.Process(number)
                    if _is_trainer(process, self.updated()):
                        return process
        return None


def list_runs(folder: Path) -> list[Run]:
    """All runs below a folder, the latest first."""
    folder, runs = folder.resolve(), []
    for parent, folders, files in os.walk(folder):
        depth = len(Path(parent).relative_to(folder).parts)
        if (CONFIG_FILE in files and {STATE_FILE, METRICS_FILE, LORA_FILE} & set(files)) or START_FILE in files:
            folders.clear()
            if depth and len(runs) < MOST_RUNS:
                runs.append(Run(Path(parent).relative_to(folder).as_posix(), Path(parent)))
        elif depth >= MOST_DEPTH:
            folders.clear()
        else:
            folders[:] = [one for one in folders if not one.startswith(".")]
    return sorted(runs, key=lambda run: -run.updated())


def find_run(folder: Path, name: str) -> Run:
    """A run by its name.

    Raises:
        UserError: there is none of this name below the folder.
    """
    for run in list_runs(folder):
        if run.name == name:
            return run
    raise UserError(f"there is no run {show(name)}")


def start_run(folder: Path, name: str, words: Sequence[str]) -> Run:
    """Starts the trainer's command in a process of its own, in a new folder.

    Arguments:
        folder: of the runs.
        name: of the new one: letters, digits, dots, dashes and underscores.
        words: of the trainer's command line, without `--output_dir`.

    Raises:
        UserError: a flag is wrong, in the trainer's own words; or there is a folder of this name.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", name):
        raise UserError(f"the name {show(name)} cannot be a run's: use letters, digits, dots, dashes and underscores")
    path = folder.resolve() / name
    if path.exists():
        raise UserError(f"there is a folder {name} already: take another name")
    config = parse([*words, "--output_dir", str(path)])
    path.mkdir(parents=True)
    (path / START_FILE).write_text(to_yaml(config), encoding="utf-8")
    run = Run(name, path)
    _launch_and_forget(run, run._words())
    return run


def resume_run(run: Run) -> None:
    """Goes on with a run that has ended too early, from its last checkpoint or, without one, from the start.

    Raises:
        UserError: it is at work or finished, or its configuration is gone or is none.
    """
    state, process = run.state()["state"], run.process()
    if state == "interrupted" and process is not None:
        with suppress(psutil.Error):
            process.wait(MOST_SECONDS_OF_ENDING)  # all is written, and it is about to go
    if run.process() is not None:
        raise UserError(f"{run.name} is at work")
    if state == "finished":
        raise UserError(f"{run.name} is finished: for more steps run its command with a higher --max_train_steps")
    words = [*run._words(), *RESUMED]
    if words == [*RESUMED]:
        raise UserError(f"{run.name} has no {CONFIG_FILE}: resume it with the command that started it")
    parse(words)
    _launch_and_forget(run, words)


def _launch_and_forget(run: Run, words: Sequence[str]) -> None:
    process = launch(run.path, words)
    # Until somebody has taken note of its end it would go on as a zombie.
    threading.Thread(target=process.wait, name=f"run {run.name}", daemon=True).start()


def launch(path: Path, words: Sequence[str]) -> subprocess.Popen:
    """Starts the trainer's command in a process of its own, in a folder that is there; what it prints is in `LOG_FILE`.

    Arguments:
        path: the run's folder, which the words name as `--output_dir`.
        words: of the trainer's command line.
    """
    with (path / LOG_FILE).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "bilora_diffusion.cli", *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C for the program that starts it is not for the run
        )
    (path / PID_FILE).write_text(str(process.pid), encoding="utf-8")
    return process


def stop_run(run: Run) -> None:
    """Asks the trainer to end after the step at hand, with everything saved.

    Raises:
        UserError: it is not running.
    """
    process = run.process()
    if process is None:
        raise UserError(f"{run.name} is not running")
    process.terminate()


def _is_trainer(process: psutil.Process, last_write: float) -> bool:
    """Whether this is a training; a number that the system gave to another process later does not count."""
    words = " ".join(process.cmdline())
    alive = process.status() != psutil.STATUS_ZOMBIE
    return alive and any(name in words for name in TRAINERS) and process.create_time() <= last_write + 60


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _time_of(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _number(checkpoint: Path) -> int:
    digits = checkpoint.name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else -1
