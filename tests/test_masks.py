"""Masks: found or read from transparency, cut as their pictures, weighing the loss; whole runs with them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import Builder, all_equal, difference, write_pictures
from whole_run import in_one_and_in_two, quicken, refusal, train, words

from bilora_diffusion.data.dreambooth import DreamBoothDataset, flatten
from bilora_diffusion.data.images import View
from bilora_diffusion.data.masks import latent_weights, render_mask, with_alpha_masks, with_mask_files
from bilora_diffusion.data.pictures import Picture, find_pictures
from bilora_diffusion.errors import UserError


def stripes(size: tuple[int, int], white: slice = slice(16, 40)) -> Image.Image:
    """A mask of (width, height), white in some columns."""
    values = np.zeros(size[::-1], dtype=np.uint8)
    values[:, white] = 255
    return Image.fromarray(values)


def found(folder: Path) -> list[Picture]:
    return find_pictures(folder, instance_prompt="x")[0]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three pictures, one of them wide, and a mask for each."""
    pictures, masks = tmp_path / "pictures", tmp_path / "masks"
    for folder in (pictures, masks):
        folder.mkdir()
    sizes = [(64, 64), (96, 64), (64, 64)]
    write_pictures(pictures, sizes, None, seed=0)
    for number, size in enumerate(sizes):
        stripes(size).save(masks / f"{number}.png")
    return pictures, masks


# --- Finding them ---


def test_a_mask_has_its_pictures_name_with_any_ending(folders: tuple[Path, Path]) -> None:
    pictures, masks = folders
    Image.open(masks / "1.png").save(masks / "1.BMP")
    (masks / "1.png").unlink()
    (masks / "1.txt").write_text("no mask")
    masked = with_mask_files(found(pictures), masks)
    assert [Path(picture.mask).name for picture in masked] == ["0.png", "1.BMP", "2.png"]
    assert [picture.load_mask().getpixel((x, 0)) for picture in masked for x in (15, 16, 40)] == [0, 255, 0] * 3


def test_masks_of_subfolders_are_in_subfolders(tmp_path: Path) -> None:
    for folder in ("pictures/deep", "masks/deep"):
        (tmp_path / folder).mkdir(parents=True)
    write_pictures(tmp_path / "pictures" / "deep", [(64, 64)], None, seed=0)
    (tmp_path / "pictures" / "metadata.jsonl").write_text('{"file_name": "deep/0.png", "text": "x"}')
    stripes((64, 64)).save(tmp_path / "masks" / "0.png")
    with pytest.raises(UserError, match=r"the first is deep/0\.png"):
        with_mask_files(found(tmp_path / "pictures"), tmp_path / "masks")
    stripes((64, 64)).save(tmp_path / "masks" / "deep" / "0.png")
    assert with_mask_files(found(tmp_path / "pictures"), tmp_path / "masks")[0].mask is not None


def one_missing(masks: Path) -> None:
    (masks / "1.png").unlink()


def two_of_one(masks: Path) -> None:
    stripes((96, 64)).save(masks / "1.bmp")


def another_size(masks: Path) -> None:
    stripes((64, 96)).save(masks / "1.png")


def all_black(masks: Path) -> None:
    stripes((96, 64), slice(0)).save(masks / "1.png")


