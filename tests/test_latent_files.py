"""Latents on disk: found again by all they follow from, whole or not there, the same as fresh ones."""

import copy
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_run import Builder, all_equal, write_both
from whole_run import (
    Forked,
    forking,
    in_one_and_in_two,
    interrupted_after,
    lora,
    main,
    quicken,
    ranks,
    refusal,
    summary,
    train,
    words,
)

from bilora_diffusion.atomic import atomic_write
from bilora_diffusion.data import latents as latents_module
from bilora_diffusion.data.dreambooth import DreamBoothDataset, flatten
from bilora_diffusion.data.images import View
from bilora_diffusion.data.latent_files import LatentFiles, fingerprint
from bilora_diffusion.data.latents import CachedLatents, EncodedLatents
from bilora_diffusion.data.masks import with_mask_files
from bilora_diffusion.data.pictures import Picture, find_pictures
from bilora_diffusion.errors import UserError
from bilora_diffusion.sdxl import Moments

VIEW = View((64, 96), (0, 16), False)
SQUARE = (64, 64)


def moments(seed: float = 0.0) -> Moments:
    return Moments(torch.full((4, 8, 8), seed), torch.ones(4, 8, 8))


def forbidden() -> Moments:
    raise AssertionError("encoded again")


@pytest.fixture
def picture(tmp_path: Path) -> Picture:
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (96, 64), "red").save(tmp_path / "pictures" / "a.png")
    return find_pictures(tmp_path / "pictures", instance_prompt="x")[0][0]


class Files(LatentFiles):
    """Keeps and reads."""

    def get(self, *what) -> Moments:
        return self.read(self.keep(*what))


def files(folder: Path, vae, interpolation: str = "lanczos") -> Files:
    return Files(folder / "cache", vae, interpolation)


def kept(folder: Path) -> list[Path]:
    """Of the pictures."""
    return sorted(path for path in (folder / "cache").rglob("*.safetensors") if "captions" not in path.parent.name)


def latents_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in kept(folder)}


# --- What a file is found by ---


def test_what_was_kept_is_found(tmp_path: Path, tiny, picture: Picture) -> None:
    first = files(tmp_path, tiny.vae)
    assert torch.equal(first.get(picture, VIEW, SQUARE, lambda: moments(3.0)).mean, moments(3.0).mean)
    again = files(tmp_path, copy.deepcopy(tiny.vae))
    found = again.get(picture, VIEW, SQUARE, forbidden)
    assert torch.equal(found.mean, moments(3.0).mean) and torch.equal(found.std, moments().std)
    assert (first.found, first.made, again.found, again.made) == (0, 1, 1, 0)
    # By its content, not by its name.
    elsewhere = picture.source.with_name("renamed.png")
    picture.source.rename(elsewhere)
    again.get(replace(picture, source=elsewhere, name="renamed.png"), VIEW, SQUARE, forbidden)
    again.get(replace(picture, source=elsewhere.read_bytes()), VIEW, SQUARE, forbidden)


def other_weights(vae) -> None:
    next(iter(vae.parameters())).data.view(-1)[0] += 1e-6


def other_precision(vae) -> None:
    vae.to(torch.bfloat16)


@pytest.mark.parametrize("change", [other_weights, other_precision])
def test_another_vae_finds_nothing(change, tmp_path: Path, tiny, picture: Picture) -> None:
    files(tmp_path, tiny.vae).get(picture, VIEW, SQUARE, moments)
    other = copy.deepcopy(tiny.vae)
    change(other)
    assert fingerprint(other) != fingerprint(tiny.vae)
    assert files(tmp_path, other).get(picture, VIEW, SQUARE, lambda: moments(1.0)).mean.max() == 1
    assert len(kept(tmp_path)) == 2


def test_where_the_vae_lies_does_not_matter(tiny) -> None:
    moved = copy.deepcopy(tiny.vae)
    moved.register_to_config(_name_or_path="/another/place")
    assert fingerprint(moved) == fingerprint(tiny.vae)


def test_another_picture_view_or_resizing_finds_nothing(tmp_path: Path, tiny, picture: Picture) -> None:
    seen = 0.0

    def get(one: Picture = picture, view: View = VIEW, target: tuple[int, int] = SQUARE, **how) -> float:
        nonlocal seen
        seen += 1
        return files(tmp_path, tiny.vae, **how).get(one, view, target, lambda: moments(seen)).mean.max().item()

    assert get() == 1 == get()
    assert get(view=replace(VIEW, flipped=True)) == 3
    assert get(view=replace(VIEW, crop_top_left=(0, 0))) == 4
    assert get(target=(32, 64)) == 5
    assert get(interpolation="bilinear") == 6
    Image.new("RGB", (96, 64), "blue").save(picture.source)
    assert get() == 7
    assert len(kept(tmp_path)) == 6


