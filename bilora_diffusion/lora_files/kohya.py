"""The primary adapter as a LoRA file in Kohya's format, which ComfyUI, A1111, Forge and the model sites read.

Every layer has three tensors: `<base>.lora_down.weight` (A), `<base>.lora_up.weight` (B) and `<base>.alpha`,
where `<base>` is `lora_unet_`, `lora_te1_` or `lora_te2_` and the module's path with underscores.

The UNet's modules have two spellings: Stability's own ("sgm": `lora_unet_input_blocks_4_1_...`), which
sd-scripts writes, and diffusers' (`lora_unet_down_blocks_1_attentions_0_...`). This file uses sgm names. Both
are read by all for the attention layers, but A1111 loses an adapter on SDXL's first upsampler and on
`add_embedding` in diffusers' spelling, as its converter was written for SD 1.

The rules were read in sd-scripts 48d368fa, ComfyUI a125cd84, A1111 82a973c0 and diffusers 0.42.1;
tests/test_kohya_keys.py states them as code.
"""

import os
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from bilora_diffusion.adapters import PRIMARY, adapted_layers
from bilora_diffusion.atomic import write_bytes_atomically
from bilora_diffusion.lora_files.difference import file_rank
from bilora_diffusion.lora_files.diffusers_format import portable_name, primary_layers
from bilora_diffusion.lora_files.facts import LoraFacts
from bilora_diffusion.lora_files.kohya_metadata import kohya_file_bytes

__all__ = ["KOHYA_FILE", "has_kohya_keys", "kohya_name", "kohya_tensors", "save_kohya", "why_not_kohya"]

KOHYA_FILE = "pytorch_lora_weights_kohya.safetensors"
PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}

RESNET_MODULES = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
OUTER_MODULES = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def why_not_kohya(parts: Mapping[str, nn.Module]) -> str | None:
    """Why the adapters cannot be told in Kohya's format, None if they can."""
    for part, model in parts.items():
        if model.peft_config[PRIMARY].use_dora:
            return (
                "DoRA has no common Kohya form: ComfyUI normalises the weight by row, A1111 by column, and "
                "diffusers drops the magnitudes"
            )
        scales = {(layer.r[PRIMARY], layer.scaling[PRIMARY]) for _, layer in adapted_layers(model)}
        if len(scales) > 1:
            return f"layers of the {part} differ in rank or alpha, which diffusers misreads in Kohya's format"
    return None


