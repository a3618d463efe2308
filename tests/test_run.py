"""Whole runs: what they leave in the output folder, what they show, and that every option runs to the end."""

import json
import logging
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_run import all_equal, difference, write_both
from torch import Tensor
from whole_run import (
    KOHYA_FILE,
    LORA_FILE,
    Forked,
    checkpoint_names,
    forking,
    interrupted_after,
    lora,
    main,
    metrics,
    quicken,
    refusal,
    state,
    summary,
    train,
    words,
)

from bilora_diffusion import assembly, finishing, run, sampling
from bilora_diffusion.bases.tiny import build_tiny_random
from bilora_diffusion.batches import TrainingMicroBatch
from bilora_diffusion.config import TrainingConfig
from bilora_diffusion.finishing import peak_memory_bytes
from bilora_diffusion.lora_files import upload
from bilora_diffusion.lora_files.diffusers_format import save_diffusers
from bilora_diffusion.method_names import FLAGS_OF_METHODS
from bilora_diffusion.previews import Previews
from bilora_diffusion.progress import Progress
from bilora_diffusion.strict_json import strict_json
from bilora_diffusion.training import BegunStep, Step, Trainer

SMALL: dict[str, Any] = {"lora_layers": "to_q"}
SECRET = "secretname"  # in every path and token given below, and nowhere in what may be shared


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_both(tmp_path_factory.mktemp(SECRET))[0]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)


FULL: dict[str, Any] = {
    "method": "bilora",
    "train_text_encoder": True,
    "ascent": "normalized",
    "loss_gap_steps": 2,
    "max_train_steps": 4,
    "checkpointing_steps": 2,
    "validation_prompt": "a sks picture in the snow",
    "validation_steps": 2,
    "num_validation_images": 2,
    "report_to": "tensorboard",
    "hub_token": f"hf_{SECRET}",
    "hub_model_id": f"{SECRET}/dog",
}


