"""What the package's commands share: a user's mistake in one line, and the exit codes."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from bilora_diffusion.errors import UserError

__all__ = ["GOES_ON", "Parser", "exit_code"]

GOES_ON = "stopped; the same command goes on from here"


class Parser(argparse.ArgumentParser):
    """Raises `UserError` where argparse would print its usage and end the program."""

    def error(self, message: str) -> NoReturn:
        raise UserError(" ".join(message.removeprefix("argument ").split()))


def exit_code(work: Callable[[], object], stopped: str | None = None) -> int:
    """Runs a command's work: 0; 2 for a mistake of the user's, told in one line; 130 after Ctrl-C.

    Arguments:
        stopped: said after Ctrl-C.
    """
    try:
        work()
    except UserError as error:
        error.tell()
        return 2
    except KeyboardInterrupt:
        if stopped:
            print(stopped, file=sys.stderr)
        return 130
    return 0
