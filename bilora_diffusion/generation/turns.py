"""Whose turn it is: requests of several people are answered one after the other, in the order they came."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bilora_diffusion.errors import UserError

__all__ = ["Cancelled", "Turns"]

MOST_WAITING = 30
LOOK_EVERY_SECONDS = 0.05


class Cancelled(Exception):
    """The person who asked for it does not want it any more."""


class Turns:
    """A first-come-first-served lock that tells those who wait how many are before them."""

    def __init__(self, most_waiting: int = MOST_WAITING) -> None:
        self.most_waiting = most_waiting
        self._line: list[object] = []
        self._changed = threading.Condition()

    @contextmanager
    def turn(self, cancelled: threading.Event, waiting: Callable[[int], None] = lambda ahead: None) -> Iterator[None]:
        """Waits for one's turn, and holds it inside the `with`.

        Arguments:
            cancelled: when set, one leaves the line.
            waiting: called with the number of those before one, from 1, each time it changes; not if there is none.

        Raises:
            Cancelled: while waiting.
            UserError: too many wait already.
        """
        ticket, told = object(), 0
        with self._changed:
            if len(self._line) > self.most_waiting:
                raise UserError(f"{self.most_waiting} requests are waiting already: try again in a while")
            self._line.append(ticket)
        try:
            while True:
                with self._changed:
                    ahead = self._line.index(ticket)
                    if ahead and ahead == told:
                        self._changed.wait(LOOK_EVERY_SECONDS)
                        ahead = self._line.index(ticket)
                if cancelled.is_set():
                    raise Cancelled
                if ahead == 0:
                    break
                if ahead != told:
                    told = ahead
                    waiting(ahead)
            yield
        finally:
            with self._changed:
                self._line.remove(ticket)
                self._changed.notify_all()
