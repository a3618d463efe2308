"""Thousands of pictures: what is held in memory, what is read again, when a bar is shown, and the two benchmarks."""

import gc
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import ExifTags, Image
from tiny_run import Builder, TinyRun, write_pictures
from whole_run import Forked, forking, in_one_and_in_two, quicken, ranks, words
from whole_run import main as train_main

from benchmarks import processes as processes_benchmark
from benchmarks.scale import __main__ as scale_benchmark
from benchmarks.scale import pictures as scale_pictures
from benchmarks.scale import watched
from benchmarks.scale.report import parts_seconds, slope, table
from bilora_diffusion import bars
from bilora_diffusion.data import reading
from bilora_diffusion.data.dreambooth import DreamBoothDataset
from bilora_diffusion.data.images import image_size, load_image
from bilora_diffusion.data.pictures import find_pictures
from bilora_diffusion.data.tensor_file import TensorFile
from bilora_diffusion.errors import UserError
from bilora_diffusion.run import Run

SMALL = {"lora_layers": "to_q", "center_crop": True}


def folder_of(count: int, folder: Path, masks: Path | None = None) -> Path:
    """So many small pictures, each with a caption of its own."""
    folder.mkdir(parents=True)
    write_pictures(folder, [(64, 72)] * count, "a sks picture of kind", seed=0)
    if masks:
        masks.mkdir()
        for number in range(count):
            half = Image.new("L", (64, 72), 255)
            half.paste(0, (0, 0, 64, 36))
            half.save(masks / f"{number}.png")
    return folder


# --- Memory ---


def tensor_bytes() -> int:
    """Of all tensors that anything in this process refers to, each storage once."""
    gc.collect()
    storages = {}
    for one in gc.get_objects():
        if issubclass(type(one), torch.Tensor) and one.device.type == "cpu":
            storage = one.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def held_by(build: Builder, folder: Path, masks: Path, **flags: Any) -> tuple[int, TinyRun]:
    """Bytes of tensors that a built run holds, after it has drawn a few batches too."""
    before = tensor_bytes()
    run = build("lora", instance_data_dir=str(folder), mask_dir=str(masks), random_flip=True, **flags)
    for step in range(2):
        run.batches(step)
    return tensor_bytes() - before, run


def test_on_disk_the_memory_does_not_grow_with_the_pictures(build: Builder, tmp_path: Path) -> None:
    few, many = folder_of(2, tmp_path / "few"), folder_of(22, tmp_path / "many", tmp_path / "masks")
    growth = {}
    # Latents as they are and mirrored, mean and deviation; a mask for each; both text encoders' states.
    latents, mask, caption = 2 * 2 * 4 * 8 * 8 * 4, 2 * 8 * 8 * 4, (77 * 64 + 32) * 4
    for name, flags in (("memory", {}), ("disk", {"cache_dir_latents": str(tmp_path / "latents")})):
        sizes = [held_by(build, folder, tmp_path / "masks", **flags)[0] for folder in (few, many)]
        growth[name] = (sizes[1] - sizes[0]) / 20
    assert growth["memory"] == pytest.approx(latents + mask + caption, rel=0.02)
    assert abs(growth["disk"]) < 100


def test_on_disk_the_rows_are_the_same_bits(build: Builder, tmp_path: Path) -> None:
    folder, masks = folder_of(5, tmp_path / "pictures", tmp_path / "masks"), tmp_path / "masks"
    _, in_memory = held_by(build, folder, masks)
    _, on_disk = held_by(build, folder, masks, cache_dir_latents=str(tmp_path / "latents"))
    for step in range(6):
        (one,), (other,) = in_memory.batches(step), on_disk.batches(step)
        assert torch.equal(one.latents, other.latents) and torch.equal(one.place_weights, other.place_weights)
        assert torch.equal(one.conditioning.prompt_embeds, other.conditioning.prompt_embeds)
        assert torch.equal(one.conditioning.pooled_prompt_embeds, other.conditioning.pooled_prompt_embeds)


