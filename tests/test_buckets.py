"""Aspect-ratio buckets: which shape a picture gets, which pictures a batch; whole runs with them."""

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import Builder, write_pictures
from whole_run import forking, in_one_and_in_two, lora, main, quicken, ranks, summary, train, words

from bilora_diffusion.adapters import UNET
from bilora_diffusion.data.buckets import BucketOrder, make_buckets, nearest_bucket
from bilora_diffusion.data.dreambooth import DrawBatches, DreamBoothDataset
from bilora_diffusion.data.images import resized_size
from bilora_diffusion.data.pictures import Picture

LIST = [(64, 64), (48, 80), (80, 48)]
FLAGS = {"use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "64,64;48,80; 80,48"}
SIZES = [(64, 64), (160, 96), (60, 90), (97, 160), (70, 66)]  # (width, height): square, wide, high, high, square


def in_memory(sizes: list[tuple[int, int]]) -> list[Picture]:
    """Red is x, green is y."""
    pictures = []
    for number, (width, height) in enumerate(sizes):
        y, x = np.mgrid[:height, :width]
        image = Image.fromarray(np.stack([x, y, 0 * x + number], axis=-1).astype(np.uint8))
        pictures.append(Picture.read(str(number), image, f"picture {number}"))
    return pictures


def dataset_of(batch_size: int = 2, **options) -> DreamBoothDataset:
    return DreamBoothDataset(in_memory(SIZES), resolution=64, seed=0, buckets=LIST, batch_size=batch_size, **options)


# --- Shapes ---


def test_the_buckets_are_on_sdxls_grid_and_of_about_as_many_pixels() -> None:
    buckets = make_buckets(1024)
    assert (1024, 1024) in buckets and (832, 1216) in buckets and (1216, 832) in buckets
    assert all(side % 64 == 0 for bucket in buckets for side in bucket)
    assert len(buckets) == 41 and all(0.89 < height * width / 1024**2 <= 1 for height, width in buckets)
    assert {(512, 512), (448, 576), (256, 1024), (1024, 256)} <= set(make_buckets(512))
    assert make_buckets(16) == [(64, 64)]


def test_a_picture_gets_the_nearest_shape() -> None:
    assert nearest_bucket((1000, 1000), make_buckets(1024)) == (1024, 1024)
    assert nearest_bucket((3000, 2000), make_buckets(1024)) == (1216, 832)
    dataset = dataset_of()
    assert [dataset.target(False, index) for index in range(5)] == [LIST[place] for place in (0, 1, 2, 2, 0)]


@pytest.mark.parametrize("size", [(48, 80), (480, 800), (481, 800), (480, 801), (97, 160), (30, 300), (300, 30)])
def test_a_picture_is_resized_to_just_hold_its_bucket(size: tuple[int, int]) -> None:
    height, width = resized_size(size, (48, 80))
    assert (height == 48 and width >= 80) or (width == 80 and height >= 48)
    assert abs(height / width / (size[0] / size[1]) - 1) < 0.03
    assert resized_size(size, (64, 64)) == resized_size(size, 64)


@pytest.mark.parametrize(
    ("crop", "expected"),
    [
        ({}, None),
        ({"center_crop": True}, {(0, 8), (8, 0)}),
        ({"crops_per_image": 3}, {(0, 3), (0, 8), (0, 13), (3, 0), (8, 0), (13, 0)}),
    ],
    ids=["random", "middle", "three"],
)
def test_what_a_row_says_is_what_it_shows(crop: dict[str, Any], expected: set[tuple[int, int]] | None) -> None:
    exact = [(96, 64), (64, 96)]  # shown at their own size, so that a pixel tells where it comes from
    dataset = DreamBoothDataset(
        in_memory(exact), resolution=64, seed=0, buckets=[(64, 80), (80, 64)], random_flip=True, **crop
    )
    corners = set()
    for draw in range(40):
        (row,) = dataset[draw]
        assert row.target == [(64, 80), (80, 64)][row.picture]
        assert row.pixels.shape == (3, *row.target)
        x, y, mark = ((row.pixels[:, 0, 0] + 1) * 127.5).round().int().tolist()
        width, height = exact[row.picture]
        assert row.original_size == (height, width) and mark == row.picture
        assert (y, width - 1 - x if row.flipped else x) == row.crop_top_left
        corners.add(row.crop_top_left)
    assert len(corners) > 10 if expected is None else corners == expected


# --- Order ---


@pytest.mark.parametrize(("batch_size", "repeats"), [(1, 1), (2, 1), (3, 2), (8, 1)])
def test_an_epoch_shows_each_picture_and_a_batch_one_shape(batch_size: int, repeats: int) -> None:
    targets = [LIST[place] for place in (0, 1, 2, 2, 0, 2, 2)]
    order = BucketOrder(targets, batch_size, repeats, seed=0)
    orders = []
    for epoch in range(6):
        first = epoch * len(order) // batch_size
        batches = [order.batch(number) for number in range(first, first + len(order) // batch_size)]
        assert all(len({targets[picture] for picture in batch}) == 1 for batch in batches)
        assert Counter(picture for batch in batches for picture in batch) == dict.fromkeys(range(7), repeats)
        assert all(1 <= len(batch) <= batch_size for batch in batches)
        short = Counter(targets[batch[0]] for batch in batches if len(batch) < batch_size)
        assert all(count == 1 for count in short.values()), "only the last of a bucket is smaller"
        orders.append(str(batches))
    assert len(set(orders)) > 3


def test_an_order_needs_no_history() -> None:
    targets = [LIST[place] for place in (0, 1, 2, 2, 0)]
    order = BucketOrder(targets, 2, 1, seed=3)
    forwards = [order.batch(number) for number in range(20)]
    assert forwards == [BucketOrder(targets, 2, 1, seed=3).batch(number) for number in range(20)]
    assert forwards != [BucketOrder(targets, 2, 1, seed=4).batch(number) for number in range(20)]
    with pytest.raises(IndexError):
        order[-1]


def test_ranks_share_the_batches_and_a_resumed_run_goes_on() -> None:
    dataset = dataset_of()

    def batches(**where) -> list[list[int]]:
        return list(islice(DrawBatches(batch_size=2, rows_in=dataset.rows_in, **where), 8))

    alone = batches()
    assert {len(batch) for batch in alone} == {1, 2}
    assert all(len({dataset.describe(draw)[0].target for draw in batch}) == 1 for batch in alone)
    both = [batches(rank=rank, world_size=2) for rank in range(2)]
    assert [batch for pair in zip(*both, strict=True) for batch in pair][:8] == alone
    assert batches(start=6)[:5] == alone[3:]
    assert batches(start=5)[:5] == alone[3:]  # with another batch size before: no half batch of two shapes
    assert len(dataset) == 6  # three batches of up to two


def test_buckets_do_not_go_with_class_pictures() -> None:
    with pytest.raises(ValueError, match="do not go with buckets"):
        dataset_of(class_pictures=in_memory([(64, 64)]))


# --- Runs ---


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    write_pictures(folder, SIZES, "a sks picture of kind", seed=0)
    return folder


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)


SMALL = {"lora_layers": "to_q", "train_batch_size": 2}


def test_the_unet_sees_the_shapes_and_is_told_of_them(build: Builder, pictures: Path) -> None:
    run = build("lora", instance_data_dir=str(pictures), **FLAGS)
    seen = []
    handle = run.parts.models[UNET].register_forward_pre_hook(
        lambda _, inputs, named: seen.append((inputs[0].shape, named["added_cond_kwargs"]["time_ids"])),
        with_kwargs=True,
    )
    order = run.parts.dataset._buckets
    for number in range(3):
        batch = run.batch(range(2 * number, 2 * number + order.rows_in(number)))
        run.parts.trainer.training_step(run.parts.trainer.micro_batches([batch]), number)
    handle.remove()
    shapes = {tuple(8 * side for side in shape[2:]) for shape, _ in seen}
    assert shapes == set(LIST)
    for shape, time_ids in seen:
        assert (time_ids[:, 4:] == torch.tensor([8 * side for side in shape[2:]])).all()
    assert {tuple(one.tolist()[:2]) for _, ids in seen for one in ids} == {(height, width) for width, height in SIZES}


@pytest.mark.parametrize("crop", [{}, {"center_crop": True}, {"crops_per_image": 3}], ids=["random", "middle", "three"])
def test_a_run_with_buckets_resumes_where_it_was(crop: dict[str, Any], pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    for number, size in enumerate(SIZES):
        Image.linear_gradient("L").resize(size).save(tmp_path / "masks" / f"{number}.png")
    flags = {
        **SMALL,
        **FLAGS,
        **crop,
        "random_flip": True,
        "cache_dir_latents": tmp_path / "cache" if crop else None,
        "mask_dir": tmp_path / "masks",
        "with_prior_preservation": True,
        "prior_source": "base_prediction",
        "class_prompt": "a picture",
        "gradient_accumulation_steps": 2,
        "loss_gap_steps": 2,
    }
    whole, _ = in_one_and_in_two(pictures, tmp_path, **flags)
    assert "64 px, aspect-ratio buckets" in (whole / "README.md").read_text()


def test_an_epoch_is_all_batches_of_all_buckets(pictures: Path, tmp_path: Path) -> None:
    train(pictures, tmp_path / "run", max_train_steps=None, num_train_epochs=2, **SMALL, **FLAGS)
    assert summary(tmp_path / "run")["steps"] == 6


@forking
def test_two_processes_with_buckets(pictures: Path, tmp_path: Path) -> None:
    """Two with one micro-batch each do what one does with two accumulated."""
    flags = {**SMALL, **FLAGS, "max_train_steps": 3}
    one = train(pictures, tmp_path / "one", gradient_accumulation_steps=2, **flags)
    children = ranks(2, lambda rank: main(words(pictures, tmp_path / "two", **flags)), tmp_path)
    assert [child.wait(seconds=120) for child in children] == [0, 0], children[0].log.read_text()
    assert lora(tmp_path / "two").keys() == one.keys()
    assert summary(tmp_path / "two")["losses"] == pytest.approx(summary(tmp_path / "one")["losses"], rel=1e-4)