# --- Damage ---


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "one bit", "other tensors"])
def test_a_damaged_file_is_told_of_and_made_anew(
    damage: str, tmp_path: Path, tiny, picture: Picture, caplog: pytest.LogCaptureFixture
) -> None:
    files(tmp_path, tiny.vae).get(picture, VIEW, SQUARE, lambda: moments(1.0))
    (path,) = kept(tmp_path)
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[-100] ^= 1
    other = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    path.write_bytes(
        {
            "cut": content[:-7],
            "empty": b"",
            "garbage": b"nothing like it" * 99,
            "one bit": bytes(flipped),
            "other tensors": len(other).to_bytes(8, "little") + other + bytes(4),
        }[damage]
    )
    assert files(tmp_path, tiny.vae).get(picture, VIEW, SQUARE, lambda: moments(2.0)).mean.max() == 2
    (warning,) = caplog.messages
    assert f"{path} is damaged" in warning and "\n" not in warning
    assert files(tmp_path, tiny.vae).get(picture, VIEW, SQUARE, forbidden).mean.max() == 2


def test_a_folder_that_cannot_be_made(tmp_path: Path, tiny) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"--cache_dir_latents .* cannot be made"):
        files(tmp_path, tiny.vae)


def test_a_vae_that_overflows_leaves_no_file(build: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overflow(vae, pixels) -> Moments:
        return Moments(torch.full((1, 4, 8, 8), torch.inf), torch.ones(1, 4, 8, 8))

    monkeypatch.setattr(latents_module, "encode_images", overflow)
    with pytest.raises(UserError, match="non-finite latents"):
        build("lora", cache_dir_latents=str(tmp_path / "cache"))
    assert kept(tmp_path) == []


@forking
def test_several_may_write_one_file_at_once(tmp_path: Path) -> None:
    """None fails, what is there afterwards is whole, and nothing else is left."""
    target = tmp_path / "target"

    def write(number: int) -> int:
        for _ in range(30):
            with atomic_write(target, shared=True) as path:
                path.write_bytes(bytes([number]) * 100_000)
        return 0

    children = [Forked(lambda number=number: write(number), tmp_path / f"{number}.log") for number in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0]
    content = target.read_bytes()
    assert len(content) == 100_000 and len(set(content)) == 1
    assert [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []


# --- A few crops of each picture ---


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Picture], list[Picture]]:
    """Instance pictures with masks, two of which have something to be cropped, and class pictures, one of which has."""
    folder = tmp_path_factory.mktemp("crops")
    masks = folder / "masks"
    masks.mkdir()
    pictures, classes = write_both(folder)
    for path in pictures.glob("*.png"):
        Image.linear_gradient("L").rotate(90).resize(Image.open(path).size).save(masks / path.name)
    found = [find_pictures(one, instance_prompt="x")[0] for one in (pictures, classes)]
    return with_mask_files(found[0], masks), found[1]


def few_crops(material: tuple[list[Picture], list[Picture]], shapes: str, seed: int = 0) -> DreamBoothDataset:
    instances, classes = material
    how = {"buckets": [(64, 64), (48, 80)]} if shapes == "buckets" else {"class_pictures": classes}
    return DreamBoothDataset(instances, resolution=64, crops_per_image=3, random_flip=True, seed=seed, **how)


@pytest.mark.parametrize("shapes", ["squares", "buckets"])
@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
def test_a_row_gets_the_latents_and_weights_of_the_crop_that_it_shows(
    material, tiny, tmp_path: Path, on_disk: bool, shapes: str
) -> None:
    dataset = few_crops(material, shapes)
    cached = CachedLatents(dataset, tiny.vae, files(tmp_path, tiny.vae) if on_disk else None)
    encoded = EncodedLatents(dataset, tiny.vae)
    seen = set()
    for row in flatten(dataset[draw] for draw in range(120)):
        assert row.pixels is not None
        (one,), (other,) = cached.moments([row]), encoded.moments([row])
        assert torch.equal(one.mean, other.mean) and torch.equal(one.std, other.std)
        (weights,), (expected,) = cached.loss_weights([row]), encoded.loss_weights([row])
        assert (weights is None) == row.is_class and (weights is None or torch.equal(weights, expected))
        seen.add(row.key)
    assert seen == set(cached.kept) and len(seen) > 15
    assert (cached.bytes_in_memory == 0) == on_disk


@pytest.mark.parametrize("shapes", ["squares", "buckets"])
def test_another_seed_and_another_process_find_all_crops(material, tiny, tmp_path: Path, shapes: str) -> None:
    first, again = files(tmp_path, tiny.vae), files(tmp_path, tiny.vae)
    CachedLatents(few_crops(material, shapes), tiny.vae, first)
    variants = len(set(few_crops(material, shapes).variants()))
    assert first.found + first.made == variants and first.made == len(kept(tmp_path))
    CachedLatents(few_crops(material, shapes, seed=7), tiny.vae, again, rank=1, processes=2)
    assert (again.found, again.made) == (variants, 0)


