"""Class pictures: which are missing, how they are made, and that their rows count as they should."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_run import all_equal, difference, write_both, write_pictures
from whole_run import main, quicken, refusal, snapshot, summary, train, words

from bilora_diffusion import assembly, prior, sampling
from bilora_diffusion.bases.tiny import build_tiny_random
from bilora_diffusion.batches import TrainingMicroBatch
from bilora_diffusion.errors import UserError
from bilora_diffusion.prior import make_class_pictures, missing_class_pictures

PRIOR: dict[str, Any] = {
    "with_prior_preservation": True,
    "class_prompt": "a picture",
    "num_class_images": 3,
    "lora_layers": "to_q",
    "max_train_steps": 1,
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_both(tmp_path_factory.mktemp("material"))[0]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)
    draw = sampling.sample_pictures
    monkeypatch.setattr(prior, "sample_pictures", lambda *a, **k: draw(*a, **{**k, "steps": 2}))


# --- Which are missing ---


def test_a_folder_that_is_not_there_lacks_all(tmp_path: Path) -> None:
    assert missing_class_pictures(tmp_path / "none", 3) == [0, 1, 2]


def test_what_is_there_counts_under_any_name(tmp_path: Path) -> None:
    for name in ("class-00000.png", "class-00002.png", "dog.JPG"):
        (tmp_path / name).touch()
    for name in (".hidden.png", ".class-00004.png.tmp", "notes.txt", "class-00001.txt"):
        (tmp_path / name).touch()
    assert missing_class_pictures(tmp_path, 5) == [1, 3]
    assert missing_class_pictures(tmp_path, 3) == []
    assert missing_class_pictures(tmp_path, 1) == []


def test_a_name_that_is_taken_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "class-00000.png").mkdir()  # odd, but nothing to write over
    assert 0 not in missing_class_pictures(tmp_path, 3)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--class_data_dir"):
        missing_class_pictures(tmp_path / "file", 1)


# --- Making them ---


def make(
    folder: Path, numbers: list[int], batch_size: int = 1, rank: int = 0, processes: int = 1, seed: int = 0
) -> None:
    make_class_pictures(
        folder,
        numbers,
        build_tiny_random,
        prompt="a picture",
        seed=seed,
        resolution=64,
        batch_size=batch_size,
        rank=rank,
        processes=processes,
    )


def test_each_picture_depends_on_the_seed_and_its_number_alone(tmp_path: Path) -> None:
    make(tmp_path / "one", [0, 1, 2])
    make(tmp_path / "parts", [1])
    make(tmp_path / "parts", [0, 2])
    for rank in range(2):
        make(tmp_path / "ranks", [0, 1, 2], rank=rank, processes=2)
    one = snapshot(tmp_path / "one")
    assert sorted(one) == [f"class-0000{number}.png" for number in range(3)]
    assert one == snapshot(tmp_path / "parts") == snapshot(tmp_path / "ranks")
    assert len(set(one.values())) == 3
    make(tmp_path / "other", [0], seed=1)
    assert snapshot(tmp_path / "other")["class-00000.png"] != one["class-00000.png"]
    assert Image.open(tmp_path / "one" / "class-00000.png").size == (64, 64)


def test_a_process_without_a_share_loads_nothing(tmp_path: Path) -> None:
    def load() -> None:
        raise AssertionError("loaded")

    arguments = {"prompt": "x", "seed": 0, "resolution": 64, "batch_size": 1, "rank": 1, "processes": 2}
    make_class_pictures(tmp_path, [0], load, **arguments)


def test_a_run_makes_what_is_missing_and_goes_on_where_it_was_stopped(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = tmp_path / "classes"
    flags = {**PRIOR, "class_data_dir": classes, "sample_batch_size": 1}
    write = prior.atomic_write
    written: list[Path] = []

    def interrupted(path: Path) -> Any:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        return write(path)

    with monkeypatch.context() as patch:
        patch.setattr(prior, "atomic_write", interrupted)
        assert main(words(pictures, tmp_path / "run", **flags)) == 130
    before = snapshot(classes)
    assert sorted(before) == ["class-00000.png", "class-00001.png"]
    first = train(pictures, tmp_path / "run", **flags)
    after = snapshot(classes)
    assert len(after) == 3 and before.items() <= after.items()
    assert summary(tmp_path / "run")["steps"] == 1

    def make_none(*_: Any, **__: Any) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(assembly, "make_class_pictures", make_none)
    assert all_equal(first, train(pictures, tmp_path / "again", **flags))
    assert snapshot(classes) == after


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_precision_they_are_made_in(precision: str, pictures: Path, tmp_path: Path) -> None:
    train(
        pictures,
        tmp_path / "run",
        class_data_dir=tmp_path / "classes",
        prior_generation_precision=precision,
        **PRIOR | {"num_class_images": 1},
    )
    low, high = zip(*Image.open(tmp_path / "classes" / "class-00000.png").getextrema(), strict=True)
    assert max(high) - min(low) > 50


def test_broken_class_pictures_are_named_and_left_out(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    classes = tmp_path / "classes"
    classes.mkdir()
    write_pictures(classes, [(64, 64)], None, seed=1)
    (classes / "broken.png").write_bytes(b"nothing")
    flags = {**PRIOR, "class_data_dir": classes, "num_class_images": 2}
    train(pictures, tmp_path / "run", **flags)
    assert any("broken.png" in message for message in caplog.messages)
    (classes / "0.png").write_bytes(b"nothing")
    assert "holds no usable picture" in refusal(words(pictures, tmp_path / "other", **flags), capsys)


# --- Their rows ---


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_every_row_has_its_own_prompt_and_weight(
    batch_size: int, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of a step is the instances' mean plus the weight times the class pictures' mean."""
    seen: list[dict[str, Any]] = []
    loss = TrainingMicroBatch.loss

    def watched(self: TrainingMicroBatch, rows: slice = slice(None)) -> torch.Tensor:
        value = loss(self, rows)
        with torch.no_grad():
            each = [loss(self, slice(row, row + 1)).item() for row in range(len(self))]
        seen.append({"loss": value.item(), "each": each, "batch": self.batch})
        return value

    monkeypatch.setattr(TrainingMicroBatch, "loss", watched)
    conditioning = "bilora_diffusion.prompts.EmbeddedPrompts.conditioning"
    asked: list[list[str]] = []
    original = assembly.EmbeddedPrompts.conditioning

    def listening(self: Any, prompts: list[str], sizes: torch.Tensor) -> Any:
        asked.append(list(prompts))
        return original(self, prompts, sizes)

    monkeypatch.setattr(conditioning, listening)
    flags = {**PRIOR, "class_data_dir": pictures.parent / "class_pictures", "method": "lora", "max_train_steps": 2}
    train(pictures, tmp_path / "run", prior_loss_weight=0.3, train_batch_size=batch_size, **flags)
    for prompts, step in zip(asked, seen, strict=True):
        batch = step["batch"]
        assert len(batch) == 2 * batch_size
        assert [prompt == "a picture" for prompt in prompts] == [False, True] * batch_size
        assert all(prompt.startswith("a sks picture of kind") for prompt in prompts[::2])
        assert batch.instances.tolist() == [1.0, 0.0] * batch_size
        assert batch.weights.tolist() == pytest.approx([1.0, 0.3] * batch_size)
        instances, classes = step["each"][::2], step["each"][1::2]  # a class row alone has its weight already
        expected = (sum(instances) + sum(classes)) / batch_size
        assert step["loss"] == pytest.approx(expected, rel=1e-4)


def test_without_weight_they_teach_nothing(pictures: Path, tmp_path: Path) -> None:
    flags = {**PRIOR, "class_data_dir": pictures.parent / "class_pictures", "max_train_steps": 2}
    with_prior = train(pictures, tmp_path / "with", **flags)
    weightless = train(pictures, tmp_path / "weightless", prior_loss_weight=0, **flags)
    without = train(pictures, tmp_path / "without", lora_layers="to_q", max_train_steps=2)
    assert difference(weightless, without) < 1e-4 < difference(with_prior, without)
