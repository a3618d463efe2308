"""What can be wrong in the words of `python -m benchmarks.quality`, each told in one line."""

import re
from collections.abc import Iterable, Sequence

import torch

from bilora_diffusion.errors import UserError
from bilora_diffusion.flags import nearest, show

__all__ = ["check_device", "check_names", "part_of"]


def part_of(text: str) -> tuple[int, int]:
    """(i, n) of "i/n".

    Raises:
        UserError: it is none.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    number, of = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= of:
        raise UserError(f"--part is {show(text)}: give i/n, the i-th of n shares, such as 1/2")
    return number, of


def check_device(name: str) -> None:
    """Raises `UserError` if nothing can be computed there."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without it
        reason = str(error).split(". ")[0].splitlines()[0]
        raise UserError(f"--device {show(name)} cannot be used: {reason}") from None


def check_names(flag: str, words: Iterable[str], names: Sequence[str], what: str) -> None:
    """Raises `UserError` if a word of a flag is not among the names.

    Arguments:
        what: said before the word: "there is no".
    """
    for word in words:
        if word not in names:
            guess = nearest(word, names)
            hint = f"did you mean {guess}?" if guess else f"there are {'; '.join(names)}"
            raise UserError(f"{flag}: {what} {show(word)}: {hint}")
