"""What bad input gets: one line that names the flag or the file and the mend, exit code 2, nothing written over."""

import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_run import all_equal, write_both, write_pictures
from whole_run import (
    KOHYA_FILE,
    LORA_FILE,
    Forked,
    checkpoint_names,
    forking,
    lora,
    main,
    quicken,
    refusal,
    snapshot,
    train,
    words,
)

from bilora_diffusion.checkpoint import checkpoints, load_checkpoint

SMALL = {"lora_layers": "to_q"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_both(tmp_path_factory.mktemp("material"))[0]


@pytest.fixture(scope="module")
def old_run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, with a file of the user's in its folder. Nothing below may change it."""
    folder = tmp_path_factory.mktemp("old") / "run"
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        train(pictures, folder, checkpointing_steps=2, max_train_steps=2, **SMALL)
    (folder / "notes.txt").write_text("mine")
    return folder


# --- Flags ---

FLAGS: list[tuple[dict[str, Any], str]] = [
    ({"rank": 0}, "--rank"),
    ({"rank": -1}, "--rank"),
    ({"rank": 2.5}, "--rank"),
    ({"rho": -0.1}, "--rho"),
    ({"rho": "nan"}, "--rho"),
    ({"rho_relative": -1}, "--rho_relative"),
    ({"rho": 1, "rho_relative": 0.1}, "--rho_relative"),
    ({"auxiliary_rank": 0}, "--auxiliary_rank"),
    ({"learning_rate": "fast"}, "--learning_rate"),
    ({"method": "bilorra"}, "did you mean bilora"),
    ({"optimizer": "adam"}, "did you mean AdamW"),
    ({"lr_scheduler": "cosin"}, "did you mean cosine"),
    ({"ascent": "sgdd"}, "did you mean sgd"),
    ({"report_to": "tensorbord"}, "did you mean tensorboard"),
    ({"mixed_precision": "fp8"}, "--mixed_precision"),
    ({"resolution": 100}, "multiple of 8"),
    ({"max_train_steps": 0}, "--max_train_steps"),
    ({"lerning_rate": 1}, "did you mean --learning_rate"),
    ({"instance_data_dir": None}, "--instance_data_dir FOLDER or --dataset_name"),
    ({"dataset_name": "somewhere/something"}, "both set"),
    ({"with_prior_preservation": True, "class_prompt": "x"}, "--class_data_dir"),
    ({"with_prior_preservation": True, "class_data_dir": "x"}, "--class_prompt"),
    ({"optimizer": "prodigy"}, "--auxiliary_learning_rate"),
    ({"config": "nowhere.yaml"}, "nowhere.yaml"),
    ({"report_to": "wandb", "hub_token": "hf_x"}, "--hub_token"),
    ({"pretrained_model_name_or_path": None}, "--pretrained_model_name_or_path is missing"),
]


@pytest.mark.parametrize(("flags", "said"), FLAGS, ids=lambda value: str(value))
def test_flags(
    flags: dict,
    said: str,
    pictures: Path,
    old_run: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = snapshot(old_run)
    assert said in refusal(words(pictures, old_run, overwrite_output_dir=True, **flags), capsys)
    assert snapshot(old_run) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rank=0"], "--rank is 0"),
        (["--pretrained_model_name_or_path=embedded", "--instance_data_dir=absent"], "absent is not there"),
        (["--pretrained_model_name_or_path=embedded", "--instance_data_dir=docs"], "docs holds no pictures"),
    ],
)
def test_a_refused_flag_does_not_wait_for_torch(words: list[str], said: str) -> None:
    """Told by a process that cannot even import it."""
    code = f"import sys; sys.modules['torch'] = None; from bilora_diffusion.cli import main; sys.exit(main({words}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr) and said in done.stderr


# --- Folders and files ---


def no_pictures(folder: Path) -> dict[str, Any]:
    (folder / "notes.txt").write_text("no picture")
    return {"instance_data_dir": folder}


def pictures_one_level_down(folder: Path) -> dict[str, Any]:
    (folder / "deep").mkdir()
    write_pictures(folder / "deep", [(64, 64)], None, seed=0)
    return {"instance_data_dir": folder}


