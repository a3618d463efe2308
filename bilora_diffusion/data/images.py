"""1-> One file to pixels: upright RGB, resized, perhaps mirrored, cropped, in [-1, 1].

SDXL is told how each picture was cut (micro-conditioning), so this module returns, beside the pixels, the
size the picture had before resizing and the corner of the crop. Where a picture is cut (`draw_view`) is kept
apart from the pixels (`render`): with cached latents the first is still needed for every draw, the second
never.

Reference: SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis, Podell et al., 2023,
arXiv:2307.01952, section 2.2.
"""

import io
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from bilora_diffusion.errors import UserError

__all__ = [
    "INTERPOLATIONS",
    "SMALLEST_SIDE_PX",
    "Prepared",
    "Resolution",
    "Source",
    "View",
    "crop_corners",
    "draw_view",
    "image_size",
    "load_alpha",
    "load_image",
    "load_mask",
    "prepare",
    "render",
    "resize",
    "resized_size",
]

Source = Path | bytes | Image.Image

Resolution = int | tuple[int, int]
"""Of what the model sees: the side of a square, or (height, width), in px."""

SMALLEST_SIDE_PX = 16

INTERPOLATIONS = {mode.value.replace("-", "_"): mode for mode in InterpolationMode}
"""Names of `--image_interpolation_mode`: nearest, nearest_exact, bilinear, bicubic, box, hamming, lanczos."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to what makes the picture upright."""

_SIDEWAYS = {_UPRIGHT[orientation] for orientation in (5, 6, 7, 8)}

Result = TypeVar("Result")


@dataclass(frozen=True)
class View:
    """How a picture is shown to the model.

    Attributes:
        original_size: (height, width) in px, upright, before resizing.
        crop_top_left: (y, x) in px of the crop's corner in the picture resized and, if `flipped`, mirrored.
        flipped: mirrored left to right.
    """

    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]
    flipped: bool


@dataclass(frozen=True, eq=False)
class Prepared:
    """Pixels (3, R, R), float32 in [-1, 1], and the `View` they show, field by field."""

    pixels: torch.Tensor
    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]
    flipped: bool


def load_image(source: Source, name: str | None = None) -> Image.Image:
    """A picture, fully decoded, upright, as 8-bit RGB; the first frame of an animation.

    Transparency is laid on white: many cut-outs hide black or noise under it. Grey of more than 8 bits is
    scaled, where Pillow's own conversion clips it to white.

    Arguments:
        source: a file, the bytes of one, or an open picture.
        name: what to call it in messages; by default the file's path.

    Raises:
        UserError: it cannot be read to its end, or a side is under `SMALLEST_SIDE_PX`. The message names it.
    """
    name = name or (str(source) if isinstance(source, Path) else "a picture")
    image = _read(source, name, partial(_upright, convert=_rgb))
    _check_size((image.height, image.width), name)
    return image


def image_size(source: Source, name: str) -> tuple[int, int]:
    """(height, width) in px of what `load_image` gives of a picture, which is read to its last byte.

    A JPEG is decoded at an eighth of its size: that finds a damaged one as well, and sooner.

    Raises:
        UserError: as `load_image`.
    """
    if isinstance(source, Image.Image):
        image = load_image(source, name)
        return image.height, image.width
    size = _read(source, name, _size)  # changes what was opened
    _check_size(size, name)
    return size


def _check_size(size: tuple[int, int], name: str) -> None:
    height, width = size
    if min(size) < SMALLEST_SIDE_PX:
        raise UserError(
            f"{name} is too small, {width} x {height} px (width x height): each side needs at "
            f"least {SMALLEST_SIDE_PX} px; replace or remove it"
        )


def load_alpha(source: Source, name: str) -> Image.Image:
    """How opaque a picture is, upright, as 8-bit grey: 255 all over where it has no transparency.

    Raises:
        UserError: as `load_image`.
    """
    return _read(source, name, partial(_upright, convert=_alpha))


def load_mask(source: Source, name: str) -> Image.Image:
    """A mask, upright, as 8-bit grey; what is transparent in it counts as black.

    Raises:
        UserError: as `load_image`.
    """
    return _read(source, name, partial(_upright, convert=_grey_on_black))


