"""The one exception a user is meant to see."""

__all__ = ["UserError"]


class UserError(Exception):
    """A mistake in a flag, a file or the machine's set-up, told in one line.

    The message says what is wrong, where (the flag or the file) and how to mend it. The command line
    prints it without a traceback and exits with code 2.
    """
