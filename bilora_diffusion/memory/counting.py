"""Bytes that tensors hold, counted by their storages: what an allocator is asked for, on any device."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["BLOCK_BYTES", "StorageCounter", "rounded"]

BLOCK_BYTES = 512
"""CUDA's caching allocator gives out multiples of this."""


def rounded(size: int) -> int:
    """Bytes that the allocator counts for so many."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


class StorageCounter(TorchDispatchMode):
    """Inside, counts the storages that operations make on a device, as long as something refers to them.

    Not seen: what a kernel needs for itself while it runs, and what is made without torch's operations until one is
    done to it.

    Arguments:
        device: only tensors there.
        known: tensors that are there already and are not counted, nor their views.

    Attributes:
        live, peak: bytes, now and the most since `restart`.
    """

    def __init__(self, device: torch.device, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._device_type = device.type
        self._storages: dict[int, weakref.ref] = {}
        self._sizes: dict[int, int] = {}
        self.leave_out(known)

    def restart(self) -> None:
        """The peak from here on."""
        self.peak = self.live

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """From here on these are not counted, nor their views."""
        for tensor in tensors:
            self._add(tensor, counted=False)
            key = id(tensor.untyped_storage())
            self.live -= self._sizes[key]
            self._sizes[key] = 0

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._storages.clear()  # no callback may outlive the interpreter
        self._sizes.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return self.seen(func(*args, **(kwargs or {})))

    def seen(self, result: Any) -> Any:
        """Counts what an operation gave, and gives it on."""
        for one in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(one, Tensor) and one.device.type == self._device_type:
                self._add(one)
        return result

    def _add(self, tensor: Tensor, counted: bool = True) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._storages:
            return

        def forget(_: weakref.ref) -> None:
            del self._storages[key]
            self.live -= self._sizes.pop(key)

        self._storages[key] = weakref.ref(storage, forget)
        self._sizes[key] = rounded(storage.nbytes()) if counted else 0
        self.live += self._sizes[key]
        self.peak = max(self.peak, self.live)
