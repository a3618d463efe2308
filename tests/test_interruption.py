"""Ctrl-C: once, and everything is saved; twice, and the run is gone. SIGTERM as the first."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_run import all_equal, write_both
from whole_run import (
    KOHYA_FILE,
    LORA_FILE,
    Forked,
    checkpoint_names,
    forking,
    lora,
    main,
    metrics,
    quicken,
    state,
    summary,
    train,
    words,
)

from bilora_diffusion.bases.tiny import build_tiny_random
from bilora_diffusion.interruption import Interruption
from bilora_diffusion.training import Trainer

FLAGS: dict[str, Any] = {"lora_layers": "to_q", "max_train_steps": 300}
"""More steps than any machine makes before the signal arrives."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_both(tmp_path_factory.mktemp("material"))[0]


def test_the_first_is_a_request_the_second_an_end() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), Interruption(announces=False) as interruption:
        assert not interruption.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.requested
        os.kill(os.getpid(), signal.SIGTERM)  # what a launcher sends after the user's Ctrl-C
        os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_sigterm_is_a_request_however_often_it_comes(capfd: pytest.CaptureFixture) -> None:
    with Interruption() as interruption:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.requested
    assert capfd.readouterr().err.count("interrupted") <= 1


def running(child: Forked, folder: Path, steps: int = 2) -> None:
    path = folder / "metrics.jsonl"
    child.wait_for(lambda: path.exists() and path.read_text().count("\n") >= steps)


@forking
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_saves_everything_and_leaves(number: int, workers: int, pictures: Path, tmp_path: Path) -> None:
    """Sent to the whole process group, as a terminal and a launcher do: the workers that read pictures must live on."""
    folder = tmp_path / "run"
    flags = {**FLAGS, "dataloader_num_workers": workers, "validation_prompt": "a picture", "validation_steps": 900}
    child = Forked(lambda: main(words(pictures, folder, **flags)), tmp_path / "log", group=True)
    running(child, folder)
    os.killpg(child.pid, number)
    assert child.wait() == 130
    printed = (tmp_path / "log").read_text()
    assert "Traceback" not in printed and "error" not in printed
    assert "the step at hand is finished" in printed
    assert "--resume_from_checkpoint latest" in printed

    steps = state(folder)["step"]
    assert 2 <= steps < 300 and state(folder)["state"] == "interrupted"
    assert checkpoint_names(folder) == [f"checkpoint-{steps}"]
    assert [line["step"] for line in metrics(folder)] == list(range(1, steps + 1))
    told = summary(folder)
    assert told["steps"] == len(told["losses"]) == steps
    assert told["interrupted"] and told["verified"] is True
    assert len(told["verification"]) == 2
    assert {"README.md", KOHYA_FILE, "config.yaml"} < {path.name for path in folder.iterdir()}
    assert not list(folder.glob("previews/final*"))
    assert all_equal(lora(folder), lora(folder / f"checkpoint-{steps}"))
    for name in (LORA_FILE, KOHYA_FILE):
        build_tiny_random().load_lora_weights(str(folder / name))


@forking
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(pictures: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    flags = {**FLAGS, "max_train_steps": 14}
    child = Forked(lambda: main(words(pictures, parts, **flags)), tmp_path / "log")
    running(child, parts)
    os.kill(child.pid, signal.SIGINT)
    assert child.wait() == 130, "the machine was too fast: give the run more steps"
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        resumed = train(pictures, parts, resume_from_checkpoint="latest", **flags)
        assert all_equal(resumed, train(pictures, tmp_path / "whole", **flags))
    assert summary(parts)["losses"] == summary(tmp_path / "whole")["losses"]


@forking
def test_the_second_ctrl_c_leaves_at_once(pictures: Path, tmp_path: Path) -> None:
    folder, stuck = tmp_path / "run", tmp_path / "stuck"
    step = Trainer.begin_step

    def slow(self: Trainer, micro_batches: Any, number: int, stop: bool = False) -> Any:
        if number == 2:
            stuck.touch()
            time.sleep(50)
        return step(self, micro_batches, number, stop)

    def work() -> int:
        Trainer.begin_step = slow  # of the child alone
        return main(words(pictures, folder, **FLAGS))

    child = Forked(work, tmp_path / "log")
    child.wait_for(stuck.exists)
    os.kill(child.pid, signal.SIGINT)
    child.wait_for(lambda: "Ctrl-C again" in (tmp_path / "log").read_text())
    began = time.monotonic()
    os.kill(child.pid, signal.SIGINT)
    assert child.wait() == 130
    assert time.monotonic() - began < 5
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert checkpoint_names(folder) == []
    assert state(folder)["state"] == "interrupted"


def test_ctrl_c_before_the_first_step(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bilora_diffusion.run.assemble", interrupt)
    assert main(words(pictures, tmp_path / "run", **FLAGS)) == 130
    assert not (tmp_path / "run").exists()
