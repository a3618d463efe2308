"""What is measured of a landscape; each returns JSON values.

References:
    Visualizing the Loss Landscape of Neural Nets (Li et al., 2018), arXiv 1712.09913, Section 4 (filter normalisation).
    Bi-LoRA (Liu et al., 2026), arXiv 2508.19564, Fig. 4, Table A6, Proposition 3.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bilora_diffusion.randomness import generator
from bilora_diffusion.sharpness.landscape import Landscape, norm

__all__ = ["along_random", "filter_normalized", "ky_fan", "top_eigenvalue", "worst_case"]

Say = Callable[[str], None]


def filter_normalized(points: Sequence[Tensor], seed: int, number: int) -> list[Tensor]:
    """A random direction whose every row has the norm of the row of the weights that it will be added to."""
    direction = []
    for place, point in enumerate(points):
        rows = point.detach().reshape(len(point), -1)
        drawn = torch.randn(rows.shape, generator=generator(seed, "direction", number, place)).to(rows)
        scale = rows.norm(dim=1, keepdim=True) / drawn.norm(dim=1, keepdim=True)
        direction.append((drawn * scale).view_as(point))
    return direction


def along_random(landscape: Landscape, sizes: Sequence[float], directions: int, seed: int, say: Say) -> dict[str, list]:
    """The loss at `size` times filter-normalised random directions.

    Returns:
        `sizes`, `losses`: a list for each direction, and `mean`: the mean over directions at each size.
    """
    losses = []
    for number in range(directions):
        direction = filter_normalized(landscape.points, seed, number)
        losses.append([_at(landscape, direction, size) for size in sizes])
        say(f"direction {number + 1} of {directions}")
    means = [sum(column) / directions for column in zip(*losses, strict=True)]
    return {"sizes": list(sizes), "losses": losses, "mean": means}


def worst_case(landscape: Landscape, sizes: Sequence[float], say: Say) -> dict[str, list | float]:
    """The loss after a step along the gradient, of growing length: the worst direction to first order.

    Arguments:
        sizes: the steps' lengths as shares of the weights' norm.

    Returns:
        `sizes`, the `lengths` in absolute terms, `losses`, and `gradient_norm`.
    """
    gradient = landscape.gradient()
    size_of_weights, length = norm(landscape.points), norm(gradient)
    direction = [g / length if length > 0 else g for g in gradient]
    lengths = [size * size_of_weights for size in sizes]
    losses = [_at(landscape, direction, step) for step in lengths]
    say("worst case")
    return {"sizes": list(sizes), "lengths": lengths, "losses": losses, "gradient_norm": length}


def top_eigenvalue(landscape: Landscape, steps: int, seed: int, say: Say) -> dict[str, list | float]:
    """The Hessian's eigenvalue of largest size, by power iteration with central differences of the gradient.

        H v  ~  (g(theta + h v) - g(theta - h v)) / (2 h),    h = 1e-3 of the weights' norm

    Returns:
        `eigenvalue`: the last Rayleigh quotient v' H v; `history`: all of them, to judge the convergence by.
    """
    h = 1e-3 * norm(landscape.points)
    v = [
        torch.randn(point.shape, generator=generator(seed, "eigenvector", place)).to(point)
        for place, point in enumerate(landscape.points)
    ]
    history = []
    for number in range(steps):
        length = norm(v)
        v = [part / length for part in v]
        with landscape.displaced(v, h):
            ahead = landscape.gradient()
        with landscape.displaced(v, -h):
            behind = landscape.gradient()
        Hv = [(one - other) / (2 * h) for one, other in zip(ahead, behind, strict=True)]
        history.append(sum((a.double() * b.double()).sum().item() for a, b in zip(v, Hv, strict=True)))
        say(f"power iteration {number + 1} of {steps}: {history[-1]:.4g}")
        if norm(Hv) == 0:
            break
        v = Hv
    return {"eigenvalue": history[-1], "history": history}


def ky_fan(landscape: Landscape, rank: int) -> dict[str, float | int]:
    """The first-order rise of the loss per unit of a perturbation of rank r in each layer, and of a free one.

    sqrt(sum over layers and their top r singular values of G of sigma^2) is the maximum of <G, E> over ||E||_F <= 1
    with rank(E_j) <= r. (The paper's Proposition 3 says the Ky Fan norm; for a ball in the Frobenius norm it is this.)
    """
    gradient = landscape.gradient()
    top = 0.0
    for layer in gradient:
        values = torch.linalg.svdvals(layer.flatten(1).double())
        top += values[:rank].square().sum().item()
    whole = norm(gradient)
    return {"rank": rank, "top": math.sqrt(top), "whole": whole, "share": math.sqrt(top) / whole if whole else 0.0}


def _at(landscape: Landscape, direction: Sequence[Tensor], size: float) -> float:
    with landscape.displaced(direction, size):
        return landscape.loss()
