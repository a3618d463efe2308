"""2-> Instance and class (prior) pictures with their captions, and which of them each draw of the run shows.

A draw is the number of an instance row since the run began, over all processes and micro-batches. Everything
about a row (picture, crop, flip, what is done to its caption) follows from the seed and its draw. So a crop is drawn
each time a picture is seen, a resumed run starts at its next draw without saved state, and two processes with
batch b read the rows of one with batch 2b.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

from bilora_diffusion.data.buckets import BucketOrder, nearest_bucket
from bilora_diffusion.data.captions import CaptionRule
from bilora_diffusion.data.images import View, crop_corners, draw_view, render, resize, resized_size
from bilora_diffusion.data.masks import render_mask
from bilora_diffusion.data.pictures import Picture
from bilora_diffusion.errors import UserError
from bilora_diffusion.randomness import generator

__all__ = ["DrawBatches", "DreamBoothDataset", "Row", "Shuffled", "VariantKey", "flatten"]

VariantKey = tuple[bool, int, View]
"""(is_class, picture, view): names what the model sees; see `Row.key`."""

_KEPT_BYTES = 256 * 2**20
"""Memory (a process) for pictures already decoded and resized: 60 photos at 1024 px."""


class Shuffled:
    """An endless sequence of the numbers 0 ... count - 1: one permutation after another, each from its own
    stream.
    """

    def __init__(self, count: int, seed: int, stream: str) -> None:
        self.count, self.seed, self.stream = count, seed, stream
        self._epoch = -1
        self._order: list[int] = []

    def __getitem__(self, position: int) -> int:
        if position < 0:
            raise IndexError(f"position {position} is negative")
        epoch, offset = divmod(position, self.count)
        if epoch != self._epoch:
            order = torch.randperm(self.count, generator=generator(self.seed, self.stream, epoch))
            self._epoch, self._order = epoch, order.tolist()
        return self._order[offset]


@dataclass(frozen=True, eq=False)
class Row:
    """One row of a batch.

    Attributes:
        pixels: (3, H, W), float32 in [-1, 1]; None when the data set does not decode.
        mask: (H, W), float32, the weight of each pixel in the loss; None where all weigh the same, or as `pixels`.
        original_size: (height, width) in px of this very picture, upright, before resizing.
        crop_top_left: (y, x) in px, in the resized and, if `flipped`, mirrored picture.
        prompt: its caption, as the `CaptionRule` makes it for this draw.
        is_class: a class (prior) picture.
        picture: its number among the instance or the class pictures.
        flipped: mirrored left to right.
        draw: which draw of the run it is of; an instance row and its class row share it.
        first: the draw that shows the same under another noise, `draw` itself if no step before did.
        target: (height, width) in px of what is shown.
    """

    pixels: torch.Tensor | None
    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]
    prompt: str
    is_class: bool
    picture: int
    flipped: bool
    draw: int
    first: int
    target: tuple[int, int]
    mask: torch.Tensor | None = None

    @property
    def key(self) -> VariantKey:
        """Names its pixels."""
        return self.is_class, self.picture, self.view

    @property
    def view(self) -> View:
        """What of its picture is shown."""
        return View(self.original_size, self.crop_top_left, self.flipped)


class DreamBoothDataset(Dataset[list[Row]]):
    """Rows by draw: `dataset[n]` is [instance row], with prior preservation [instance row, class row], for
    any n >= 0.

    Draw n is in epoch n // len(dataset), and every epoch shows every picture in an order of its own. Class
    pictures go round in an order of their own, each with its own size, crop and prompt. With `steps_per_draw` above 1
    so many steps in a row show the same rows.

    Arguments:
        instances: the pictures to learn.
        class_pictures: for prior preservation; None without it.
        resolution: side of the square in px.
        buckets: (height, width) to show pictures at in place of the square, each at the nearest, those of a batch at
            the same; not with class pictures. None: the square.
        batch_size: instance rows in a micro-batch; matters with buckets only.
        center_crop, random_flip, interpolation: see `images.prepare`.
        crops_per_image: cut each picture at one of so many places, `images.crop_corners`, drawn each time; None:
            anywhere. Without `center_crop`, which is one place.
        seed: the run's seed.
        repeats: how often an epoch shows each instance picture.
        captions: what is done to the captions of instance rows; unset: nothing.
        steps_per_draw: optimiser steps that show the same rows.
        rows_a_step: instance rows of an optimiser step over all processes; matters with `steps_per_draw` only.
        decode: False leaves `Row.pixels` None and opens no file (latents are cached). May be set later,
            before a DataLoader starts its workers.
    """

    def __init__(
        self,
        instances: Sequence[Picture],
        *,
        class_pictures: Sequence[Picture] | None = None,
        resolution: int,
        center_crop: bool = False,
        crops_per_image: int | None = None,
        random_flip: bool = False,
        interpolation: str = "lanczos",
        seed: int,
        repeats: int = 1,
        captions: CaptionRule | None = None,
        buckets: Sequence[tuple[int, int]] | None = None,
        batch_size: int = 1,
        steps_per_draw: int = 1,
        rows_a_step: int = 1,
        decode: bool = True,
    ) -> None:
        if not instances:
            raise ValueError("a data set needs at least one instance picture")
        if class_pictures is not None and not class_pictures:
            raise ValueError("prior preservation needs at least one class picture (None: without it)")
        if center_crop and crops_per_image is not None:
            raise ValueError("the middle is one crop: give center_crop or crops_per_image")
        if buckets and class_pictures:
            raise ValueError("class pictures are squares: they do not go with buckets")
        self.instances = tuple(instances)
        self.class_pictures = tuple(class_pictures or ())
        self.resolution = resolution
        self.crops = 1 if center_crop else crops_per_image
        self.random_flip = random_flip
        self.interpolation = interpolation
        self.seed = seed
        self.captions = captions or CaptionRule()
        self.batch_size = batch_size
        self.steps_per_draw = steps_per_draw
        self.rows_a_step = rows_a_step
        self.decode = decode
        self._targets = [
            nearest_bucket(picture.size, buckets) if buckets else (resolution, resolution) for picture in self.instances
        ]
        self._buckets = BucketOrder(self._targets, batch_size, repeats, seed) if buckets else None
        self._length = max(len(self.instances) * repeats, len(self.class_pictures))
        self._order = Shuffled(self._length, seed, "order")
        self._class_order = Shuffled(len(self.class_pictures), seed, "class order")
        self._kept: dict[tuple[bool, int, str], Image.Image] = {}
        self._kept_bytes = 0

    def __len__(self) -> int:
        """Draws in an epoch: instance pictures x repeats or, if that is more, class pictures. See `BucketOrder` too.

        Whatever `steps_per_draw` is, so that all methods take as many steps; above 1 an epoch shows fewer pictures.
        """
        return self._length if self._buckets is None else len(self._buckets)

    @property
    def rows_in(self) -> Callable[[int], int] | None:
        """Gives the number of instance rows in a batch, counted since the run began; None: all are whole."""
        if self._buckets is None:
            return None
        return lambda batch: self._buckets.rows_in(self._first_of(batch * self.batch_size)[1] // self.batch_size)

    def __getitem__(self, draw: int) -> list[Row]:
        rows = self.describe(draw)
        if not self.decode:
            return rows
        return [self._decoded(row) for row in rows]

    def stop_decoding(self) -> None:
        """From now on rows come without pixels; pictures kept in memory are let go."""
        self.decode = False
        self.let_go()

    def let_go(self) -> None:
        """Frees the pictures that were kept in memory; shown again, they are decoded again."""
        self._kept.clear()
        self._kept_bytes = 0

    def describe(self, draw: int) -> list[Row]:
        """`self[draw]` without the pixels; opens no file.

        Raises:
            IndexError: `draw` is negative.
        """
        first, place = self._first_of(draw)
        index = self._order[place] % len(self.instances) if self._buckets is None else self._buckets[place]
        rows = [self._row(self.instances[index], False, index, draw, first)]
        if self.class_pictures:
            index = self._class_order[place]
            rows.append(self._row(self.class_pictures[index], True, index, draw, first))
        return rows

    def resumed_at(self, draws: int, rows_a_step: int) -> int:
        """The draw that a resumed run begins with: the next, or the next that shows something new where its steps have
        another number of rows, so that the draws of one step are either all repeats or none.

        Arguments:
            draws: done so far.
            rows_a_step: of the steps that did them.
        """
        if self.steps_per_draw == 1 or rows_a_step == self.rows_a_step:
            return draws
        rows = self.steps_per_draw * self.rows_a_step
        return -(-draws // rows) * rows

    def _first_of(self, draw: int) -> tuple[int, int]:
        """The draw that showed the same first, and its number among those that show something new."""
        step, row = divmod(draw, self.rows_a_step)
        new, repeat = divmod(step, self.steps_per_draw)
        return draw - repeat * self.rows_a_step, new * self.rows_a_step + row

    @property
    def cacheable(self) -> bool:
        """Each picture has a few crops that do not change, so its variants (each crop, as it is and mirrored) are
        worth keeping as latents.
        """
        return self.crops is not None or all(
            resized_size(picture.size, target) == target
            for is_class, index, picture in self._all_pictures()
            for target in (self.target(is_class, index),)
        )

    def variants(self) -> Iterator[VariantKey]:
        """What the rows of a `cacheable` data set can show: each `Row.key` once, those of a picture in a row.

        Raises:
            ValueError: the data set is not `cacheable`.
        """
        if not self.cacheable:
            raise ValueError("crops differ from draw to draw: nothing can be cached")
        for is_class, index, picture in self._all_pictures():
            corners = crop_corners(picture.size, self.target(is_class, index), self.crops or 1)
            for corner, flipped in itertools.product(corners, (False, True) if self.random_flip else (False,)):
                yield is_class, index, View(picture.size, corner, flipped)

    def prompts(self) -> list[str]:
        """Every prompt a row can have but those with shuffled tags, each once; with caption dropout "" is one."""
        captions = [
            picture.caption
            for is_class, _, picture in self._all_pictures()
            if is_class or not self.captions.changes_order_of(picture.caption)
        ]
        return list(dict.fromkeys(captions + [""] * (self.captions.dropout > 0)))

    def _all_pictures(self) -> Iterator[tuple[bool, int, Picture]]:
        for is_class, pictures in ((False, self.instances), (True, self.class_pictures)):
            for index, picture in enumerate(pictures):
                yield is_class, index, picture

    def _row(self, picture: Picture, is_class: bool, index: int, draw: int, first: int) -> Row:
        purpose = "class augmentation" if is_class else "augmentation"
        target = self.target(is_class, index)
        view = self._view(picture, target, generator(self.seed, purpose, first))
        prompt = picture.caption if is_class else self.captions(picture.caption, self.seed, first)
        shown = view.original_size, view.crop_top_left, prompt, is_class, index, view.flipped
        return Row(None, *shown, draw, first, target)

    def _view(self, picture: Picture, target: tuple[int, int], random: torch.Generator) -> View:
        return draw_view(picture.size, target, self.crops, self.random_flip, random)

    def picture(self, is_class: bool, index: int) -> Picture:
        return (self.class_pictures if is_class else self.instances)[index]

    def target(self, is_class: bool, index: int) -> tuple[int, int]:
        """(height, width) in px that a picture is shown at."""
        return (self.resolution, self.resolution) if is_class else self._targets[index]

    def pixels(self, is_class: bool, index: int, view: View) -> torch.Tensor:
        """(3, H, W), float32 in [-1, 1]: what a view shows of a picture.

        Raises:
            UserError: the picture cannot be read, or is another than it was.
        """
        resized = self._kept_as((is_class, index, "pixels"), self._resized)
        return render(resized, view, self.target(is_class, index))

    def mask(self, is_class: bool, index: int, view: View) -> torch.Tensor | None:
        """(H, W), float32: the weights of those pixels in the loss; None where all weigh the same. Errors as above."""
        if self.picture(is_class, index).mask is None:
            return None
        resized = self._kept_as((is_class, index, "mask"), self._resized_mask)
        return render_mask(resized, view, self.target(is_class, index))

    def _decoded(self, row: Row) -> Row:
        shown = row.is_class, row.picture, row.view
        return replace(row, pixels=self.pixels(*shown), mask=self.mask(*shown))

    def _kept_as(self, key: tuple[bool, int, str], make: Callable[[bool, int], Image.Image]) -> Image.Image:
        # A photo takes 0.1 s and more to decode and resize, and a few photos are shown again and again.
        if key in self._kept:
            return self._kept[key]
        image = make(*key[:2])
        size_bytes = len(image.getbands()) * image.width * image.height
        if self._kept_bytes + size_bytes <= _KEPT_BYTES:
            self._kept[key] = image
            self._kept_bytes += size_bytes
        return image

    def _resized(self, is_class: bool, index: int) -> Image.Image:
        picture = self.picture(is_class, index)
        image = picture.load()
        if (image.height, image.width) != picture.size:
            raise UserError(f"{picture.name} changed while the run was using it: start the run again")
        return resize(image, self.target(is_class, index), self.interpolation)

    def _resized_mask(self, is_class: bool, index: int) -> Image.Image:
        picture = self.picture(is_class, index)
        height, width = resized_size(picture.size, self.target(is_class, index))
        return picture.load_mask().resize((width, height), Image.Resampling.BOX)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}, "_kept_bytes": 0}  # workers decode for themselves


class DrawBatches(Sampler[list[int]]):
    """Endless batches of draws for one process; a `batch_sampler` of a DataLoader that nothing else may
    shard.

    Row j of micro-batch m (counted over the processes together) on process `rank` is draw
    start + (m * world_size + rank) * batch_size + j.

    Arguments:
        start: the first draw; of a resumed run, the number of draws done.
        rows_in: gives the rows of a batch by its number since the run began, where batches can be smaller (buckets):
            such a batch has the first of its `batch_size` draws. A start inside a batch is moved to the next one.
    """

    def __init__(
        self,
        start: int = 0,
        *,
        rank: int = 0,
        world_size: int = 1,
        batch_size: int = 1,
        rows_in: Callable[[int], int] | None = None,
    ) -> None:
        if start < 0 or batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"no such batches: {start=} {rank=} {world_size=} {batch_size=}")
        self.start = start if rows_in is None else -(-start // batch_size) * batch_size
        self.rank, self.world_size, self.batch_size = rank, world_size, batch_size
        self.rows_in = rows_in

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start + self.rank * self.batch_size
        for batch in itertools.count(first, self.world_size * self.batch_size):
            rows = self.batch_size if self.rows_in is None else self.rows_in(batch // self.batch_size)
            yield list(range(batch, batch + rows))


def flatten(rows_of_draws: Iterable[list[Row]]) -> list[Row]:
    """The rows of several draws in one list, class rows after their instance rows; a DataLoader's
    `collate_fn`.
    """
    return list(itertools.chain.from_iterable(rows_of_draws))
