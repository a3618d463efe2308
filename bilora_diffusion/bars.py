"""Progress bars for what comes before the first step: seconds with five pictures, minutes with thousands."""

from typing import Any

import torch.distributed as dist
from tqdm.auto import tqdm

__all__ = ["progress_bar"]

SHOWN_AFTER_SECONDS = 3.0


def progress_bar(what: str, total: int, unit: str) -> "tqdm[Any]":
    """A bar that appears once its part has taken a while, on the main process only.

    Arguments:
        what: which part of the start it is, such as `reading pictures`.
        total: how many `unit`s there are, of this process.
    """
    silent = dist.is_available() and dist.is_initialized() and dist.get_rank() != 0
    return tqdm(desc=what, total=total, unit=unit, delay=SHOWN_AFTER_SECONDS, disable=silent)
