"""What several processes share: the mean of their gradients, and the start; and what a device tells its host.

The models are not wrapped in DistributedDataParallel. The trained parameters are few (7 million on SDXL), so one
all-reduce of one flat buffer a step costs next to nothing, and in return a method may run as many passes as it likes,
parameters without a gradient are tolerated, and two processes with batch b compute what one with batch 2b does.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bilora_diffusion.adapters import wide_dtype

__all__ = ["average", "average_gradients", "broadcast", "on_host", "process_count", "process_number"]


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


def on_host(values: Mapping[str, Tensor]) -> dict[str, float]:
    """The numbers of scalars on one device, read in one go: each reading waits until the device has caught up."""
    if not values:
        return {}
    device = next(iter(values.values())).device
    read = torch.stack([value.to(wide_dtype(device)) for value in values.values()]).tolist()
    return dict(zip(values, read, strict=True))