def test_a_run_on_disk_resumes_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)
    in_one_and_in_two(folder_of(3, tmp_path / "p"), tmp_path, cache_dir_latents=tmp_path / "latents", **SMALL)
    left = [path for path in (tmp_path / "latents").rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    assert left == []


def test_latents_that_vanish_during_a_run_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    quicken(monkeypatch)

    def fit(run: Run) -> bool:
        for path in (tmp_path / "latents").rglob("*.safetensors"):
            path.unlink()
        return fitted(run)

    fitted = Run.fit
    monkeypatch.setattr(Run, "fit", fit)
    argv = words(folder_of(2, tmp_path / "p"), tmp_path / "run", cache_dir_latents=tmp_path / "latents", **SMALL)
    assert train_main(argv) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "are gone" in told[0] and "--cache_dir_latents" in told[0]


def test_decoded_pictures_are_let_go_one_by_one(
    build: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []
    let_go = DreamBoothDataset.let_go

    def noted(dataset: DreamBoothDataset) -> None:
        held.append(len(dataset._kept))
        let_go(dataset)

    monkeypatch.setattr(DreamBoothDataset, "let_go", noted)
    build("lora", instance_data_dir=str(folder_of(4, tmp_path / "p")), random_flip=True)
    assert held == [1, 1, 1, 1, 0]


def test_a_tensor_file_gives_back_the_bits_and_leaves_nothing(tmp_path: Path) -> None:
    kept: TensorFile[str] = TensorFile(tmp_path / "made")
    draw = torch.Generator().manual_seed(0)
    given = {
        name: (torch.randn(7, 3, generator=draw).T.to(dtype), torch.randn(2, generator=draw))
        for name, dtype in (("a", torch.float32), ("b", torch.bfloat16), ("c", torch.float16))
    }
    kept.update(given)
    kept["a"] = given["c"]
    assert list(kept) == ["a", "b", "c"] and "d" not in kept
    for name, other in (("c", "c"), ("a", "c"), ("b", "b")):
        assert len(kept[name]) == 2
        for one, two in zip(kept[name], given[other], strict=True):
            assert torch.equal(one, two) and one.dtype == two.dtype
    del kept, given
    gc.collect()
    assert list((tmp_path / "made").iterdir()) == []


def test_a_tensor_file_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file cannot be written"):
        TensorFile(tmp_path / "file")


# --- Time ---


def test_a_folder_of_masks_is_listed_once(build: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, masks = folder_of(6, tmp_path / "p", tmp_path / "masks"), tmp_path / "masks"
    listed = []
    iterdir = Path.iterdir

    def noted(path: Path) -> Iterator[Path]:
        listed.append(path)
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", noted)
    build("lora", instance_data_dir=str(pictures), mask_dir=str(masks))
    assert listed.count(masks) == 1 and listed.count(pictures) <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_the_size_is_that_of_the_whole_picture(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    buffer = io.BytesIO()
    Image.effect_noise((83, 51), 60).convert("RGB").save(buffer, kind, exif=exif)
    whole = load_image(buffer.getvalue(), "it")
    assert image_size(buffer.getvalue(), "it") == (whole.height, whole.width)
    opened = Image.open(buffer)
    assert image_size(opened, "it") == (whole.height, whole.width)
    assert opened.size == (83, 51) or kind == "TIFF"  # which turns itself: what is handed over open is not shrunk


def test_a_jpeg_that_is_cut_anywhere_is_found_out() -> None:
    buffer = io.BytesIO()
    Image.effect_noise((200, 160), 60).convert("RGB").save(buffer, "JPEG", quality=90)
    content = buffer.getvalue()
    for share in (0.1, 0.5, 0.9, 0.99):
        for read in (image_size, load_image):
            with pytest.raises(UserError, match="cannot be read as a picture"):
                read(content[: int(len(content) * share)], "it")


def test_files_are_read_in_order_and_no_further_than_wanted(tmp_path: Path) -> None:
    """More than are read at once; every seventh is broken."""
    for number in range(2 * reading._AT_ONCE + 5):
        if number % 7 == 3:
            (tmp_path / f"{number:03d}.png").write_bytes(b"no picture")
        else:
            Image.new("RGB", (16, 16 + number), "red").save(tmp_path / f"{number:03d}.png")
    pictures, warnings = find_pictures(tmp_path, instance_prompt="x")
    whole = [number for number in range(2 * reading._AT_ONCE + 5) if number % 7 != 3]
    assert [picture.size for picture in pictures] == [(16 + number, 16) for number in whole]
    assert [warning[10:17] for warning in warnings] == [f"{n:03d}.png" for n in range(3, 2 * reading._AT_ONCE + 5, 7)]


def test_an_error_of_a_reader_comes_in_its_turn() -> None:
    def read(number: int) -> int:
        if number == 3:
            raise UserError("three")
        return number

    seen = []
    with pytest.raises(UserError, match="three"):
        for number in reading.read_each(read, range(10), "reading", 10):
            seen.append(number)
    assert seen == [0, 1, 2]


# --- Bars ---

LONG_PARTS = ("reading pictures", "reading masks", "embedding captions", "caching latents")


def test_every_long_part_has_a_bar_that_short_ones_do_not_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    quicken(monkeypatch)
    pictures, masks = folder_of(3, tmp_path / "p", tmp_path / "masks"), tmp_path / "masks"
    flags = {**SMALL, "mask_dir": masks, "max_train_steps": 1}
    assert train_main(words(pictures, tmp_path / "quick", **flags)) == 0
    assert not any(part in capfd.readouterr().err for part in LONG_PARTS)
    monkeypatch.setattr(bars, "SHOWN_AFTER_SECONDS", 0)
    assert train_main(words(pictures, tmp_path / "long", **flags)) == 0
    told = capfd.readouterr().err
    assert all(f"{part}: 100%" in told and "3/3" in told for part in LONG_PARTS), told
    assert train_main(words(pictures, tmp_path / "trained", train_text_encoder=True, **flags)) == 0
    assert "tokenizing captions: 100%" in capfd.readouterr().err


@forking
def test_only_the_main_process_shows_bars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)
    monkeypatch.setattr(bars, "SHOWN_AFTER_SECONDS", 0)
    argv = words(folder_of(3, tmp_path / "p"), tmp_path / "run", max_train_steps=1, **SMALL)
    children = ranks(2, lambda rank: train_main(argv), tmp_path / "logs")
    assert [child.wait() for child in children] == [0, 0]
    first, second = (child.log.read_text() for child in children)
    assert all(part in first for part in LONG_PARTS if "masks" not in part)
    assert not any(part in second for part in LONG_PARTS) and "it/s" not in second


# --- The benchmarks ---


def in_forks(words: Sequence[str], count: int, work: Callable[[list[str]], int], folder: Path) -> tuple[int, str]:
    """What a benchmark's own start of the trainer gives, without ten seconds of imports a process."""
    children = (
        ranks(count, lambda rank: work([*words]), folder / "logs")
        if count > 1
        else [Forked(lambda: work([*words]), folder / "log")]
    )
    return max(child.wait() for child in children), children[0].log.read_text()


@forking
def test_the_scale_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)
    monkeypatch.setattr(scale_benchmark, "_start", lambda words, _: in_forks(words, 1, watched.main, tmp_path))
    words = ["--pictures", "2", "--side", "64", "--resolution", "32", "--steps", "3", "--folder", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch:
        kinds = {kind: scale_benchmark.KINDS[kind] for kind in ("on disk", "found on disk")}
        patch.setattr(scale_benchmark, "KINDS", kinds)
        scale_benchmark.main(words)
    measured = json.loads((tmp_path / "scale_cpu.json").read_text())
    made, found = measured["samples"]
    for sample in (made, found):
        assert len(sample["steps"]) == 3 and min(sample["steps"]) > 0
        assert sample["peak_memory_bytes"] > 1e8
        assert 0 < parts_seconds(sample) < sample["cpu_seconds"]
        assert sum(part["seconds"] for part in sample["parts"].values()) < sample["seconds"]
    caching = "caching latents"
    assert found["parts"][caching]["cpu_seconds"] < made["parts"][caching]["cpu_seconds"]
    assert measured["versions"]["torch"] and "| found on disk | 2 |" in (tmp_path / "scale.md").read_text()
    assert str(tmp_path) not in (tmp_path / "scale_cpu.json").read_text()


def test_what_a_picture_adds() -> None:
    samples = [
        {
            "kind": "in memory",
            "pictures": count,
            "parts": {"reading pictures": {"cpu_seconds": 0.01 * count}, "caching latents": {"cpu_seconds": 0.5}},
            "seconds": 20.0,
            "cpu_seconds": 10 + 0.01 * count,
            "peak_memory_bytes": 1e9 + 5e5 * count,
            "steps": [1.0, 1.0, 0.25],
        }
        for count in (5, 50, 500)
    ]
    assert slope(samples, parts_seconds) == pytest.approx(0.01)
    setting = {"pretrained_model_name_or_path": "b", "resolution": 8, "side": 9, "load_before": 0.0}
    text = table(
        [{"configuration": {**setting, "flags": {"in memory": {}}}, "device": "a CPU", "samples": samples}]
    ).splitlines()
    assert "| in memory | 500 | 20.0 s (15.0) | 5.00 | 0.50 | 9.5 | 1,250 MB | +248 MB | 250 ms |" in text
    assert "| in memory | 10.0 ms | 500.0 kB | 10.0 ms, 10.0 ms |" in text


def test_the_benchmarks_pictures_follow_from_their_number(tmp_path: Path) -> None:
    for name, count in (("one", 2), ("other", 3)):
        scale_pictures.write_pictures(tmp_path / name, count, 64)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["00000.jpg", "00000.txt", "00001.jpg", "00001.txt"]
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes() for name in files)
    assert len({path.read_bytes() for path in (tmp_path / "other").iterdir()}) == 6


@forking
def test_the_benchmark_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)
    monkeypatch.setattr(
        processes_benchmark, "_launch", lambda words, count, _: in_forks(words, count, train_main, tmp_path)
    )
    monkeypatch.setattr(processes_benchmark, "_cores", lambda: 2)
    argv = "--methods lora --repeats 1 --steps 5 --base tiny-random --resolution 32 --batch 1 --folder".split()  # noqa: SIM905
    processes_benchmark.main([*argv, str(tmp_path)])
    measured = json.loads((tmp_path / "processes_cpu.json").read_text())
    assert [sample["processes"] for sample in measured["samples"]] == [1, 2]
    assert all(len(sample["seconds"]) == 5 and min(sample["seconds"]) > 0 for sample in measured["samples"])
    assert "| lora | " in (tmp_path / "processes.md").read_text()
    assert str(tmp_path) not in (tmp_path / "processes_cpu.json").read_text()


@forking
def test_what_a_run_says_is_handed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(processes_benchmark, "_cores", lambda: 2)
    monkeypatch.setattr(
        processes_benchmark, "_launch", lambda words, count, _: in_forks(words, count, train_main, tmp_path)
    )
    with pytest.raises(SystemExit, match=r"^2$"):
        processes_benchmark.main(["--pictures", "nowhere", "--base", "tiny-random", "--folder", str(tmp_path)])
    printed = capsys.readouterr().err
    assert printed.startswith("error: --instance_data_dir nowhere is not there") and printed.count("\n") == 1


def test_the_share_of_ideal() -> None:
    samples = [
        {"method": "lora", "processes": count, "repeat": repeat, "seconds": [9.0, 9.0, 9.0, step, step, 2 * step]}
        for repeat, factor in enumerate((1, 2, 3))
        for count, step in ((1, 1.0 * factor), (2, 1.25 * factor))
    ]
    assert processes_benchmark.rate(samples[1], 4) == pytest.approx(4 * 2 / 1.25)
    setting = {
        "pretrained_model_name_or_path": "b",
        "train_batch_size": 4,
        "mixed_precision": "no",
        "cores": 2,
        "load_before": 0.5,
    }
    text = processes_benchmark.table([{"configuration": setting, "device": "a CPU", "samples": samples}])
    row = "| lora | 2 (1.33 to 4) | 3.2 (2.13 to 6.4) | 1.6 (1.6 to 1.6) | 80% | 6 |"
    assert row in text.splitlines() and "No GPU was at hand" in text


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--processes", "3"], "error: --processes 3: only 2 times 1 CPU threads are there"),
        (["--processes", "1"], "error: --processes 1: give 2 or more"),
        (["--steps", "3"], "error: --steps 3: give more than the 3"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    argv: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(processes_benchmark, "_cores", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"^2$"):
        processes_benchmark.main([*argv, "--folder", str(tmp_path)])
    printed = capsys.readouterr().err
    assert printed.startswith(told) and printed.count("\n") == 1