def only_a_cut_picture(folder: Path) -> dict[str, Any]:
    write_pictures(folder, [(64, 64)], None, seed=0)
    path = folder / "0.png"
    path.write_bytes(path.read_bytes()[:200])
    return {"instance_data_dir": folder}


def only_a_tiny_picture(folder: Path) -> dict[str, Any]:
    Image.new("RGB", (15, 300)).save(folder / "small.png")
    return {"instance_data_dir": folder}


def a_picture_without_a_caption(folder: Path) -> dict[str, Any]:
    write_pictures(folder, [(64, 64)], "a caption", seed=0)
    Image.new("RGB", (64, 64)).save(folder / "bare.png")
    return {"instance_data_dir": folder, "instance_prompt": None}


def metadata_that_is_no_json(folder: Path) -> dict[str, Any]:
    write_pictures(folder, [(64, 64)], None, seed=0)
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text"')
    return {"instance_data_dir": folder}


def class_folder_is_a_file(folder: Path) -> dict[str, Any]:
    (folder / "file").write_text("")
    return {"with_prior_preservation": True, "class_prompt": "x", "class_data_dir": folder / "file"}


def class_folder_cannot_be_made(folder: Path) -> dict[str, Any]:
    (folder / "file").write_text("")
    return {"with_prior_preservation": True, "class_prompt": "x", "class_data_dir": folder / "file" / "below"}


def class_pictures_all_broken(folder: Path) -> dict[str, Any]:
    (folder / "a.png").write_bytes(b"no picture")
    flags = {"with_prior_preservation": True, "class_prompt": "x", "num_class_images": 1}
    return flags | {"class_data_dir": folder}


def output_is_a_file(folder: Path) -> dict[str, Any]:
    (folder / "file").write_text("")
    return {"output_dir": folder / "file"}


def output_below_a_file(folder: Path) -> dict[str, Any]:
    (folder / "file").write_text("")
    return {"output_dir": folder / "file" / "run"}


def output_is_the_input(folder: Path) -> dict[str, Any]:
    write_pictures(folder, [(64, 64)], None, seed=0)
    return {"instance_data_dir": folder, "output_dir": folder}


def base_is_another_model(folder: Path) -> dict[str, Any]:
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "X"]}')
    return {"pretrained_model_name_or_path": folder}


def base_is_a_text(folder: Path) -> dict[str, Any]:
    (folder / "base.safetensors").write_text("not a model")
    return {"pretrained_model_name_or_path": folder / "base.safetensors"}


def base_is_a_lora(folder: Path) -> dict[str, Any]:
    save_file({"unet.x.lora_A.weight": torch.ones(2, 2)}, folder / "base.safetensors")
    return {"pretrained_model_name_or_path": folder / "base.safetensors"}


def base_is_nowhere(folder: Path) -> dict[str, Any]:
    return {"pretrained_model_name_or_path": folder / "nowhere"}


def base_is_not_in_the_cache(folder: Path) -> dict[str, Any]:
    return {"pretrained_model_name_or_path": "somebody/something", "cache_dir": folder}


def vae_is_nowhere(folder: Path) -> dict[str, Any]:
    return {"pretrained_vae_model_name_or_path": folder / "nowhere.safetensors"}


def lora_is_nowhere(folder: Path) -> dict[str, Any]:
    return {"init_lora_from": folder / "nowhere.safetensors"}


def lora_is_a_pickle(folder: Path) -> dict[str, Any]:
    torch.save({}, folder / "lora.pt")
    return {"init_lora_from": folder / "lora.pt"}


def lora_is_a_text(folder: Path) -> dict[str, Any]:
    (folder / "lora.safetensors").write_text("no LoRA")
    return {"init_lora_from": folder / "lora.safetensors"}


def lora_is_something_else(folder: Path) -> dict[str, Any]:
    save_file({"weight": torch.ones(2, 2)}, folder / "lora.safetensors")
    return {"init_lora_from": folder / "lora.safetensors"}


def data_set_is_nowhere(folder: Path) -> dict[str, Any]:
    return {"instance_data_dir": None, "dataset_name": folder / "nowhere"}


def data_set_without_the_column(folder: Path) -> dict[str, Any]:
    write_pictures(folder, [(64, 64)], None, seed=0)
    for text in folder.glob("*.txt"):
        text.unlink()
    return {"instance_data_dir": None, "dataset_name": folder, "image_column": "photo"}


