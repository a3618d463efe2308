"""A run that was interrupted and resumed is the run that was not, bit for bit. Checkpoints are whole or not there."""

import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import all_equal, write_both
from whole_run import (
    LORA_FILE,
    Forked,
    checkpoint_names,
    forking,
    in_one_and_in_two,
    interrupted_after,
    lora,
    main,
    metrics,
    quicken,
    refusal,
    snapshot,
    state,
    summary,
    train,
    words,
)

from bilora_diffusion import assembly
from bilora_diffusion.checkpoint import (
    Checkpoint,
    checkpoints,
    find_checkpoint,
    load_checkpoint,
    remove_leftovers,
    save_checkpoint,
)
from bilora_diffusion.errors import UserError
from bilora_diffusion.training import Trainer

EVERYTHING = {
    "train_text_encoder": True,
    "random_flip": True,
    "caption_dropout": 0.3,
    "lora_dropout": 0.2,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "gradient_accumulation_steps": 2,
    "noise_offset": 0.1,
}
"""Random crops, flips, captions and dropout, a schedule with a warm-up: all that a resumed run must go on with."""

SMALL = {"lora_layers": "to_q"}  # a quarter of the layers: attaching adapters is most of a tiny run

KINDS: dict[str, dict[str, Any]] = {
    "bilora-adamw": {"method": "bilora", "ascent": "adamw", **EVERYTHING},
    "bilora-sgd": {"method": "bilora", "ascent": "sgd", "auxiliary_learning_rate": 1.0, "rho": 0.05, **SMALL},
    "bilora-normalized": {"method": "bilora", "ascent": "normalized", "dataloader_num_workers": 2, **EVERYTHING},
    "lora": {"method": "lora", **EVERYTHING},
    "flat-lora": {"method": "flat-lora", "sigma": 0.3, "ema_decay": 0.9, "loraplus_lr_ratio": 4.0, **SMALL},
    "looksam": {"method": "looksam", "rho": 0.5, "looksam_every": 3, **SMALL},
    "bilora-echo": {"method": "bilora-echo", "rho": 0.5, "steps_per_draw": 3, **SMALL},
    "bilora-fresh": {"method": "bilora-fresh", "rho": 0.5, "ascent_every": 2, "sigma": 0.2, **SMALL},
    "bilora-fresh tracked": {"method": "bilora-fresh", "ascent_basis": "tracked", "rho": 0.5, "sigma": 0.2, **SMALL},
    "base prediction": {
        "with_prior_preservation": True,
        "prior_source": "base_prediction",
        "class_prompt": "a picture",
        "lora_dropout": 0.2,
        **SMALL,
    },
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0, "ascent": "normalized", **SMALL},
    "dora": {"method": "lora", "use_dora": True, "lora_layers": "to_q,ff.net.0.proj"},
    "pissa": {"method": "bilora", "init_lora_weights": "pissa_niter_2", "ema_decay": 0.9, **SMALL},
    "lora-ga": {"method": "flat-lora", "init_lora_weights": "lora_ga", "sigma": 0.3, **SMALL},
    "fp16": {"mixed_precision": "fp16", "center_crop": True, **SMALL},
    "bf16": {"mixed_precision": "bf16", "gradient_checkpointing": True, **SMALL},
}
RARER = (
    *("bilora-sgd", "bilora-normalized", "bilora-fresh tracked", "looksam", "prodigy"),
    *("pissa", "lora-ga", "fp16", "bf16"),
)
"""Run by `make test-slow`: each shares all but a detail with another one, or has a shorter test elsewhere."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_both(tmp_path_factory.mktemp("material"))[0]


@pytest.fixture(scope="module")
def class_pictures(pictures: Path) -> Path:
    return pictures.parent / "class_pictures"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)


def assert_same_run(one: Path, other: Path, step: int) -> None:
    """The LoRA, everything in the checkpoint of that step, and what is told of the run."""
    assert all_equal(lora(one), lora(other))
    here, there = one / f"checkpoint-{step}", other / f"checkpoint-{step}"
    assert {path.name for path in here.iterdir()} == {path.name for path in there.iterdir()}
    for path in here.glob("*.safetensors"):
        assert all_equal(load_file(path), load_file(there / path.name)), path.name
    states = [torch.load(folder / "training_state.pt", weights_only=True) for folder in (here, there)]
    assert equal_values(*states)
    for name in ("losses", "clean_losses", "perturbed_losses", "loss_gap_steps", "clipped_share", "c_over_rho", "seed"):
        assert summary(one)[name] == summary(other)[name], name
    seen = [[{k: v for k, v in line.items() if k != "seconds"} for line in metrics(folder)] for folder in (one, other)]
    assert seen[0] == seen[1]
    assert [line["step"] for line in seen[0]] == list(range(1, step + 1))


def equal_values(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal_values(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal_values, one, other))
    return one == other


@pytest.mark.parametrize("kind", [pytest.param(one, marks=[pytest.mark.slow] * (one in RARER)) for one in KINDS])
def test_a_resumed_run_gives_the_same_tensors(kind: str, pictures: Path, tmp_path: Path) -> None:
    flags = {"loss_gap_steps": 2, "checkpointing_steps": 4, **KINDS[kind]}
    assert_same_run(*in_one_and_in_two(pictures, tmp_path, **flags), 4)


def test_a_resumed_run_takes_its_start_from_the_checkpoint(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    flags = {"method": "lora", "init_lora_weights": "olora", "checkpointing_steps": 2, "center_crop": True, **SMALL}
    whole = train(pictures, tmp_path / "run", **flags)
    monkeypatch.setattr(assembly, "fill_start", None)  # would fail if it were called
    assert all_equal(whole, train(pictures, tmp_path / "run", resume_from_checkpoint="checkpoint-2", **flags))
    (tmp_path / "run" / "checkpoint-2" / "factors.safetensors").unlink()
    capsys.readouterr()
    line = refusal(words(pictures, tmp_path / "run", resume_from_checkpoint="checkpoint-2", **flags), capsys)
    assert "checkpoint-2 holds other layers than this run trains" in line


def test_a_run_resumed_twice_and_with_class_pictures(pictures: Path, class_pictures: Path, tmp_path: Path) -> None:
    flags = {
        "with_prior_preservation": True,
        "class_data_dir": class_pictures,
        "class_prompt": "a picture",
        "num_class_images": 3,
        "lora_layers": "to_q",
        "max_train_steps": 6,
        "checkpointing_steps": 6,
        "loss_gap_steps": 1,
    }
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(pictures, whole, **flags)
    with interrupted_after(2):
        for _ in range(2):
            assert main(words(pictures, parts, resume_from_checkpoint="latest", **flags)) == 130
    assert state(parts)["step"] == 4 and summary(parts)["interrupted"]
    assert len(summary(parts)["losses"]) == 4
    train(pictures, parts, resume_from_checkpoint="latest", **flags)
    assert_same_run(whole, parts, 6)
    assert not summary(parts)["interrupted"]


def test_a_run_that_crashed_goes_on_from_its_last_checkpoint(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"checkpointing_steps": 2, "ascent": "normalized", **SMALL}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(pictures, whole, **flags)
    step = Trainer.begin_step

    def crash(self: Trainer, micro_batches: Any, number: int, stop: bool = False) -> Any:
        if number == 3:
            raise RuntimeError("as if the machine had gone")
        return step(self, micro_batches, number, stop)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(Trainer, "begin_step", crash)
        main(words(pictures, parts, **flags))
    assert state(parts)["state"] == "failed"
    assert [line["step"] for line in metrics(parts)] == [1, 2, 3]
    with open(parts / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # as a kill leaves it
    train(pictures, parts, resume_from_checkpoint="latest", **flags)
    assert_same_run(whole, parts, 4)


def test_a_finished_run_can_be_resumed_and_lengthened(pictures: Path, tmp_path: Path) -> None:
    short = tmp_path / "short"
    before = train(pictures, short, checkpointing_steps=2, max_train_steps=2, **SMALL)
    again = train(pictures, short, resume_from_checkpoint="latest", max_train_steps=2, **SMALL)
    assert all_equal(before, again)
    longer = train(pictures, short, resume_from_checkpoint="latest", max_train_steps=4, **SMALL)
    assert all_equal(longer, train(pictures, tmp_path / "long", **SMALL))


# --- Which checkpoint ---


@pytest.fixture(scope="module")
def finished(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with a checkpoint at 2 and 4. Not to be written to."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        train(pictures, folder, checkpointing_steps=2, **SMALL)
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "copied")


@pytest.mark.parametrize("how", ["name", "path", "elsewhere"])
def test_a_checkpoint_can_be_named(how: str, finished: Path, copied: Path, pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" if how == "elsewhere" else copied
    wanted = {"name": "checkpoint-2", "path": str(copied / "checkpoint-2"), "elsewhere": str(copied / "checkpoint-2")}
    before = snapshot(copied)
    assert all_equal(train(pictures, output, resume_from_checkpoint=wanted[how], **SMALL), lora(finished))
    if how == "elsewhere":
        assert snapshot(copied) == before
        assert [line["step"] for line in metrics(output)] == [3, 4]
        assert len(summary(output)["losses"]) == 4


def test_a_checkpoint_of_another_folder_does_not_open_a_run_to_be_written_over(
    finished: Path, copied: Path, pictures: Path, capsys: pytest.CaptureFixture
) -> None:
    before = snapshot(copied)
    argv = words(pictures, copied, resume_from_checkpoint=finished / "checkpoint-2", **SMALL)
    assert "holds another run" in refusal(argv, capsys)
    assert snapshot(copied) == before


def test_latest_starts_a_new_run_where_there_is_no_checkpoint(
    finished: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    fresh = tmp_path / "fresh"
    assert all_equal(train(pictures, fresh, resume_from_checkpoint="latest", **SMALL), lora(finished))
    # It is finished: to start again would write over it.
    line = refusal(words(pictures, fresh, resume_from_checkpoint="latest", **SMALL), capsys)
    assert "without a checkpoint" in line and "--overwrite_output_dir" in line
    # Killed before its first checkpoint: the same command must get it going again.
    killed = tmp_path / "killed"
    killed.mkdir()
    for name in ("config.yaml", "metrics.jsonl", "state.json"):
        shutil.copy(finished / name, killed)
    assert "holds another run" in refusal(words(pictures, killed, **SMALL), capsys)
    assert all_equal(train(pictures, killed, resume_from_checkpoint="latest", **SMALL), lora(finished))
    assert len(metrics(killed)) == 4


def test_a_checkpoint_that_is_not_there(finished: Path, pictures: Path, capsys: pytest.CaptureFixture) -> None:
    line = refusal(words(pictures, finished, resume_from_checkpoint="checkpoint-3", **SMALL), capsys)
    assert "checkpoint-2, checkpoint-4" in line


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ({"rank": 3}, "--rank 2"),
        ({"method": "lora"}, "--method bilora"),
        ({"lora_alpha": 2}, "--lora_alpha 4"),
        ({"lora_layers": "to_k"}, "--lora_layers to_q"),
        ({"train_text_encoder": True}, "--train_text_encoder False"),
        ({"auxiliary_rank": 3}, "--auxiliary_rank 2"),
        ({"ascent": "sgd"}, "--ascent adamw"),
        ({"use_dora": True}, "--use_dora False"),
        ({"init_lora_weights": "pissa"}, "--init_lora_weights gaussian"),
        ({"optimizer": "prodigy", "auxiliary_learning_rate": 0.1}, "--optimizer AdamW"),
        ({"rho": 0}, "layers"),
    ],
    ids=lambda value: str(value),
)
def test_a_checkpoint_of_another_kind_of_run_is_refused(
    flags: dict, names: str, finished: Path, pictures: Path, capsys: pytest.CaptureFixture
) -> None:
    before = snapshot(finished)
    assert names in refusal(words(pictures, finished, resume_from_checkpoint="latest", **{**SMALL, **flags}), capsys)
    assert snapshot(finished) == before


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "gone"])
@pytest.mark.parametrize("name", [LORA_FILE, "auxiliary.safetensors", "training_state.pt", "checkpoint.json"])
def test_a_damaged_checkpoint_is_refused(
    name: str, damage: str, copied: Path, pictures: Path, capsys: pytest.CaptureFixture
) -> None:
    path = copied / "checkpoint-4" / name
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": content[: len(content) // 2], "garbage": b"\x80[[not this" * 99, "empty": b""}[damage])
    before = snapshot(copied)
    line = refusal(words(pictures, copied, resume_from_checkpoint="checkpoint-4", **SMALL), capsys)
    assert "checkpoint-4" in line
    assert snapshot(copied) == before


def test_json_of_another_shape_is_a_damaged_checkpoint(copied: Path) -> None:
    for content in ("[]", "{}", '{"identity": 1}', "null"):
        (copied / "checkpoint-4" / "checkpoint.json").write_text(content)
        with pytest.raises(UserError, match="not a whole checkpoint"):
            load_checkpoint(copied / "checkpoint-4", {})


def test_what_a_resumed_run_cannot_change_is_said(
    copied: Path, finished: Path, pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    resumed = train(pictures, copied, resume_from_checkpoint="checkpoint-2", learning_rate=0.5, **SMALL)
    assert all_equal(resumed, lora(finished))
    assert any("--learning_rate 0.5 has no effect" in message for message in caplog.messages)


# --- Whole or not there ---


def tiny_checkpoint(step: int) -> Checkpoint:
    state = {"optimizer": {"state": {0: {"m": torch.full((100,), float(step))}}}}
    return Checkpoint({"rank": 1}, {}, {"step": step, "losses": [float("nan")]}, state, {"a": torch.ones(3) * step})


def write_tiny_lora(folder: Path) -> None:
    save_file({"x": torch.ones(2)}, folder / LORA_FILE)


def assert_whole(path: Path) -> None:
    step = int(path.name.removeprefix("checkpoint-"))
    loaded = load_checkpoint(path, {"rank": 1})
    assert loaded.progress == {"step": step, "losses": [None]}
    assert equal_values(loaded.state, tiny_checkpoint(step).state)
    assert torch.equal(loaded.auxiliary["a"], torch.ones(3) * step)
    assert (path / LORA_FILE).stat().st_size > 0


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-mine").mkdir()
    for step in (2, 4, 10):
        save_checkpoint(tmp_path, tiny_checkpoint(step), write_tiny_lora, limit=2)
    assert checkpoint_names(tmp_path) == ["checkpoint-10", "checkpoint-4", "checkpoint-mine"]
    assert [step for step, _ in checkpoints(tmp_path)] == [4, 10]
    # Taken back to an earlier step, the run leaves later ones behind: those are not the newest.
    save_checkpoint(tmp_path, tiny_checkpoint(6), write_tiny_lora, limit=2)
    assert [step for step, _ in checkpoints(tmp_path)] == [4, 6]
    save_checkpoint(tmp_path, tiny_checkpoint(6), write_tiny_lora, limit=1)
    assert [step for step, _ in checkpoints(tmp_path)] == [6]
    assert_whole(tmp_path / "checkpoint-6")


def test_rotation_in_a_run(pictures: Path, tmp_path: Path) -> None:
    train(pictures, tmp_path / "run", checkpointing_steps=1, checkpoints_total_limit=2, **SMALL)
    assert checkpoint_names(tmp_path / "run") == ["checkpoint-3", "checkpoint-4"]


@forking
@pytest.mark.parametrize("again", [False, True], ids=["new step", "same step"])
def test_a_kill_at_any_file_operation_leaves_a_whole_checkpoint(again: bool, tmp_path: Path) -> None:
    """Dies at the first, second, ... opening, renaming or removal of a file that saving does, until it gets through."""
    step = 2 if again else 4

    def save_and_die(operation: int, folder: Path) -> int:
        left = operation

        def audit(event: str, arguments: tuple) -> None:
            nonlocal left
            named = any(str(folder) in str(one) for one in arguments)
            if named and event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"):
                left -= 1
                if left < 0:
                    os._exit(9)

        sys.addaudithook(audit)
        save_checkpoint(folder, tiny_checkpoint(step), write_tiny_lora, limit=1)
        return 0

    states = set()
    for operation in range(200):
        folder = tmp_path / str(operation)
        folder.mkdir()
        save_checkpoint(folder, tiny_checkpoint(1), write_tiny_lora, limit=None)
        if again:
            save_checkpoint(folder, tiny_checkpoint(2), write_tiny_lora, limit=None)
        code = Forked(lambda: save_and_die(operation, folder), tmp_path / "log").wait()  # noqa: B023
        assert code in (0, 9), (tmp_path / "log").read_text()
        latest = find_checkpoint(folder, "latest")
        assert latest is not None
        assert_whole(latest)
        states.add((code, latest.name))
        remove_leftovers(folder)
        assert all(path.name.startswith("checkpoint-") for path in folder.iterdir())
        save_checkpoint(folder, tiny_checkpoint(step + 1), write_tiny_lora, limit=1)
        assert_whole(folder / f"checkpoint-{step + 1}")
        if code == 0:
            break
    assert operation > 10 and (0, f"checkpoint-{step}") in states and (9, f"checkpoint-{step}") in states


@forking
def test_runs_that_are_killed_again_and_again_end_as_one_that_is_not(pictures: Path, tmp_path: Path) -> None:
    flags = {"checkpointing_steps": 1, "checkpoints_total_limit": 1, "max_train_steps": 8, "train_text_encoder": True}
    flags |= {"loss_gap_steps": 1, "lora_layers": "to_q"}
    train(pictures, tmp_path / "whole", **flags)
    parts = tmp_path / "parts"
    argv = words(pictures, parts, resume_from_checkpoint="latest", **flags)
    draw = random.Random(0)
    seen = 0
    for attempt in range(2):
        child = Forked(lambda: main(argv), tmp_path / f"{attempt}.log")
        goal = seen + draw.randint(2, 3)

        def reached(goal: int = goal) -> bool:
            path = parts / "metrics.jsonl"
            return path.exists() and path.read_text().count("\n") >= goal

        child.wait_for(reached)
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        seen = max(step for step, _ in checkpoints(parts))
        assert json.loads((parts / f"checkpoint-{seen}" / "checkpoint.json").read_text())["progress"]["step"] == seen
    assert main(argv) == 0
    assert_same_run(tmp_path / "whole", parts, 8)
    assert checkpoint_names(parts) == ["checkpoint-8"]
