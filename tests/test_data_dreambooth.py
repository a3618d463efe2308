"""Which pictures a folder holds, under which captions; and what each draw shows of them."""

import io
import itertools
import json
import os
import pickle
import sys
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from bilora_diffusion.data import dreambooth
from bilora_diffusion.data.captions import CaptionRule
from bilora_diffusion.data.dreambooth import DrawBatches, DreamBoothDataset, Row, Shuffled, flatten
from bilora_diffusion.data.folders import SUFFIXES
from bilora_diffusion.data.images import resize
from bilora_diffusion.data.pictures import Picture, class_pictures, find_pictures, pictures_of_dataset
from bilora_diffusion.errors import UserError

Load = Callable[..., tuple[list[Picture], list[str]]]

DOGS = Path(__file__).parents[2] / "shared" / "data" / "dreambooth" / "dog"


def save(path: Path, width: int = 30, height: int = 20, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), colour).save(path)
    return path


def write_metadata(folder: Path, *rows: dict | str) -> None:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def captions_of(pictures: list[Picture]) -> dict[str, str]:
    return {picture.name: picture.caption for picture in pictures}


def coordinates(width: int, height: int, mark: int = 0) -> Image.Image:
    """Red is x, green is y, blue tells pictures apart."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, 0 * x + mark], axis=-1).astype(np.uint8))


def pictures_in_memory(
    count: int, sizes: tuple[tuple[int, int], ...] = ((24, 16),), kind: str = "dog"
) -> list[Picture]:
    images = (coordinates(*sizes[number % len(sizes)], mark=number) for number in range(count))
    return [Picture.read(f"{kind}{number}", image, f"a {kind} {number}") for number, image in enumerate(images)]


def dataset_of(count: int = 5, **options) -> DreamBoothDataset:
    return DreamBoothDataset(
        options.pop("instances", None) or pictures_in_memory(count), **{"resolution": 16, "seed": 0} | options
    )


def same(one: Row, other: Row) -> bool:
    def fields(row: Row) -> tuple:
        return row.key, row.view, row.prompt, row.draw

    return fields(one) == fields(other) and (
        one.pixels is other.pixels is None or torch.equal(one.pixels, other.pixels)
    )


# Folders


def test_pictures_are_sorted_and_strays_ignored(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "c.WebP", "sub/d.png", ".hidden.png"):
        save(tmp_path / name)
    for stray in ("notes.txt", ".DS_Store", "Thumbs.db", "data.json", "clip.mp4", "._a.png"):
        (tmp_path / stray).write_bytes(b"stray")
    (tmp_path / "folder.png").mkdir()
    pictures, warnings = find_pictures(tmp_path, instance_prompt="a sks dog")
    assert [picture.name for picture in pictures] == ["a.png", "b.JPG", "c.WebP"]
    assert {picture.caption for picture in pictures} == {"a sks dog"}
    assert {picture.size for picture in pictures} == {(20, 30)}
    assert warnings == []


def test_the_size_is_the_upright_one(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    (picture,), _ = find_pictures(tmp_path, instance_prompt="x")
    assert picture.size == (30, 20)


def test_pictures_of_formats_that_are_not_read_are_worth_a_warning(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "b.HEIC").write_bytes(b"")
    _, (warning,) = find_pictures(tmp_path, instance_prompt="x")
    assert ".heic files, which are not used" in warning


def test_captions_under_another_name_are_worth_a_warning(tmp_path: Path) -> None:
    for name in ("dog 1.png", "dog 2.png", "dog 3.png"):
        save(tmp_path / name)
    for name in ("dog 1.txt", "dog_2.txt", "dog_3.png.txt"):
        (tmp_path / name).write_text("a sks dog that runs")
    pictures, (warning,) = find_pictures(tmp_path, instance_prompt="x")
    assert [one.caption for one in pictures] == ["a sks dog that runs", "x", "x"]
    assert "2 .txt file(s)" in warning and "first: dog_2.txt" in warning and "first: dog 2.png" in warning
    (tmp_path / "dog 2.txt").write_text("")
    (tmp_path / "dog 3.txt").write_text("")
    assert find_pictures(tmp_path, instance_prompt="x")[1] == []


def test_captions_metadata_then_sidecar_then_prompt(tmp_path: Path) -> None:
    for name in ("both.png", "meta.png", "null.png", "side.png", "empty.png", "none.png", "deep/er.png"):
        save(tmp_path / name)
    for name in ("both", "side", "null"):
        (tmp_path / f"{name}.txt").write_text(f"\n  {name} sidecar é \n", encoding="utf-8")
    (tmp_path / "empty.txt").write_text("  \n")
    write_metadata(
        tmp_path,
        {"file_name": "both.png", "text": " both metadata "},
        {"file_name": "./meta.png", "text": "meta metadata"},
        {"file_name": "null.png", "text": None},
        {"file_name": "deep/er.png", "text": "from below"},
        "",
    )
    pictures, warnings = find_pictures(tmp_path, instance_prompt="the prompt")
    assert captions_of(pictures) == {
        "both.png": "both metadata",
        "deep/er.png": "from below",
        "empty.png": "the prompt",
        "meta.png": "meta metadata",
        "none.png": "the prompt",
        "null.png": "null sidecar é",
        "side.png": "side sidecar é",
    }
    assert warnings == []
    assert list(captions_of(pictures)) == sorted(captions_of(pictures))


def test_the_caption_column(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    write_metadata(tmp_path, {"file_name": "a.png", "text": "one", "long": "two"})
    assert captions_of(find_pictures(tmp_path, instance_prompt=None)[0]) == {"a.png": "one"}
    pictures, _ = find_pictures(tmp_path, instance_prompt=None, caption_column="long")
    assert captions_of(pictures) == {"a.png": "two"}
    with pytest.raises(UserError, match=r"--caption_column short .*columns are file_name, text, long"):
        find_pictures(tmp_path, instance_prompt="x", caption_column="short")


def test_captions_that_would_go_unnoticed_are_warned_of(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    _, (warning,) = find_pictures(tmp_path, instance_prompt="x", caption_column="text")
    assert "--caption_column text is not used" in warning
    write_metadata(tmp_path, {"file_name": "a.png", "prompt": "lost"})
    _, (warning,) = find_pictures(tmp_path, instance_prompt="x")
    assert "no column `text`" in warning
    assert "prompt" in warning
    write_metadata(tmp_path, {"file_name": "a.png", "text": "1"}, {"file_name": "a.png", "text": "2"})
    pictures, (warning,) = find_pictures(tmp_path, instance_prompt="x")
    assert "line 2 names a.png a second time" in warning
    assert captions_of(pictures) == {"a.png": "1"}


def test_files_from_windows_editors(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa caption\r\n")
    (tmp_path / "metadata.jsonl").write_bytes(b'\xef\xbb\xbf{"file_name": "b.png", "text": "b caption"}\r\n\r\n')
    pictures, _ = find_pictures(tmp_path, instance_prompt=None)
    assert captions_of(pictures) == {"a.png": "a caption", "b.png": "b caption"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'file_name': 'a.png'}", "line 2 is not JSON"),
        ('["a.png"]', "line 2 is not a JSON object"),
        ('{"text": "x"}', "line 2 has no file_name"),
        ('{"file_name": " "}', "line 2 has no file_name"),
        ('{"file_name": 3}', "line 2 has no file_name"),
        ('{"file_name": "gone.png"}', "line 2 names gone.png, which is not in"),
        ('{"file_name": "../secret.png"}', r"line 2 names \.\./secret\.png, which is outside"),
        ('{"file_name": "sub/../../secret.png"}', "which is outside"),
        ('{"file_name": "/etc/secret.png"}', "which is outside"),
        ('{"file_name": "a.png", "text": ["x"]}', "line 2, column text: a caption must be text, not"),
    ],
)
def test_a_wrong_line_of_metadata_is_named(tmp_path: Path, line: str, message: str) -> None:
    folder = tmp_path / "dog"
    save(tmp_path / "secret.png")
    save(folder / "a.png")
    write_metadata(folder, {"file_name": "a.png", "text": "x"}, line)
    with pytest.raises(UserError, match=f"metadata.jsonl, {message}" if message[0] == "l" else message) as caught:
        find_pictures(folder, instance_prompt="x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.txt", "metadata.jsonl"])
def test_text_that_is_not_utf_8_is_named(tmp_path: Path, name: str) -> None:
    save(tmp_path / "a.png")
    (tmp_path / name).write_bytes("ein Hündchen".encode("latin-1"))
    with pytest.raises(UserError, match=rf"{name} is not UTF-8"):
        find_pictures(tmp_path, instance_prompt="x")


def test_unusable_pictures_are_named_and_the_others_used(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:9000])
    (tmp_path / "fake.png").write_text("hello")
    save(tmp_path / "small.png", 15, 40)
    save(tmp_path / "good.png")
    (tmp_path / "good.txt").write_text("its own caption")
    pictures, warnings = find_pictures(tmp_path, instance_prompt=None)
    assert captions_of(pictures) == {"good.png": "its own caption"}
    assert [warning.split()[2] for warning in warnings] == ["cut.jpg", "fake.png", "small.png"]
    assert "truncated" in warnings[0]
    assert "15 x 40 px" in warnings[2]


def test_no_usable_picture_names_up_to_three(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.png").write_text("hello")
    with pytest.raises(UserError, match=r"no usable picture: 0\.png .*1\.png .*2\.png .*; and 2 more") as caught:
        find_pictures(tmp_path, instance_prompt="x")
    assert "3.png" not in str(caught.value)


def test_folders_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--instance_data_dir .*gone is not there"):
        find_pictures(tmp_path / "gone", instance_prompt="x")
    with pytest.raises(UserError, match=r"--instance_data_dir .*a\.png is a file"):
        find_pictures(save(tmp_path / "sub" / "a.png"), instance_prompt="x")
    with pytest.raises(UserError, match=r"holds no pictures \(accepted: \.jpg \.jpeg .*subfolders"):
        find_pictures(tmp_path, instance_prompt="x")
    assert SUFFIXES[:2] == (".jpg", ".jpeg")


@pytest.mark.parametrize("prompt", [None, "", "  "])
def test_missing_captions_are_counted_and_the_first_named(tmp_path: Path, prompt: str | None) -> None:
    for name in "abc":
        save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("has one")
    with pytest.raises(UserError, match=r"2 of 3 pictures .* first is b\.png: give --instance_prompt, a \.txt"):
        find_pictures(tmp_path, instance_prompt=prompt)


def test_class_pictures(tmp_path: Path) -> None:
    assert class_pictures(tmp_path / "later", "a dog", 3) == ([], [])
    for number in range(5):
        save(tmp_path / f"class-{number}.png")
    (tmp_path / "class-1.png").write_text("damaged")
    (tmp_path / "class-0.txt").write_text("not a caption for prior preservation")
    pictures, (warning,) = class_pictures(tmp_path, "a dog", 3)
    expected = {"class-0.png": "a dog", "class-2.png": "a dog", "class-3.png": "a dog"}
    assert captions_of(pictures) == expected
    assert "class-1.png" in warning
    assert len(class_pictures(tmp_path, "a dog")[0]) == 4
    with pytest.raises(UserError, match=r"--class_data_dir .* is a file"):
        class_pictures(tmp_path / "class-0.png", "a dog", 3)
    for path in tmp_path.glob("*.png"):
        path.write_text("damaged")
    with pytest.raises(UserError, match=r"--class_data_dir .* no usable picture"):
        class_pictures(tmp_path, "a dog", 3)


# Data sets of the Hugging Face library


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "imagefolder"
    exif = Image.Exif()
    exif[0x0112] = 6
    folder.mkdir()
    Image.new("RGB", (40, 20), "red").save(folder / "a.jpg", exif=exif)
    Image.new("RGBA", (40, 20), (0, 0, 0, 0)).save(folder / "b.png")
    save(folder / "c.png", 15, 40)
    write_metadata(
        folder,
        {"file_name": "a.jpg", "text": "a red thing", "number": 1},
        {"file_name": "b.png", "text": None, "number": 2},
        {"file_name": "c.png", "text": "too small", "number": 3},
    )
    return folder


@pytest.fixture
def load(tmp_path: Path) -> Load:
    return lambda folder, **options: pictures_of_dataset(str(folder), cache_dir=str(tmp_path / "cache"), **options)


def test_a_local_image_folder(image_folder: Path, load: Load) -> None:
    pictures, warnings = load(image_folder, caption_column="text", instance_prompt="a sks dog")
    assert captions_of(pictures) == {"train[0] (a.jpg)": "a red thing", "train[1] (b.png)": "a sks dog"}
    assert [picture.size for picture in pictures] == [(40, 20), (20, 40)], "upright by EXIF"
    assert pictures[1].load().getpixel((5, 5)) == (255, 255, 255), "transparency on white"
    assert len(warnings) == 1
    assert "c.png" in warnings[0]
    again = pickle.loads(pickle.dumps(pictures))
    assert again[0].load().size == (20, 40)
    dataset = DreamBoothDataset(pictures, resolution=16, seed=0)
    assert dataset[0][0].pixels.shape == (3, 16, 16)


def test_captions_of_a_data_set_are_used_only_when_asked_for(image_folder: Path, load: Load) -> None:
    pictures, warnings = load(image_folder, instance_prompt="a sks dog")
    assert set(captions_of(pictures).values()) == {"a sks dog"}
    assert "--caption_column text" in warnings[0]
    with pytest.raises(UserError, match=r"2 of 2 pictures have no caption.*--caption_column"):
        load(image_folder)
    with pytest.raises(UserError, match=r"1 of 2 .* first is train\[1\] \(b\.png\)"):
        load(image_folder, caption_column="text")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"caption_column": "txt"}, "--caption_column txt is not in .*columns are image, text, number"),
        ({"image_column": "img"}, "--image_column img is not in .*columns are image, text, number"),
        ({"image_column": "number"}, "--image_column number of .* holds no pictures"),
        ({"caption_column": "number"}, "--caption_column number: a caption must be text, not 1"),
    ],
)
def test_wrong_columns_of_a_data_set(image_folder: Path, options: dict[str, str], message: str, load: Load) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(image_folder, instance_prompt="x", **options)
    assert "\n" not in str(caught.value)


def test_a_data_set_that_is_not_there_or_has_no_train_split(tmp_path: Path, load: Load) -> None:
    for missing in ("nobody/has-this-data-set", tmp_path / "gone"):
        with pytest.raises(UserError, match=r"--dataset_name .* cannot be loaded \(") as caught:
            load(missing, instance_prompt="x")
        assert "\n" not in str(caught.value)
    save(tmp_path / "split" / "test" / "a.png")
    with pytest.raises(UserError, match="has no split `train`, only test"):
        load(tmp_path / "split", instance_prompt="x")


def test_pictures_stored_inside_a_data_set(tmp_path: Path, load: Load) -> None:
    import datasets

    file = io.BytesIO()
    Image.new("I;16", (20, 20), 40000).save(file, "PNG")
    rows = {"image": [{"bytes": file.getvalue(), "path": None}, None], "text": ["deep grey", "nothing"]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    table = datasets.Dataset.from_dict(rows, features=features)
    (tmp_path / "parquet").mkdir()
    table.to_parquet(str(tmp_path / "parquet" / "train.parquet"))
    (picture,), (warning,) = load(tmp_path / "parquet", caption_column="text")
    assert picture.name == "train[0]"
    assert picture.load().getpixel((0, 0)) == (156, 156, 156)
    assert "row 1 has no picture" in warning


def test_the_datasets_library_is_optional(monkeypatch: pytest.MonkeyPatch, load: Load) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        load("anything", instance_prompt="x")


# Order


@pytest.mark.parametrize(("count", "repeats"), [(1, 1), (5, 1), (5, 3)])
def test_each_epoch_shows_each_picture_exactly_repeats_times(count: int, repeats: int) -> None:
    dataset = dataset_of(count, repeats=repeats)
    assert len(dataset) == count * repeats
    orders = []
    for epoch in range(6):
        draws = range(epoch * len(dataset), (epoch + 1) * len(dataset))
        orders.append(tuple(dataset.describe(draw)[0].picture for draw in draws))
        assert Counter(orders[-1]) == {picture: repeats for picture in range(count)}
    assert len(set(orders)) > 1 or count == 1, "a new order in each epoch"


def test_a_row_depends_on_the_seed_and_the_draw_alone() -> None:
    one, other, reseeded = (
        dataset_of(random_flip=True, captions=CaptionRule(0.3), class_pictures=pictures_in_memory(3), seed=seed)
        for seed in (7, 7, 8)
    )
    forwards = [one[draw] for draw in range(12)]
    backwards = [other[draw] for draw in reversed(range(12))][::-1]
    assert all(same(a, b) for a, b in zip(flatten(forwards), flatten(backwards), strict=True))
    assert not all(
        a.key == b.key and a.view == b.view
        for a, b in zip(flatten(forwards), flatten(reseeded[draw] for draw in range(12)), strict=True)
    )
    assert one[10**12][0].draw == 10**12
    with pytest.raises(IndexError):
        one[-1]


def test_shuffled_permutations() -> None:
    shuffled = Shuffled(6, 0, "order")
    numbers = [shuffled[position] for position in range(600)]
    assert all(sorted(numbers[start : start + 6]) == list(range(6)) for start in range(0, 600, 6))
    assert [Shuffled(6, 0, "order")[position] for position in (599, 3, 300)] == [
        numbers[position] for position in (599, 3, 300)
    ]
    assert numbers != [Shuffled(6, 0, "class order")[position] for position in range(600)]


def test_ranks_and_batches_cover_the_same_draws() -> None:
    def draws(rank: int, world_size: int, batch_size: int, start: int = 5) -> list[list[int]]:
        batches = DrawBatches(start, rank=rank, world_size=world_size, batch_size=batch_size)
        return list(islice(batches, 4))

    alone = draws(0, 1, 6)
    assert alone == [list(range(5 + 6 * m, 11 + 6 * m)) for m in range(4)]
    for world_size in (2, 3):
        ranks = [draws(rank, world_size, 6 // world_size) for rank in range(world_size)]
        assert [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)] == alone
    assert draws(0, 1, 6, start=5 + 12)[:2] == alone[2:], "a resumed run goes on at its next draw"
    for wrong in ({"start": -1}, {"rank": 1}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="no such batches"):
            DrawBatches(**wrong)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_data_loader(workers: int) -> None:
    dataset = dataset_of(class_pictures=pictures_in_memory(3, kind="class"), random_flip=True)
    dataset.describe(0)
    size = len(pickle.dumps(dataset))
    dataset[0]
    assert len(pickle.dumps(dataset)) == size, "decoded pictures do not travel to the workers"
    loader = DataLoader(
        dataset,
        batch_sampler=DrawBatches(3, rank=1, world_size=2, batch_size=2),
        collate_fn=flatten,
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
    )
    for number, rows in enumerate(islice(loader, 3)):
        first = 3 + (number * 2 + 1) * 2
        expected = flatten(dataset[draw] for draw in (first, first + 1))
        assert [row.is_class for row in rows] == [False, True, False, True]
        assert all(same(a, b) for a, b in zip(rows, expected, strict=True))


# What a row shows


def place_of(row: Row) -> tuple[tuple[int, int], int]:
    """(y, x) that the top left pixel comes from and the mark of its picture, read from the pixels."""
    x, y, mark = ((row.pixels[:, 0, 0] + 1) * 127.5).round().int().tolist()
    return (y, x), mark


def test_size_corner_flip_and_picture_of_every_row_are_those_of_its_pixels() -> None:
    sizes = ((24, 16), (16, 30), (16, 16))
    dataset = dataset_of(
        instances=pictures_in_memory(4, sizes),
        class_pictures=pictures_in_memory(7, sizes[::-1], "class"),
        random_flip=True,
    )
    for draw in range(60):
        instance, prior = dataset[draw]
        assert (instance.is_class, prior.is_class) == (False, True)
        for row, kind, widths in ((instance, "dog", sizes), (prior, "class", sizes[::-1])):
            width, height = widths[row.picture % 3]
            y, x = row.crop_top_left
            assert row.original_size == (height, width)
            assert place_of(row) == ((y, width - 1 - x if row.flipped else x), row.picture)
            assert row.prompt == f"a {kind} {row.picture}"
            assert row.draw == draw


def test_crops_and_flips_are_new_in_each_epoch() -> None:
    dataset = dataset_of(1, instances=pictures_in_memory(1, ((60, 16),)), random_flip=True)
    views = {dataset.describe(draw)[0].view for draw in range(100)}
    assert len(views) > 40
    assert {view.flipped for view in views} == {False, True}


def test_class_rows_have_their_own_order_and_sizes() -> None:
    dataset = dataset_of(2, class_pictures=pictures_in_memory(5, ((16, 40),), "class"))
    assert len(dataset) == 5, "the longer of the two, as in the stock script"
    for epoch in range(4):
        rows = [dataset.describe(draw) for draw in range(5 * epoch, 5 * epoch + 5)]
        assert sorted(prior.picture for _, prior in rows) == list(range(5))
        assert {prior.original_size for _, prior in rows} == {(40, 16)}
        assert {instance.original_size for instance, _ in rows} == {(16, 24)}
    fewer = dataset_of(5, class_pictures=pictures_in_memory(2, kind="class"))
    assert len(fewer) == 5
    assert Counter(fewer.describe(draw)[1].picture for draw in range(10)) == {0: 5, 1: 5}


def test_a_class_row_is_cut_independently_of_its_instance_row() -> None:
    pictures = pictures_in_memory(1, ((40, 16),))
    dataset = dataset_of(instances=pictures, class_pictures=pictures, random_flip=True)
    rows = [dataset.describe(draw) for draw in range(200)]
    assert 60 < sum(instance.flipped == prior.flipped for instance, prior in rows) < 140
    assert sum(instance.crop_top_left == prior.crop_top_left for instance, prior in rows) < 40


def test_class_pictures_do_not_change_the_instance_rows() -> None:
    plain, prior = (
        dataset_of(random_flip=True),
        dataset_of(random_flip=True, class_pictures=pictures_in_memory(3)),
    )
    assert all(same(plain[draw][0], prior[draw][0]) for draw in range(20))


def test_caption_dropout() -> None:
    dataset = dataset_of(captions=CaptionRule(0.25), class_pictures=pictures_in_memory(3, kind="class"))
    rows = [dataset.describe(draw) for draw in range(1000)]
    dropped = {instance.draw for instance, _ in rows if instance.prompt == ""}
    assert 200 < len(dropped) < 300
    assert all(prior.prompt for _, prior in rows)
    never, always = dataset_of(), dataset_of(captions=CaptionRule(1.0))
    assert all(never.describe(draw)[0].prompt for draw in range(50))
    assert not any(always.describe(draw)[0].prompt for draw in range(50))


def test_prompts() -> None:
    pictures = pictures_in_memory(2) * 2
    prior = [Picture.read("c", Image.new("RGB", (20, 20)), "a dog")] * 3
    assert dataset_of(instances=pictures).prompts() == ["a dog 0", "a dog 1"]
    full = dataset_of(instances=pictures, class_pictures=prior, captions=CaptionRule(0.1))
    assert full.prompts() == ["a dog 0", "a dog 1", "a dog", ""]
    assert {row.prompt for draw in range(200) for row in full.describe(draw)} == set(full.prompts())


# Caches


@pytest.mark.parametrize(
    ("sizes", "center_crop", "cacheable"),
    [
        (((16, 16),), False, True),
        (((33, 33), (200, 201)), False, True),  # 200 x 201 is square once 16 px high
        (((16, 16), (24, 16)), False, False),
        (((16, 16), (24, 16)), True, True),
    ],
)
@pytest.mark.parametrize("random_flip", [False, True])
def test_the_variants_are_all_that_rows_can_show(
    sizes: tuple[tuple[int, int], ...], center_crop: bool, cacheable: bool, random_flip: bool
) -> None:
    dataset = dataset_of(
        instances=pictures_in_memory(2, sizes),
        class_pictures=pictures_in_memory(3, sizes, "class"),
        center_crop=center_crop,
        random_flip=random_flip,
    )
    assert dataset.cacheable == cacheable
    if not cacheable:
        with pytest.raises(ValueError, match="crops differ"):
            next(dataset.variants())
        return
    variants = list(dataset.variants())
    assert len(set(variants)) == len(variants) == 5 * (2 if random_flip else 1)
    for row in flatten(dataset[draw] for draw in range(30)):
        assert row.key in variants
        assert torch.equal(row.pixels, dataset.pixels(*row.key))


@pytest.mark.parametrize("random_flip", [False, True])
def test_the_variants_of_a_few_crops(random_flip: bool) -> None:
    sizes = ((28, 16), (16, 16), (16, 18))
    options = {
        "instances": pictures_in_memory(3, sizes),
        "class_pictures": pictures_in_memory(2, ((16, 40),), "class"),
        "crops_per_image": 4,
        "random_flip": random_flip,
    }
    dataset = dataset_of(**options)
    assert dataset.cacheable
    variants = list(dataset.variants())
    flips = (False, True) if random_flip else (False,)
    corners = {
        (False, 0): [(0, x) for x in (1, 4, 7, 10)],  # of 12 px
        (False, 1): [(0, 0)],
        (False, 2): [(y, 0) for y in (0, 1, 2)],
        (True, 0): [(y, 0) for y in (3, 9, 15, 21)],
        (True, 1): [(y, 0) for y in (3, 9, 15, 21)],
    }
    assert [(key[:2], key[2].crop_top_left, key[2].flipped) for key in variants] == [
        (picture, corner, flipped) for picture, some in corners.items() for corner in some for flipped in flips
    ]
    rows = flatten(dataset[draw] for draw in range(200))
    assert {row.key for row in rows} == set(variants), "what rows show, and all of it"
    reseeded = dataset_of(**options, seed=5)
    assert list(reseeded.variants()) == variants
    again = flatten(reseeded[draw] for draw in range(200))
    assert [row.key for row in again] != [row.key for row in rows] and {row.key for row in again} == set(variants)
    for row in rows:
        assert torch.equal(row.pixels, dataset.pixels(*row.key))
        y, x = row.crop_top_left
        width = sizes[row.picture][0] if not row.is_class else 16
        assert place_of(row) == ((y, width - 1 - x if row.flipped else x), row.picture)


def test_a_few_crops_leave_every_other_draw_as_it_was() -> None:
    options = {"instances": pictures_in_memory(3, ((40, 16), (16, 30))), "random_flip": True}
    anywhere, few = (
        dataset_of(**options, captions=CaptionRule(0.3), steps_per_draw=2, repeats=2, crops_per_image=crops)
        for crops in (None, 3)
    )
    for draw in range(60):
        (one,), (other,) = anywhere.describe(draw), few.describe(draw)
        told = [(row.picture, row.flipped, row.prompt, row.draw, row.first) for row in (one, other)]
        assert told[0] == told[1]
        assert few.describe(other.first)[0].view == other.view, "steps on the same draw see the same crop"
    with pytest.raises(ValueError, match="center_crop or crops_per_image"):
        dataset_of(center_crop=True, crops_per_image=3)


def test_a_class_picture_that_must_be_cropped_prevents_the_cache() -> None:
    square, oblong = pictures_in_memory(2, ((16, 16),)), pictures_in_memory(2, ((24, 16),))
    assert not dataset_of(instances=square, class_pictures=oblong).cacheable


def test_without_decoding_the_rows_are_the_same_and_no_file_is_opened(tmp_path: Path) -> None:
    for number in range(3):
        save(tmp_path / f"{number}.png", 24 + number)
    pictures, _ = find_pictures(tmp_path, instance_prompt="x")
    options = {"instances": pictures, "random_flip": True, "captions": CaptionRule(0.2)}
    whole = [dataset_of(**options)[draw] for draw in range(20)]
    for path in tmp_path.glob("*.png"):
        path.unlink()
    dataset = dataset_of(**options, decode=False)
    for draw in range(20):
        (row,), (expected,) = dataset[draw], whole[draw]
        assert row.pixels is None
        assert (row.key, row.view, row.prompt) == (expected.key, expected.view, expected.prompt)
    dataset.decode = True
    with pytest.raises(UserError, match=r"0\.png is missing|1\.png is missing|2\.png is missing"):
        dataset[0]


def test_a_picture_that_changed_is_noticed(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    pictures, _ = find_pictures(tmp_path, instance_prompt="x")
    save(tmp_path / "a.png", 40, 40)
    with pytest.raises(UserError, match=r"a\.png changed"):
        dataset_of(instances=pictures)[0]


def test_resized_pictures_are_kept_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    resized = []
    monkeypatch.setattr(dreambooth, "resize", lambda *arguments: resized.append(1) or resize(*arguments))
    monkeypatch.setattr(dreambooth, "_KEPT_BYTES", 3 * 24 * 16 * 2)  # two of the five
    dataset = dataset_of()
    first = [dataset[draw] for draw in range(5)]
    assert len(resized) == 5
    second = [dataset[draw] for draw in range(5)]
    assert len(resized) == 8
    assert all(same(a, b) for a, b in zip(flatten(first), flatten(second), strict=True))


def test_a_data_set_without_pictures_is_refused() -> None:
    with pytest.raises(ValueError, match="instance picture"):
        DreamBoothDataset([], resolution=16, seed=0)
    with pytest.raises(ValueError, match="class picture"):
        dataset_of(class_pictures=[])


@pytest.mark.skipif(not DOGS.is_dir(), reason="the real photos of ../shared/data are not here")
def test_real_photos() -> None:
    pictures, warnings = find_pictures(DOGS, instance_prompt="a sks dog")
    assert [picture.name for picture in pictures] == [f"{number:02}.jpg" for number in range(5)]
    assert warnings == []
    dataset = DreamBoothDataset(pictures, resolution=64, random_flip=True, seed=0)
    for draw in range(10):
        (row,) = dataset[draw]
        assert row.original_size == pictures[row.picture].size
        assert row.pixels.shape == (3, 64, 64)
        assert -1 <= row.pixels.min() < row.pixels.max() <= 1
