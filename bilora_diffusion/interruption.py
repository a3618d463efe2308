"""Ctrl-C ends a run after the step at hand, with everything saved; a second one ends it at once.

Several processes agree on where to stop by the steps themselves, which takes two more.
"""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

__all__ = ["Interruption", "ignore_interrupts"]

NOTICE = "\ninterrupted: the step at hand is finished and everything saved; Ctrl-C again leaves at once\n"


class Interruption:
    """Inside the `with`, the first SIGINT or SIGTERM only sets `requested`; a SIGINT after it raises KeyboardInterrupt.

    A second SIGTERM does nothing: launchers send one after the user's Ctrl-C, which is no wish to lose the run.
    Signal handlers exist in the main thread alone; in another thread nothing is caught.

    Arguments:
        announces: tell the user on stderr that the first one was heard.
    """

    def __init__(self, announces: bool = True) -> None:
        self.requested = False
        self.announces = announces
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.announces and not self.requested:
            os.write(sys.__stderr__.fileno(), NOTICE.encode())  # print() may be what the signal interrupted
        self.requested = True

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def ignore_interrupts(_worker: int) -> None:
    """Keeps Ctrl-C from the processes that read pictures, a DataLoader's `worker_init_fn`.

    The terminal sends it to every process of the group, a launcher's SIGTERM goes to all of them too, and the step
    at hand still needs its pictures. The run itself ends them, and they notice when it is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
