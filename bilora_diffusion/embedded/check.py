"""How well the embedded base draws: each picture is looked up among all icons of its style."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from bilora_diffusion.embedded.icons import Icons, from_bytes
from bilora_diffusion.errors import UserError
from bilora_diffusion.randomness import generator
from bilora_diffusion.sampling import use_sampling_scheduler

__all__ = ["Retrieval", "draw", "features", "retrieve"]

SMILEYS = "face-"
COLOUR_SIDE_PX = 32


@dataclass(frozen=True)
class Retrieval:
    """Attributes:
    names: what was asked for.
    ranks: of the icon of that name among all of the style, 1 is the nearest.
    nearest: the name of the nearest icon.
    ranks_of_family: of the nearest look-alike: of a smiley any of its family counts as right, of others only itself.
    """

    names: list[str]
    ranks: list[int]
    nearest: list[str]
    ranks_of_family: list[int]

    def share(self, within: int, look_alikes: bool = True) -> float:
        """The share of names found among the `within` nearest, in [0, 1]."""
        ranks = self.ranks_of_family if look_alikes else self.ranks
        return sum(rank <= within for rank in ranks) / len(ranks)


def draw(
    pipeline: StableDiffusionXLPipeline,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    steps: int = 20,
    guidance_scale: float = 5.0,
    batch: int = 16,
    log: Callable[[str], None] = lambda line: None,
) -> Tensor:
    """One picture for each prompt, (N, 3, 64, 64), uint8. Picture i starts from the noise of (seed, i)."""
    use_sampling_scheduler(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    for start in range(0, len(prompts), batch):
        group = list(prompts[start : start + batch])
        numbers = range(start, start + len(group))
        drawn = pipeline(
            prompt=group,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=[generator(seed, "sample", number) for number in numbers],
            output_type="pil",
        ).images
        pictures += [torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in drawn]
        log(f"{len(pictures)} of {len(prompts)} pictures")
    return torch.stack(pictures)


def features(pixels: Tensor) -> Tensor:
    """What pictures are compared by, (N, 3, H, W) uint8 -> (N, D): colours and shapes, both of length 1.

    Colours are the mean-centred pixels at 32 x 32; shapes are histograms of oriented gradients (9 directions, cells of
    8 x 8 px, blocks of 2 x 2). The scalar product of two rows is the sum of both cosine similarities, in [-2, 2].

    Reference: Dalal and Triggs, Histograms of Oriented Gradients for Human Detection, 2005.

    Raises:
        UserError: scikit-image is missing.
    """
    hog = _hog()
    small = interpolate(from_bytes(pixels), size=(COLOUR_SIDE_PX, COLOUR_SIDE_PX), mode="area").flatten(1)
    colours = small - small.mean(1, keepdim=True)
    shapes = [
        hog(np.asarray(picture), pixels_per_cell=(8, 8), cells_per_block=(2, 2), channel_axis=-1)
        for picture in pixels.permute(0, 2, 3, 1).numpy()
    ]
    return torch.cat([normalize(colours), normalize(torch.from_numpy(np.stack(shapes)).float())], dim=1)


def retrieve(drawn: Tensor, names: Sequence[str], icons: Icons, style: str) -> Retrieval:
    """Ranks all icons of a style by their similarity to each picture.

    Arguments:
        drawn: (N, 3, 64, 64), uint8.
        names: what each shows.
    """
    similarities = features(drawn) @ features(icons.pixels[style]).T
    order = similarities.argsort(dim=1, descending=True)
    asked = icons.rows(list(names))
    ranks = (order == asked[:, None]).int().argmax(1) + 1
    ranks_of_family = [
        _best_rank(places, row, icons.families) for places, row in zip(order.tolist(), asked.tolist(), strict=True)
    ]
    nearest = [icons.names[row] for row in order[:, 0].tolist()]
    return Retrieval(list(names), ranks.tolist(), nearest, ranks_of_family)


def _hog() -> Callable[..., np.ndarray]:
    try:
        from skimage.feature import hog
    except ImportError:
        raise UserError("scikit-image is needed: pip install 'bilora-diffusion[embedded]'") from None
    return hog


def _best_rank(order: Sequence[int], asked: int, families: Sequence[str]) -> int:
    family = families[asked]
    alike = {asked}
    if family.startswith(SMILEYS):
        alike |= {row for row, other in enumerate(families) if other == family}
    return next(place for place, row in enumerate(order, start=1) if row in alike)


def contact_sheet(drawn: Tensor, true: Tensor, columns: int = 16) -> Image.Image:
    """Drawn pictures, each above the true one, in rows of `columns`."""
    pairs = torch.cat([drawn, true], dim=2)
    missing = -len(pairs) % columns
    white = torch.full((missing, *pairs.shape[1:]), 255, dtype=torch.uint8)
    cells = torch.cat([pairs, white]).unflatten(0, (-1, columns))
    rows, _, _, height, width = cells.shape
    return Image.fromarray(cells.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3).numpy())