def _read(source: Source, name: str, use: Callable[[Image.Image], Result]) -> Result:
    """What `use` makes of an opened picture."""
    # Decoders of damaged files raise whatever they stumble on (OSError, SyntaxError, struct.error ...).
    try:
        if isinstance(source, Image.Image):
            return use(source)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            return use(opened)
    except FileNotFoundError as error:
        raise UserError(f"{name} is missing: there is no file {error.filename}") from error
    except Exception as error:
        raise UserError(f"{name} cannot be read as a picture ({_reason(error)}): replace or remove it") from error


def resized_size(size: tuple[int, int], resolution: Resolution) -> tuple[int, int]:
    """(height, width) in px of the smallest size that holds `resolution`: for a square, the shorter side is its side.

    Torchvision's rounding (down), but never below `resolution`.
    """
    height, width = size
    to_height, to_width = _sides(resolution)
    if height * to_width <= width * to_height:
        return to_height, max(to_width, int(to_height * width / height))
    return max(to_height, int(to_width * height / width)), to_width


def _sides(resolution: Resolution) -> tuple[int, int]:
    return (resolution, resolution) if isinstance(resolution, int) else resolution


def draw_view(
    size: tuple[int, int], resolution: Resolution, crops: int | None, random_flip: bool, generator: torch.Generator
) -> View:
    """Where to cut a picture of (height, width) `size` px, and whether to mirror it first (one time in two).

    Always three numbers are drawn (flip, y, x), used or not: switching one option on leaves the others' draws
    as they were.

    Arguments:
        crops: cut at one of the `crop_corners`, 1 for the middle; None: anywhere. With equal chances.
    """
    flip, *shares = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    places = (range(px + 1) if crops is None else _spread(px, crops) for px in _spare(size, resolution))
    y, x = (some[int(share * len(some))] for share, some in zip(shares, places, strict=True))
    return View(original_size=size, crop_top_left=(y, x), flipped=random_flip and flip < 0.5)


def crop_corners(size: tuple[int, int], resolution: Resolution, crops: int) -> list[tuple[int, int]]:
    """(y, x) in px of the corners of a picture's crops, spread evenly over what there is to crop, each once.

    A picture in its `resized_size` has s px to spare along one side at most. Crop n of N = `crops` leaves the share
    (n + 1/2) / N of them before it, rounded: for N = 1 the crop is the middle, for N > s there are s + 1, each place.
    Nothing is random: they are the same in every run.
    """
    return list(itertools.product(*(_spread(px, crops) for px in _spare(size, resolution))))


def _spare(size: tuple[int, int], resolution: Resolution) -> list[int]:
    """What there is to crop of the height and of the width, in px."""
    return [have - need for have, need in zip(resized_size(size, resolution), _sides(resolution), strict=True)]


