"""The output folder while a run is on: what it may overwrite, `config.yaml`, `metrics.jsonl`, `state.json`, `summary.json`."""

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bilora_diffusion.atomic import write_text_atomically
from bilora_diffusion.checkpoint import remove_leftovers
from bilora_diffusion.errors import UserError

__all__ = ["CONFIG_FILE", "DIFFUSERS_FILE", "KOHYA_FILE", "PREVIEWS", "RunFolder"]

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "pytorch_lora_weights_kohya.safetensors"
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
STATE_FILE = "state.json"
SUMMARY_FILE = "summary.json"
CARD_FILE = "README.md"
PREVIEWS = "previews"
_RESULTS = (DIFFUSERS_FILE, KOHYA_FILE, METRICS_FILE, STATE_FILE, SUMMARY_FILE, CONFIG_FILE)


class RunFolder:
    """One run's output folder.

    Arguments:
        path: `--output_dir`.
        writes: only one process of a run writes; the others call the same methods, which then do nothing.
    """

    def __init__(self, path: str | os.PathLike[str], writes: bool = True) -> None:
        self.path = Path(path)
        self.writes = writes
        self._state_written = 0.0

    def holds_a_run(self) -> bool:
        return any((self.path / name).exists() for name in _RESULTS) or any(self.path.glob("checkpoint-*"))

    def refuse_another_run(self) -> None:
        """Raises: UserError: the folder holds a run, and nobody said that it may go."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--output_dir {self.path} is a file: name a folder")
        if self.holds_a_run():
            raise UserError(
                f"--output_dir {self.path} holds another run: continue it with --resume_from_checkpoint latest, "
                "replace it with --overwrite_output_dir, or name another folder"
            )

    def begin(self, config_yaml: str, *, fresh: bool) -> None:
        """Makes the folder ready; an earlier run's files go only now, when the new one is known to start.

        Arguments:
            config_yaml: the resolved configuration.
            fresh: not a resumed run. Files that no run of ours writes are left alone.
        """
        if not self.writes:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if fresh and self.holds_a_run():
                for name in (*_RESULTS, CARD_FILE):
                    (self.path / name).unlink(missing_ok=True)
                for path in (self.path / PREVIEWS, *self.path.glob("checkpoint-*")):
                    shutil.rmtree(path, ignore_errors=True)
        except OSError as error:
            raise UserError(f"--output_dir {self.path} cannot be written: {error.strerror}") from error
        remove_leftovers(self.path)
        write_text_atomically(self.path / CONFIG_FILE, config_yaml)

    def forget_after(self, step: int) -> None:
        """Drops the metrics of steps that a resumed run will do again."""
        path = self.path / METRICS_FILE
        if not (self.writes and path.exists()):
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except ValueError:  # the line a kill cut short
                continue
        write_text_atomically(path, "".join(kept))

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one line."""
        if self.writes:
            try:
                with open(self.path / METRICS_FILE, "a") as file:
                    file.write(json.dumps({"step": step, **values}) + "\n")
            except OSError as error:
                raise UserError(f"{self.path / METRICS_FILE} was not written: {error.strerror}") from error

    def state(self, state: str, step: int, steps: int, *, now: bool = False) -> None:
        """Says where the run is, at most once a second.

        Arguments:
            state: `running`, `finished`, `interrupted` or `failed`.
            now: write in any case.
        """
        if not self.writes or not (now or time.monotonic() - self._state_written > 1):
            return
        self._state_written = time.monotonic()
        content = {"state": state, "step": step, "steps": steps, "updated": time.time(), "pid": os.getpid()}
        write_text_atomically(self.path / STATE_FILE, json.dumps(content) + "\n")

    def summary(self, summary: Mapping[str, Any]) -> None:
        if self.writes:
            write_text_atomically(self.path / SUMMARY_FILE, json.dumps(summary, indent=2, allow_nan=False) + "\n")
