"""Keeping the libraries' remarks and progress bars off the user's screen while a base is loaded."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import diffusers
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging as transformers_logging

__all__ = ["quiet_libraries"]


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silences diffusers and transformers; the hub's download bars stay, on the first process of a machine.

    What a user should know is told by our own errors instead.
    """
    loggings = (diffusers.logging, transformers_logging)
    levels = [logging.get_verbosity() for logging in loggings]
    bars = [logging.is_progress_bar_enabled() for logging in loggings]
    downloads = not are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logging in loggings:
                logging.set_verbosity_error()
                logging.disable_progress_bar()
            # After transformers' switch, which turns the hub's bars off and on along with its own.
            _set_download_bars(downloads and os.environ.get("LOCAL_RANK", "0") == "0")
            yield
        finally:
            for logging, level, bar in zip(loggings, levels, bars, strict=True):
                logging.set_verbosity(level)
                (logging.enable_progress_bar if bar else logging.disable_progress_bar)()
            _set_download_bars(downloads)


def _set_download_bars(shown: bool) -> None:
    (enable_progress_bars if shown else disable_progress_bars)()
