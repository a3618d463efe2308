"""The primary adapter as a LoRA file in diffusers' format: `pytorch_lora_weights.safetensors`.

Keys are `unet.<module>.lora_A.weight` and `text_encoder[_2].text_model.encoder.layers.<n>...lora_B.weight`:
peft's own names, which `load_lora_weights` reads as they are. diffusers' `.lora.down` spelling exists for
attention only; a file that mixes both loses layers on loading. Alpha is not a tensor in this format: it is in
the metadata, without which every reader takes alpha = rank.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from bilora_diffusion.adapters import AUXILIARY, PRIMARY, START, adapted_layers, parameters_of
from bilora_diffusion.atomic import write_bytes_atomically
from bilora_diffusion.lora_files.difference import file_factors

__all__ = ["DIFFUSERS_FILE", "adapter_metadata", "portable_name", "primary_layers", "save_diffusers"]

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
ADAPTER_METADATA = "lora_adapter_metadata"  # the entry diffusers reads (loaders/lora_base.py)

# What a reader needs to build the same layers. The whole configuration would not do: a peft that lacks one of
# its fields refuses the file. The last five are written only when they differ from peft's defaults.
ALWAYS = ("r", "lora_alpha", "target_modules")
WHEN_SET = ("rank_pattern", "alpha_pattern", "use_dora", "use_rslora", "lora_bias")


def portable_name(part: str, module: str) -> str:
    """A module's path in its part as LoRA files spell it, whatever the version of transformers.

    transformers 5 dropped the level `text_model` from CLIPTextModel (text encoder 1) and kept it in
    CLIPTextModelWithProjection (2); every reader of LoRA files expects it in both.
    """
    if part == "unet" or module.startswith("text_model."):
        return module
    return f"text_model.{module}"


def primary_layers(part: str, model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the primary adapter under portable peft names, copied to the CPU in their own dtype.

    Those of its change where it did not begin with zero: see `difference`.

    Arguments:
        part: `unet`, `text_encoder` or `text_encoder_2`.
        model: the part itself, out of any wrapper (DDP, torch.compile).

    Raises:
        ValueError: the model has no primary adapter, or the tensors are not exactly the primary's.
    """
    if PRIMARY not in getattr(model, "peft_config", {}):
        raise ValueError(f"the {part} has no adapter named '{PRIMARY}'")
    state = get_peft_model_state_dict(
        model,
        adapter_name=PRIMARY,
        save_embedding_layers=False,  # "auto" asks the hub for the base's vocabulary
    )
    # peft drops the ".weight" of a DoRA magnitude. diffusers then loses it for text encoders (transformers 5
    # warns, and the magnitude starts anew); with the ending it is read everywhere.
    state = {
        f"{name}.weight" if name.endswith(".lora_magnitude_vector") else name: tensor for name, tensor in state.items()
    }
    expected = set(parameters_of(model, PRIMARY))
    if set(state) != expected or any(AUXILIARY in name for name in state):
        raise ValueError(f"unexpected or lost tensors in the {part}: {sorted(set(state) ^ expected)[:5]}")
    for name, layer in adapted_layers(model):
        if START in layer.lora_A:
            state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = file_factors(layer)
    return {
        portable_name(part, name): tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()
    }


def adapter_metadata(model: nn.Module) -> dict[str, Any]:
    """What a reader needs of the primary's `LoraConfig`: rank, alpha, targets, and what a variant adds."""
    config: LoraConfig = model.peft_config[PRIMARY]
    defaults = LoraConfig()
    fields = {name: getattr(config, name) for name in ALWAYS}
    if START in model.peft_config:
        fields |= {"r": 2 * config.r, "lora_alpha": 2 * config.lora_alpha}
    for name in WHEN_SET:
        value = getattr(config, name, None)
        if value and value != getattr(defaults, name, None):
            fields[name] = value
    if not isinstance(fields["target_modules"], str):  # a set, whose order differs from run to run
        fields["target_modules"] = sorted(fields["target_modules"])
    return fields


def save_diffusers(
    path: str | os.PathLike[str],
    parts: Mapping[str, nn.Module],
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes the primary adapters of all parts to one file, atomically.

    Arguments:
        path: the file, by convention `DIFFUSERS_FILE` in the output folder.
        parts: part -> model, only parts that have a primary adapter.
        dtype: of the tensors in the file, None = as trained.
        metadata: more entries for the header, see `facts.bilora_metadata`.

    Raises:
        UserError: the file cannot be written; an older one is untouched.
        ValueError: see `primary_layers`.
    """
    tensors: dict[str, Tensor] = {}
    adapters: dict[str, Any] = {}
    for part, model in parts.items():
        layers = primary_layers(part, model)
        tensors |= {f"{part}.{name}": tensor.to(dtype) for name, tensor in layers.items()}
        adapters |= {f"{part}.{name}": value for name, value in adapter_metadata(model).items()}
    header = {
        **(metadata or {}),
        "format": "pt",
        ADAPTER_METADATA: json.dumps(adapters, indent=2, sort_keys=True),
    }
    write_bytes_atomically(path, safetensors.torch.save(tensors, header))