def config_with_an_unknown_key(folder: Path) -> dict[str, Any]:
    (folder / "run.yaml").write_text("learning_rat: 1\n")
    return {"config": folder / "run.yaml"}


def config_with_a_wrong_value(folder: Path) -> dict[str, Any]:
    (folder / "run.yaml").write_text("rank: many\n")
    return {"config": folder / "run.yaml", "rank": None}


def layers_that_are_none(_: Path) -> dict[str, Any]:
    return {"lora_layers": "to_q,to_nothing"}


def latents_of_crops(_: Path) -> dict[str, Any]:
    return {"cache_latents": True}


def a_tracker_that_is_not_installed(_: Path) -> dict[str, Any]:
    return {"report_to": "clearml"}


def eight_bits_without_the_package(_: Path) -> dict[str, Any]:
    return {"use_8bit_adam": True}


def attention_without_the_package(_: Path) -> dict[str, Any]:
    return {"enable_xformers_memory_efficient_attention": True}


def an_edm_base_is_no_place_for_snr(_: Path) -> dict[str, Any]:
    return {"do_edm_style_training": True, "snr_gamma": 5}


CASES: list[tuple[Callable[[Path], dict[str, Any]], str]] = [
    (no_pictures, "holds no pictures"),
    (pictures_one_level_down, "subfolders"),
    (only_a_cut_picture, "0.png"),
    (only_a_tiny_picture, "small.png is too small, 15 x 300 px"),
    (a_picture_without_a_caption, "bare.png: give --instance_prompt"),
    (metadata_that_is_no_json, "metadata.jsonl, line 1"),
    (class_folder_is_a_file, "--class_data_dir"),
    (class_folder_cannot_be_made, "--class_data_dir"),
    (class_pictures_all_broken, "a.png"),
    (output_is_a_file, "--output_dir"),
    (output_below_a_file, "--output_dir"),
    (output_is_the_input, "--output_dir"),
    (base_is_another_model, "StableDiffusionPipeline"),
    (base_is_a_text, "--pretrained_model_name_or_path"),
    (base_is_a_lora, "--pretrained_model_name_or_path"),
    (base_is_nowhere, "--pretrained_model_name_or_path"),
    (base_is_not_in_the_cache, "somebody/something"),
    (vae_is_nowhere, "--pretrained_vae_model_name_or_path"),
    (lora_is_nowhere, "--init_lora_from"),
    (lora_is_a_pickle, "never pickles"),
    (lora_is_a_text, "--init_lora_from"),
    (lora_is_something_else, "--init_lora_from"),
    (data_set_is_nowhere, "--dataset_name"),
    (data_set_without_the_column, "--image_column photo"),
    (config_with_an_unknown_key, "run.yaml, line 1"),
    (config_with_a_wrong_value, "run.yaml, line 1"),
    (layers_that_are_none, "--lora_layers"),
    (latents_of_crops, "add --crops_per_image 4 or --center_crop, or leave --cache_latents out"),
    (a_tracker_that_is_not_installed, "pip install clearml"),
    (eight_bits_without_the_package, "pip install bitsandbytes"),
    (attention_without_the_package, "xFormers"),
    (an_edm_base_is_no_place_for_snr, "--snr_gamma"),
]


