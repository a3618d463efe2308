"""The parts of a base built from their configuration alone, on the `meta` device, and the bytes that they take."""

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from bilora_diffusion.bases.quiet import quiet_libraries
from bilora_diffusion.memory.simulation import META, rounded

__all__ = ["TEXT_ENCODERS", "build_part", "frozen_bytes"]

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


def frozen_bytes(model: nn.Module, linear: float, other: float) -> int:
    """What a frozen model keeps on the GPU: the one place that knows how its weights are stored.

    Arguments:
        model: without adapters.
        linear: bytes a parameter of the weights of `nn.Linear` layers, which is what quantisation shrinks.
        other: of everything else: convolutions, norms, embeddings, biases.
    """
    shrinkable = {id(module.weight) for module in model.modules() if type(module) is nn.Linear}
    total = 0
    for tensor in (*model.parameters(), *model.buffers()):
        total += rounded(round(tensor.numel() * (linear if id(tensor) in shrinkable else other)))
    return total
