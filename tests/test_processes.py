"""Several processes on one machine (CPU, gloo): what they compute together, and that a launcher starts them."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny_run import all_equal, difference, write_both
from whole_run import (
    Forked,
    checkpoint_names,
    forking,
    interrupted_after,
    lora,
    main,
    metrics,
    quicken,
    ranks,
    snapshot,
    state,
    summary,
    train,
    words,
)

from bilora_diffusion import initialisation, prior, sampling
from bilora_diffusion.randomness import stream_seed
from bilora_diffusion.training import Trainer

ROOT = Path(__file__).parents[1]
SMALL = {"lora_layers": "to_q"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_both(tmp_path_factory.mktemp("material"))[0]


@pytest.fixture(scope="module")
def class_pictures(pictures: Path) -> Path:
    return pictures.parent / "class_pictures"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)


def train_in(count: int, argv: list[str], folder: Path, code: int = 0) -> list[Forked]:
    """The same command line in every process; each must end with this code."""
    children = ranks(count, lambda rank: main(argv), folder / "logs of ranks")
    codes = [child.wait() for child in children]
    assert codes == [code] * count, "\n".join(child.log.read_text() for child in children)
    return children


KINDS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "max_grad_norm": 1e-3, **SMALL},
    "bilora": {"train_text_encoder": True, "gradient_accumulation_steps": 2, "loss_gap_steps": 1, "random_flip": True},
    "normalized, class pictures": {
        "ascent": "normalized",
        "with_prior_preservation": True,
        "loss_gap_steps": 2,
        **SMALL,
    },
    # As many directions as the layers have: the sketch is the gradient but for those a thousandth as strong as the
    # strongest, which rounding keeps or drops. Without an average over the processes the weights differ by 0.24.
    "sketched gradients": {"method": "bilora-fresh", "ascent_share": 1, "auxiliary_rank": 64, "rho": 0.05, **SMALL},
    "base prediction": {"with_prior_preservation": True, "prior_source": "base_prediction", **SMALL},
}


RARER = ("normalized, class pictures", "base prediction")
"""Run by `make test-slow`."""


@forking
@pytest.mark.parametrize("kind", [pytest.param(one, marks=[pytest.mark.slow] * (one in RARER)) for one in KINDS])
def test_two_with_batch_1_are_one_with_batch_2(kind: str, pictures: Path, class_pictures: Path, tmp_path: Path) -> None:
    flags = {
        "class_data_dir": class_pictures,
        "class_prompt": "a picture",
        "num_class_images": 3,
        "caption_dropout": 0.2,
        "checkpointing_steps": 4,
        **KINDS[kind],
    }
    one, two = tmp_path / "one", tmp_path / "two"
    still = {"max_train_steps": 1, "learning_rate": 0, "text_encoder_lr": 0}
    start = train(pictures, tmp_path / "start", train_batch_size=2, **{**flags, **still})
    together = train(pictures, one, train_batch_size=2, **flags)
    children = train_in(2, words(pictures, two, train_batch_size=1, **flags), tmp_path)
    # Relative to what training changed. Measured: 2e-5; with Adam, which divides a rounding by a tiny gradient, 4e-4.
    assert difference(together, lora(two), start) < (2e-2 if kind == "sketched gradients" else 1e-3)
    assert summary(two)["processes"] == 2 and summary(one)["processes"] == 1
    for name in ("losses", "clean_losses", "perturbed_losses"):
        assert summary(two)[name] == (summary(one)[name] and pytest.approx(summary(one)[name], rel=1e-4)), name
    if flags.get("method", "bilora") == "bilora":
        auxiliary = [load_file(folder / "checkpoint-4" / "auxiliary.safetensors") for folder in (one, two)]
        assert difference(*auxiliary) < 1e-3
    # One of them tells and writes, the other is silent.
    assert [line["step"] for line in metrics(two)] == [1, 2, 3, 4]
    assert "Traceback" not in children[1].log.read_text() and "/4" not in children[1].log.read_text()
    assert "x 2 processes" in (two / "README.md").read_text()
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}


@forking
def test_two_share_one_start(pictures: Path, tmp_path: Path) -> None:
    flags = {"method": "lora", "init_lora_weights": "pissa_niter_1", "checkpointing_steps": 4, **SMALL}
    one, two = tmp_path / "one", tmp_path / "two"
    train(pictures, one, train_batch_size=2, **flags)

    def main_with_rounding_of_its_own(rank: int) -> int:
        if rank == 1:  # as another processor's linear algebra would have, only more of it
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(initialisation, "stream_seed", lambda seed, *stream: stream_seed(seed + 1, *stream))
                return main(words(pictures, two, train_batch_size=1, **flags))
        return main(words(pictures, two, train_batch_size=1, **flags))

    children = ranks(2, main_with_rounding_of_its_own, tmp_path / "logs of ranks")
    assert [child.wait() for child in children] == [0, 0], [child.log.read_text() for child in children]
    starts = [load_file(folder / "checkpoint-4" / "factors.safetensors") for folder in (one, two)]
    first, second = ({k: v for k, v in tensors.items() if k.startswith("start.")} for tensors in starts)
    assert all_equal(first, second)
    # Had they begun apart, the gradients of the second would be those of another model.
    assert difference(*starts) < 1e-3
    assert summary(two)["losses"] == pytest.approx(summary(one)["losses"], rel=1e-4)


@forking
def test_two_resume_where_they_stopped(pictures: Path, tmp_path: Path) -> None:
    flags = {"lora_dropout": 0.2, "random_flip": True, **SMALL}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_in(2, words(pictures, whole, **flags), tmp_path)
    with interrupted_after(1):
        train_in(2, words(pictures, parts, **flags), tmp_path, code=130)
    assert checkpoint_names(parts) == ["checkpoint-3"]  # see `StopAfter`
    train_in(2, words(pictures, parts, resume_from_checkpoint="latest", **flags), tmp_path)
    assert all_equal(lora(whole), lora(parts))
    assert summary(whole)["losses"] == summary(parts)["losses"]


@forking
def test_a_signal_to_one_stops_all_after_the_same_step(pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    argv = words(pictures, folder, max_train_steps=500, seed=None, **SMALL)
    children = ranks(2, lambda rank: main(argv), tmp_path)
    children[0].wait_for(lambda: (folder / "metrics.jsonl").exists())
    os.kill(children[1].pid, signal.SIGINT)
    assert [child.wait() for child in children] == [130, 130]
    steps = state(folder)["step"]
    assert checkpoint_names(folder) == [f"checkpoint-{steps}"]
    assert summary(folder)["steps"] == steps < 500
    assert isinstance(summary(folder)["seed"], int)  # drawn by one, told to the other


@forking
def test_two_make_class_pictures_as_one_does(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = sampling.sample_pictures
    monkeypatch.setattr(prior, "sample_pictures", lambda *a, **k: draw(*a, **{**k, "steps": 1}))
    flags = {
        "with_prior_preservation": True,
        "class_prompt": "a picture",
        "num_class_images": 5,
        "sample_batch_size": 1,
        "max_train_steps": 1,
        **SMALL,
    }
    train(pictures, tmp_path / "one", class_data_dir=tmp_path / "by one", **flags)
    train_in(2, words(pictures, tmp_path / "two", class_data_dir=tmp_path / "by two", **flags), tmp_path)
    by_one = snapshot(tmp_path / "by one")
    assert len(by_one) == 5 and by_one == snapshot(tmp_path / "by two")


@forking
def test_a_mistake_is_told_once(pictures: Path, tmp_path: Path) -> None:
    argv = words(tmp_path / "nothing here", tmp_path / "run", **SMALL)
    children = train_in(2, argv, tmp_path, code=2)
    told = [child.log.read_text() for child in children]
    assert re.fullmatch(r"error: [^\n]*nothing here[^\n]*\n", told[0])
    assert told[1] == ""


@forking
def test_a_step_that_is_not_finite_for_one_is_skipped_by_all(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.begin_step

    def poisoned(self: Trainer, micro_batches: Any, number: int, stop: bool = False) -> Any:
        if number == 1 and self.rank == 1:
            micro_batches[0].batch.latents.fill_(float("nan"))
        return step(self, micro_batches, number, stop)

    monkeypatch.setattr(Trainer, "begin_step", poisoned)
    folder = tmp_path / "run"
    train_in(2, words(pictures, folder, **SMALL), tmp_path)
    told = summary(folder)
    assert told["skipped_steps"] == 1 and [loss is None for loss in told["losses"]] == [False, True, False, False]
    assert all(tensor.isfinite().all() for tensor in lora(folder).values())


@pytest.mark.skipif(sys.platform == "win32", reason="gloo through accelerate's launcher is not set up on Windows")
def test_the_launcher_starts_two(pictures: Path, tmp_path: Path) -> None:
    """The README's command. `--num_processes 2 --cpu`, or a MULTI_CPU configuration, starts one without a word."""
    folder = tmp_path / "run"
    launch = "accelerate.commands.accelerate_cli launch --multi_gpu --num_processes 2 --num_machines 1"
    options = "--mixed_precision no --dynamo_backend no --main_process_port 0"
    argv = words(pictures, folder, max_train_steps=1, **SMALL)
    done = subprocess.run(
        [sys.executable, "-m", *launch.split(), *options.split(), "train_dreambooth_bilora.py", *argv],
        cwd=ROOT,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("done: 1 steps") == 1
    told = json.loads((folder / "summary.json").read_text())
    assert told["processes"] == 2 and told["verified"] is True
