"""--channels_last: the UNet's convolutions on tensors whose channels lie together in memory, as (B, H, W, C).

The shapes stay (B, C, H, W); a convolution whose weight lies so gives an output that does, whatever its input's layout.
Transformers take rows of channels, so they need no copy of such an input.
"""

import torch
from torch import nn

__all__ = ["lay_channels_last"]


def lay_channels_last(model: nn.Module) -> None:
    """Puts the frozen weight of each convolution, (out, in, k, k), in that layout.

    The weights are new parameters: the old ones may be shared with other models.

    Arguments:
        model: frozen, on its device, without adapters.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            weight = layer.weight.detach()
            # Not `contiguous`, which takes a kernel of one place for laid out already, whatever its strides say.
            laid = torch.empty_like(weight, memory_format=torch.channels_last).copy_(weight)
            layer.weight = nn.Parameter(laid, requires_grad=False)
