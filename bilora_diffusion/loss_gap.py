"""Is the perturbation alive? The loss it adds to the batch at hand, measured in float32.

    gap = L(W0 + s1 B1 A1 + perturbation) - L(W0 + s1 B1 A1)

on the same rows, noise and timesteps; Bi-LoRA's perturbation is s2 B2 A2. One that ascends makes it positive; one that
does nothing leaves it at zero. In bfloat16 the rounding of a single layer is larger than a small perturbation, so the
frozen base computes in float32 here, a layer at a time.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from bilora_diffusion.adapters import auxiliary_off
from bilora_diffusion.compilation import uncompiled
from bilora_diffusion.methods.interface import Method

__all__ = ["ARITHMETIC_NOISE", "LossGap", "float32_computation", "measure_loss_gap", "no_dropout"]

ARITHMETIC_NOISE = 1e-6
"""Share of the loss below which a gap cannot be told from float32's rounding. tests/test_loss_gap.py measures it:
the same loss summed over other splits of the batch differs by less."""


@dataclass(frozen=True)
class LossGap:
    """Mean losses over the rows of one optimiser step, on this process."""

    perturbed: float
    clean: float

    @property
    def gap(self) -> float:
        return self.perturbed - self.clean

    @property
    def is_noise(self) -> bool:
        return abs(self.gap) <= ARITHMETIC_NOISE * abs(self.clean)


@torch.no_grad()
def measure_loss_gap(models: Iterable[nn.Module], method: Method, micro_batches: Sequence) -> LossGap:
    """Two forward passes over every micro-batch, one under the method's perturbation, one without.

    Arguments:
        models: the trained parts.
        method: gives the perturbation, which it may need passes of its own to find.
        micro_batches: of one step; each gives its float32 twin by `in_float32()`.
    """
    models = list(models)
    twins = [micro_batch.in_float32() for micro_batch in micro_batches]
    with uncompiled(), no_dropout(models):
        # Found as the step finds it. A backward pass in `float32_computation` would meet weights put back by then.
        with method.perturbed(micro_batches), float32_computation(models):
            perturbed = torch.stack([twin.loss() for twin in twins]).mean()
        with auxiliary_off(models), float32_computation(models):
            clean = torch.stack([twin.loss() for twin in twins]).mean()
    return LossGap(perturbed.item(), clean.item())


@contextmanager
def no_dropout(models: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, nothing is dropped. Dropout draws anew in each pass: its difference would drown the auxiliary's."""
    training = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model, was in zip(models, training, strict=True):
            model.train(was)


@contextmanager
def float32_computation(models: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, every layer computes in float32 whatever precision its weights are stored in.

    A layer's half-precision weights are widened when its forward begins and put back, the very same tensors, when it
    ends: the extra memory is one layer's. On an exception they are put back too.
    """
    handles = []
    stored: dict[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    # Only what is on: said once, even "off" is another setting to torch.compile, which would make all programs anew.
    in_tf32 = [backend for backend in (torch.backends.cuda.matmul, torch.backends.cudnn) if backend.allow_tf32]

    def own(module: nn.Module) -> Iterator[torch.Tensor]:
        yield from module.parameters(recurse=False)
        yield from module.buffers(recurse=False)

    def widen(module: nn.Module, *_) -> None:
        # A tensor shared with a module that is running is wide already: that one puts it back.
        for tensor in own(module):
            if tensor.dtype in (torch.float16, torch.bfloat16):
                stored.setdefault(module, []).append((tensor, tensor.data))
                tensor.data = tensor.data.float()

    def restore(module: nn.Module, *_) -> None:
        for tensor, data in stored.pop(module, ()):
            tensor.data = data

    try:
        for backend in in_tf32:
            backend.allow_tf32 = False
        for model in models:
            for module in model.modules():
                if any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in own(module)):
                    handles.append(module.register_forward_pre_hook(widen))
                    handles.append(module.register_forward_hook(restore))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in list(stored):
            restore(module)
        for backend in in_tf32:
            backend.allow_tf32 = True
