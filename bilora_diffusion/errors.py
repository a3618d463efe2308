"""The one exception a user is meant to see."""

import re
import sys

__all__ = ["UserError"]


class UserError(Exception):
    """A mistake in a flag, a file or the machine's set-up, told in one line.

    The message says what is wrong, where (the flag or the file) and how to mend it. The commands print it without a
    traceback and exit with code 2.
    """

    def tell(self) -> None:
        """Prints "error: " and the message to stderr, as one line: a library's words in it may come in several."""
        text = re.sub(r"\s*\n\s*", " ", str(self).strip())
        print(f"error: {text}", file=sys.stderr)
