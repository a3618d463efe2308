"""Reading many pictures: on several threads, in order, under a progress bar."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from PIL import Image

from bilora_diffusion.bars import progress_bar

__all__ = ["read_each"]

Item = TypeVar("Item")
Result = TypeVar("Result")

THREADS = min(8, os.cpu_count() or 1)
"""Pillow decodes outside Python's lock. A decoded photo takes 36 MB of memory, so there are never many."""
_AT_ONCE = 64


def read_each(
    read: Callable[[Item], Result], items: Iterable[Item], what: str, total: int, unit: str = "picture"
) -> Iterator[Result]:
    """`read` of each item, in their order; an exception of one is raised when its turn comes.

    Arguments:
        items: taken a few ahead of what is yielded, in this thread.
        what, total, unit: see `progress_bar`.
    """
    items = iter(items)
    Image.init()  # Pillow loads most formats at first need, and a second thread may then find its format missing
    with progress_bar(what, total, unit) as bar, ThreadPoolExecutor(THREADS) as pool:
        while group := list(islice(items, _AT_ONCE)):
            for result in pool.map(read, group):
                bar.update()
                yield result
