"""Three linear layers in float64 with adapters, small enough to write a method out beside it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn


class Stack(nn.Module):
    """Three linear layers of different shapes with tanh between them."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in ((6, 9), (9, 5), (5, 4)))
        for layer in self.layers:
            layer.weight.data = torch.randn(layer.weight.shape, generator=draw, dtype=torch.float64) / 2
        self.requires_grad_(False)

    def add_adapter(self, config: LoraConfig, adapter_name: str) -> None:
        inject_adapter_in_model(config, self, adapter_name)

    def forward(self, x: Tensor, weights: Sequence[Tensor] | None = None) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = torch.tanh(layer(x) if weights is None else x @ weights[number].T)
        return x


@dataclass
class StackBatch:
    """A micro-batch in float64 with a squared error on given targets."""

    model: Stack
    x: Tensor
    y: Tensor
    share: float
    is_repeat: bool = False

    def __len__(self) -> int:
        return len(self.x)

    def loss(self, rows: slice = slice(None)) -> Tensor:
        return (self.model(self.x[rows]) - self.y[rows]).square().mean()

    def add_gradient(self, rows: slice = slice(None), weight: float = 1.0) -> Tensor:
        loss = self.loss(rows)
        (loss * weight * self.share).backward()
        return loss.detach()
