"""Variations of flat icons, told in the caption: what teaches the base that a style is something apart from a name.

A base that has seen each name in the same few pictures only knows them by heart; a further style, learned from 23
icons, then spoils the others instead of carrying over. Each variation has a word and a strength that is drawn anew each
time, so that no picture repeats. All of them stay flat: colours, plain light from one side, softness, size and
position. None follows the form of what is drawn.
"""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample, pad

__all__ = ["VARIATIONS", "vary"]

Variation = Callable[[Tensor, float], Tensor]
"""Colours in [0, 1], (3, H, W), and a strength in [0, 1] -> colours."""


def vary(pixels: Tensor, word: str, random: Generator) -> Tensor:
    """A variation of an icon on white, (3, H, W), float32 in [-1, 1]; white stays white.

    Arguments:
        word: a key of `VARIATIONS`.
        random: decides the strength.
    """
    strength = torch.rand((), generator=random).item()
    return VARIATIONS[word](pixels / 2 + 0.5, strength).clamp(0, 1) * 2 - 1


def _icon(colours: Tensor) -> Tensor:
    """How much of each pixel is icon and not background, (1, H, W) in [0, 1]."""
    return ((1 - colours).amax(0, keepdim=True) * 8).clamp(0, 1)


def _towards(colours: Tensor, target: Tensor, share: Tensor | float) -> Tensor:
    return colours + (target - colours) * share * _icon(colours)


def _colour(*rgb: float) -> Tensor:
    return torch.tensor(rgb).view(3, 1, 1)


def _tinted(*rgb: float) -> Variation:
    return lambda colours, strength: _towards(colours, _colour(*rgb), 0.25 + 0.3 * strength)


def _grey(colours: Tensor, strength: float) -> Tensor:
    luminance = (colours * _colour(0.299, 0.587, 0.114)).sum(0, keepdim=True)
    return _towards(colours, luminance, 0.6 + 0.4 * strength)


def _lit(across: float, down: float) -> Variation:
    """Brighter on one side of the square and darker on the other, whatever the icon's form."""

    def change(colours: Tensor, strength: float) -> Tensor:
        height, width = colours.shape[-2:]
        y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        light = (0.3 + 0.4 * strength) * (across * x + down * y)
        brighter = _towards(colours, torch.ones(3, 1, 1), light.clamp_min(0))
        return _towards(brighter, torch.zeros(3, 1, 1), (-light).clamp_min(0))

    return change


def _soft(colours: Tensor, strength: float) -> Tensor:
    blurred = colours
    for _ in range(2):
        blurred = avg_pool2d(pad(blurred, (1, 1, 1, 1), value=1.0), 3, stride=1)
    return colours + (blurred - colours) * (0.4 + 0.6 * strength)


def _scaled(low: float, high: float) -> Variation:
    return lambda colours, strength: _moved(colours, 1 / (low + (high - low) * strength), 0.0)


def _tilted(colours: Tensor, strength: float) -> Tensor:
    return _moved(colours, 1.05, 0.15 + 0.35 * strength)


def _mirrored(colours: Tensor, strength: float) -> Tensor:
    return _moved(colours.flip(-1), 1 + 0.1 * strength, 0.0)


def _moved(colours: Tensor, scale: float, angle: float) -> Tensor:
    """Each place takes its colour from `scale` times as far from the middle, turned by `angle` in radians."""
    cosine, sine = scale * math.cos(angle), scale * math.sin(angle)
    theta = torch.tensor([[[cosine, -sine, 0.0], [sine, cosine, 0.0]]])
    grid = affine_grid(theta, [1, *colours.shape], align_corners=False)
    return grid_sample(colours[None] - 1, grid, align_corners=False)[0] + 1  # outside is white


VARIATIONS: dict[str, Variation] = {
    "red": _tinted(1.0, 0.1, 0.1),
    "orange": _tinted(1.0, 0.5, 0.0),
    "yellow": _tinted(1.0, 0.9, 0.1),
    "green": _tinted(0.1, 0.7, 0.2),
    "blue": _tinted(0.1, 0.4, 1.0),
    "purple": _tinted(0.5, 0.1, 0.8),
    "pink": _tinted(1.0, 0.5, 0.8),
    "brown": _tinted(0.4, 0.2, 0.05),
    "pale": _tinted(1.0, 1.0, 1.0),
    "dark": _tinted(0.0, 0.0, 0.0),
    "grey": _grey,
    "top-lit": _lit(0.0, -1.0),
    "bottom-lit": _lit(0.0, 1.0),
    "left-lit": _lit(-1.0, 0.0),
    "right-lit": _lit(1.0, 0.0),
    "corner-lit": _lit(-0.7, -0.7),
    "soft": _soft,
    "small": _scaled(0.65, 0.9),
    "large": _scaled(1.1, 1.35),
    "tilted": _tilted,
    "mirrored": _mirrored,
}
"""By the word that captions have for them."""
