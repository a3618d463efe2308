"""Files of every kind to pixels: right way up, right colours, right corner, or one clear line."""

import io
import itertools
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, features
from torchvision import transforms
from torchvision.transforms import functional as stock

from bilora_diffusion.data.folders import SUFFIXES
from bilora_diffusion.data.images import (
    INTERPOLATIONS,
    crop_corners,
    draw_view,
    load_image,
    prepare,
    render,
    resize,
    resized_size,
)
from bilora_diffusion.errors import UserError
from bilora_diffusion.randomness import generator


def corners(width: int = 40, height: int = 24) -> Image.Image:
    """Red, green, blue and yellow from top left to bottom right: tells every turn and mirroring apart."""
    image = Image.new("RGB", (width, height), "red")
    image.paste("lime", (width // 2, 0, width, height // 2))
    image.paste("blue", (0, height // 2, width // 2, height))
    image.paste("yellow", (width // 2, height // 2, width, height))
    return image


def coordinates(width: int, height: int) -> Image.Image:
    """Red is x, green is y: any pixel tells where it comes from."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))


def corner_of(pixels: torch.Tensor) -> tuple[int, int]:
    """(y, x) that the top left pixel of a picture made of `coordinates` comes from."""
    x, y, _ = ((pixels[:, 0, 0] + 1) * 127.5).round().int().tolist()
    return y, x


def noise(width: int = 64, height: int = 48) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def png_of_16_bits(values: np.ndarray, colour_type: int, transparent: tuple[int, ...] | None = None) -> bytes:
    """A PNG with 16 bits a channel, which Pillow reads but does not write in colour. `values`: (H, W, C)."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, _ = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    key = b"" if transparent is None else chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    body = chunk(b"IHDR", header) + key + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def values_of(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_accepted_format_is_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"picture{suffix}"
    corners().save(path, quality=95)
    assert load_image(path).size == (40, 24)
    centres = values_of(load_image(path))[[6, 6, 18, 18], [10, 30, 10, 30]]
    np.testing.assert_allclose(centres, [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)], atol=12)


def test_avif_is_accepted_where_pillow_reads_it() -> None:
    assert (".avif" in SUFFIXES) == features.check("avif")


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(
    ("orientation", "undo"),
    [
        (1, None),
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
        (3, Image.Transpose.ROTATE_180),
        (4, Image.Transpose.FLIP_TOP_BOTTOM),
        (5, Image.Transpose.TRANSPOSE),
        (6, Image.Transpose.ROTATE_90),  # the camera's 6 says: turn clockwise to see it upright
        (7, Image.Transpose.TRANSVERSE),
        (8, Image.Transpose.ROTATE_270),
    ],
)
def test_exif_orientation_is_undone(orientation: int, undo: Image.Transpose | None, format_: str) -> None:
    stored = corners() if undo is None else corners().transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    stored.save(file, format_, exif=exif, **({"lossless": True} if format_ == "WEBP" else {}))
    upright = load_image(file.getvalue())
    assert upright.size == (40, 24)
    centres = values_of(upright)[[6, 6, 18, 18], [10, 30, 10, 30]]
    np.testing.assert_allclose(centres, [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)], atol=12)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_exif_block_does_not_lose_the_picture() -> None:
    file = io.BytesIO()
    corners().save(file, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\0\0")
    assert load_image(file.getvalue()).size == (40, 24)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_means_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    corners().save(file, "PNG", exif=exif)
    np.testing.assert_array_equal(values_of(load_image(file.getvalue())), values_of(corners()))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_transparency_is_laid_on_white(mode: str) -> None:
    """Left: opaque black; right: transparent black, which is white to the eye; middle: half."""
    image = Image.new("RGBA", (48, 20), (0, 0, 0, 255))
    image.paste((0, 0, 0, 128), (16, 0, 32, 20))
    image.paste((0, 0, 0, 0), (32, 0, 48, 20))
    if mode == "La":
        image = image.convert("LA").convert("La")
    elif mode == "PA":
        alpha = image.getchannel("A")
        image = Image.new("P", image.size).convert("PA")
        image.putalpha(alpha)
    else:
        image = image.convert(mode)
    assert image.mode == mode
    np.testing.assert_allclose(values_of(load_image(image))[10, [8, 24, 40], 0], [0, 127, 255], atol=1)


@pytest.mark.parametrize("mode", ["P", "L", "1", "RGB"])
def test_a_transparent_colour_in_a_png_becomes_white(mode: str) -> None:
    image = Image.new("RGB", (40, 20), "white" if mode == "1" else "gray")
    image.paste("black", (20, 0, 40, 20))
    image = image.convert(mode, palette=Image.Palette.ADAPTIVE)
    file = io.BytesIO()
    key = image.getpixel((30, 10))
    image.save(file, "PNG", transparency=key)
    row = values_of(load_image(file.getvalue()))[10]
    assert row[30].tolist() == [255] * 3
    assert row[10].tolist() == ([255] * 3 if mode == "1" else [128] * 3)


def test_a_palette_with_several_degrees_of_transparency() -> None:
    image = Image.new("P", (48, 20))
    image.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    for number in range(3):
        image.paste(number, (16 * number, 0, 16 * number + 16, 20))
    file = io.BytesIO()
    image.save(file, "PNG", transparency=bytes([255, 0, 51]))
    row = values_of(load_image(file.getvalue()))[10]
    np.testing.assert_allclose(row[[8, 24, 40]], [(200, 0, 0), (255, 255, 255), (204, 204, 244)], atol=1)


RAMP = np.linspace(0, 65535, 32 * 32).round().astype(np.uint16).reshape(32, 32)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I"])
def test_deep_grey_is_scaled_and_not_clipped(mode: str) -> None:
    if mode == "I":
        image = Image.fromarray(RAMP.astype(np.int32))
    else:
        image = Image.frombytes(mode, (32, 32), RAMP.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    assert image.mode == mode
    np.testing.assert_array_equal(values_of(load_image(image))[..., 1], np.rint(RAMP / 257))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_files_are_scaled(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(RAMP).save(path)
    np.testing.assert_array_equal(values_of(load_image(path))[..., 0], np.rint(RAMP / 257))


def test_16_bit_grey_png_with_a_transparent_grey() -> None:
    values = np.full((20, 20, 1), 1000)
    values[:10] = 40000
    grey = values_of(load_image(png_of_16_bits(values, 0, transparent=(1000,))))
    assert grey[0, 0, 0] == round(40000 / 257)
    assert grey[19, 0, 0] == 255


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (6, 4), (4, 2)])
def test_16_bit_colour_png(colour_type: int, channels: int) -> None:
    values = np.full((20, 20, channels), 65535)
    values[..., 0] = 40000
    pixel = values_of(load_image(png_of_16_bits(values, colour_type)))[0, 0]
    np.testing.assert_allclose(pixel, [156, 156, 156] if channels == 2 else [156, 255, 255], atol=1)


def test_16_bit_colour_png_with_a_transparent_colour() -> None:
    values = np.full((20, 20, 3), 40000)
    values[:10] = 10000
    rgb = values_of(load_image(png_of_16_bits(values, 2, transparent=(40000,) * 3)))
    assert rgb[0, 0].tolist() == [39] * 3
    assert rgb[19, 0].tolist() == [255] * 3


@pytest.mark.parametrize("white", [1.0, 255.0, 65535.0, 1e6])
def test_floating_point_grey_of_any_range(tmp_path: Path, white: float) -> None:
    ramp = np.linspace(0, white, 400, dtype=np.float32).reshape(20, 20)
    Image.fromarray(ramp).save(tmp_path / "float.tiff")
    np.testing.assert_allclose(values_of(load_image(tmp_path / "float.tiff"))[..., 2], ramp / white * 255, atol=0.51)


def test_floating_point_overshoot_and_nan_are_clipped() -> None:
    values = np.full((16, 16), 0.5, dtype=np.float32)
    values[0, :4] = [1.2, -0.3, np.nan, np.inf]
    row = values_of(load_image(Image.fromarray(values)))[0, :5, 0]
    assert row.tolist() == [255, 0, 0, 0, 128]


@pytest.mark.parametrize("mode", ["L", "1", "P", "YCbCr", "HSV", "CMYK", "RGBX"])
def test_other_modes_keep_their_colours(mode: str) -> None:
    image = Image.new("RGB", (32, 32), "white")
    image.paste("black", (16, 0, 32, 32))
    values = values_of(load_image(image.convert(mode)))
    np.testing.assert_allclose(values[16, [4, 28]], [[255] * 3, [0] * 3], atol=2)


def test_lab() -> None:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(corners(), *profiles, outputMode="LAB")
    np.testing.assert_allclose(values_of(load_image(image)), values_of(corners()), atol=25)  # 8-bit LAB is coarse


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk_files(tmp_path: Path, suffix: str) -> None:
    corners().convert("CMYK").save(tmp_path / f"print.{suffix}", quality=95)
    centres = values_of(load_image(tmp_path / f"print.{suffix}"))[[6, 6, 18, 18], [10, 30, 10, 30]]
    np.testing.assert_allclose(centres, [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)], atol=12)


@pytest.mark.parametrize("format_", ["WEBP", "PNG", "TIFF", "GIF"])
def test_the_first_frame_of_an_animation(format_: str) -> None:
    file = io.BytesIO()
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    lossless = {"lossless": True} if format_ == "WEBP" else {}
    frames[0].save(file, format_, save_all=True, append_images=frames[1:], **lossless)
    np.testing.assert_allclose(values_of(load_image(file.getvalue()))[10, 10], [255, 0, 0], atol=2)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_a_truncated_file_is_named(tmp_path: Path, suffix: str, share: float) -> None:
    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    noise().save(whole)
    content = whole.read_bytes()
    cut.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=rf"cut\{suffix} cannot be read as a picture"):
        load_image(cut)


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_what_is_not_a_picture_is_named_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "odd.png").write_bytes(content)
    with pytest.raises(UserError, match=r"odd\.png cannot be read") as caught:
        load_image(tmp_path / "odd.png")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"^row 3 cannot be read"):
        load_image(content, "row 3")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.jpg is missing"):
        load_image(tmp_path / "gone.jpg")


@pytest.mark.parametrize("size", [(15, 40), (40, 15)])
def test_a_small_picture_is_refused_with_its_size(size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=rf"small\.png is too small, {size[0]} x {size[1]} px"):
        load_image(Image.new("RGB", size), "small.png")
    assert load_image(Image.new("RGB", (16, 40))).size == (16, 40)


def test_the_original_is_left_as_it_was() -> None:
    image = Image.new("RGB", (20, 20))
    image.info["transparency"] = (300, 0, 0)
    load_image(image)
    assert image.mode == "RGB"
    assert image.info["transparency"] == (300, 0, 0)


@pytest.mark.parametrize("size", [(1000, 17), (17, 1000), (333, 334), (64, 64), (1023, 1365), (50, 70)])
def test_resized_size_is_torchvisions(size: tuple[int, int]) -> None:
    width, height = stock.resize(Image.new("L", size[::-1]), 100).size
    assert resized_size(size, 100) == (height, width)


@pytest.mark.parametrize("name", sorted(INTERPOLATIONS))
@pytest.mark.parametrize("size", [(64, 48), (31, 90)])
def test_the_pixels_are_those_of_the_stock_transforms(name: str, size: tuple[int, int]) -> None:
    image = noise(*size)
    stock_transform = transforms.Compose(
        [
            transforms.Resize(32, interpolation=transforms.InterpolationMode[name.upper()]),
            transforms.RandomHorizontalFlip(p=1.0),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )
    view = draw_view(size[::-1], 32, 1, False, generator(0))
    mirrored = type(view)(view.original_size, view.crop_top_left, True)
    assert torch.equal(render(resize(image, 32, name), mirrored, 32), stock_transform(image))


def test_the_names_of_the_interpolations() -> None:
    names = {"nearest", "nearest_exact", "bilinear", "bicubic", "box", "hamming", "lanczos"}
    assert set(INTERPOLATIONS) == names
    with pytest.raises(UserError, match=r"--image_interpolation_mode cubic is unknown.*lanczos"):
        resize(noise(), 32, "cubic")


@pytest.mark.parametrize("size", [(96, 64), (64, 96), (64, 64), (95, 64)])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("center", [False, True])
def test_the_crop_corner_is_that_of_the_picture_the_model_sees(size: tuple[int, int], flip: bool, center: bool) -> None:
    """Seen through a picture whose pixels name their place (the shorter side is R: nothing is resized)."""
    width, height = size
    seen = set()
    for number in range(40):
        prepared = prepare(coordinates(*size), 64, center, flip, "lanczos", generator(0, number))
        assert prepared.pixels.shape == (3, 64, 64)
        assert prepared.pixels.dtype == torch.float32
        assert prepared.original_size == (height, width)
        y, x = prepared.crop_top_left
        place = (y, width - 1 - x) if prepared.flipped else (y, x)
        assert corner_of(prepared.pixels) == place
        seen.add((prepared.crop_top_left, prepared.flipped))
    assert {flipped for _, flipped in seen} == ({False, True} if flip else {False})
    if center:
        assert {corner for corner, _ in seen} == {(round((height - 64) / 2), round((width - 64) / 2))}


def test_the_corner_is_counted_after_resizing_and_the_size_before() -> None:
    blocks = coordinates(96, 64).resize((192, 128), Image.Resampling.NEAREST)
    prepared = prepare(blocks, 64, False, False, "nearest", generator(0))
    assert prepared.original_size == (128, 192)
    assert corner_of(prepared.pixels) == prepared.crop_top_left


def test_crops_reach_both_ends_and_flips_are_even() -> None:
    views = [draw_view((16, 20), 16, None, True, generator(0, number)) for number in range(1000)]
    counts = np.bincount([view.crop_top_left[1] for view in views])
    assert len(counts) == 5
    assert counts.min() > 150
    assert 450 < sum(view.flipped for view in views) < 550


def test_an_option_does_not_shift_the_others_draws() -> None:
    for number in range(20):
        plain, flipping, centred, three = (
            draw_view((100, 200), 50, crops, flip, generator(0, number))
            for crops, flip in ((None, False), (None, True), (1, True), (3, True))
        )
        assert plain.crop_top_left == flipping.crop_top_left
        assert flipping.flipped == centred.flipped == three.flipped
        anywhere, few = (view.crop_top_left[1] for view in (plain, three))
        assert few == (8, 25, 42)[anywhere * 3 // 51], "the third of the picture that a crop anywhere is in"
    after = []
    for crops, flip in itertools.product((None, 1, 3), (False, True)):
        stream = generator(0)
        draw_view((100, 200), 50, crops, flip, stream)
        after.append(torch.rand(1, generator=stream).item())
    assert len(set(after)) == 1


@pytest.mark.parametrize(
    ("width", "crops", "places"),
    [
        (116, 1, [50]),
        (116, 2, [25, 75]),
        (116, 4, [12, 37, 62, 87]),
        (116, 5, [10, 30, 50, 70, 90]),
        (19, 1, [2]),  # as --center_crop rounds it
        (18, 3, [0, 1, 2]),
        (18, 10**9, [0, 1, 2]),
        (20, 4, [0, 1, 2, 3]),
        (24, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (16, 7, [0]),
    ],
)
def test_crops_are_spread_evenly_over_what_there_is_to_crop(width: int, crops: int, places: list[int]) -> None:
    assert crop_corners((16, width), 16, crops) == [(0, x) for x in places]
    assert crop_corners((width, 16), 16, crops) == [(y, 0) for y in places]
    assert crop_corners((16, width), (16, width), crops) == [(0, 0)]
    views = [draw_view((16, width), 16, crops, True, generator(0, number)) for number in range(100 * len(places))]
    shown = Counter(view.crop_top_left for view in views)
    assert sorted(shown) == [(0, x) for x in places]
    assert min(shown.values()) > 60, "each as often"
    centred = draw_view((16, width), 16, 1, False, generator(0)).crop_top_left
    assert crops > 1 or centred == (0, round((width - 16) / 2))


def test_the_range_of_the_pixels() -> None:
    black_and_white = Image.new("RGB", (32, 16))
    black_and_white.paste("white", (16, 0, 32, 16))
    pixels = prepare(black_and_white, 16, False, False, "nearest", generator(3)).pixels
    assert set(pixels.unique().tolist()) <= {-1.0, 1.0}
