"""Aspect-ratio buckets: pictures are trained at the (height, width) of a list that is nearest to their own shape.

A micro-batch holds pictures of one bucket. In every epoch each bucket's pictures are shuffled and cut into batches, the
last of which may be smaller, and the batches of all buckets are shuffled: nothing is left out. The order follows from
the seed and the epoch alone.

Reference:
    SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis (Podell et al., 2023), arXiv 2307.01952,
    Section 2.3 and Appendix I, whose list this is.
"""

from collections.abc import Sequence

import torch
from diffusers.training_utils import find_nearest_bucket

from bilora_diffusion.randomness import generator

__all__ = ["GRID_PX", "BucketOrder", "make_buckets", "nearest_bucket"]

GRID_PX = 64
_SDXL_WIDTHS = {
    512: (1856, 1920, 1984, 2048),
    576: (1664, 1728, 1792),
    640: (1536, 1600),
    704: (1344, 1408, 1472),
    768: (1280, 1344),
    832: (1152, 1216),
    896: (1088, 1152),
    960: (1024, 1088),
    1024: (1024,),
}
"""The widths in px that each height up to the square's has; the other half are these lying on their sides."""


def make_buckets(resolution: int) -> list[tuple[int, int]]:
    """SDXL's (height, width) in px for a square of 1024, for another scaled, and rounded to its grid of 64."""
    wide = [(height, width) for height, widths in _SDXL_WIDTHS.items() for width in widths]
    scaled = {tuple(max(GRID_PX, round(side * resolution / 1024 / GRID_PX) * GRID_PX) for side in one) for one in wide}
    return sorted({*scaled, *((width, height) for height, width in scaled)})


def nearest_bucket(size: tuple[int, int], buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The bucket for a picture of (height, width) `size`."""
    return buckets[find_nearest_bucket(*size, buckets)]


class BucketOrder:
    """Which picture a draw shows: draw n is row n % batch_size of batch n // batch_size, if that batch has it.

    Arguments:
        buckets: of each picture.
        batch_size: rows of a whole batch.
        repeats: how often an epoch shows each picture.
    """

    def __init__(self, buckets: Sequence[tuple[int, int]], batch_size: int, repeats: int, seed: int) -> None:
        self.batch_size, self.seed = batch_size, seed
        self._members = [
            [picture for picture, own in enumerate(buckets) if own == bucket] * repeats
            for bucket in sorted(set(buckets))
        ]
        self._batches_in_epoch = sum(-(-len(members) // batch_size) for members in self._members)
        self._epoch = -1
        self._batches: list[list[int]] = []

    def __len__(self) -> int:
        """Draws in an epoch, with those that a smaller batch does not have."""
        return self._batches_in_epoch * self.batch_size

    def batch(self, number: int) -> list[int]:
        """The pictures of a batch, counted from the beginning of the run."""
        epoch, place = divmod(number, self._batches_in_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffled(epoch)
        return self._batches[place]

    def rows_in(self, number: int) -> int:
        """How many rows a batch has, counted from the beginning of the run."""
        return len(self.batch(number))

    def __getitem__(self, draw: int) -> int:
        if draw < 0:
            raise IndexError(f"draw {draw} is negative")
        number, row = divmod(draw, self.batch_size)
        return self.batch(number)[row]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        random = generator(self.seed, "bucket order", epoch)
        batches = []
        for members in self._members:
            order = [members[place] for place in torch.randperm(len(members), generator=random).tolist()]
            batches += [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        return [batches[place] for place in torch.randperm(len(batches), generator=random).tolist()]
