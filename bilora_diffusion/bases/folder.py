"""SDXL as a folder in the diffusers layout: model_index.json, and a folder for each part."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from bilora_diffusion.bases.clip_tokenizer import read_tokenizer
from bilora_diffusion.bases.weights import check_complete, open_safetensors
from bilora_diffusion.errors import UserError

__all__ = ["CONFIG_FILES", "PARTS", "BaseFolder", "read_part", "weight_patterns"]

PARTS = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
"""The parts that have weights, and their classes."""

CONFIG_FILES = [
    "model_index.json",
    "*/config.json",
    "scheduler/*.json",
    "tokenizer*/*.json",
    "tokenizer*/*.txt",
]
"""Everything of a base but the weights, as patterns of file names."""


class BaseFolder:
    """A folder, checked to be an SDXL base; each part is read only when it is asked for.

    Arguments:
        where: the flag and the model, for messages.
        variant: the weights' variant, such as "fp16".

    Raises:
        UserError: it is another model, or its configuration is damaged.
    """

    def __init__(self, path: Path, where: str, variant: str | None = None) -> None:
        self.path = path
        self.where = where
        self.variant = variant
        if not (path / "model_index.json").is_file():
            raise UserError(f"{where} {_what_else(path)}.")
        self.index = self.read_json("model_index.json")
        self._refuse_other_models()

    def part(self, name: str, dtype: torch.dtype) -> nn.Module:
        """One of `PARTS`; `UserError` if its weights are missing, damaged or of another shape."""
        return read_part(self.path, name, dtype, self.where, variant=self.variant)

    def tokenizers(self) -> tuple[CLIPTokenizer, CLIPTokenizer]:
        """The tokenizers of the two text encoders."""
        first, second = (read_tokenizer(self.path, name, self.where) for name in ("tokenizer", "tokenizer_2"))
        return first, second

    def scheduler_config(self) -> dict[str, Any]:
        """The noise schedule."""
        return self.read_json("scheduler/scheduler_config.json")

    def read_json(self, name: str) -> dict[str, Any]:
        """A file of the folder, by its name relative to it; `UserError` if it is missing or damaged."""
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.where}: its {name} is missing or damaged; copy or download it again.") from error

    def _refuse_other_models(self) -> None:
        if "unet" not in self.index or "text_encoder_2" not in self.index:
            kind = self.index.get("_class_name") or "model of an unknown kind"
            raise UserError(f"{self.where} is a {kind}, not an SDXL base.")
        if not (self.index.get("text_encoder") or [None])[0]:
            raise UserError(f"{self.where} is the SDXL refiner, which has one text encoder; train on the SDXL base.")
        unet = self.read_json("unet/config.json")
        if unet.get("addition_embed_type") != "text_time":
            raise UserError(f"{self.where} has a UNet without SDXL's size conditioning; it is not an SDXL base.")
        read, drawn = unet.get("in_channels", 4), unet.get("out_channels", 4)
        if read != drawn:
            raise UserError(
                f"{self.where} has a UNet that reads {read} channels and draws {drawn} (inpainting or editing); "
                "train on the plain base."
            )


def read_part(
    folder: Path,
    part: str,
    dtype: torch.dtype,
    where: str,
    variant: str | None = None,
    subfolder: str | None = None,
) -> nn.Module:
    """One part of a model from `folder`/`subfolder` (unset: named as the part).

    Raises:
        UserError: its weights are missing, damaged or of another shape.
    """
    subfolder = part if subfolder is None else subfolder
    _check_weights(folder / subfolder, part, variant, where)
    try:
        model, info = PARTS[part].from_pretrained(
            folder,
            subfolder=subfolder,
            variant=variant,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{where}: its {part} could not be loaded: {reason}") from error
    check_complete(model, info["missing_keys"], where, part)
    return model


def weight_patterns(part: str, variant: str | None) -> list[str]:
    """How the files of a part's weights may be named, whole or in shards."""
    stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
    shard = "[0-9]*-of-[0-9]*"
    if variant is None:
        return [f"{stem}.safetensors", f"{stem}-{shard}.safetensors", f"{stem}.safetensors.index.json"]
    return [
        f"{stem}.{variant}.safetensors",
        f"{stem}.{variant}-{shard}.safetensors",
        f"{stem}-{shard}.{variant}.safetensors",
        f"{stem}.safetensors.index.{variant}.json",
    ]


def _check_weights(folder: Path, part: str, variant: str | None, where: str) -> None:
    """Finds a part's weights and reads their headers: a cut file is told before minutes of loading."""
    # A shard of a variant may end in ".fp16.safetensors", which the plain pattern of shards matches as well.
    found = {
        file
        for pattern in weight_patterns(part, variant)
        for file in folder.glob(pattern)
        if file.suffix == ".safetensors" and (variant or len(file.suffixes) == 1)
    }
    if not found:
        others = sorted(file.name for file in folder.glob("*.safetensors"))
        if variant and others:
            raise UserError(f"--variant: {where} has no {variant} weights of its {part}, only {others[0]}.")
        if others:
            raise UserError(f"{where} has its {part} as {others[0]} only; name that --variant.")
        raise UserError(f"{where} has no weights of its {part} (.safetensors).")
    for file in sorted(found):
        with open_safetensors(file, where):
            pass


def _what_else(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file() or (folder / "pytorch_lora_weights.safetensors").is_file():
        return "is a LoRA, not a base; continue from it with --init_lora_from"
    if (folder / "config.json").is_file():
        return "is a single part of a model; name the whole model's folder"
    if checkpoints := sorted(file.name for file in folder.glob("*.safetensors")):
        return f"is not in the diffusers layout; to use the checkpoint in it, name the file ({checkpoints[0]})"
    return "is not a base: it has no model_index.json"
