"""Work in a thread of its own, so that its steps can be shown and its end does not wait for the browser."""

import logging
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from PIL import Image

__all__ = ["Cancellations", "Status", "follow"]

logger = logging.getLogger("app")
Result = TypeVar("Result")
LOOK_EVERY_SECONDS = 0.1


@dataclass(frozen=True)
class Status:
    """Where a piece of work is.

    Attributes:
        share: done, in [0, 1].
        preview: the picture that is forming.
    """

    text: str
    share: float = 0.0
    preview: Image.Image | None = None


def follow(
    work: Callable[[Callable[[Status], None]], Result], cancelled: threading.Event
) -> Generator[Status, None, Result]:
    """Yields the latest of what the work tells, and returns its result or raises what it raised.

    When the generator is closed (the browser went away) the work is cancelled.
    """
    told: queue.SimpleQueue[Status] = queue.SimpleQueue()
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["result"] = work(told.put)
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, name="app work", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(LOOK_EVERY_SECONDS)
            latest = None
            while not told.empty():
                latest = told.get()
            if latest is not None and thread.is_alive():
                yield latest
    finally:
        cancelled.set()
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]


class Cancellations:
    """Which work belongs to which browser, and to which of its tabs: each cancels its own."""

    def __init__(self) -> None:
        self._events: dict[str, set[threading.Event]] = {}
        self._lock = threading.Lock()

    @contextmanager
    def of(self, session: str | None) -> Iterator[threading.Event]:
        """Inside, `cancel` with the same session sets the event it gives."""
        event, key = threading.Event(), session or ""
        with self._lock:
            self._events.setdefault(key, set()).add(event)
        try:
            yield event
        finally:
            with self._lock:
                self._events[key].discard(event)
                if not self._events[key]:
                    del self._events[key]

    def cancel(self, session: str | None) -> bool:
        """Cancels all work of a session; says whether there was any."""
        with self._lock:
            events = list(self._events.get(session or "", ()))
        for event in events:
            event.set()
        return bool(events)
