"""What several processes share: the mean of their gradients, and the start; and what a device tells its host.

The models are not wrapped in DistributedDataParallel. The trained parameters are few (7 million on SDXL), so one
all-reduce of one flat buffer a step costs next to nothing, and in return a method may run as many passes as it likes,
parameters without a gradient are tolerated, and two processes with batch b compute what one with batch 2b does.
"""

import time
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bilora_diffusion.adapters import wide_dtype

__all__ = [
    "Mark",
    "Reading",
    "average",
    "average_gradients",
    "broadcast",
    "process_count",
    "process_number",
    "to_device",
]


def process_count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_number() -> int:
    """Which of them this one is, from 0."""
    return dist.get_rank() if process_count() > 1 else 0


def _several() -> bool:
    return process_count() > 1


def average(values: Sequence[Tensor]) -> list[Tensor]:
    """The mean of each tensor over all processes. Every process must bring tensors of the same shapes."""
    if not _several():
        return list(values)
    flat = torch.cat([value.detach().reshape(-1).float() for value in values])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    pieces = flat.split([value.numel() for value in values])
    return [piece.reshape(value.shape) for piece, value in zip(pieces, values, strict=True)]


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Gives every process the first one's values."""
    if _several():
        for tensor in tensors:
            dist.broadcast(tensor.data, src=0)


def average_gradients(parameters: Iterable[nn.Parameter], *scalars: Tensor) -> list[Tensor]:
    """Averages the gradients in place and returns the means of the scalars, in one exchange.

    A parameter without a gradient has none on any process (they run the same graph) and stays without: a zero
    gradient would bring it weight decay.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    means = average([*scalars, *gradients])
    if _several():
        torch._foreach_copy_(gradients, means[len(scalars) :])
    return means[: len(scalars)]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy there, which nobody waits for: a GPU takes it from pinned memory when it comes to it."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")  # elsewhere nothing keeps the source until it is read


class Mark:
    """A moment in a device's work: when all that it was asked for so far is done."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self._event is None:
            self._moment = time.perf_counter()
        else:
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Until then."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: "Mark") -> float:
        """By the device's own clock where it has one; waits for both."""
        if self._event is None:
            return self._moment - earlier._moment
        self.wait()
        return earlier._event.elapsed_time(self._event) / 1000


class Reading:
    """Scalars on their way to the host, all in one copy.

    Arguments:
        values: on one device, at least one.

    Attributes:
        taken: when the device has computed them.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        device = next(iter(values.values())).device
        self._names = list(values)
        stacked = torch.stack([value.to(wide_dtype(device)) for value in values.values()])
        # To pinned memory on a GPU; elsewhere an unfinished copy could be read.
        self._copy = stacked.to("cpu", non_blocking=device.type == "cuda")
        self.taken = Mark(device)

    def numbers(self) -> dict[str, float]:
        """Waits until they are here."""
        self.taken.wait()
        return dict(zip(self._names, self._copy.tolist(), strict=True))