def test_the_unet_is_told_of_the_crop_that_is_shown(build: Builder) -> None:
    run = build("lora", center_crop=False, crops_per_image=3, random_flip=True, with_prior_preservation=True)
    told = set()
    for step in range(50):
        rows = flatten(run.parts.dataset.describe(draw) for draw in (2 * step, 2 * step + 1))
        (batch,) = run.batches(step)
        for row, ids in zip(rows, batch.conditioning.time_ids.int().tolist(), strict=True):
            assert tuple(ids) == (*row.original_size, *row.crop_top_left, 64, 64)
            told.add((row.is_class, row.picture, *ids[2:4]))
    assert {one[2:] for one in told if one[:2] == (False, 1)} == {(0, 5), (0, 16), (0, 27)}  # of 96 x 64 px
    assert {one[2:] for one in told if one[:2] == (True, 1)} == {(1, 0), (4, 0), (7, 0)}  # of 64 x 72 px


# --- Runs ---

SMALL = {"lora_layers": "to_q", "center_crop": True}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_both(tmp_path_factory.mktemp("material"))[0]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)


def test_a_run_on_kept_latents_is_the_run_on_fresh_ones(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flags = {**SMALL, "random_flip": True, "cache_dir_latents": tmp_path / "cache"}
    fresh = train(pictures, tmp_path / "none", **flags | {"cache_dir_latents": None})
    with interrupted_after(2):
        assert main(words(pictures, tmp_path / "run", **flags)) == 130
    before = latents_in(tmp_path)
    assert len(before) == 8  # four pictures, as they are and mirrored
    assert {tuple(load_file(path)["mean"].shape) for path in kept(tmp_path)} == {(4, 8, 8)}
    assert any("0 found in" in message and "8 encoded" in message for message in caplog.messages)

    def never(*_) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(latents_module, "encode_images", never)
    assert all_equal(fresh, train(pictures, tmp_path / "run", resume_from_checkpoint="latest", **flags))
    assert all_equal(fresh, train(pictures, tmp_path / "again", **flags))
    assert any("8 found in" in message and "0 encoded" in message for message in caplog.messages)
    assert latents_in(tmp_path) == before


def test_a_run_on_a_few_crops_resumes_and_another_seed_finds_them(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flags = {
        "lora_layers": "to_q",
        "crops_per_image": 3,
        "random_flip": True,
        "with_prior_preservation": True,
        "class_prompt": "a picture",
        "class_data_dir": pictures.parent / "class_pictures",
        "num_class_images": 3,
    }
    cache = {"cache_dir_latents": tmp_path / "cache"}
    whole, _ = in_one_and_in_two(pictures, tmp_path, **flags, **cache)
    before = latents_in(tmp_path)
    assert len(before) == 2 * (1 + 3 + 3 + 1) + 2 * (1 + 3 + 1)
    for where in ({"cache_latents": False}, {"cache_latents": True}):
        assert all_equal(lora(whole), train(pictures, tmp_path / f"{where}", **flags, **where))

    def never(*_) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(latents_module, "encode_images", never)
    train(pictures, tmp_path / "again", seed=1, method="lora", max_train_steps=12, **flags, **cache)
    assert any("26 found in" in message and "0 encoded" in message for message in caplog.messages)
    assert latents_in(tmp_path) == before


def test_random_crops_cannot_be_kept(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    argv = words(pictures, tmp_path / "run", cache_dir_latents=tmp_path / "cache", lora_layers="to_q")
    assert "--cache_dir_latents: random crops" in refusal(argv, capsys)
    assert not (tmp_path / "cache").exists()


@forking
@pytest.mark.parametrize(("crop", "kept"), [({}, 4), ({"center_crop": False, "crops_per_image": 2}, 6)])
def test_two_processes_fill_one_cache_between_them(crop, kept: int, pictures: Path, tmp_path: Path) -> None:
    flags = {**SMALL, **crop, "cache_dir_latents": tmp_path / "cache", "max_train_steps": 2}
    one = train(pictures, tmp_path / "one", train_batch_size=2, **flags | {"cache_dir_latents": None})
    argv = words(pictures, tmp_path / "two", **flags)
    children = ranks(2, lambda rank: main(argv), tmp_path)
    assert [child.wait(seconds=120) for child in children] == [0, 0], children[0].log.read_text()
    assert len(latents_in(tmp_path)) == kept
    assert lora(tmp_path / "two").keys() == one.keys()
    assert summary(tmp_path / "two")["losses"] == pytest.approx(summary(tmp_path / "one")["losses"], rel=1e-4)
    assert os.environ.get("WORLD_SIZE") is None  # that of the children was theirs
