"""The parts of a base built from their configuration alone, on the `meta` device, and the bytes that they take."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from bilora_diffusion.base_precision import FLOATS, QUANTISED, replace_weights
from bilora_diffusion.bases.quiet import quiet_libraries
from bilora_diffusion.memory.counting import rounded
from bilora_diffusion.memory.simulation import META
from bilora_diffusion.stored_linear import StoredLinear

__all__ = ["TEXT_ENCODERS", "build_part", "frozen_bytes", "store"]

TEXT_ENCODERS = {
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}


def build_part(part: str, config: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """A part without weights, frozen, in the given precision.

    Arguments:
        part: one of `bases.PARTS`.
        config: what its config.json holds.
    """
    with quiet_libraries(), META:
        if part in TEXT_ENCODERS:
            model = TEXT_ENCODERS[part](CLIPTextConfig.from_dict(config))
        else:
            model = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[part].from_config(config)
        return model.requires_grad_(False).to(dtype)


@dataclass(frozen=True)
class _NoWeight:
    """Stands for a stored weight: restoring it takes what it takes, and it has no values.

    Arguments:
        nbytes: on the GPU.
    """

    shape: torch.Size
    nbytes: int

    def restored(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.shape, dtype=dtype, device=META)


def store(part: str, model: nn.Module, precision: str | None, *, offload: bool) -> None:
    """`base_precision.store_base` without weights.

    Arguments:
        model: on `meta`, without adapters.
    """

    def stored(weight: Tensor) -> _NoWeight:
        return _NoWeight(weight.shape, 0 if offload else _stored_bytes(weight, precision))

    if precision is not None or offload:
        replace_weights(part, model, stored)


def _stored_bytes(weight: Tensor, precision: str | None) -> int:
    """With the scales: one for each output, of nf4 one in 8 bits for each 64 weights; int8's has a zero point too."""
    count = weight.numel()
    if precision == "nf4":
        return count // 2 + count // 64
    if precision in QUANTISED:
        return count + (5 if precision == "int8" else 4) * len(weight)
    return count * FLOATS.get(precision, weight.dtype).itemsize


def frozen_bytes(model: nn.Module) -> int:
    """What a frozen model without adapters keeps on the GPU."""
    stored = sum(rounded(module.stored.nbytes) for module in model.modules() if isinstance(module, StoredLinear))
    return stored + sum(rounded(tensor.nbytes) for tensor in (*model.parameters(), *model.buffers()))
