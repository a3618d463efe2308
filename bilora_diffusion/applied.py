"""What a step changes only if it is applied, decided where the gradients are: nobody waits to hear of it.

A step is not applied if its loss or a gradient is not finite. For a while that is known on the device alone, as a
tensor `applied`; the host goes on meanwhile and asks for the next step.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["copy_if", "step_if"]


def step_if(optimizer: torch.optim.Optimizer, applied: Tensor) -> None:
    """The optimiser's step, or none: neither parameters nor moments change then, whatever the gradients hold.

    torch's fused optimisers decide on the device; for others the host waits and decides.

    Arguments:
        applied: a scalar of bools, on the device of the parameters.
    """
    if not all(group.get("fused") for group in optimizer.param_groups):
        optimizer._opt_called = True  # a schedule would warn of a first step that was left out
        if applied:
            optimizer.step()
        return
    # What torch.amp.GradScaler tells them in the same way.
    optimizer.grad_scale, optimizer.found_inf = None, (~applied).float()
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf


@torch.no_grad()
def copy_if(applied: Tensor, targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Gives each target its value, or leaves all as they are; those of one shape together.

    Arguments:
        applied: a scalar of bools, on the device of the targets.
        values: of the targets' shapes; need not be finite where they are not taken.
    """
    alike: dict[tuple, list[int]] = {}
    for index, target in enumerate(targets):
        alike.setdefault((target.shape, target.dtype), []).append(index)
    for members in alike.values():
        some = [targets[index] for index in members]
        chosen = torch.where(applied, torch.stack([values[index] for index in members]), torch.stack(some))
        torch._foreach_copy_(some, chosen.unbind())
