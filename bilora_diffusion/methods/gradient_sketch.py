"""The gradient of the adapted weights in a few directions, taken along in a backward pass that is made anyway.

A layer with inputs x (rows, in) and gradients g (rows, out) of its outputs has the weight gradient G = g' x, which
nothing else needs and which is as large as the weight. Its strongest directions cost products of rank k only:

    Y = g' (x V),  Z = x' (g Y)          V random, (in, k)
    G ~ Q Q' G = Y (Y' Y)^-1 Z'          Q the orthonormal columns of Y; then cut to rank r < k

Reference: Finding structure with randomness (Halko et al., 2011), arXiv 0909.4061, Algorithm 4.3 with one iteration.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from bilora_diffusion.adapters import LowRank, adapted_layers, wide_dtype
from bilora_diffusion.compilation import uncompiled
from bilora_diffusion.fused import FusedLinear, tap
from bilora_diffusion.processes import average, process_count, process_number
from bilora_diffusion.randomness import stream_seed

__all__ = ["OVERSAMPLING", "GradientSketch", "fill"]

OVERSAMPLING = 4
"""Directions beside the r wanted; the usual number is 5 to 10, and 4 find what r = 4 is used for here."""

Factors = tuple[Tensor, Tensor]
"""B of (out, k) and A of (k, in), float32 or wider, which stand for B A."""


class GradientSketch:
    """Sketches of all layers that carry adapters.

    Arguments:
        models: the trained parts, adapters attached.
        rank: r of what `factors` gives.
        seed: the run's; V depends on it, the step and the layer.
    """

    def __init__(self, models: Mapping[str, nn.Module], rank: int, seed: int) -> None:
        self.layers = [
            (f"{part}.{name}", layer) for part, model in models.items() for name, layer in adapted_layers(model)
        ]
        self.rank = rank
        self.seed = seed
        self._found: dict[str, list[Factors]] = {}  # (Y, Z') of each pass

    @contextmanager
    def collecting(self, step: int) -> Iterator[None]:
        """Inside, backward passes leave sketches of the gradients at the weights that the passes are taken at.

        What is compiled computes as it is written meanwhile: hooks are no part of its programs.
        """
        self._found = {name: [] for name, _ in self.layers}
        undo = [_listen(layer, self._collector(name, layer, step)) for name, layer in self.layers]
        try:
            with uncompiled():
                yield
        finally:
            for stop in undo:
                stop()

    def _collector(self, name: str, layer: BaseTunerLayer, step: int) -> Callable[[Tensor, Tensor], None]:
        seed = stream_seed(self.seed, "sketch", name, step)

        def collect(x: Tensor, g: Tensor) -> None:
            self._found[name].append(_sketch(*_as_rows(layer, x, g), self.rank + OVERSAMPLING, seed))

        return collect

    @torch.no_grad()
    def factors(self) -> list[Factors]:
        """What was collected last, the sum over micro-batches and the mean over processes, cut to rank r.

        B (out, r) has orthonormal columns, or columns of zeros where the gradient has nothing; A is (r, in). A layer
        that the loss did not see has zeros.
        """
        pieces = [self._found[name] or [_nothing(layer)] for name, layer in self.layers]
        self._found = {}
        solved = iter(_solved([piece for some in pieces for piece in some]))
        sums = []
        for some in pieces:
            B, A = zip(*(next(solved) for _ in some), strict=True)
            sums.append((torch.cat(B, 1), torch.cat(A)))
        return _cut(_of_all_processes(sums), self.rank)


@torch.no_grad()
def fill(layers: Sequence[LowRank], factors: Sequence[Factors], rho: float) -> None:
    """Makes an adapter the direction of `GradientSketch.factors`, with ||s B A||_F = rho over all layers.

    A gradient of zero leaves it zero.
    """
    norm = torch.stack([A.square().sum() for _, A in factors]).sum().sqrt()  # the columns of B are orthonormal
    size = torch.where(norm > 0, rho / norm, 0.0)
    for layer, (B, A) in zip(layers, factors, strict=True):
        layer.B.copy_(B.view_as(layer.B))
        layer.A.copy_((A * (size / layer.scale)).view_as(layer.A))


def _listen(layer: BaseTunerLayer, collect: Callable[[Tensor, Tensor], None]) -> Callable[[], object]:
    """Lets a layer's backward passes call it; returns what ends that."""
    if isinstance(layer, FusedLinear):
        layer.on_gradient = collect
        return lambda: delattr(layer, "on_gradient")
    return layer.register_forward_hook(lambda _, given, y: tap(given[0], y, collect)).remove


def _as_rows(layer: BaseTunerLayer, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, in) and (rows, out), of a convolution with a row for each place."""
    base = layer.get_base_layer()
    if isinstance(base, nn.Conv2d):
        x = nn.functional.unfold(x, base.kernel_size, base.dilation, base.padding, base.stride).mT
        g = g.flatten(2).mT
    return x.reshape(-1, x.shape[-1]).to(g.dtype), g.reshape(-1, g.shape[-1])


def _sketch(x: Tensor, g: Tensor, columns: int, seed: int) -> Factors:
    """Y and Z'."""
    columns = min(columns, x.shape[1], g.shape[1])
    x, x_size = _over_its_largest(x)
    g, g_size = _over_its_largest(g)
    random = torch.Generator(x.device).manual_seed(seed)
    V = torch.randn(x.shape[1], columns, generator=random, device=x.device).to(x.dtype)
    Y, _ = _over_its_largest(g.mT @ _over_its_largest(x @ V)[0])
    gY, size = _over_its_largest(g @ Y)
    return _wide(Y), _wide(gY.mT @ x) * (size * x_size * g_size)


