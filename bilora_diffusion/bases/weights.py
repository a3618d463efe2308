"""Weight files that are not whole, told in one line before they do harm."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from bilora_diffusion.errors import UserError

__all__ = ["check_complete", "open_safetensors"]


@contextmanager
def open_safetensors(path: Path, where: str) -> Iterator[Any]:
    """`safetensors.safe_open` for torch; only the header is read, and checked against the file's length.

    Arguments:
        where: the flag and the model, for the message.

    Raises:
        UserError: the file is damaged or cut short.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise UserError(
            f"{where}: {path.name} is damaged or cut short ({error}); copy or download it again."
        ) from error


def check_complete(model: nn.Module, missing: Iterable[str], where: str, part: str) -> None:
    """Raises `UserError` unless every weight of `model` came from the file.

    The libraries only warn of a missing weight and leave it random, or empty on the meta device.

    Arguments:
        missing: names that the loader reports as missing.
    """
    empty = (name for name, weight in model.named_parameters() if weight.is_meta)
    if lacking := sorted({*missing, *empty}):
        raise UserError(
            f"{where} lacks {len(lacking)} of the weights of its {part} (such as {lacking[0]}): "
            "it is incomplete or not SDXL."
        )
