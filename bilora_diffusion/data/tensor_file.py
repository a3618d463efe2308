"""Tensors by key that lie on disk, not in memory, while a process lives."""

import tempfile
from collections.abc import Hashable, Iterator, MutableMapping
from pathlib import Path
from typing import TypeVar

from safetensors.torch import load, save
from torch import Tensor

from bilora_diffusion.atomic import HINTS
from bilora_diffusion.errors import UserError

__all__ = ["TensorFile"]

Key = TypeVar("Key", bound=Hashable)


class TensorFile(MutableMapping[Key, tuple[Tensor, ...]]):
    """A mapping whose values, tuples of tensors, are in an unnamed file: it goes when the process ends, however it
    ends. Reading gives the same bits. A key that is set again takes its place a second time.

    Arguments:
        folder: where the file is; made if it is not there.

    Raises:
        UserError: the folder cannot be made or written, or, later, the disk is full.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._places: dict[Key, tuple[int, int]] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115, it lives as long as this
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written: {_reason(error)}") from error

    def __setitem__(self, key: Key, tensors: tuple[Tensor, ...]) -> None:
        content = save({str(place): tensor.contiguous() for place, tensor in enumerate(tensors)})
        try:
            start = self._file.seek(0, 2)
            self._file.write(content)
            self._file.flush()
        except OSError as error:
            raise UserError(f"a temporary file in {self.folder} was not written: {_reason(error)}") from error
        self._places[key] = start, len(content)

    def __getitem__(self, key: Key) -> tuple[Tensor, ...]:
        start, size = self._places[key]
        self._file.seek(start)
        tensors = load(self._file.read(size))
        return tuple(tensors[str(place)] for place in range(len(tensors)))

    def __delitem__(self, key: Key) -> None:
        del self._places[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _reason(error: OSError) -> str:
    return HINTS.get(error.errno or 0) or error.strerror or str(error)
