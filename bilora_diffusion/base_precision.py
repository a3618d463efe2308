"""The frozen base in fewer bits (`--base_precision`) or in the computer's memory (`--offload_base`).

Only the linear layers of the transformer blocks are stored in another way, 86 % of SDXL's UNet; convolutions, norms and
embeddings are small and sensitive, and keep the precision of the computation. The adapters are float32 always.

References:
    QLoRA: Efficient Finetuning of Quantized LLMs (Dettmers et al., 2023), arXiv 2305.14314, for nf4: 4.13 bits a
    weight with its scales. int8 and fp8 (e4m3) have one scale for each output.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bilora_diffusion.adapters import UNET
from bilora_diffusion.errors import UserError
from bilora_diffusion.stored_linear import StoredLinear, StoredWeight

__all__ = ["FLOATS", "QUANTISED", "precisions", "replace_weights", "store_base"]

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUANTISED = ("nf4", "int8", "fp8")


def store_base(part: str, model: nn.Module, precision: str | None, device: torch.device, *, offload: bool) -> None:
    """Moves a frozen model to its device, the linear layers of its blocks as they are to be kept.

    They are taken one at a time, so that the device never holds the whole model in its first precision.

    Arguments:
        part: which of `adapters.TARGETS` the model is.
        model: on the CPU, without adapters, in the precision of the computation.
        precision: of `FLOATS` or `QUANTISED`; None keeps the model's own.
        offload: keep them in the computer's memory; each is copied to the device when it is used.

    Raises:
        UserError: a package for the precision is missing or does not work on this machine.
    """
    if precision is not None or offload:
        replace_weights(part, model, lambda weight: _store(weight.detach().to(device), precision, offload))
    model.to(device)


def replace_weights(part: str, model: nn.Module, store: Callable[[Tensor], StoredWeight]) -> None:
    """Puts a `StoredLinear` in the place of every linear layer of the blocks."""
    for name in _names(part, model):
        layer = model.get_submodule(name)
        model.set_submodule(name, StoredLinear(layer, store(layer.weight), layer.weight.dtype))


def precisions(base_precision: str | None, compute_dtype: torch.dtype) -> tuple[torch.dtype, str | None]:
    """What --base_precision means beside the precision of the computation.

    Returns:
        (in which the base is read and its other layers kept, that of its stored layers or None for the same).
    """
    read = torch.float32 if base_precision == "fp32" else compute_dtype
    return read, None if FLOATS.get(base_precision) == compute_dtype else base_precision


def _names(part: str, model: nn.Module) -> list[str]:
    blocks = "attentions" if part == UNET else "layers"
    return [name for name, module in model.named_modules() if type(module) is nn.Linear and blocks in name.split(".")]


def _store(weight: Tensor, precision: str | None, offload: bool) -> StoredWeight:
    keep = _to_pinned_memory if offload else _as_it_is
    if precision == "nf4":
        return _nf4(weight, keep)
    if precision in QUANTISED:
        return _torchao(weight, precision, keep)
    return _Float(keep(weight.to(FLOATS.get(precision, weight.dtype))), weight.device)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _to_pinned_memory(tensor: Tensor) -> Tensor:
    """On the CPU, where the device can read it without the processor's help and without waiting."""
    return tensor.cpu().pin_memory() if tensor.device.type == "cuda" else tensor.cpu()


@dataclass(frozen=True)
class _Float:
    """In a float format."""

    tensor: Tensor
    device: torch.device

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def restored(self, dtype: torch.dtype) -> Tensor:
        return self.tensor.to(self.device, non_blocking=True).to(dtype)


@dataclass(frozen=True)
class _NF4:
    """bitsandbytes' 4-bit NormalFloat in blocks of 64, the blocks' scales in 8 bits."""

    packed: Tensor
    state: Any
    device: torch.device
    dequantise: Callable[..., Tensor] = field(repr=False)

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.state.absmax.nbytes

    def restored(self, dtype: torch.dtype) -> Tensor:
        return self.dequantise(self.packed.to(self.device, non_blocking=True), self.state).to(dtype)


def _nf4(weight: Tensor, keep: Callable[[Tensor], Tensor]) -> _NF4:
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    except ImportError:
        raise _missing("nf4", "bitsandbytes") from None
    try:
        packed, state = quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=True)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise _unusable("nf4", "bitsandbytes", error) from error
    return _NF4(keep(packed), state, weight.device, dequantize_4bit)


@dataclass(frozen=True)
class _TorchAO:
    """torchao's tensor of integers or short floats, with the scales of its rows."""

    tensor: Tensor
    device: torch.device
    nbytes: int

    def restored(self, dtype: torch.dtype) -> Tensor:
        return self.tensor.to(self.device, non_blocking=True).dequantize().to(dtype)


def _torchao(weight: Tensor, precision: str, keep: Callable[[Tensor], Tensor]) -> _TorchAO:
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise _missing(precision, "torchao") from None
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.out_features, layer.in_features = weight.shape
    try:
        quantize_(layer, Int8WeightOnlyConfig() if precision == "int8" else Float8WeightOnlyConfig())
    except (RuntimeError, NotImplementedError, ValueError, AssertionError) as error:
        raise _unusable(precision, "torchao", error) from error
    # A subclass of tensors: it is taken apart to be kept elsewhere, as torch does where it compiles.
    tensor = layer.weight.detach()
    names, context = tensor.__tensor_flatten__()
    kept = {name: keep(getattr(tensor, name)) for name in names}
    whole = type(tensor).__tensor_unflatten__(kept, context, tensor.shape, tensor.stride())
    return _TorchAO(whole, weight.device, sum(one.nbytes for one in kept.values()))


def _missing(precision: str, package: str) -> UserError:
    return UserError(f"--base_precision {precision} needs the package {package}: pip install {package}")


def _unusable(precision: str, package: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return UserError(
        f"--base_precision {precision}: {package} cannot store weights here ({reason}); use bf16, or another of "
        f"{', '.join(QUANTISED)}"
    )