def save_kohya(
    path: str | os.PathLike[str],
    parts: Mapping[str, nn.Module],
    *,
    facts: LoraFacts,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes the primary adapters of all parts to one file, atomically.

    Arguments:
        path: the file, by convention `KOHYA_FILE` in the output folder.
        parts: part -> model, only parts that have a primary adapter.
        facts: what the metadata say.
        dtype: of the weights in the file, None = as trained. Alpha is float32 always.

    Raises:
        UserError: the file cannot be written; an older one is untouched.
        ValueError: see `why_not_kohya`, which the caller asks first.
    """
    reason = why_not_kohya(parts)
    if reason:
        raise ValueError(reason)
    tensors: dict[str, Tensor] = {}
    for part, model in parts.items():
        # From the layers, never the rank: alpha is the strength of the file in every reader.
        alphas = {
            portable_name(part, name): layer.scaling[PRIMARY] * file_rank(layer)
            for name, layer in adapted_layers(model)
        }
        layers = primary_layers(part, model)
        tensors |= kohya_tensors(part, layers, alphas, dtype, getattr(model, "config", None))
    write_bytes_atomically(path, kohya_file_bytes(tensors, facts))


def kohya_tensors(
    part: str,
    layers: Mapping[str, Tensor],
    alphas: Mapping[str, float],
    dtype: torch.dtype | None = None,
    config: Mapping | None = None,
) -> dict[str, Tensor]:
    """One part's tensors under Kohya's names.

    Arguments:
        part: `unet`, `text_encoder` or `text_encoder_2`.
        layers: as `primary_layers` gives them: `<module>.lora_A.weight` of shape (r, in) or (r, in, k, k),
            `<module>.lora_B.weight` of shape (out, r) or (out, r, 1, 1).
        alphas: module -> the number that the reader divides by the rank.
        dtype: of the weights, None = unchanged.
        config: the UNet's configuration, for its block layout; None = SDXL's.
    """
    kinds = {"lora_A": "lora_down", "lora_B": "lora_up"}
    tensors: dict[str, Tensor] = {}
    for name, tensor in layers.items():
        module, kind, _ = name.rsplit(".", 2)
        tensors[f"{kohya_name(part, module, config)}.{kinds[kind]}.weight"] = tensor.to(dtype)
    for module, alpha in alphas.items():
        # No dimension: readers take its one value. float32: a large alpha would be rounded in half precision.
        tensors[f"{kohya_name(part, module, config)}.alpha"] = torch.tensor(float(alpha), dtype=torch.float32)
    return dict(sorted(tensors.items()))


def kohya_name(part: str, module: str, config: Mapping | None = None) -> str:
    """The base name of a module, for example `lora_te1_text_model_encoder_layers_0_self_attn_q_proj`.

    Arguments:
        part: `unet`, `text_encoder` or `text_encoder_2`.
        module: the module's path in the diffusers or transformers model.
        config: the UNet's configuration, for its block layout; None = SDXL's.

    Raises:
        ValueError: a module that the format has no name for.
    """
    path = sgm_path(module, config) if part == "unet" else portable_name(part, module)
    return PREFIXES[part] + path.replace(".", "_")


def sgm_path(module: str, config: Mapping | None = None) -> str:
    """A diffusers UNet's module path in Stability's naming.

    Blocks are counted through all resolutions, 3 to each in SDXL. Input block 0 is `conv_in`. A block holds a
    resnet (0) and, where the resolution has attention, a transformer (1); a resolution's last input block is
    its downsampler, and the last member of its last output block the upsampler.
    """
    if module in OUTER_MODULES:
        return OUTER_MODULES[module]
    blocks = (config["layers_per_block"] if config else 2) + 1
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.([a-z]+)\.(\d+)\.(.+)", module)
    if match:
        side, level, kind, index, tail = match[1], int(match[2]), match[3], int(match[4]), match[5]
        if kind == "downsamplers":
            return f"input_blocks.{blocks * (level + 1)}.0.op"
        if kind == "upsamplers":
            member = 2 if _has_attention(config, level) else 1
            return f"output_blocks.{blocks * (level + 1) - 1}.{member}.conv"
        number = blocks * level + index + (1 if side == "down" else 0)
        stem = "input_blocks" if side == "down" else "output_blocks"
        member, path = _member_path(kind, tail)
        return f"{stem}.{number}.{member}.{path}"
    match = re.fullmatch(r"mid_block\.([a-z]+)\.(\d+)\.(.+)", module)
    if match:
        kind, index, tail = match[1], int(match[2]), match[3]
        member, path = _member_path(kind, tail)
        return f"middle_block.{2 * index + member}.{path}"  # resnet, transformer, resnet
    raise ValueError(f"the Kohya format has no name for the UNet's module '{module}'")


def _member_path(kind: str, tail: str) -> tuple[int, str]:
    """Which member of its block a resnet or transformer is, and the path inside it."""
    if kind == "attentions":
        return 1, tail
    if kind != "resnets" or tail not in RESNET_MODULES:
        raise ValueError(f"the Kohya format has no name for '{tail}' in the UNet's {kind}")
    return 0, RESNET_MODULES[tail]


def _has_attention(config: Mapping | None, level: int) -> bool:
    kinds: Sequence[str] = config["up_block_types"] if config else ("CrossAttn", "CrossAttn", "")
    return "CrossAttn" in kinds[level]


def has_kohya_keys(names: Sequence[str]) -> bool:
    """Whether these are the tensor names of a Kohya file, as diffusers decides it (all of them)."""
    return bool(names) and all(name.startswith(tuple(PREFIXES.values())) for name in names)