@pytest.fixture
def without_optional_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if they were not installed, wherever the tests run; and the one that is, without its progress bars."""
    datasets.disable_progress_bars()
    for name in ("bitsandbytes", "bitsandbytes.optim", "xformers", "xformers.ops", "clearml"):
        monkeypatch.setitem(sys.modules, name, None)
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "clearml" else find(name, *rest)
    )


@pytest.mark.usefixtures("without_optional_packages")
@pytest.mark.parametrize(("make", "said"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_files_and_folders(
    make: Callable[[Path], dict[str, Any]],
    said: str,
    pictures: Path,
    old_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    folder = tmp_path / "material"
    folder.mkdir()
    flags = {**SMALL, **make(folder)}
    before = snapshot(tmp_path), snapshot(old_run), snapshot(pictures)
    argv = words(pictures, flags.pop("output_dir", old_run), overwrite_output_dir=True, **flags)
    assert said in refusal(argv, capsys)
    assert (snapshot(tmp_path), snapshot(old_run), snapshot(pictures)) == before


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DEEPSPEED"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "fp8"),
    ],
)
def test_launchers_set_up_for_something_else(
    variable: str, value: str, said: str, pictures: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    assert said in refusal(words(pictures, tmp_path / "run"), capsys)
    assert not (tmp_path / "run").exists()


def test_the_usable_pictures_are_used_and_the_others_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    quicken(monkeypatch)
    folder = tmp_path / "pictures"
    folder.mkdir()
    write_pictures(folder, [(64, 64), (64, 64)], None, seed=0)
    (folder / "1.png").write_bytes((folder / "0.png").read_bytes()[:300])
    Image.new("RGB", (8, 8)).save(folder / "small.png")
    train(folder, tmp_path / "run", max_train_steps=1, **SMALL)
    told = "\n".join(caplog.messages)
    assert "1.png" in told and "small.png" in told and "0.png cannot" not in told


# --- A folder that holds something ---


def test_an_output_folder_that_holds_another_run(
    pictures: Path, old_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before = snapshot(old_run)
    line = refusal(words(pictures, old_run), capsys)
    assert all(flag in line for flag in ("--output_dir", "--resume_from_checkpoint", "--overwrite_output_dir"))
    assert snapshot(old_run) == before
    for name in (LORA_FILE, KOHYA_FILE, "summary.json", "metrics.jsonl", "state.json", "config.yaml", "checkpoint-2"):
        part = tmp_path / name
        part.mkdir()
        (shutil.copytree if (old_run / name).is_dir() else shutil.copy)(old_run / name, part / name)
        assert "holds another run" in refusal(words(pictures, part), capsys)


def test_overwriting_takes_the_old_run_and_nothing_else(
    pictures: Path, old_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quicken(monkeypatch)
    folder = shutil.copytree(old_run, tmp_path / "run")
    mine = {"checkpoint-mine/x.txt": "x", "previews/holiday.png": "y", "logs/other/z": "z", "notes.txt": "mine"}
    for name, text in mine.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "previews" / "step_000001_0.png").write_text("old")
    (folder / "previews" / "final_7.png").write_text("old")
    (folder / "logs" / "dreambooth-bilora-sdxl").mkdir()
    (folder / "logs" / "dreambooth-bilora-sdxl" / "events.out.tfevents.1").write_text("old")
    (folder / "checkpoint-90").mkdir()
    train(pictures, folder, overwrite_output_dir=True, max_train_steps=1, **SMALL)
    assert {name: (folder / name).read_text() for name in mine} == mine
    assert checkpoint_names(folder) == ["checkpoint-mine"]
    assert {path.name for path in (folder / "previews").iterdir()} == {"holiday.png"}
    assert {path.name for path in (folder / "logs").iterdir()} == {"other"}
    assert (folder / "metrics.jsonl").read_text().count("\n") == 1
    again = lora(folder)  # and once more over its own output
    assert all_equal(again, train(pictures, folder, overwrite_output_dir=True, max_train_steps=1, **SMALL))


def test_logs_outside_the_output_folder_are_left_alone(
    pictures: Path, old_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quicken(monkeypatch)
    folder = shutil.copytree(old_run, tmp_path / "run")
    elsewhere = tmp_path / "elsewhere" / "dreambooth-bilora-sdxl"
    elsewhere.mkdir(parents=True)
    (elsewhere / "events").write_text("mine")
    flags = {"overwrite_output_dir": True, "logging_dir": tmp_path / "elsewhere", "max_train_steps": 1, **SMALL}
    train(pictures, folder, **flags)
    assert (elsewhere / "events").read_text() == "mine"


def test_a_readme_of_the_users_is_not_written_over(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "README.md").write_text("# My project")
    assert "README.md" in refusal(words(pictures, tmp_path), capsys)
    assert snapshot(tmp_path) == {"README.md": b"# My project"}


# --- A full disk ---

WRITTEN = (
    "config.yaml",
    "state.json",
    "metrics.jsonl",
    "auxiliary.safetensors",
    "training_state.pt",
    "checkpoint.json",
    LORA_FILE,
    KOHYA_FILE,
    "summary.json",
    "README.md",
    "step_000003_0.png",
    "events.out.tfevents",
)


WRITTEN_LIKE_OTHERS = ("auxiliary.safetensors", "training_state.pt", "state.json", "README.md")
"""Run by `make test-slow`."""


@forking
@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=[pytest.mark.slow] * (one in WRITTEN_LIKE_OTHERS)) for one in WRITTEN]
)
def test_a_disk_that_is_full_for_one_file(
    name: str, pictures: Path, old_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file the trainer writes; the system's refusal comes with the opening of the file."""
    quicken(monkeypatch)
    folder = shutil.copytree(old_run, tmp_path / "run")
    before = snapshot(folder)
    fresh = name == "config.yaml"
    flags = {**SMALL, "max_train_steps": 5, "checkpointing_steps": 3}
    flags |= {"validation_prompt": "x", "validation_steps": 3, "report_to": "tensorboard"}
    flags |= {"overwrite_output_dir": True} if fresh else {"resume_from_checkpoint": "latest"}

    def work() -> int:
        def audit(event: str, arguments: tuple) -> None:
            if event == "open" and name in os.path.basename(str(arguments[0])):
                _, mode, flags = arguments
                if flags & (os.O_WRONLY | os.O_RDWR) or set(mode or "") & set("wax+"):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), arguments[0])

        sys.addaudithook(audit)
        return main(words(pictures, folder, **flags))

    child = Forked(work, tmp_path / "log")
    assert child.wait() == 2, child.log.read_text()
    printed = child.log.read_text()
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in printed
    assert "the disk is full" in errors[0] and "free some space" in errors[0]
    if fresh:
        assert snapshot(folder) == before
    # What was there is whole, and the run goes on from it.
    assert checkpoints(folder)
    for _, path in checkpoints(folder):
        load_checkpoint(path, {})
    assert not [path for path in folder.rglob("*") if ".unfinished" in path.name or path.suffix == ".tmp"]
    flags = {**flags, "overwrite_output_dir": False, "resume_from_checkpoint": "latest", "report_to": "none"}
    assert main(words(pictures, folder, **flags)) == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of one megabyte, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if sys.platform != "linux" or mount is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("free_kib", [0, 4, 8, 40, 120, 500])