@pytest.fixture(scope="module")
def full(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run with everything on, its files verified. Not to be written to."""
    folder = tmp_path_factory.mktemp(f"home of {SECRET}") / "dog"
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch, verify=True)
        train(pictures, folder, cache_dir=folder.parent / "cache", **FULL)
    return folder


# --- The output folder ---


def test_every_file_is_there(full: Path) -> None:
    assert {path.name for path in full.iterdir()} == {
        LORA_FILE,
        KOHYA_FILE,
        "README.md",
        "config.yaml",
        "summary.json",
        "metrics.jsonl",
        "state.json",
        "logs",
        "previews",
        "checkpoint-2",
        "checkpoint-4",
    }
    drawn = {"step_000002_0", "step_000002_1", "step_000004_0", "step_000004_1", "final_0", "final_1"}
    assert {path.stem for path in (full / "previews").iterdir()} == drawn
    for name in ("checkpoint-2", "checkpoint-4"):
        held = {path.name for path in (full / name).iterdir()}
        assert held == {LORA_FILE, "auxiliary.safetensors", "training_state.pt", "checkpoint.json"}


def test_the_summary(full: Path) -> None:
    told = summary(full)
    assert told["method"] == "bilora" and told["steps"] == 4 and told["seed"] == 0 and told["processes"] == 1
    assert len(told["losses"]) == 4 and told["final_loss"] == told["losses"][-1]
    assert told["loss_gap_steps"] == [2, 4]
    assert len(told["clean_losses"]) == len(told["perturbed_losses"]) == 2
    # The loss of a step is taken under the same perturbation, on the same draws, as the gap's measurement.
    assert told["perturbed_losses"] == pytest.approx([told["losses"][1], told["losses"][3]], rel=1e-5)
    gaps = [p - c for p, c in zip(told["perturbed_losses"], told["clean_losses"], strict=True)]
    assert told["loss_gap"] == pytest.approx(sum(gaps) / 2)
    assert told["rho"] > 0 and 0 < told["rho_relative"] < 1
    assert 0 < told["c_over_rho"] <= 1 + 1e-6 and 0 <= told["clipped_share"] <= 1
    assert told["seconds_per_step"] > 0 and told["peak_memory_bytes"] > 2**27
    assert told["skipped_steps"] == 0 and told["interrupted"] is False
    assert told["verified"] is True
    assert [one["file"] for one in told["verification"]] == [LORA_FILE, KOHYA_FILE]
    for one in told["verification"]:
        assert one["layers"] == 136 + 12 + 12
        for name in ("unet", "text_encoder.hidden", "text_encoder_2.pooled"):
            assert one["differences"][name] <= one["tolerances"][name]
    assert {"torch", "diffusers", "transformers", "peft", "accelerate", "bilora_diffusion"} <= set(told["versions"])
    assert (
        told["parameters"]["primary"] == told["parameters"]["auxiliary"] == sum(t.numel() for t in lora(full).values())
    )


def test_what_a_method_lacks_is_null(pictures: Path, tmp_path: Path, quick: None) -> None:
    train(pictures, tmp_path / "run", method="lora", loss_gap_steps=1, **SMALL)
    told = summary(tmp_path / "run")
    lacking = ("rho", "rho_relative", "clipped_share", "c_over_rho", "loss_gap", "clean_losses")
    lacking += ("inert", "too_strong", "leaning")
    assert {name: told[name] for name in lacking} == dict.fromkeys(lacking)
    assert len(told["losses"]) == 4 and told["parameters"]["auxiliary"] == 0
    assert set(metrics(tmp_path / "run")[0]) == {"step", "loss", "lr", "seconds"}


def test_the_curves_and_the_state(full: Path) -> None:
    lines = metrics(full)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["loss"] for line in lines] == summary(full)["losses"]
    assert all(line["lr"] == 1e-3 and line["seconds"] > 0 and line["c_over_rho"] > 0 for line in lines)
    assert ["loss_gap" in line for line in lines] == [False, True, False, True]
    told = state(full)
    assert (told["state"], told["step"], told["steps"]) == ("finished", 4, 4)


def test_the_card(full: Path) -> None:
    text = (full / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    values = yaml.safe_load(head)
    assert "instance_prompt" not in values and "bilora" in values["tags"]  # all pictures have captions of their own
    assert "a sks picture of kind 0" in body
    assert [one["output"]["url"] for one in values["widget"]] == ["previews/final_0.png", "previews/final_1.png"]
    assert all((full / one["output"]["url"]).exists() for one in values["widget"])
    assert {one["text"] for one in values["widget"]} == {"a sks picture in the snow"}
    assert LORA_FILE in body and KOHYA_FILE in body


@pytest.mark.parametrize("captions", [4, 3, 0])
def test_the_prompt_is_the_pictures_or_it_is_told(captions: int, pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copies"
    shutil.copytree(pictures, folder)
    for path in sorted(folder.glob("*.txt"))[captions:]:
        path.unlink()
    config = TrainingConfig(
        pretrained_model_name_or_path="tiny-random", instance_data_dir=str(folder), instance_prompt=" a sks picture "
    )
    found, warnings = assembly.read_pictures(config)
    assert (assembly.used_prompt(config, found) is None) == (captions == 4)
    assert any("--instance_prompt is not used" in warning for warning in warnings) == (captions == 4)


def test_nothing_of_this_machine_is_in_what_is_shared(full: Path, pictures: Path) -> None:
    shared = [
        path
        for path in full.rglob("*")
        if path.is_file() and path.name != "config.yaml"  # which is for this machine, and is never uploaded
    ]
    assert len(shared) > 15
    for path in shared:
        content = path.read_bytes()
        for word in (SECRET, str(full.parent), str(pictures), str(Path.home()), "hf_"):
            assert word.encode() not in content, f"{word} in {path.name}"
    assert f"hf_{SECRET}" not in (full / "config.yaml").read_text()
    for name in (LORA_FILE, KOHYA_FILE):
        with safe_open(full / name, "pt") as file:
            assert file.metadata()["bilora_method"] == "bilora"


def test_the_auxiliary_is_in_checkpoints_alone(full: Path) -> None:
    for path in (full / LORA_FILE, full / KOHYA_FILE, full / "checkpoint-4" / LORA_FILE):
        assert b"auxiliary" not in re.sub(rb"bilora_auxiliary_rank|auxiliary_rank", b"", path.read_bytes()), path
    assert load_file(full / "checkpoint-4" / "auxiliary.safetensors")
    assert all_equal(lora(full), lora(full / "checkpoint-4"))


@pytest.mark.parametrize("kind", ["full", "lora", "relative", "zero"])
def test_the_configuration_gives_the_same_run_again(
    kind: str, full: Path, pictures: Path, tmp_path: Path, quick: None
) -> None:
    given = {
        "lora": {"method": "lora", "mixed_precision": "bf16", "num_train_epochs": 1, "max_train_steps": None, **SMALL},
        "relative": {"rho_relative": 0.013, "ascent": "sgd", "seed": None, **SMALL},
        "zero": {"rho": 0, **SMALL},
    }
    folder = full if kind == "full" else tmp_path / "first"
    if kind != "full":
        train(pictures, folder, **given[kind])
    again = ["--config", str(folder / "config.yaml"), "--output_dir", str(tmp_path / "again"), "--report_to", "none"]
    assert main(again) == 0
    assert all_equal(lora(folder), lora(tmp_path / "again"))
    assert summary(folder)["losses"] == summary(tmp_path / "again")["losses"]
    configs = [yaml.safe_load((one / "config.yaml").read_text()) for one in (folder, tmp_path / "again")]
    changed = {name for name in configs[0] if configs[0][name] != configs[1][name]}
    assert changed <= {"output_dir", "report_to"}


@pytest.mark.parametrize("method", FLAGS_OF_METHODS["rho"])
def test_one_configuration_serves_all_methods(method: str, pictures: Path, tmp_path: Path, quick: None) -> None:
    """As configs/quickstart.yaml does: what another method reads is passed over."""
    others = {"rho_relative": 0.003, "auxiliary_learning_rate": 1e-4, "sigma": 0.1, "looksam_every": 2}
    train(pictures, tmp_path / "run", method=method, max_train_steps=1, **SMALL, **others)
    again = main(["--config", str(tmp_path / "run" / "config.yaml"), "--output_dir", str(tmp_path / "again")])
    assert again == 0


def test_the_configuration_of_a_resumed_run_gives_the_whole_run(pictures: Path, tmp_path: Path, quick: None) -> None:
    with interrupted_after(2):
        assert main(words(pictures, tmp_path / "run", **SMALL)) == 130
    resumed = train(pictures, tmp_path / "run", resume_from_checkpoint="checkpoint-2", **SMALL)
    again = ["--config", str(tmp_path / "run" / "config.yaml"), "--output_dir", str(tmp_path / "again")]
    assert main(again) == 0
    assert all_equal(resumed, lora(tmp_path / "again"))


def test_a_seed_that_is_not_given_is_drawn(pictures: Path, tmp_path: Path, quick: None) -> None:
    for name in ("one", "two"):
        train(pictures, tmp_path / name, seed=None, max_train_steps=1, **SMALL)
    seeds = {summary(tmp_path / name)["seed"] for name in ("one", "two")}
    assert len(seeds) == 2 and all(isinstance(seed, int) for seed in seeds)


def test_a_file_that_is_not_the_trained_model_is_an_error(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(path: Path, parts: Any, **more: Any) -> None:
        for model in parts.values():
            for name, parameter in model.named_parameters():
                if "default" in name and "attn1.to_q.lora_B" in name:
                    parameter.data[0, 0] += 1
                    try:
                        return save_diffusers(path, parts, **more)
                    finally:
                        parameter.data[0, 0] -= 1

    monkeypatch.setattr(finishing, "save_diffusers", spoilt)
    assert main(words(pictures, tmp_path / "run", max_train_steps=1, **SMALL)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and LORA_FILE in line and "attn1.to_q.lora_B.weight" in line
    assert state(tmp_path / "run")["state"] == "failed"


@pytest.mark.parametrize(("upcast", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_the_precision_of_the_files(
    upcast: bool, dtype: torch.dtype, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quicken(monkeypatch, verify=True)
    flags = {**SMALL, "mixed_precision": "bf16", "upcast_before_saving": upcast, "max_train_steps": 1}
    tensors = train(pictures, tmp_path / "run", checkpointing_steps=1, **flags)
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert {
        t.dtype for n, t in load_file(tmp_path / "run" / KOHYA_FILE).items() if "lora_" in n and "alpha" not in n
    } == {dtype}
    # What is resumed from is exact.
    assert {tensor.dtype for tensor in lora(tmp_path / "run" / "checkpoint-1").values()} == {torch.float32}


def test_no_kohya_file_if_none_is_wanted(pictures: Path, tmp_path: Path, quick: None) -> None:
    train(pictures, tmp_path / "run", output_kohya_format=False, max_train_steps=1, **SMALL)
    assert not (tmp_path / "run" / KOHYA_FILE).exists()
    assert KOHYA_FILE not in (tmp_path / "run" / "README.md").read_text()


def test_json_has_no_numbers_that_are_none() -> None:
    value = {"a": [1.5, math.nan, (math.inf, -math.inf)], "b": {"c": math.nan, "d": "NaN", "e": None, "f": True}}
    text = strict_json(value)
    assert json.loads(text) == {"a": [1.5, None, [None, None]], "b": {"c": None, "d": "NaN", "e": None, "f": True}}


# --- On the screen ---


@forking
def test_what_a_run_shows(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: what the libraries print past Python's streams is seen too."""
    quicken(monkeypatch, verify=True)
    flags = {"validation_prompt": "x", "validation_steps": 2, "loss_gap_steps": 1}
    child = Forked(lambda: main(words(pictures, tmp_path / "run", **flags)), tmp_path / "log")
    assert child.wait() == 0
    printed = child.log.read_bytes().decode()  # as text, "\r" would be read as "\n"
    last = printed.split("\r")[-1].splitlines()[0]
    told = summary(tmp_path / "run")
    for text in (
        "bilora: 100%",
        "4/4",
        f"loss={told['final_loss']:.4f}",
        "lr=1.0e-03",
        f"c/rho={told['c_over_rho']:.2f}",
        "gap=",
        "s/step=",
    ):
        assert text in last, text
    assert re.search(r"\[\d\d:\d\d<\d\d:\d\d", last)  # time used < time left
    others = [line for line in re.sub(r"[^\n]*\r", "", printed).splitlines() if line and not line.startswith("bilora:")]
    ours = (
        "--instance_prompt is not used",
        "latents are not cached",
        "done: 4 steps",
        str(tmp_path),
        "note: ",
        "tip: ",
    )
    assert [line for line in others if not line.startswith(ours)] == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"rho": 1e4}, "c / rho never passed"),
        ({"rho": 1e-7, "auxiliary_learning_rate": 1}, "never left the noise"),
        ({"rho": 2, "ascent": "normalized", "ascent_fraction": 0.9}, None),
        ({"method": "lora"}, None),
    ],
)
def test_an_auxiliary_that_does_nothing_is_told(
    flags: dict, said: str | None, pictures: Path, tmp_path: Path, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    train(pictures, tmp_path / "run", loss_gap_steps=1, **flags, **SMALL)
    notes = [message for message in caplog.messages if message.startswith("note: ")]
    told = summary(tmp_path / "run")["inert"]
    if said is None:
        assert notes == [] and told is None
    else:
        assert len(notes) == 1 and said in notes[0] and said in told and "\n" not in told


def test_a_perturbation_that_is_too_strong_is_told() -> None:
    def told(perturbed: list[float]) -> str | None:
        clean = [0.1] * len(perturbed)
        return Progress(gap_steps=[1] * len(clean), clean_losses=clean, perturbed_losses=perturbed).is_too_strong()

    assert "with it the loss was 4.5 times what it was without" in told([0.4, 0.5])
    assert told([0.2, 0.39]) is None and told([0.05]) is None and told([]) is None


def test_a_primary_that_leans_on_the_auxiliary_is_told() -> None:
    def told(gaps: list[float], **values: object) -> str | None:
        losses = [0.1 + 0.01 * place for place in range(len(gaps))]
        perturbed = [loss + gap for loss, gap in zip(losses, gaps, strict=True)]
        known = {"clean_losses": losses, "perturbed_losses": perturbed, "highest_c_over_rho": 1.0, **values}
        return Progress(**known).leans_on_auxiliary()

    leaning = [-0.001, -0.002, -0.003, -0.002, -0.002]
    assert "the loss was 1.7% lower with it" in told(leaning) and "\n" not in told(leaning)
    assert told([-gap for gap in leaning]) is None
    assert told(leaning[:4]) is None  # too few
    assert "at the last look the loss was 10.0% lower" in told([0.01, 0.02, -0.012]) and "anneal" in told([-0.02])
    assert told([-0.02, -0.02, -0.005]) is None and told([-0.02], highest_c_over_rho=None) is None
    assert told([gap / 100 for gap in leaning]) is None  # too little
    assert told([-0.02, 0.018, -0.019, 0.017, -0.002]) is None  # chance
    assert told(leaning, highest_c_over_rho=None) is None  # dual-lora's second adapter descends by intent


# --- Previews ---


def picture(path: Path) -> bytes:
    return Image.open(path).tobytes()


@pytest.mark.parametrize(
    "text_encoders",
    [pytest.param(False, marks=pytest.mark.slow), True],
    ids=["frozen text encoders", "trained text encoders"],
)
def test_a_preview_is_what_the_exported_lora_draws(
    text_encoders: bool, pictures: Path, tmp_path: Path, quick: None
) -> None:
    """The auxiliary is large here, and dropout on: neither may show."""
    flags = {
        "train_text_encoder": text_encoders,
        "lora_dropout": 0.3,
        "rho": 20,
        "ascent": "normalized",
        "ascent_fraction": 0.5,
        "learning_rate": 0.01,
        "checkpointing_steps": 2,
    }
    shown = {"validation_prompt": "a sks picture", "validation_steps": 2, "num_validation_images": 2}
    folder = tmp_path / "run"
    tensors = train(pictures, folder, **flags, **shown)
    for step in (2, 4):
        pipeline = build_tiny_random()
        pipeline.load_lora_weights(str(folder / f"checkpoint-{step}" / LORA_FILE))
        drawn = draw(pipeline, "a sks picture", 2)
        assert drawn == [picture(folder / "previews" / f"step_00000{step}_{number}.png") for number in range(2)]
    assert drawn == [picture(folder / "previews" / f"final_{number}.png") for number in range(2)]
    assert picture(folder / "previews" / "step_000002_0.png") != drawn[0]
    # And they leave the training as it is.
    assert all_equal(tensors, train(pictures, tmp_path / "without", **flags))
    assert not (tmp_path / "without" / "previews").exists()


def draw(pipeline: Any, prompt: str, count: int) -> list[bytes]:
    vae, pipeline.vae = pipeline.vae, None
    sampling.use_sampling_scheduler(pipeline)
    drawn = sampling.sample_pictures(
        pipeline, prompt, numbers=range(count), seed=0, resolution=64, load_vae=lambda: vae, steps=2
    )
    return [one.tobytes() for one in drawn]


@pytest.mark.parametrize(
    ("steps", "epochs", "total", "due"),
    [
        (3, 50, 10, [3, 6, 9]),
        (None, 1, 10, [4, 8, 10]),
        (None, 2, 20, [4, 12, 20]),
        (None, 2, 19, [4, 12, 19]),
        (None, 50, 10, [4]),
        (None, 50, 2, [2]),
    ],
)
def test_when_a_preview_is_due(steps: int | None, epochs: int, total: int, due: list[int]) -> None:
    """By epoch: after those whose number, from 0, is a multiple of --validation_epochs, as in the stock script."""
    config = SimpleNamespace(validation_prompt="x", validation_steps=steps, validation_epochs=epochs)
    previews = Previews(config, None, None, None, None, total, steps_per_epoch=4)  # type: ignore[arg-type]
    assert [step for step in range(1, total + 1) if previews.is_due(step)] == due


def test_previews_by_epoch_and_the_final_prompt(pictures: Path, tmp_path: Path, quick: None) -> None:
    flags = {"validation_prompt": "", "validation_epochs": 1, "final_validation_prompt": "another"}
    train(pictures, tmp_path / "run", num_train_epochs=2, max_train_steps=None, **flags, **SMALL)
    names = {path.stem for path in (tmp_path / "run" / "previews").iterdir()}
    assert names == {"step_000004_0", "step_000008_0", "final_0"}
    last = [picture(tmp_path / "run" / "previews" / f"{name}.png") for name in ("step_000008_0", "final_0")]
    assert last[0] != last[1]
    train(pictures, tmp_path / "two", skip_final_inference=True, max_train_steps=1, **flags, **SMALL)
    assert {path.stem for path in (tmp_path / "two" / "previews").iterdir()} == {"step_000001_0"}


# --- From a LoRA ---


def strengths(tensors: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """s B A of every layer of a file."""
    return {
        name: scale * tensors[name.replace("lora_A", "lora_B")] @ A for name, A in tensors.items() if "lora_A" in name
    }


@pytest.mark.parametrize("name", [LORA_FILE, KOHYA_FILE, "."])
@pytest.mark.parametrize("alpha", [4, 1])
def test_continuing_from_a_lora(name: str, alpha: int, full: Path, pictures: Path, tmp_path: Path, quick: None) -> None:
    flags = {"train_text_encoder": True, "learning_rate": 0, "text_encoder_lr": 0, "max_train_steps": 1}
    begun = train(pictures, tmp_path / "run", init_lora_from=full / name, lora_alpha=alpha, **flags)
    assert difference(strengths(lora(full), 2.0), strengths(begun, alpha / 2)) < 1e-6
    assert difference(strengths(lora(full), 2.0), strengths(begun, 1.1 * alpha / 2)) > 0.05


@pytest.mark.parametrize("name", [LORA_FILE, KOHYA_FILE])
def test_continuing_from_the_change_since_a_start(name: str, pictures: Path, tmp_path: Path, quick: None) -> None:
    """It is an ordinary LoRA, of twice the rank."""
    started = train(pictures, tmp_path / "one", method="lora", init_lora_weights="pissa", **SMALL)
    flags = {"learning_rate": 0, "max_train_steps": 1, "rank": 4, "lora_alpha": 8, **SMALL}
    begun = train(pictures, tmp_path / "two", method="lora", init_lora_from=tmp_path / "one" / name, **flags)
    assert difference(strengths(started, 2.0), strengths(begun, 2.0)) < 1e-6


def test_what_does_not_fit_a_lora_is_refused(
    full: Path, pictures: Path, tmp_path: Path, quick: None, capsys: pytest.CaptureFixture
) -> None:
    train(pictures, tmp_path / "dora", method="lora", use_dora=True, max_train_steps=1, **SMALL)
    train(pictures, tmp_path / "plain", method="lora", max_train_steps=1, **SMALL)
    capsys.readouterr()

    def said(source: Path, **flags: Any) -> str:
        # Cached latents, as the remark that they are not is a line of its own.
        return refusal(words(pictures, tmp_path / "run", init_lora_from=source, center_crop=True, **flags), capsys)

    assert "give --rank 2" in said(full, rank=3, train_text_encoder=True)
    assert "--train_text_encoder" in said(full)
    assert "--lora_layers" in said(tmp_path / "plain", lora_layers="to_k")
    assert "DoRA" in said(tmp_path / "dora")
    assert "--use_dora" in said(tmp_path / "plain", use_dora=True, method="lora", **SMALL)
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_does_not_look_for_the_lora_it_began_with(pictures: Path, tmp_path: Path, quick: None) -> None:
    train(pictures, tmp_path / "start", method="lora", max_train_steps=1, **SMALL)
    flags = {"init_lora_from": tmp_path / "start" / LORA_FILE, **SMALL}
    whole = train(pictures, tmp_path / "whole", **flags)
    with interrupted_after(2):
        assert main(words(pictures, tmp_path / "parts", **flags)) == 130
    (tmp_path / "start" / LORA_FILE).unlink()
    assert all_equal(whole, train(pictures, tmp_path / "parts", resume_from_checkpoint="latest", **flags))
    assert not all_equal(whole, train(pictures, tmp_path / "plain", **SMALL))


# --- The step that the device is at work on ---


def test_a_loss_is_read_when_the_next_step_has_been_asked_for(
    pictures: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the steps whose weights are saved, shown or measured, and the last."""
    order: list[str] = []
    begin, result = Trainer.begin_step, BegunStep.result

    def begun(self: Trainer, batches: Any, number: int, stop: bool = False) -> BegunStep:
        order.append(f"{number + 1}")
        step = begin(self, batches, number, stop)
        step.number = number + 1
        return step

    def read(self: BegunStep) -> Step:
        order.append(f"{self.number} read")
        return result(self)

    monkeypatch.setattr(Trainer, "begin_step", begun)
    monkeypatch.setattr(BegunStep, "result", read)
    flags = {"max_train_steps": 7, "checkpointing_steps": 3, "loss_gap_steps": 6, "method": "bilora", **SMALL}
    train(pictures, tmp_path / "run", **flags)
    # Saved after 3 and 6, measured before 6.
    assert " ".join(order) == "1 2 1 read 3 2 read 3 read 4 5 4 read 5 read 6 6 read 7 7 read"
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]
    assert all(line["seconds"] > 0 for line in lines)


# --- Losses that are not finite ---


def spoil(monkeypatch: pytest.MonkeyPatch, steps: range) -> None:
    """The losses of these steps, counted from 0 over all that is trained from now on, are infinite."""
    add_gradient = TrainingMicroBatch.add_gradient
    loss = TrainingMicroBatch.loss
    done = 0

    def spoilt(self: TrainingMicroBatch, rows: slice = slice(None)) -> Tensor:
        return loss(self, rows) * (math.inf if done in steps else 1)

    def counted(self: TrainingMicroBatch, rows: slice = slice(None), weight: float = 1.0) -> Tensor:
        nonlocal done
        value = add_gradient(self, rows, weight)
        done += 1
        return value

    monkeypatch.setattr(TrainingMicroBatch, "loss", spoilt)
    monkeypatch.setattr(TrainingMicroBatch, "add_gradient", counted)


@pytest.mark.parametrize("ascent", ["adamw", "sgd", "normalized"])
def test_a_bad_step_is_skipped_and_counted(
    ascent: str, pictures: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    spoil(monkeypatch, range(1, 3))
    flags = {"ascent": ascent, "max_bad_steps": 3, "loss_gap_steps": 1, "checkpointing_steps": 3, **SMALL}
    tensors = train(pictures, tmp_path / "run", **flags)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    told = summary(tmp_path / "run")
    assert [loss is None for loss in told["losses"]] == [False, True, True, False]
    assert told["skipped_steps"] == 2 and told["final_loss"] == told["losses"][3]
    assert [line["loss"] is None for line in metrics(tmp_path / "run")] == [False, True, True, False]
    assert told["loss_gap_steps"] == [1, 4]  # not to be measured in between
    assert any("2 steps were skipped" in message for message in caplog.messages)
    saved = json.loads((tmp_path / "run" / "checkpoint-3" / "checkpoint.json").read_text())["progress"]
    assert saved["skipped_in_a_row"] == 2 and Progress.from_json(saved).skipped_in_a_row == 0


def test_many_bad_steps_are_told_while_the_next_is_at_work(
    pictures: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    flags = {"max_bad_steps": 2, "checkpointing_steps": 99, "loss_gap_steps": 0, "max_train_steps": 9, **SMALL}
    spoil(monkeypatch, range(2, 99))
    assert main(words(pictures, tmp_path / "run", **flags)) == 2
    assert "2 steps in a row (up to step 4)" in capsys.readouterr().err.splitlines()[-1]
    assert [line["loss"] is None for line in metrics(tmp_path / "run")] == [False, False, True, True]
    assert state(tmp_path / "run")["state"] == "failed"


def test_many_bad_steps_stop_the_run_and_it_can_go_on(
    pictures: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    flags = {"max_bad_steps": 2, "checkpointing_steps": 1, "max_train_steps": 6, **SMALL}
    with monkeypatch.context() as patch:
        spoil(patch, range(2, 99))
        assert main(words(pictures, tmp_path / "run", **flags)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and "2 steps in a row" in line
    assert all(flag in line for flag in ("--learning_rate", "--rho", "--mixed_precision bf16"))
    assert state(tmp_path / "run")["state"] == "failed"
    assert checkpoint_names(tmp_path / "run") == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    train(pictures, tmp_path / "run", resume_from_checkpoint="latest", **flags)
    told = summary(tmp_path / "run")
    assert [loss is None for loss in told["losses"]] == [False, False, True, False, False, False]
    resumed = train(pictures, tmp_path / "run", resume_from_checkpoint="checkpoint-2", **flags)
    assert all_equal(resumed, train(pictures, tmp_path / "whole", **flags))


# --- Trackers and the hub ---


def test_tensorboard(full: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (full / "logs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    read = {name: [(one.step, one.value) for one in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert set(read) == {"loss", "lr", "c_over_rho", "clipped_share", "loss_gap", "seconds"}
    for name in ("loss", "c_over_rho"):
        assert read[name] == [(line["step"], pytest.approx(line[name])) for line in metrics(full)]
    assert [step for step, _ in read["loss_gap"]] == [2, 4]
    images = {name.split("/")[0]: events.Images(name) for name in events.Tags()["images"]}
    assert set(images) == {"validation", "test"}
    (hparams,) = folder.rglob("hparams.yml")
    assert yaml.safe_load(hparams.read_text())["rank"] == 2


def test_no_tracker(pictures: Path, tmp_path: Path, quick: None) -> None:
    train(pictures, tmp_path / "run", report_to="none", max_train_steps=1, **SMALL)
    assert not (tmp_path / "run" / "logs").exists()


def test_all_trackers_that_are_installed(
    pictures: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    flags = {"report_to": "all", "max_train_steps": 1, "validation_prompt": "x", "validation_steps": 1, **SMALL}
    train(pictures, tmp_path / "run", **flags)
    assert list((tmp_path / "run" / "logs").rglob("events.out.tfevents*"))


def test_a_tracker_that_is_not_installed(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "wandb" else find(name, *rest))
    assert "pip install wandb" in refusal(words(pictures, tmp_path / "run", report_to="wandb"), capsys)
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_does_not_start(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no account\nlog in first")

    monkeypatch.setattr(run.Accelerator, "init_trackers", fail)
    argv = words(pictures, tmp_path / "run", report_to="tensorboard", center_crop=True, **SMALL)
    line = refusal(argv, capsys)
    assert "--report_to tensorboard" in line and "no account log in first" in line


class Hub:
    """In the place of the hub's client: notes what would be sent."""

    calls: dict[str, Any]

    def __init__(self, token: str | None = None) -> None:
        Hub.calls = {"token": token}

    def create_repo(self, name: str, **more: Any) -> SimpleNamespace:
        Hub.calls |= {"name": name, **more}
        return SimpleNamespace(repo_id=f"somebody/{name}")

    def upload_folder(self, **more: Any) -> None:
        from huggingface_hub.utils import filter_repo_objects

        folder = Path(more["folder_path"])
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        sent = filter_repo_objects(names, allow_patterns=more["allow_patterns"])
        Hub.calls |= {"repo_id": more["repo_id"], "sent": sorted(sent)}


def test_only_what_may_be_shared_goes_to_the_hub(
    pictures: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "HfApi", Hub)
    flags = {"push_to_hub": True, "hub_token": "hf_x", "validation_prompt": "x", "validation_steps": 1}
    flags |= {"checkpointing_steps": 1, "max_train_steps": 1, "report_to": "tensorboard", **SMALL}
    train(pictures, tmp_path / "dog", **flags)
    assert Hub.calls["sent"] == sorted(["README.md", LORA_FILE, KOHYA_FILE, "previews/final_0.png"])
    assert (Hub.calls["name"], Hub.calls["repo_id"], Hub.calls["token"]) == ("dog", "somebody/dog", "hf_x")
    train(pictures, tmp_path / "dog", hub_model_id="me/cat", overwrite_output_dir=True, **flags)
    assert Hub.calls["name"] == "me/cat" and "'me/cat'" in (tmp_path / "dog" / "README.md").read_text()


@pytest.mark.parametrize("method", ["create_repo", "upload_folder"])
def test_a_hub_that_refuses_loses_nothing(
    method: str, pictures: Path, tmp_path: Path, quick: None, monkeypatch: Any, capsys: pytest.CaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(upload, "HfApi", Hub)
    monkeypatch.setattr(Hub, method, fail)
    assert main(words(pictures, tmp_path / "run", push_to_hub=True, max_train_steps=1, **SMALL)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: --push_to_hub") and "no route to the hub" in line
    assert state(tmp_path / "run")["state"] == "finished" and summary(tmp_path / "run")["verified"]


def test_an_interrupted_run_is_not_uploaded(
    pictures: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "HfApi", None)
    with interrupted_after(1):
        assert main(words(pictures, tmp_path / "run", push_to_hub=True, **SMALL)) == 130


# --- Every option runs to the end, its files verified ---

OPTIONS: dict[str, dict[str, Any]] = {
    "bf16": {"mixed_precision": "bf16", "train_text_encoder": True},
    "fp16": {"mixed_precision": "fp16", "train_text_encoder": True},
    "bf16 dora": {"mixed_precision": "bf16", "use_dora": True, **SMALL},
    "gradient checkpointing": {"gradient_checkpointing": True, "train_text_encoder": True},
    "bf16 pissa": {"mixed_precision": "bf16", "init_lora_weights": "pissa", "ema_decay": 0.9, **SMALL},
    "fp16 lora_ga": {
        "mixed_precision": "fp16",
        "init_lora_weights": "lora_ga",
        "gradient_checkpointing": True,
        **SMALL,
    },
    "dora": {"use_dora": True, "method": "lora", **SMALL},
    "bilora dora": {"use_dora": True, "train_text_encoder": True, **SMALL},
    "other layers": {"lora_layers": "to_q,ff.net.0.proj,ff.net.2,conv1"},
    "edm": {"do_edm_style_training": True, **SMALL},
    "min-snr": {"snr_gamma": 5, **SMALL},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1, "ascent": "normalized", **SMALL},
    "noise offset": {"noise_offset": 0.1, **SMALL},
    "crops": {"center_crop": False, "random_flip": True, "resolution": 48, **SMALL},
    "centre": {"center_crop": True, "random_flip": True, "cache_latents": True, **SMALL},
    "schedule": {"lr_scheduler": "polynomial", "lr_warmup_steps": 1, "lr_power": 2, "scale_lr": True, **SMALL},
    "gaussian": {"auxiliary_init": "gaussian", "auxiliary_rank": 3, "auxiliary_weight_decay": 0.1, **SMALL},
    "tf32, repeats": {"allow_tf32": True, "repeats": 2, "image_interpolation_mode": "box", **SMALL},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "GRADIENT_ROWS", 4)
    flags = {"max_train_steps": 2, "train_batch_size": 2, "loss_gap_steps": 1, **OPTIONS[name]}
    tensors = train(pictures, tmp_path / "run", **flags)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert any(tensor.any() for key, tensor in tensors.items() if "lora_B" in key)  # zero before training
    told = summary(tmp_path / "run")
    assert told["verified"] is True and told["steps"] == 2
    if "mixed_precision" not in flags:
        assert told["skipped_steps"] == 0 and None not in told["losses"]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_cached_latents_change_nothing(batch_size: int, pictures: Path, tmp_path: Path, quick: None) -> None:
    flags = {"center_crop": True, "random_flip": True, "train_batch_size": batch_size, **SMALL}
    cached, encoded = (train(pictures, tmp_path / str(cache), cache_latents=cache, **flags) for cache in (True, False))
    assert all_equal(cached, encoded) if batch_size == 1 else difference(cached, encoded) < 1e-4


def test_gradient_checkpointing_changes_nothing(pictures: Path, tmp_path: Path, quick: None) -> None:
    flags = {"train_text_encoder": True, "lora_dropout": 0.2, "max_train_steps": 2}
    plain, checkpointed = (
        train(pictures, tmp_path / str(on), gradient_checkpointing=on, **flags) for on in (False, True)
    )
    assert difference(plain, checkpointed) < 1e-5


def test_a_data_set_instead_of_a_folder(pictures: Path, tmp_path: Path, quick: None) -> None:
    (tmp_path / "data").mkdir()
    for path in pictures.glob("*.png"):
        (tmp_path / "data" / path.name).write_bytes(path.read_bytes())
    flags = {"instance_data_dir": None, "dataset_name": tmp_path / "data", "cache_dir": tmp_path / "cache"}
    train(pictures, tmp_path / "run", max_train_steps=1, **flags, **SMALL)
    assert summary(tmp_path / "run")["steps"] == 1


def test_peak_memory_where_there_is_no_resource_module(monkeypatch: pytest.MonkeyPatch) -> None:
    here = peak_memory_bytes(torch.device("cpu"))
    assert 2**27 < here < 2**40
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(sys, "platform", "win32")
    memory = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=12345))
    monkeypatch.setattr("psutil.Process", lambda: memory)
    assert peak_memory_bytes(torch.device("cpu")) == 12345


def test_the_loggers_level_is_for_the_main_process_to_speak(caplog: pytest.LogCaptureFixture) -> None:
    run._set_up_logging(SimpleNamespace(is_main=False))  # type: ignore[arg-type]
    assert logging.getLogger("bilora_diffusion").level == logging.ERROR
    run._set_up_logging(SimpleNamespace(is_main=True))  # type: ignore[arg-type]
    assert logging.getLogger("bilora_diffusion").level == logging.INFO


READ_BY_A_WORKER = """
import sys
from pathlib import Path
from types import SimpleNamespace

from PIL import Image

from bilora_diffusion import run
from bilora_diffusion.data.dreambooth import DreamBoothDataset
from bilora_diffusion.data.pictures import find_pictures
from bilora_diffusion.errors import UserError

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    Image.new("RGB", (64, 80)).save(folder / "a.png")
    pictures, _ = find_pictures(folder, instance_prompt="a picture")
    Image.new("RGB", (64, 96)).save(folder / "a.png")
    parts = SimpleNamespace(dataset=DreamBoothDataset(pictures, resolution=64, seed=0))
    machine, progress = SimpleNamespace(rank=0, processes=1), SimpleNamespace(draws=0)
    config = SimpleNamespace(train_batch_size=1, dataloader_num_workers=1)
    try:
        next(run.Run._batches(SimpleNamespace(parts=parts, machine=machine, config=config, progress=progress)))
    except UserError as error:
        print(error)
"""


def test_a_picture_that_changes_while_workers_read_it(tmp_path: Path) -> None:
    """A worker's error comes wrapped in its traceback; the user is told the line alone.

    In a process of its own: a worker forked from this one, which has the threads of other tests, may stop for ever.
    """
    words = [sys.executable, "-c", READ_BY_A_WORKER, str(tmp_path)]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("a.png changed") and ended.stdout.count("\n") == 1


HUNG_WORKER = """
import os
import sys
import threading
from types import SimpleNamespace

from bilora_diffusion import run
from bilora_diffusion.errors import UserError
from bilora_diffusion.interruption import Interruption

class Dataset:
    def __getitem__(self, draw):
        held.acquire()

    def rows_in(self, draw):
        return 1

if __name__ == "__main__":
    run.READING_SECONDS = 1
    held = threading.Lock()
    held.acquire()
    if sys.argv[1] == "at its start":
        os.register_at_fork(after_in_child=held.acquire)
    machine, progress = SimpleNamespace(rank=0, processes=1), SimpleNamespace(draws=0)
    config, parts = SimpleNamespace(train_batch_size=1, dataloader_num_workers=1), SimpleNamespace(dataset=Dataset())
    with Interruption():
        try:
            next(run.Run._batches(SimpleNamespace(parts=parts, machine=machine, config=config, progress=progress)))
        except UserError as error:
            print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the worker's lock is the parent's where it is forked")
@pytest.mark.parametrize("where", ["at its start", "at a picture"])
def test_a_worker_that_hangs_is_told_and_ended(where: str) -> None:
    """Under the run's handler of SIGTERM, which a worker that stops at its start keeps."""
    ended = subprocess.run([sys.executable, "-c", HUNG_WORKER, where], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("--dataloader_num_workers 1: nothing was read in 1 s"), ended.stderr