def _solved(pieces: Sequence[Factors]) -> list[Factors]:
    """(Y, (Y' Y)^-1 Z') of each (Y, Z')."""
    solved: list[Factors | None] = [None] * len(pieces)
    for members in _of_one_size(pieces):
        gram = torch.stack([pieces[index][0].mT @ pieces[index][0] for index in members])
        dtype = wide_dtype(gram.device)
        finite, mark = _decomposable(gram.to(dtype))
        inverse = (torch.linalg.pinv(finite, hermitian=True, rtol=_noise(gram.dtype)) + mark).to(gram.dtype)
        for place, index in enumerate(members):
            Y, Zt = pieces[index]
            solved[index] = Y, inverse[place] @ Zt
    return solved


def _of_one_size(factors: Sequence[Factors]) -> list[list[int]]:
    """Indices of those with as many columns, whose small matrices are decomposed together."""
    groups: dict[int, list[int]] = {}
    for index, (B, _) in enumerate(factors):
        groups.setdefault(B.shape[1], []).append(index)
    return list(groups.values())


def _decomposable(gram: Tensor) -> tuple[Tensor, Tensor]:
    """(n, k, k) without what is not finite, which a decomposition refuses, and what puts that back: NaN, else 0."""
    return gram.nan_to_num(0.0, 0.0, 0.0), (gram * 0).sum((1, 2), keepdim=True)


def _noise(dtype: torch.dtype) -> float:
    """Eigenvalues of a Gram matrix below this share of the largest are rounding."""
    return 10 * torch.finfo(dtype).eps


def _wide(matrix: Tensor) -> Tensor:
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))


def _over_its_largest(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled so that in float16 no product of it leaves the range, and what it was divided by."""
    largest = _wide(matrix.abs().amax())
    # Divided by, not multiplied with its inverse: that is beyond float16's range where the entries are small.
    return (matrix / torch.where(largest > 0, largest, 1.0)).to(matrix.dtype), largest


def _nothing(layer: BaseTunerLayer) -> Factors:
    weight = layer.get_base_layer().weight.flatten(1)
    return weight.new_zeros(len(weight), 1, dtype=torch.float32), weight.new_zeros(
        1, weight.shape[1], dtype=torch.float32
    )


def _of_all_processes(sums: Sequence[Factors]) -> Sequence[Factors]:
    """The factors of all side by side, by an average in which each has a place of its own."""
    count, number = process_count(), process_number()
    if count == 1:
        return sums
    placed = []
    for B, A in sums:
        places = [(torch.zeros_like(B), torch.zeros_like(A)) for _ in range(count)]
        places[number] = (B, A)
        placed += [torch.cat([one for one, _ in places], 1), torch.cat([one for _, one in places])]
    means = average(placed)
    return list(zip(means[::2], means[1::2], strict=True))


def _cut(sums: Sequence[Factors], rank: int) -> list[Factors]:
    """Each B A by its r strongest singular directions. Only matrices of the size of B' B are decomposed."""
    cut: list[Factors | None] = [None] * len(sums)
    for members in _of_one_size(sums):
        dtype = wide_dtype(sums[members[0]][0].device)
        gram_B = torch.stack([sums[index][0].mT @ sums[index][0] for index in members]).to(dtype)
        gram_A = torch.stack([sums[index][1] @ sums[index][1].mT for index in members]).to(dtype)
        # B = Q root W' with orthonormal Q, so that B A = Q (root W' A), whose Gram matrix is small.
        finite, mark = _decomposable(gram_B)
        values, W = torch.linalg.eigh(finite)
        usable = values > _noise(sums[members[0]][0].dtype) * values.amax(1, keepdim=True)
        root = values.clamp_min(0).sqrt() * usable
        inverse = torch.where(usable, 1 / values.clamp_min(torch.finfo(dtype).tiny).sqrt(), 0.0)
        down = root[:, :, None] * W.mT
        finite, other_mark = _decomposable(down @ gram_A @ down.mT)
        _, P = torch.linalg.eigh(finite)
        P = P.flip(2)[:, :, :rank] + mark + other_mark
        left, right = W @ (inverse[:, :, None] * P), P.mT @ down
        for place, index in enumerate(members):
            B, A = sums[index]
            cut[index] = _padded(B @ left[place].to(B.dtype), right[place].to(A.dtype) @ A, rank)
    return cut


def _padded(B: Tensor, A: Tensor, rank: int) -> Factors:
    """With zeros for the directions that a small layer does not have."""
    missing = rank - B.shape[1]
    return nn.functional.pad(B, (0, missing)), nn.functional.pad(A, (0, 0, 0, missing))
