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

from bilora_diffusion.data.images import SUFFIXES, View
from bilora_diffusion.data.pictures import ALPHA, Picture
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
    masked = [replace(picture, mask=_mask_file(folder, picture.name)) for picture in pictures]
    missing = [picture.name for picture in masked if picture.mask is None]
    if missing:
        raise UserError(
            f"--mask_dir {folder} has no mask for {len(missing)} of {len(masked)} pictures, the first is {missing[0]}: "
            f"add {Path(missing[0]).with_suffix('.png')} of its size there, all white if the whole picture counts"
        )
    for picture in masked:
        _check_some_white(picture)
    return masked


def with_alpha_masks(pictures: Sequence[Picture]) -> tuple[list[Picture], list[str]]:
    """The pictures with their transparency for a mask (`--alpha_mask`), and warnings; opaque ones count whole.

    Raises:
        UserError: no picture has transparency, or one has nothing else.
    """
    candidates = [replace(picture, mask=ALPHA) for picture in pictures]
    opaque = {picture.name for picture in candidates if picture.load_mask().getextrema() == (255, 255)}
    if len(opaque) == len(candidates):
        raise UserError(
            f"--alpha_mask: none of the {len(candidates)} pictures has transparency: save them as PNG or WebP with an "
            "alpha channel, or leave it out"
        )
    masked = [replace(picture, mask=None) if picture.name in opaque else picture for picture in candidates]
    for picture in masked:
        _check_some_white(picture)
    if not opaque:
        return masked, []
    first = next(picture.name for picture in masked if picture.name in opaque)
    return masked, [f"--alpha_mask: {len(opaque)} of {len(masked)} pictures have no transparency, such as {first}"]


def _mask_file(folder: Path, name: str) -> Path | None:
    """The mask of a picture by that name, which may be in a subfolder."""
    place = folder / Path(name).parent
    if not place.is_dir():
        return None
    stem = Path(name).stem
    found = sorted(path for path in place.iterdir() if path.stem == stem and path.suffix.lower() in SUFFIXES)
    if len(found) > 1:
        raise UserError(f"--mask_dir has {found[0]} and {found[1]} for {name}: leave only one of them there")
    return found[0] if found else None


def _check_some_white(picture: Picture) -> None:
    mask = picture.load_mask()
    if mask is not None and mask.getextrema()[1] == 0:
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
