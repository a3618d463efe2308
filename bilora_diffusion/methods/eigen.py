"""Eigenvalues of many small symmetric matrices, found without the host waiting for the device.

torch.linalg.eigh looks whether it converged, for which the host waits. Off the CPU a fixed number of sweeps of Jacobi's
method does here: each round turns k / 2 pairs of axes at once, so that their entries off the diagonal vanish. After a
few sweeps convergence is quadratic, to rounding.

Reference:
    The Solution of Singular-Value and Symmetric Eigenvalue Problems on Multiprocessor Arrays (Brent & Luk, 1985), SIAM
    J. Sci. Stat. Comput. 6; Matrix Computations (Golub & Van Loan), section 8.5.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["eigh_of_all", "jacobi"]

MOST = 32
"""Rows of the largest matrices for which so many small operations are quicker than to wait."""


def eigh_of_all(matrices: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """As `torch.linalg.eigh` of each, all of one size together.

    Arguments:
        matrices: each (n, k, k), symmetric and finite.

    Returns:
        the eigenvalues of each, (n, k), ascending, and the eigenvectors, (n, k, k), in columns.
    """
    alike: dict[int, list[int]] = {}
    for index, some in enumerate(matrices):
        alike.setdefault(some.shape[-1], []).append(index)
    found: list[tuple[Tensor, Tensor] | None] = [None] * len(matrices)
    for size, members in alike.items():
        whole = torch.cat([matrices[index] for index in members])
        values, vectors = torch.linalg.eigh(whole) if whole.device.type == "cpu" or size > MOST else jacobi(whole)
        counts = [len(matrices[index]) for index in members]
        for index, *one in zip(members, values.split(counts), vectors.split(counts), strict=True):
            found[index] = (one[0], one[1])
    return found


def jacobi(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """(n, k, k), symmetric and finite -> as `eigh_of_all` of one.

    In float64 exact to rounding up to k = 12, and to 1e-8 of the largest value up to `MOST`, where the values fall by
    powers of ten; otherwise to rounding.
    """
    size = matrices.shape[-1]
    vectors = torch.eye(size, dtype=matrices.dtype, device=matrices.device).expand_as(matrices)
    for _ in range(4 + math.ceil(math.log2(max(size, 2)))):
        for first, second, places in _rounds(size, matrices.device):
            turned = _turns(matrices, first, second, places)
            matrices = turned.mT @ matrices @ turned
            vectors = vectors @ turned
        matrices = (matrices + matrices.mT) / 2  # what rounding made of one side is not seen on the other
    values, order = matrices.diagonal(dim1=1, dim2=2).sort(dim=1)
    return values, vectors.gather(2, order[:, None].expand_as(vectors))


def _turns(matrices: Tensor, first: Tensor, second: Tensor, places: Tensor) -> Tensor:
    """The rotation of each pair of axes, by an eighth of a circle at most, after which its two entries are zero."""
    diagonal = matrices.diagonal(dim1=1, dim2=2)
    apart = diagonal[:, second] - diagonal[:, first]
    double = 2 * matrices[:, first, second]
    angle = torch.atan2(torch.where(apart < 0, -double, double), apart.abs()) / 2
    cosine, sine = angle.cos(), angle.sin()
    turned = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device).expand_as(matrices).flatten(1)
    return turned.index_copy(1, places, torch.cat([cosine, cosine, sine, -sine], 1)).view_as(matrices)


@functools.lru_cache
def _rounds(size: int, device: torch.device) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Pairs of axes so that all have met after one sweep, nobody twice in a round: p, q, and where c, c, s, -s go."""
    circle = [*range(size), *[None] * (size % 2)]
    rounds = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        met = zip(circle[:half], reversed(circle[half:]), strict=True)
        pairs = [sorted(pair) for pair in met if None not in pair]
        p, q = ([pair[side] for pair in pairs] for side in (0, 1))
        both = list(zip(p, q, strict=True))
        places = [a * size + a for a in p] + [b * size + b for b in q]
        places += [a * size + b for a, b in both] + [b * size + a for a, b in both]
        rounds.append(tuple(torch.tensor(some, dtype=torch.long, device=device) for some in (p, q, places)))
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return rounds
