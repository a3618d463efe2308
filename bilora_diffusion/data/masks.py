"""Masked loss: what share each part of a picture has in its loss.

A mask is white where the picture is to be learnt, black where it is not, grey for something between; it has the
picture's size and follows its resizing, mirroring and crop. On the latents' grid each cell weighs what the mask is in
it on average, divided by the mask's mean over the whole picture:

    loss of a row = mean over cells of  weight_cell * squared error,    weight = mask / mean(mask)

So small subjects count as much as large ones, a crop that shows little of the subject counts little, and a mask of one
brightness, whichever, changes nothing, to the last bit.

Reference:
    docs/masked_loss_README.md of kohya-ss/sd-scripts (48d368fa), where the same weights are not divided by their mean:
    there the loss, and with it the gradient, is small where the mask is.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bilora_diffusion.data.folders import SUFFIXES
from bilora_diffusion.data.images import View
from bilora_diffusion.data.pictures import ALPHA, Picture
from bilora_diffusion.data.reading import read_each
from bilora_diffusion.errors import UserError

__all__ = ["latent_weights", "render_mask", "with_alpha_masks", "with_mask_files"]


def with_mask_files(pictures: Sequence[Picture], folder: str | Path) -> list[Picture]:
    """The pictures with the masks of `--mask_dir`, each found under its picture's name with any picture's ending.

    Raises:
        UserError: a picture has no mask or several, or its mask is unusable, of another size, or all black.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--mask_dir {folder} is not there: give the folder that holds the masks")
    places: dict[Path, dict[str, list[Path]]] = {}
    masked = [replace(picture, mask=_mask_file(folder, picture.name, places)) for picture in pictures]
    missing = [picture.name for picture in masked if picture.mask is None]
    if missing:
        raise UserError(
            f"--mask_dir {folder} has no mask for {len(missing)} of {len(masked)} pictures, the first is {missing[0]}: "
            f"add {Path(missing[0]).with_suffix('.png')} of its size there, all white if the whole picture counts"
        )
    for picture, (_, brightest) in zip(masked, _extrema(masked), strict=True):
        _check_some_white(picture, brightest)
    return masked


def with_alpha_masks(pictures: Sequence[Picture]) -> tuple[list[Picture], list[str]]:
    """The pictures with their transparency for a mask (`--alpha_mask`), and warnings; opaque ones count whole.

    Raises:
        UserError: no picture has transparency, or one has nothing else.
    """
    candidates = [replace(picture, mask=ALPHA) for picture in pictures]
    extrema = _extrema(candidates)
    if extrema.count((255, 255)) == len(candidates):
        raise UserError(
            f"--alpha_mask: none of the {len(candidates)} pictures has transparency: save them as PNG or WebP with an "
            "alpha channel, or leave it out"
        )
    masked = []
    for picture, (darkest, brightest) in zip(candidates, extrema, strict=True):
        _check_some_white(picture, brightest)
        masked.append(replace(picture, mask=None) if darkest == 255 else picture)
    opaque = [picture.name for picture in masked if picture.mask is None]
    if not opaque:
        return masked, []
    return masked, [f"--alpha_mask: {len(opaque)} of {len(masked)} pictures have no transparency, such as {opaque[0]}"]


def _mask_file(folder: Path, name: str, places: dict[Path, dict[str, list[Path]]]) -> Path | None:
    """The mask of a picture by that name, which may be in a subfolder.

    Arguments:
        places: the folders that were already listed, added to here: pictures by the name without its ending.
    """
    place = folder / Path(name).parent
    if place not in places:
        places[place] = _by_stem(place)
    found = places[place].get(Path(name).stem, [])
    if len(found) > 1:
        raise UserError(f"--mask_dir has {found[0]} and {found[1]} for {name}: leave only one of them there")
    return found[0] if found else None


def _by_stem(place: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in sorted(place.iterdir()) if place.is_dir() else ():
        if path.suffix.lower() in SUFFIXES:
            found.setdefault(path.stem, []).append(path)
    return found


def _extrema(masked: Sequence[Picture]) -> list[tuple[int, int]]:
    """The darkest and the brightest of each picture's mask."""
    found = read_each(lambda picture: picture.load_mask().getextrema(), masked, "reading masks", len(masked), "mask")
    return list(found)


def _check_some_white(picture: Picture, brightest: int) -> None:
    if brightest == 0:
        raise UserError(f"the mask of {picture.name} is black all over, nothing of it would be learnt: mend it")


def render_mask(resized: Image.Image, view: View, resolution: tuple[int, int]) -> Tensor:
    """The weight of each pixel that `view` shows, (H, W), float32: mirrored and cut as `images.render` does.

    Arguments:
        resized: the mask, 8-bit grey, of the size of the resized picture.
        resolution: (H, W) in px.
    """
    values = np.asarray(resized, dtype=np.float64)
    values = values / (values.mean() or 1.0)  # a few white pixels may vanish when it is made smaller
    if view.flipped:
        values = values[:, ::-1]
    y, x = view.crop_top_left
    height, width = resolution
    return torch.from_numpy(values[y : y + height, x : x + width].astype(np.float32))


def latent_weights(weights: Tensor, factor: int) -> Tensor:
    """(H, W) -> (H / factor, W / factor): the mean over the pixels of each of the latents' cells."""
    return torch.nn.functional.avg_pool2d(weights[None], factor)[0]
