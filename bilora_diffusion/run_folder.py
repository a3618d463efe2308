"""The output folder while a run is on: what may be overwritten, and the files that tell of the run.

config.yaml    the resolved configuration
metrics.jsonl  a line a step
state.json     where the run is
summary.json   what came of it
"""

import json
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bilora_diffusion.atomic import HINTS, atomic_write, write_text_atomically
from bilora_diffusion.checkpoint import checkpoints, remove_leftovers
from bilora_diffusion.errors import UserError
from bilora_diffusion.lora_files.diffusers_format import DIFFUSERS_FILE
from bilora_diffusion.lora_files.kohya import KOHYA_FILE
from bilora_diffusion.lora_files.model_card import CARD_FILE
from bilora_diffusion.strict_json import strict_json

__all__ = ["CONFIG_FILE", "DIFFUSERS_FILE", "KOHYA_FILE", "PREVIEWS", "TRACKED_AS", "RunFolder"]

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
STATE_FILE = "state.json"
SUMMARY_FILE = "summary.json"
PREVIEWS = "previews"
TRACKED_AS = "dreambooth-bilora-sdxl"
"""The project's name in the trackers, and so the folder that tensorboard's files are in, under `--logging_dir`."""

_RESULTS = (DIFFUSERS_FILE, KOHYA_FILE, SUMMARY_FILE)
_TRACES = (METRICS_FILE, STATE_FILE, CONFIG_FILE)


class RunFolder:
    """One run's output folder.

    Arguments:
        path: `--output_dir`.
        logs: `--logging_dir`, relative to it.
        writes: only one process of a run writes; the others call the same methods, which then do nothing.
    """

    def __init__(self, path: str | os.PathLike[str], logs: str = "logs", writes: bool = True) -> None:
        self.path = Path(path)
        self.logs = self.path / logs
        self.writes = writes
        self._state_written = 0.0

    def refuse_another_run(self, *, restart: bool = False) -> None:
        """Refuses a folder with something in it that a new run would write over.

        Arguments:
            restart: a resumed run without a checkpoint yet: what a run leaves before its first one may go.

        Raises:
            UserError: the folder holds a run, or a README.md of the user's, and nobody said that it may go.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--output_dir {self.path} is a file: name a folder")
        held = _RESULTS if restart else (*_RESULTS, *_TRACES)
        if any((self.path / name).exists() for name in held) or checkpoints(self.path):
            way_on = "" if restart else "continue it with --resume_from_checkpoint latest, "
            kind = "a run without a checkpoint" if restart else "another run"
            raise UserError(
                f"--output_dir {self.path} holds {kind}: {way_on}replace it with --overwrite_output_dir, "
                "or name another folder"
            )
        if (self.path / CARD_FILE).exists():
            raise UserError(
                f"--output_dir {self.path} holds a {CARD_FILE}, and the run would write its own: name another folder, "
                "or allow it with --overwrite_output_dir"
            )

    def begin(self, config_yaml: str, *, fresh: bool) -> None:
        """Makes the folder ready; an earlier run's files go only now, when the new one is known to start.

        Arguments:
            config_yaml: the resolved configuration.
            fresh: not a resumed run. Files that no run of ours writes are left alone.

        Raises:
            UserError: the folder cannot be written, or the disk is full; nothing was deleted then.
        """
        if not self.writes:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output_dir {self.path} cannot be written: {_reason(error)}") from error
        with atomic_write(self.path / CONFIG_FILE) as temporary:
            temporary.write_text(config_yaml, encoding="utf-8")
            if fresh:  # only now: a full disk would have shown
                self._clear()
        remove_leftovers(self.path)

    def _clear(self) -> None:
        """Deletes what an earlier run wrote, by its names."""
        for name in (*_RESULTS, *_TRACES, CARD_FILE):
            (self.path / name).unlink(missing_ok=True)
        previews = self.path / PREVIEWS
        for picture in (*previews.glob("step_*.png"), *previews.glob("final_*.png")):
            picture.unlink()
        with suppress(OSError):  # not there, or with pictures of the user's in it
            previews.rmdir()
        doomed = [path for _, path in checkpoints(self.path)]
        if self.logs.resolve().is_relative_to(self.path.resolve()):
            doomed.append(self.logs / TRACKED_AS)
        for path in doomed:
            shutil.rmtree(path, ignore_errors=True)

    def forget_after(self, step: int) -> None:
        """Drops the metrics of steps that a resumed run will do again."""
        path = self.path / METRICS_FILE
        if not (self.writes and path.exists()):
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, TypeError, KeyError):  # the line that a kill or a full disk cut short
                continue
        write_text_atomically(path, "".join(kept))

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one line."""
        if self.writes:
            try:
                with open(self.path / METRICS_FILE, "a", encoding="utf-8") as file:
                    file.write(strict_json({"step": step, **values}) + "\n")
            except OSError as error:
                raise UserError(f"{self.path / METRICS_FILE} was not written: {_reason(error)}") from error

    def state(self, state: str, step: int, steps: int, *, now: bool = False) -> None:
        """Says where the run is, at most once a second.

        Arguments:
            state: `running`, `finishing`, `finished`, `interrupted` or `failed`.
            now: write in any case.
        """
        if not self.writes or not (now or time.monotonic() - self._state_written > 1):
            return
        self._state_written = time.monotonic()
        content = {"state": state, "step": step, "steps": steps, "updated": time.time(), "pid": os.getpid()}
        write_text_atomically(self.path / STATE_FILE, strict_json(content) + "\n")

    def summary(self, summary: Mapping[str, Any]) -> None:
        if self.writes:
            write_text_atomically(self.path / SUMMARY_FILE, strict_json(summary, indent=2) + "\n")


def _reason(error: OSError) -> str:
    return HINTS.get(error.errno or 0) or error.strerror or str(error)
