"""The gradient of the adapted weights in a few directions, taken along in a backward pass that is made anyway.

A layer with inputs x (rows, in) and gradients g (rows, out) of its outputs has the weight gradient G = g' x, which
nothing else needs and which is as large as the weight. Its strongest directions cost products of rank k only:

    Y = g' (x V),  Z = x' (g Y)          V random, (in, k)
    G ~ Q Q' G = Y (Y' Y)^-1 Z'          Q the orthonormal columns of Y; then cut to rank r < k

Reference: Finding structure with randomness (Halko et al., 2011), arXiv 0909.4061, Algorithm 4.3 with one iteration.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from bilora_diffusion.adapters import LowRank, adapted_layers, wide_dtype
from bilora_diffusion.applied import copy_if
from bilora_diffusion.compilation import uncompiled
from bilora_diffusion.fused import FusedLinear, tap
from bilora_diffusion.methods.eigen import eigh_of_all
from bilora_diffusion.processes import average, process_count, process_number
from bilora_diffusion.randomness import stream_seed

__all__ = ["OVERSAMPLING", "GradientSketch", "fill"]

OVERSAMPLING = 4
"""Directions beside the r wanted; the usual number is 5 to 10, and 4 find what r = 4 is used for here."""

Factors = tuple[Tensor, Tensor]
"""B (out, k) and A (k, in), which stand for B A; or those of n layers of one shape, (n, out, k) and (n, k, in)."""


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
        self._found: dict[str, list[Factors]] = {}  # (Y, Z') of each pass, in the precision of its products

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
        alike: dict[tuple, list[int]] = {}
        for index, (name, _) in enumerate(self.layers):
            found = self._found[name]
            alike.setdefault((len(found), *(one.shape for one in found[0])) if found else (), []).append(index)
        unseen = alike.pop((), [])
        sums = _of_all_processes(self._sums(list(alike.values())))
        self._found = {}
        factors: list[Factors | None] = [None] * len(self.layers)
        for members, cut in zip(alike.values(), _cut(sums, self.rank), strict=True):
            for index, *one in zip(members, *cut, strict=True):
                factors[index] = (one[0], one[1])
        for index in unseen:
            factors[index] = _nothing(self.layers[index][1], self.rank)
        return factors

    def _sums(self, groups: Sequence[Sequence[int]]) -> list[Factors]:
        """B (layers, out, k) and A (layers, k, in) of each group of layers of one shape, k over all passes."""
        sketches, counts = [], []
        for members in groups:
            passes = list(zip(*(self._found[self.layers[index][0]] for index in members), strict=True))
            counts.append(len(passes))
            for of_one_pass in passes:
                Y, Zt = (torch.stack(some) for some in zip(*of_one_pass, strict=True))
                sketches.append((Y, Zt))
        solved = iter([(_wide(Y), A) for (Y, _), A in zip(sketches, _solved(sketches), strict=True)])
        sums = []
        for count in counts:
            B, A = zip(*itertools.islice(solved, count), strict=True)
            sums.append((B[0], A[0]) if count == 1 else (torch.cat(B, 2), torch.cat(A, 1)))
        return sums


@torch.no_grad()
def fill(layers: Sequence[LowRank], factors: Sequence[Factors], rho: float, applied: Tensor | None = None) -> None:
    """Makes an adapter the direction of `GradientSketch.factors`, with ||s B A||_F = rho over all layers.

    A gradient of zero leaves it zero.

    Arguments:
        applied: a scalar of bools on the device; where it is False the adapter becomes zero. None: True.
    """
    norm = torch.stack(torch._foreach_norm([A for _, A in factors])).norm()  # the columns of B are orthonormal
    size = torch.where(norm > 0, rho / norm, 0.0)
    scaled = torch._foreach_mul([A for _, A in factors], size)
    torch._foreach_div_(scaled, [layer.scale for layer in layers])
    for of_layers, found in (
        ([layer.B for layer in layers], [B for B, _ in factors]),
        ([layer.A for layer in layers], scaled),
    ):
        values = [one.view_as(own) for one, own in zip(found, of_layers, strict=True)]
        if applied is None:
            torch._foreach_copy_(of_layers, values)
        else:
            torch._foreach_zero_(of_layers)
            copy_if(applied, of_layers, values)


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
    """Y and Z', in the precision of x and g; of float16 Z' is float32."""
    columns = min(columns, x.shape[1], g.shape[1])
    random = torch.Generator(x.device).manual_seed(seed)
    V = torch.randn(x.shape[1], columns, generator=random, device=x.device).to(x.dtype)
    if x.dtype != torch.float16:
        Y = g.mT @ (x @ V)
        return Y, (g @ Y).mT @ x
    x, x_size = _over_its_largest(x)
    g, g_size = _over_its_largest(g)
    Y, _ = _over_its_largest(g.mT @ _over_its_largest(x @ V)[0])
    gY, size = _over_its_largest(g @ Y)
    return Y, _wide(gY.mT @ x) * (size * x_size * g_size)


def _solved(sketches: Sequence[Factors]) -> list[Tensor]:
    """(Y' Y)^-1 Z' of each: (n, out, k), (n, k, in) in the products' precision -> (n, k, in), `_wide`."""
    grams = [_wide(Y).mT @ _wide(Y) for Y, _ in sketches]
    finite, marks = _decomposable([gram.to(wide_dtype(gram.device)) for gram in grams])
    solved = []
    for (Y, Zt), gram, (values, vectors), mark in zip(sketches, grams, eigh_of_all(finite), marks, strict=True):
        # Of Y itself: directions below it hold nothing, and would be blown up.
        rounding = torch.finfo(Y.dtype).eps ** 2
        usable = values > max(rounding, _noise(gram.dtype)) * values.amax(1, keepdim=True)
        inverse = torch.where(usable, 1 / values.clamp_min(torch.finfo(values.dtype).tiny), 0.0)
        inverse = (vectors * inverse[:, None]) @ vectors.mT + mark
        solved.append(inverse.to(gram.dtype) @ _wide(Zt))
    return solved


def _decomposable(grams: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Each (n, k, k) without what is not finite, which LAPACK refuses, and what puts that back: NaN, else 0."""
    finite = [gram.nan_to_num(0.0, 0.0, 0.0) for gram in grams]
    return finite, [(gram * 0).sum((1, 2), keepdim=True) for gram in grams]


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


def _nothing(layer: BaseTunerLayer, rank: int) -> Factors:
    weight = layer.get_base_layer().weight.flatten(1)
    size = {"dtype": torch.float32, "device": weight.device}
    return torch.zeros(len(weight), rank, **size), torch.zeros(rank, weight.shape[1], **size)


def _of_all_processes(sums: Sequence[Factors]) -> Sequence[Factors]:
    """The factors of all side by side, by an average in which each has a place of its own."""
    count, number = process_count(), process_number()
    if count == 1:
        return sums
    placed = []
    for B, A in sums:
        places = [(torch.zeros_like(B), torch.zeros_like(A)) for _ in range(count)]
        places[number] = (B, A)
        placed += [torch.cat([one for one, _ in places], 2), torch.cat([one for _, one in places], 1)]
    means = average(placed)
    return list(zip(means[::2], means[1::2], strict=True))


def _cut(products: Sequence[Factors], rank: int) -> list[Factors]:
    """Products B A, each of n, by their r strongest singular directions: (n, out, k), (n, k, in) -> with r for k.

    Only matrices of the size of B' B are decomposed.
    """
    if not products:
        return []
    dtype = wide_dtype(products[0][0].device)
    # B = Q root W' with orthonormal Q, so that B A = Q (root W' A), whose Gram matrix is small.
    finite, marks = _decomposable([(B.mT @ B).to(dtype) for B, _ in products])
    lefts, downs = [], []
    for (B, _), (values, W) in zip(products, eigh_of_all(finite), strict=True):
        usable = values > _noise(B.dtype) * values.amax(1, keepdim=True)
        root = values.clamp_min(0).sqrt() * usable
        inverse = torch.where(usable, 1 / values.clamp_min(torch.finfo(dtype).tiny).sqrt(), 0.0)
        lefts.append(W * inverse[:, None])
        downs.append(root[:, :, None] * W.mT)
    grams = [down @ (A @ A.mT).to(dtype) @ down.mT for down, (_, A) in zip(downs, products, strict=True)]
    finite, other_marks = _decomposable(grams)
    cut = []
    for number, ((B, A), (_, P)) in enumerate(zip(products, eigh_of_all(finite), strict=True)):
        P = P.flip(2)[:, :, :rank] + marks[number] + other_marks[number]
        left, right = lefts[number] @ P, P.mT @ downs[number]
        cut.append(_padded(B @ left.to(B.dtype), right.to(A.dtype) @ A, rank))
    return cut


def _padded(B: Tensor, A: Tensor, rank: int) -> Factors:
    """With zeros for the directions that a small layer does not have."""
    missing = rank - B.shape[2]
    if missing <= 0:
        return B, A
    return nn.functional.pad(B, (0, missing)), nn.functional.pad(A, (0, 0, 0, missing))
