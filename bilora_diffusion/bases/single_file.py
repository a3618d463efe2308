"""SDXL checkpoints in one `.safetensors` file, in the layout of the original code ("sgm"), as often shared.

    model.diffusion_model.*          the UNet
    first_stage_model.*              the VAE (some files leave it out)
    conditioner.embedders.0.*        text encoder 1, CLIP ViT-L, under transformers' own names
    conditioner.embedders.1.model.*  text encoder 2, OpenCLIP bigG, under OpenCLIP's names

Such a file does not say how its models are built; SDXL's configuration is shipped in `sdxl_config/`, so
that a file loads without a network. diffusers converts UNet and VAE. The text encoders are converted here:
diffusers tells the two apart by their width alone, and what it misses stays without weights.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from bilora_diffusion.bases.clip_tokenizer import clip_tokenizer, sdxl_merges
from bilora_diffusion.bases.folder import BaseFolder
from bilora_diffusion.bases.weights import check_complete, open_safetensors
from bilora_diffusion.errors import UserError

__all__ = ["SDXL_CONFIG", "SingleFile", "vae_from_file"]

SDXL_CONFIG = Path(__file__).parent / "sdxl_config"
"""The configuration of stabilityai/stable-diffusion-xl-base-1.0, in the folders of the diffusers layout."""

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
}
FIRST_LAYER = PREFIXES["unet"] + "input_blocks.0.0.weight"

# What else is taken for a base: a pattern that gives its keys away -> what it is and what to do.
OTHER_MODELS = {
    r"lora_(up|down|[ABab])\b|\.lora\.|hada_w|lokr_w": (
        "is a LoRA, not a base; continue from it with --init_lora_from"
    ),
    r"^control_model\.|input_hint_block": "is a ControlNet, not a base",
    r"^cond_stage_model\.": "is a Stable Diffusion 1 or 2 checkpoint, not SDXL",
    r"double_blocks\.\d": "is a Flux checkpoint, not SDXL",
    r"joint_blocks\.\d": "is a Stable Diffusion 3 checkpoint, not SDXL",
    r"^edm_(mean$|vpred\.)": "was trained in the EDM formulation; use its diffusers folder",
    r"^down_blocks\.\d": "is a UNet alone, in the diffusers layout; name the folder of the whole model",
}


class SingleFile:
    """One checkpoint file, checked to be an SDXL base; each part is read only when it is asked for.

    Arguments:
        where: the flag and the model, for messages.
        config: the folder of the model's configuration, in the diffusers layout. If it holds tokenizers they
            are used, else SDXL's.

    Raises:
        UserError: the file is damaged, or it is another model (the message says which).
    """

    def __init__(self, path: Path, where: str, config: Path = SDXL_CONFIG) -> None:
        if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
            raise UserError(f"{where} is a pickle, which can run any code when opened; use the model's .safetensors.")
        if path.suffix != ".safetensors":
            raise UserError(f"{where} is not a .safetensors file.")
        self.path = path
        self.where = where
        self.config = BaseFolder(config, where)
        self.index = self.config.index
        with open_safetensors(path, where) as file:
            self.keys = frozenset(file.keys())
            complaint = self._what_else(file)
        if complaint:
            raise UserError(f"{where} {complaint}.")

    def part(self, name: str, dtype: torch.dtype) -> nn.Module:
        """unet, vae, text_encoder or text_encoder_2; `UserError` if it is not there whole, or not SDXL's."""
        weights = self._read(PREFIXES[name])
        if name == "vae" and not weights:
            raise UserError(f"{self.where} holds no VAE; name one with --pretrained_vae_model_name_or_path.")
        with _telling_misfits(
            f"{self.where}: its {name} is incomplete or not built as SDXL's; a model of another size needs "
            "its diffusers folder, which holds its configuration."
        ):
            if name == "text_encoder":
                return self._clip(CLIPTextModel, name, weights, dtype)
            if name == "text_encoder_2":
                return self._clip(CLIPTextModelWithProjection, name, _from_open_clip(weights), dtype)
            cls = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[name]
            return _from_original(cls, weights, self.config.path, name, dtype, self.where)

    def tokenizers(self) -> tuple[CLIPTokenizer, CLIPTokenizer]:
        """The tokenizers of the two text encoders."""
        if (self.config.path / "tokenizer").is_dir():
            return self.config.tokenizers()
        merges = sdxl_merges()
        return clip_tokenizer(merges), clip_tokenizer(merges, pad_token="!")

    def scheduler_config(self) -> dict[str, Any]:
        """The configuration's noise schedule, with what the file says of its own.

        By a convention that ComfyUI reads (comfy/supported_models.py, SDXL.model_type), a tensor named
        `v_pred` says that the UNet predicts v, and one named `ztsnr` beside it that it was trained down to
        zero signal; without them it predicts the noise.
        """
        config = self.read_json("scheduler/scheduler_config.json")
        if "v_pred" in self.keys:
            config["prediction_type"] = "v_prediction"
            if "ztsnr" in self.keys:
                # "trailing": sampling must then begin at the very last timestep, which is pure noise.
                config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return config

    def read_json(self, name: str) -> dict[str, Any]:
        """A file of the model's configuration, by its name relative to that folder."""
        return self.config.read_json(name)

    def _what_else(self, file: Any) -> str | None:
        """What this is instead of an SDXL base; None if it is one."""
        for pattern, complaint in OTHER_MODELS.items():
            if any(re.search(pattern, key) for key in self.keys):
                return complaint
        if FIRST_LAYER not in self.keys:
            if any(key.endswith("decoder.conv_in.weight") for key in self.keys):
                return "is a VAE, not a base; name it with --pretrained_vae_model_name_or_path"
            return "is not an SDXL checkpoint: it holds no UNet under the names of the original layout"
        if not self._has(PREFIXES["text_encoder_2"]) and self._has("conditioner.embedders.0.model."):
            return "is the SDXL refiner, which has one text encoder; train on the SDXL base"
        if not (self._has(PREFIXES["text_encoder"]) and self._has(PREFIXES["text_encoder_2"])):
            return "holds a UNet without SDXL's two text encoders; a whole checkpoint is needed"
        channels = file.get_slice(FIRST_LAYER).get_shape()[1]
        if channels != 4:
            return (
                f"has a UNet that reads {channels} channels (inpainting or editing), SDXL's reads 4; "
                "train on the plain base"
            )
        return None

    def _has(self, prefix: str) -> bool:
        return any(key.startswith(prefix) for key in self.keys)

    def _read(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under `prefix`, which is cut off."""
        with open_safetensors(self.path, self.where) as file:
            wanted = sorted(key for key in self.keys if key.startswith(prefix))
            return {key.removeprefix(prefix): file.get_tensor(key) for key in wanted}

    def _clip(self, cls: type[nn.Module], name: str, weights: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
        config = CLIPTextConfig.from_pretrained(self.config.path / name)
        with init_empty_weights():
            model = cls(config)
        if not hasattr(model, "text_model"):  # transformers 5 took this level out of CLIPTextModel alone
            weights = {key.removeprefix("text_model."): weight for key, weight in weights.items()}
        weights = {key: weight.to(dtype) for key, weight in weights.items()}
        misfits = model.load_state_dict(weights, strict=False, assign=True)
        check_complete(model, misfits.missing_keys, self.where, name)
        return model.eval()


def vae_from_file(path: Path, where: str, dtype: torch.dtype) -> AutoencoderKL:
    """A VAE of SDXL's shape from a file of its own, in the original or the diffusers layout.

    Raises:
        UserError: it is damaged or something else.
    """
    if path.suffix != ".safetensors":
        raise UserError(f"{where} is not a .safetensors file.")
    with open_safetensors(path, where) as file:
        weights = {key.removeprefix(PREFIXES["vae"]): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    misfit = f"{where} is not a VAE of SDXL's shape."
    if "decoder.conv_in.weight" not in weights:  # so named in both layouts
        raise UserError(misfit)
    with _telling_misfits(misfit):
        return _from_original(AutoencoderKL, weights, SDXL_CONFIG, "vae", dtype, where)


def _from_original(
    cls: type, weights: dict[str, Tensor], config: Path, name: str, dtype: torch.dtype, where: str
) -> nn.Module:
    """UNet or VAE by diffusers' own conversion, which looks for the UNet's prefix and not for the VAE's."""
    if name == "unet":
        weights = {PREFIXES[name] + key: weight for key, weight in weights.items()}
    model = cls.from_single_file(weights, config=str(config), subfolder=name, dtype=dtype, local_files_only=True)
    check_complete(model, (), where, name)
    return model


@contextmanager
def _telling_misfits(message: str) -> Iterator[None]:
    """What the loaders raise on a missing or misshapen weight, as one line."""
    try:
        yield
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(message) from error


# OpenCLIP's name of a part of a layer -> transformers'.
OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
OPEN_CLIP_REST = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection.weight": "text_projection.weight",  # as some tools that merge checkpoints write it
}


def _from_open_clip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's text tower under transformers' names: q, k and v unstacked, the projection transposed.

    What transformers has no use for (the logit scale, the causal mask) is left out.
    """
    converted = {}
    for name, tensor in weights.items():
        layer = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)", name)
        if name == "text_projection":
            converted["text_projection.weight"] = tensor.T.contiguous()
        elif name in OPEN_CLIP_REST:
            converted[OPEN_CLIP_REST[name]] = tensor
        elif layer:
            number, part, kind = layer.groups()
            target = f"text_model.encoder.layers.{number}"
            if part == "attn.in_proj":
                for letter, piece in zip("qkv", tensor.chunk(3), strict=True):
                    converted[f"{target}.self_attn.{letter}_proj.{kind}"] = piece.clone()
            elif part in OPEN_CLIP_LAYER:
                converted[f"{target}.{OPEN_CLIP_LAYER[part]}.{kind}"] = tensor
    return converted