def damaged(masks: Path) -> None:
    (masks / "1.png").write_bytes(b"nothing")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (one_missing, r"has no mask for 1 of 3 pictures, the first is 1\.png: add 1\.png of its size there"),
        (two_of_one, r"1\.bmp and .*1\.png for 1\.png: leave only one"),
        (another_size, r"1\.png is 64 x 96 px and the picture 1\.png 96 x 64 px"),
        (all_black, r"the mask of 1\.png is black all over"),
        (damaged, r"the mask .*1\.png cannot be read as a picture"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_mask_that_does_not_fit_is_named(folders: tuple[Path, Path], harm: Any, message: str) -> None:
    harm(folders[1])
    with pytest.raises(UserError, match=message) as caught:
        with_mask_files(found(folders[0]), folders[1])
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there(folders: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match=r"--mask_dir .*gone is not there"):
        with_mask_files(found(folders[0]), folders[0] / "gone")


def test_what_is_transparent_in_a_mask_is_black(folders: tuple[Path, Path]) -> None:
    pictures, masks = folders
    white = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    white.paste((255, 255, 255, 255), (16, 0, 40, 64))
    white.save(masks / "0.png")
    mask = with_mask_files(found(pictures), masks)[0].load_mask()
    assert np.array_equal(np.asarray(mask), np.asarray(stripes((64, 64))))
    deep = Image.fromarray(np.asarray(stripes((64, 64))).astype(np.uint16) * 257)
    deep.save(masks / "0.png")
    assert np.array_equal(np.asarray(with_mask_files(found(pictures), masks)[0].load_mask()), np.asarray(mask))


# --- Transparency ---


def with_alpha(mode: str) -> Image.Image:
    """A grey picture of 64 px whose columns 16 to 39 are opaque."""
    image = Image.new("RGBA", (64, 64), (90, 90, 90, 255))
    image.putalpha(stripes((64, 64)))
    return image.convert(mode)


def test_transparency_is_a_mask(tmp_path: Path) -> None:
    for mode in ("RGBA", "LA"):
        with_alpha(mode).save(tmp_path / f"{mode}.png")
    with_alpha("RGBA").save(tmp_path / "webp.webp", lossless=True)
    keyed = np.where(np.asarray(stripes((64, 64))) == 0, 7, 200).astype(np.uint8)
    Image.fromarray(keyed).save(tmp_path / "grey key.png", transparency=7)
    Image.fromarray(keyed.astype(np.uint16) * 100).save(tmp_path / "deep key.png", transparency=700)
    Image.fromarray(np.stack([keyed] * 3, -1)).save(tmp_path / "colour key.png", transparency=(7, 7, 7))
    palette = Image.fromarray(keyed).convert("P")
    palette.save(tmp_path / "palette.png", transparency=palette.getpixel((0, 0)))
    masked, warnings = with_alpha_masks(found(tmp_path))
    assert len(masked) == 7 and warnings == []
    for picture in masked:
        assert np.array_equal(np.asarray(picture.load_mask()), np.asarray(stripes((64, 64)))), picture.name


def test_transparency_is_turned_upright_with_its_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGBA", (64, 32), "red")
    image.putalpha(stripes((64, 32)))
    image.save(tmp_path / "turned.png", exif=exif)
    ((picture,), _) = with_alpha_masks(found(tmp_path))
    mask = np.asarray(picture.load_mask())
    assert mask.shape == (64, 32) and (mask[16:40] == 255).all() and not mask[:16].any()


def test_opaque_pictures_count_whole(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "opaque.png")
    with pytest.raises(UserError, match=r"--alpha_mask: none of the 1 pictures has transparency"):
        with_alpha_masks(found(tmp_path))
    with_alpha("RGBA").save(tmp_path / "cut.png")
    masked, (warning,) = with_alpha_masks(found(tmp_path))
    assert [picture.mask for picture in masked] == ["alpha", None]
    assert "1 of 2 pictures have no transparency, such as opaque.png" in warning
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(tmp_path / "nothing.png")
    with pytest.raises(UserError, match=r"the mask of nothing\.png is black all over"):
        with_alpha_masks(found(tmp_path))


# --- Cutting and weighing ---


def test_a_mask_is_cut_as_its_picture() -> None:
    """The picture is its own mask, so that every pixel tells what its weight must be."""
    rng = np.random.default_rng(0)
    blocks = np.kron(rng.integers(0, 2, (5, 8), dtype=np.uint8) * 255, np.ones((8, 8), np.uint8))
    image = Image.fromarray(blocks)  # 64 x 40 px
    picture = Picture.read("blocks", image.convert("RGB"), "x")
    keyed = image.convert("RGB").convert("RGBA")
    keyed.putalpha(image)
    masked = replace(picture, source=keyed, mask="alpha")
    dataset = DreamBoothDataset([masked], resolution=40, random_flip=True, interpolation="nearest", seed=0)
    mean = (blocks / 255).mean()
    views = set()
    for draw in range(20):
        (row,) = dataset[draw]
        views.add((row.flipped, row.crop_top_left))
        cut = np.asarray(image)[:, ::-1] if row.flipped else np.asarray(image)
        x = row.crop_top_left[1]
        assert np.allclose(row.mask.numpy(), cut[:, x : x + 40] / 255 / mean)
    assert len(views) > 10


def test_the_pixels_under_the_mask_are_the_pictures(folders: tuple[Path, Path]) -> None:
    plain = DreamBoothDataset(found(folders[0]), resolution=64, random_flip=True, seed=0)
    masked = DreamBoothDataset(with_mask_files(found(folders[0]), folders[1]), resolution=64, random_flip=True, seed=0)
    for draw in range(6):
        (one,), (other,) = plain[draw], masked[draw]
        assert torch.equal(one.pixels, other.pixels) and one.mask is None and other.mask.shape == (64, 64)


def test_a_cell_weighs_what_its_pixels_do_on_average() -> None:
    view = View((64, 64), (0, 0), False)
    weights = latent_weights(render_mask(stripes((64, 64), slice(4, 36)), view, (64, 64)), 8)
    assert weights.shape == (8, 8)
    assert weights[0].tolist() == [1.0, 2.0, 2.0, 2.0, 1.0, 0.0, 0.0, 0.0]  # half the picture is white: 1 / mean is 2
    assert weights.mean() == 1


@pytest.mark.parametrize("grey", [1, 127, 255])
def test_a_mask_of_one_brightness_weighs_exactly_one(grey: int) -> None:
    mask = Image.new("L", (96, 64), grey)
    assert (latent_weights(render_mask(mask, View((64, 96), (0, 13), True), (64, 64)), 8) == 1).all()


def test_a_mask_that_vanishes_weighs_nothing() -> None:
    assert (render_mask(Image.new("L", (64, 64), 0), View((64, 64), (0, 0), False), (64, 64)) == 0).all()


def test_the_loss_does_not_see_what_is_masked(build: Builder, folders: tuple[Path, Path]) -> None:
    flags = {"instance_data_dir": str(folders[0]), "mask_dir": str(folders[1]), "snr_gamma": 5.0}
    run = build("lora", **flags)
    (micro_batch,) = run.micro_batches()
    batch = micro_batch.batch
    assert batch.place_weights.shape == (2, 1, 8, 8)
    outside = (batch.place_weights == 0).expand_as(batch.noise)
    assert 0 < outside.sum() < outside.numel()
    with torch.no_grad():
        loss = micro_batch.loss()
        noisy = run.parts.trainer.objective.noisy_latents(batch.latents, batch.noise, batch.timesteps)
        squares = (micro_batch.predictions() - batch.noise).square()
        rows = (squares * batch.place_weights).flatten(1).mean(1)
        weights = run.parts.trainer.objective._snr_weights(batch.timesteps)
        assert loss.item() == pytest.approx((rows * weights).mean().item(), rel=1e-6)
        # Another target where the mask is black is another target for nobody.
        objective = run.parts.trainer.objective
        arguments = (micro_batch.predictions(), batch.noise, noisy, batch.timesteps)
        other = batch.noise + 100 * outside
        assert torch.equal(
            objective.errors(*arguments, batch.place_weights),
            objective.errors(arguments[0], other, *arguments[2:], batch.place_weights),
        )


@pytest.mark.parametrize("edm", [False, True])
def test_weights_of_one_are_no_weights(build: Builder, edm: bool) -> None:
    run = build("lora", do_edm_style_training=edm)
    (micro_batch,) = run.micro_batches()
    ones = replace(micro_batch, batch=replace(micro_batch.batch, place_weights=torch.ones(2, 1, 8, 8)))
    with torch.no_grad():
        assert torch.equal(ones.loss(), micro_batch.loss())


@pytest.mark.parametrize("random_flip", [False, True])
@pytest.mark.parametrize("crop", [{"center_crop": True}, {"center_crop": False, "crops_per_image": 3}])
def test_weights_do_not_depend_on_the_cache(
    build: Builder, folders: tuple[Path, Path], random_flip: bool, crop: dict[str, Any]
) -> None:
    flags = {"instance_data_dir": str(folders[0]), "mask_dir": str(folders[1]), "random_flip": random_flip, **crop}
    cached, encoded = (build("lora", cache_latents=cache, **flags) for cache in (True, False))
    for step in range(3):
        one, other = cached.batches(step)[0], encoded.batches(step)[0]
        assert torch.equal(one.place_weights, other.place_weights)
        assert torch.allclose(one.latents, other.latents, atol=1e-5)


def test_rows_of_the_class_count_whole(build: Builder, folders: tuple[Path, Path]) -> None:
    flags = {"instance_data_dir": str(folders[0]), "mask_dir": str(folders[1]), "with_prior_preservation": True}
    for source in ("class_images", "base_prediction"):
        weights = build("lora", prior_source=source, **flags).batches(0)[0].place_weights
        assert (weights[1::2] == 1).all() and (weights[::2] == 0).any()


def test_a_mask_that_is_black_in_every_crop_is_refused(build: Builder, folders: tuple[Path, Path]) -> None:
    stripes((96, 64), slice(0, 8)).save(folders[1] / "1.png")
    flags = {"instance_data_dir": str(folders[0]), "mask_dir": str(folders[1])}
    for crop in ({}, {"center_crop": False, "crops_per_image": 1}):
        with pytest.raises(UserError, match=r"the mask of 1\.png is black all over in every crop"):
            build("lora", **flags, **crop)
    kept = build("lora", **flags, center_crop=False, crops_per_image=3).parts.make_batch.latents.weights
    seen = {key[2].crop_top_left[1]: bool(weights.any()) for key, (weights,) in kept.items() if key[1] == 1}
    assert seen == {5: True, 16: False, 27: False}  # one crop that shows something of it is enough


def test_workers_bring_masks_too(folders: tuple[Path, Path]) -> None:
    dataset = DreamBoothDataset(with_mask_files(found(folders[0]), folders[1]), resolution=64, seed=0)
    rows = flatten(dataset[draw] for draw in range(3))
    assert all(row.mask is not None and row.mask.dtype == torch.float32 for row in rows)
    dataset.stop_decoding()
    assert dataset[0][0].mask is None


# --- Whole runs ---

SMALL = {"lora_layers": "to_q"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)


def test_white_masks_change_nothing_and_others_do(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pictures, masks = folders
    white = tmp_path / "white"
    white.mkdir()
    for path in masks.iterdir():
        Image.new("L", Image.open(path).size, 200).save(white / path.name)
    plain = train(pictures, tmp_path / "plain", **SMALL)
    assert all_equal(plain, train(pictures, tmp_path / "all", mask_dir=white, **SMALL))
    masked = train(pictures, tmp_path / "masked", mask_dir=masks, **SMALL)
    assert difference(plain, masked) > 1e-3
    assert "| loss | masked |" in (tmp_path / "masked" / "README.md").read_text()
    assert "masked" not in (tmp_path / "plain" / "README.md").read_text()


@pytest.mark.parametrize("crop", [{}, {"center_crop": True}, {"crops_per_image": 3}], ids=str)
def test_a_masked_run_resumes_where_it_was(crop: dict[str, Any], folders: tuple[Path, Path], tmp_path: Path) -> None:
    flags = {"mask_dir": folders[1], **crop, "random_flip": True, "loss_gap_steps": 2, **SMALL}
    in_one_and_in_two(folders[0], tmp_path, **flags)


def test_a_run_on_cut_out_pictures(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "pictures").mkdir()
    with_alpha("RGBA").save(tmp_path / "pictures" / "cut.png")
    masked = train(tmp_path / "pictures", tmp_path / "masked", alpha_mask=True, **SMALL)
    assert difference(train(tmp_path / "pictures", tmp_path / "plain", **SMALL), masked) > 1e-3
    opaque = tmp_path / "opaque"
    opaque.mkdir()
    write_pictures(opaque, [(64, 64)], None, seed=0)
    line = refusal(words(opaque, tmp_path / "refused", alpha_mask=True, **SMALL), capsys)
    assert "--alpha_mask: none of the 1 pictures has transparency" in line
