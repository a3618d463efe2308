"""Whole runs on tiny-random through `main(argv)`, in this process or in forked ones, and reading what they leave.

A run takes a second or two here, while starting Python with torch takes ten; a fork starts at once.
"""

import functools
import json
import logging
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny_run import all_equal
from torch import Tensor

from bilora_diffusion import assembly, finishing, previews, run, sampling
from bilora_diffusion.cli import main
from bilora_diffusion.lora_files.verification import strip_adapters

LORA_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "pytorch_lora_weights_kohya.safetensors"

DEFAULTS: dict[str, Any] = {
    "pretrained_model_name_or_path": "tiny-random",
    "instance_prompt": "a sks picture",
    "resolution": 64,
    "rank": 2,
    "lora_alpha": 4,
    "learning_rate": 1e-3,
    "text_encoder_lr": 1e-3,
    "train_batch_size": 1,
    "max_train_steps": 4,
    "loss_gap_steps": 0,
    "num_validation_images": 1,
    "report_to": "none",
    "seed": 0,
}

forking = pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has run torch")


def words(pictures: Path | None, output: Path | None, **flags: Any) -> list[str]:
    """The command line of a run; a flag that is None is left out."""
    given = {**DEFAULTS, "instance_data_dir": pictures, "output_dir": output, **flags}
    return [
        word
        for name, value in given.items()
        if value is not None
        for word in ((f"--{name}", str(value)) if not isinstance(value, bool) else (f"--{name}={value}",))
    ]


def train(pictures: Path, output: Path, **flags: Any) -> dict[str, Tensor]:
    """A run that must succeed; returns the tensors of its LoRA file."""
    assert main(words(pictures, output, **flags)) == 0
    return lora(output)


def quicken(monkeypatch: pytest.MonkeyPatch, verify: bool = False, denoising_steps: int = 2) -> None:
    """Leaves the reload of the files out (which has its own tests), and draws pictures and gradients in few steps."""

    def strip(files: list[Path], parts: Any) -> list[dict[str, Any]]:
        for model in parts.models.values():
            strip_adapters(model)
        return [{"file": file.name, "layers": 0, "differences": {"unet": 0.0}} for file in files]

    @functools.wraps(sampling.sample_pictures)
    def sample(*args: Any, **kwargs: Any) -> list:
        return sampling.sample_pictures(*args, **{**kwargs, "steps": denoising_steps})

    if not verify:
        monkeypatch.setattr(finishing, "_verify", strip)
    monkeypatch.setattr(previews, "sample_pictures", sample)
    monkeypatch.setattr(assembly, "GRADIENT_ROWS", 4)


@contextmanager
def quickened() -> Iterator[None]:
    """`quicken`, for a whole file of tests."""
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        yield


class StopAfter:
    """In the place of `Interruption`: wants the run to end with its k-th step, as if Ctrl-C had been pressed in it.

    Of several processes all take two steps more.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, announces: bool = True) -> "StopAfter":
        self.asked = 0
        return self

    @property
    def requested(self) -> bool:
        self.asked += 1
        return self.asked > self.steps

    def __enter__(self) -> "StopAfter":
        return self

    def __exit__(self, *_: object) -> None:
        pass


@contextmanager
def interrupted_after(steps: int) -> Iterator[None]:
    """Runs in here end after so many steps of theirs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "Interruption", StopAfter(steps))
        yield


def in_one_and_in_two(pictures: Path, folder: Path, **flags: Any) -> tuple[Path, Path]:
    """The same training twice: `folder/whole` without a stop, `folder/parts` ended after its second step and resumed.

    Their LoRA and their losses must be the same bits.
    """
    whole, parts = folder / "whole", folder / "parts"
    train(pictures, whole, **flags)
    with interrupted_after(2):
        assert main(words(pictures, parts, **flags)) == 130
    assert checkpoint_names(parts) == ["checkpoint-2"]
    assert state(parts)["state"] == "interrupted"
    assert not all_equal(lora(parts), lora(whole))
    train(pictures, parts, resume_from_checkpoint="latest", **flags)
    assert all_equal(lora(parts), lora(whole))
    assert summary(parts)["losses"] == summary(whole)["losses"]
    return whole, parts


def lora(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / LORA_FILE)


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text(), parse_constant=_refuse)


def state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "state.json").read_text(), parse_constant=_refuse)


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=_refuse) for line in lines]


def _refuse(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def checkpoint_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "checkpoint" in path.name)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file of a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(argv: list[str], capsys: pytest.CaptureFixture) -> str:
    """What a refused command prints: exactly one line on stderr, with exit code 2. Returns it without `error: `."""
    capsys.readouterr()
    code = main(argv)
    printed = capsys.readouterr()
    assert code == 2, printed.err
    assert re.fullmatch(r"error: [^\n]+\n", printed.err), printed.err
    assert printed.out == ""
    return printed.err.removeprefix("error: ").strip()


class Forked:
    """A child of this process that runs a function; what it prints goes to a file.

    Arguments:
        work: gives the exit code.
        log: where its stdout and stderr go.
        group: make it the leader of a process group of its own, as a shell makes a command.
    """

    def __init__(self, work: Callable[[], int], log: Path, group: bool = False) -> None:
        self.log = log
        self.pid = os.fork()
        if self.pid:
            return
        code = 70
        try:
            if group:
                os.setpgid(0, 0)
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1, closefd=False)
            logging.basicConfig(format="%(message)s", stream=sys.stderr, force=True)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def wait(self, seconds: float = 60) -> int:
        """The exit code, minus the signal's number if one ended it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"still running after {seconds} s:\n{self.log.read_text()}")

    def wait_for(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end or os.waitpid(self.pid, os.WNOHANG)[0]:
                raise AssertionError(f"it did not come to that:\n{self.log.read_text()}")
            time.sleep(0.01)


def ranks(count: int, work: Callable[[int], int], folder: Path) -> list[Forked]:
    """Starts `count` processes that find each other as those of a launcher do (CPU, gloo)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def become(rank: int) -> int:
        from accelerate.state import AcceleratorState, GradientState, PartialState

        for one in (AcceleratorState, GradientState, PartialState):
            one._reset_state()  # this process may have been a run alone before
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "ACCELERATE_USE_CPU": "true",
        }
        return work(rank)

    folder.mkdir(parents=True, exist_ok=True)
    return [
        Forked(functools.partial(become, rank), folder / f"{time.monotonic_ns()}-rank{rank}.log")
        for rank in range(count)
    ]
