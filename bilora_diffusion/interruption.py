"""Ctrl-C ends a run after the step at hand, with everything saved; a second one ends it at once."""

import signal
import threading
from types import FrameType

__all__ = ["Interruption"]


class Interruption:
    """Inside the `with`, SIGINT and SIGTERM only set `requested`. Signal handlers exist in the main thread alone."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