def _spread(spare: int, crops: int) -> list[int]:
    if crops == 1:
        return [round(spare / 2)]
    count = min(crops, spare + 1)
    return [-(-((2 * n + 1) * spare - count) // (2 * count)) for n in range(count)]  # halves down: all are different


def resize(image: Image.Image, resolution: Resolution, interpolation: str) -> Image.Image:
    """The picture in its `resized_size`.

    Raises:
        UserError: `interpolation` is not one of `INTERPOLATIONS`.
    """
    if interpolation not in INTERPOLATIONS:
        names = ", ".join(INTERPOLATIONS)
        raise UserError(f"--image_interpolation_mode {interpolation} is unknown: choose from {names}")
    size = resized_size((image.height, image.width), resolution)
    return F.resize(image, list(size), interpolation=INTERPOLATIONS[interpolation])


def render(resized: Image.Image, view: View, resolution: Resolution) -> torch.Tensor:
    """Pixels (3, H, W), float32 in [-1, 1], that `view` shows of a picture from `resize`: mirror, then
    crop.
    """
    if view.flipped:
        resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    y, x = view.crop_top_left
    height, width = _sides(resolution)
    values = np.array(resized.crop((x, y, x + width, y + height)))
    # Dividing by 255 and then by 0.5 rounds as torchvision's ToTensor and Normalize([0.5], [0.5]) do.
    return torch.from_numpy(values).permute(2, 0, 1).float().contiguous().div_(255).sub_(0.5).div_(0.5)


def prepare(
    image: Image.Image,
    resolution: int,
    center_crop: bool,
    random_flip: bool,
    interpolation: str,
    generator: torch.Generator,
) -> Prepared:
    """One picture from `load_image` as the model sees it: `draw_view`, `resize` and `render` in one.

    Arguments:
        resolution: R, side of the square in px; the picture's shorter side becomes that long.
        center_crop: cut the middle; otherwise anywhere, with equal chances.
        random_flip: mirror one time in two, before the crop (the corner is that of the picture the model
            sees).
        interpolation: one of `INTERPOLATIONS`.
        generator: gives three numbers, whatever the options.
    """
    crops = 1 if center_crop else None
    view = draw_view((image.height, image.width), resolution, crops, random_flip, generator)
    pixels = render(resize(image, resolution, interpolation), view, resolution)
    return Prepared(pixels, view.original_size, view.crop_top_left, view.flipped)


def _upright(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """A picture to its last byte, converted and turned upright."""
    image.load()  # a truncated file fails here; TIFF turns itself upright here
    converted = convert(image)
    turn = _turn(image)
    return converted if turn is None else converted.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged EXIF block is no reason to lose the picture
        return None


def _size(image: Image.Image) -> tuple[int, int]:
    """See `image_size`."""
    width, height = image.size
    image.draft(None, (1, 1))  # of formats but JPEG it changes nothing
    if image.size == (width, height):
        upright = _upright(image, _rgb)
        return upright.height, upright.width
    _upright(image, _rgb)
    return (width, height) if _turn(image) in _SIDEWAYS else (height, width)


def _is_deep_grey(image: Image.Image) -> bool:
    return image.mode == "F" or image.mode.startswith("I")


def _rgb(image: Image.Image) -> Image.Image:
    if _is_deep_grey(image):
        return _rgb_of_deep_grey(image)
    return _on(image, "white") if image.has_transparency_data else image.convert("RGB")


def _grey_on_black(image: Image.Image) -> Image.Image:
    if _is_deep_grey(image):
        return _rgb_of_deep_grey(image).convert("L")
    return (_on(image, "black") if image.has_transparency_data else image).convert("L")


def _alpha(image: Image.Image) -> Image.Image:
    if not _is_deep_grey(image):
        opaque = Image.new("L", image.size, 255)
        return _rgba(image).getchannel("A") if image.has_transparency_data else opaque
    transparent = image.info.get("transparency")  # a PNG may name one grey as the transparent one
    return Image.fromarray(np.where(np.asarray(image) == transparent, 0, 255).astype(np.uint8))


def _on(image: Image.Image, colour: str) -> Image.Image:
    ground = Image.new("RGBA", image.size, colour)
    ground.alpha_composite(_rgba(image))
    return ground.convert("RGB")


def _rgba(image: Image.Image) -> Image.Image:
    """Of a picture with transparency."""
    if image.mode == "La":  # Pillow converts premultiplied grey to LA only
        image = image.convert("LA")
    key = image.info.get("transparency")
    if image.mode == "RGB" and max(key) > 255:  # of a 16-bit PNG, whose pixels Pillow cuts to their high byte
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in key)
    return image.convert("RGBA")


def _rgb_of_deep_grey(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits or in floating point, scaled to 8 bits.

    White is 65535; of floats 1, 255 or 65535, the first that holds the brightest pixel (a little over 1 is
    still
    the range to 1: sharpening overshoots); of anything brighter, the brightest pixel. Pillow does not say
        which.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    brightest = values.max()
    if image.mode == "F" and brightest < 2:
        white = 1.0
    elif image.mode == "F" and brightest <= 255:
        white = 255.0
    else:
        white = max(65535.0, brightest)
    grey = np.rint(np.clip(values / white, 0, 1) * 255).astype(np.uint8)
    transparent = image.info.get("transparency")  # a PNG may name one grey as the transparent one
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a picture format that Pillow knows"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [""])[0] or type(error).__name__