def test_a_disk_that_fills_up(
    free_kib: int, small_disk: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    quicken(monkeypatch)
    filler = small_disk / "filler"
    with open(filler, "wb") as file:
        file.write(bytes(1024 * (1024 - free_kib)))
    report = "tensorboard" if free_kib == 40 else "none"
    flags = {**SMALL, "checkpointing_steps": 2, "max_train_steps": 60, "report_to": report}
    argv = words(pictures, small_disk / "run", **flags)
    assert main(argv) == 2
    printed = capfd.readouterr().err
    assert printed.count("error: ") == 1 and "Traceback" not in printed
    assert "the disk is full" in printed
    found = checkpoints(small_disk / "run")
    assert bool(found) == (free_kib == 500)
    for _, path in found:
        load_checkpoint(path, {})
    filler.unlink()
    for _, path in found[:-1]:
        shutil.rmtree(path)
    flags |= {"resume_from_checkpoint": "latest", "checkpointing_steps": 50}
    flags |= {"max_train_steps": found[-1][0] + 1 if found else 1}
    assert main(words(pictures, small_disk / "run", **flags)) == 0


def test_a_mistake_in_the_programme_is_not_told_as_the_users(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise FileNotFoundError(errno.ENOENT, "gone")

    monkeypatch.setattr("bilora_diffusion.run.assemble", fail)
    with pytest.raises(FileNotFoundError):
        main(words(pictures, tmp_path / "run"))


def test_too_little_gpu_memory(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr("bilora_diffusion.run.assemble", fail)
    assert "--gradient_checkpointing" in refusal(words(pictures, tmp_path / "run"), capsys)


def test_a_message_of_several_lines_is_told_in_one(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from bilora_diffusion.errors import UserError

    def fail(*_: Any, **__: Any) -> None:
        raise UserError("one\n  two\nthree\n")

    monkeypatch.setattr("bilora_diffusion.run.assemble", fail)
    assert refusal(words(pictures, tmp_path / "run"), capsys) == "one two three"
