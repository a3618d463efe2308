"""Continue from an existing LoRA (--init_lora_from): any file that the pipeline's own loader reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from bilora_diffusion.adapters import PRIMARY, adapted_layers
from bilora_diffusion.bases import Base
from bilora_diffusion.bases.quiet import quiet_libraries
from bilora_diffusion.errors import UserError

__all__ = ["InitialLora", "copy_lora_into", "read_lora"]


@dataclass(frozen=True)
class InitialLora:
    """A LoRA's factors by part and layer: (A, B, scale), float32 on the CPU."""

    layers: Mapping[tuple[str, str], tuple[Tensor, Tensor, float]]


def read_lora(path: str, base: Base) -> InitialLora:
    """Reads a file in diffusers or Kohya format through the pipeline's loader, whatever its naming and alpha.

    Raises:
        UserError: no such file, not a safetensors file, or not a LoRA for this base.
    """
    file = Path(path)
    if file.is_dir():
        file /= "pytorch_lora_weights.safetensors"
    if not file.is_file():
        raise UserError(f"--init_lora_from {path}: no such file")
    if file.suffix != ".safetensors":
        raise UserError(f"--init_lora_from {path}: only .safetensors files are read, never pickles")
    try:
        with safe_open(file, "pt") as content:
            if any("dora_scale" in key or "lora_magnitude_vector" in key for key in content.keys()):  # noqa: SIM118
                raise UserError(f"--init_lora_from {path}: a DoRA; only plain LoRA files can be continued from")
    except Exception as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--init_lora_from {path}: not a safetensors file ({error})") from None
    pipeline = base.load("unet", "text_encoder", "text_encoder_2", dtype=torch.float32)
    try:
        with quiet_libraries():
            pipeline.load_lora_weights(str(file), adapter_name="initial")
    except Exception as error:  # the loader raises many kinds, all of which say that the file does not fit
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"--init_lora_from {path}: not a LoRA for this base ({reason})") from None
    layers = {
        (part, name): (
            layer.lora_A["initial"].weight.detach().float(),
            layer.lora_B["initial"].weight.detach().float(),
            layer.scaling["initial"],
        )
        for part in ("unet", "text_encoder", "text_encoder_2")
        for name, layer in adapted_layers(getattr(pipeline, part))
    }
    if not layers:
        raise UserError(f"--init_lora_from {path}: the file holds no LoRA layer of this base")
    return InitialLora(layers)


@torch.no_grad()
def copy_lora_into(models: Mapping[str, nn.Module], lora: InitialLora, path: str) -> None:
    """Starts the primary from a LoRA. Layers that the file lacks keep their own start.

    B takes up the difference of the scales, so that s B A is what it was whatever --lora_alpha is now.

    Raises:
        UserError: another rank, layers that this run would not save again, or a DoRA to be trained.
    """
    ours = {(part, name): layer for part, model in models.items() for name, layer in adapted_layers(model)}
    lost = set(lora.layers) - set(ours)
    if any(part not in models for part, _ in lost):
        raise UserError(f"--init_lora_from {path} holds layers of the text encoders: add --train_text_encoder")
    if lost:
        raise UserError(
            f"--init_lora_from {path} holds layers that this run does not train ({min(lost)[1]} and "
            f"{len(lost) - 1} more): name them in --lora_layers"
        )
    for (part, name), (A, B, scale) in lora.layers.items():
        layer = ours[part, name]
        if PRIMARY in getattr(layer, "lora_magnitude_vector", {}):
            raise UserError(
                "--init_lora_from and --use_dora exclude each other: a LoRA file holds no magnitudes; leave one out"
            )
        own = layer.lora_A[PRIMARY].weight
        if own.shape != A.shape:
            raise UserError(f"--init_lora_from {path} has rank {A.shape[0]}: give --rank {A.shape[0]}")
        own.copy_(A)
        layer.lora_B[PRIMARY].weight.copy_(B * (scale / layer.scaling[PRIMARY]))
