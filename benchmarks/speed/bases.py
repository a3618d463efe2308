"""Bases of three sizes with random weights: what a step costs does not depend on what the model knows.

The copies that several trainers adapt share one set of frozen weights, so that all methods fit in memory at once.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from bilora_diffusion.bases import PARTS, Base
from bilora_diffusion.bases.clip_tokenizer import clip_tokenizer, clip_vocabulary
from bilora_diffusion.bases.single_file import SDXL_CONFIG
from bilora_diffusion.bases.text_config import small_text_config
from bilora_diffusion.bases.tiny import build_tiny_random

__all__ = ["RESOLUTIONS", "SharedBase", "sharing_copy"]

RESOLUTIONS = {"tiny": 64, "medium": 256, "sdxl": 1024}
"""Side in pixels of the pictures that each size is measured at."""


@dataclass(frozen=True)
class SharedBase:
    """One set of weights, from which `assemble` gets modules of its own.

    Arguments:
        pipeline: a whole SDXL, frozen, on the device; the VAE in float32.
    """

    pipeline: StableDiffusionXLPipeline

    @classmethod
    def build(cls, size: str, device: torch.device, dtype: torch.dtype) -> "SharedBase":
        """Arguments: size: a key of `RESOLUTIONS`; dtype: of the UNet and the text encoders."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            pipeline = build_tiny_random() if size == "tiny" else _pipeline(size, device, dtype)
        for part in PARTS:
            module = getattr(pipeline, part).requires_grad_(False)
            for tensor in (*module.parameters(), *module.buffers()):
                wanted = dtype if tensor.is_floating_point() and part != "vae" else tensor.dtype
                tensor.data = tensor.data.to(device, wanted)
        return cls(pipeline)

    def tensors(self) -> Iterator[Tensor]:
        """All of its weights and buffers, which the contenders share."""
        for part in PARTS:
            module = getattr(self.pipeline, part)
            yield from (*module.parameters(), *module.buffers())

    @contextmanager
    def in_place_of_files(self) -> Iterator[None]:
        """Inside, whatever base is asked for is this one."""
        with mock.patch.object(Base, "load", lambda _, *parts, dtype=None: self._load(parts)):
            yield

    def _load(self, parts: tuple[str, ...]) -> StableDiffusionXLPipeline:
        pipeline = copy.copy(self.pipeline)
        pipeline.register_modules(
            **{part: sharing_copy(getattr(self.pipeline, part)) if part in parts else None for part in PARTS}
        )
        return pipeline


def sharing_copy(module: nn.Module) -> nn.Module:
    """New modules around the very same parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo=shared)


def _pipeline(size: str, device: torch.device, dtype: torch.dtype) -> StableDiffusionXLPipeline:
    # The text encoders run once, before the first step: small ones of the right widths do.
    tokens = len(clip_vocabulary())
    widths = {"medium": (128, 128), "sdxl": (768, 1280)}[size]
    return StableDiffusionXLPipeline(
        unet=_medium_unet(sum(widths), widths[1]) if size == "medium" else _sdxl_unet(device, dtype),
        vae=_medium_vae() if size == "medium" else AutoencoderKL.from_config(_config("vae", AutoencoderKL)),
        text_encoder=CLIPTextModel(small_text_config(tokens, widths[0], "quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(small_text_config(tokens, widths[1], "gelu")),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(pad_token="!"),
        scheduler=EulerDiscreteScheduler.from_pretrained(SDXL_CONFIG / "scheduler"),
        add_watermarker=False,
    )


def _config(part: str, kind: type) -> dict:
    return kind.load_config(SDXL_CONFIG / part)


def _medium_unet(text_width: int, pooled_width: int) -> UNet2DConditionModel:
    """SDXL's blocks at 59 million parameters, with 64 entries a head as there."""
    return UNet2DConditionModel(
        sample_size=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 192, 384),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1, 3),
        attention_head_dim=(1, 3, 6),  # the number of heads, in spite of the name
        cross_attention_dim=text_width,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=pooled_width + 6 * 32,
    )


def _medium_vae() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=256,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        norm_num_groups=16,
        scaling_factor=0.13025,
    )


def _sdxl_unet(device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
    """At full size, drawn on the device and in its precision: on the host it would take minutes."""
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(_config("unet", UNet2DConditionModel))
    unet = unet.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(float(name.endswith("weight")))
            else:
                parameter.normal_(std=parameter[0].numel() ** -0.5)  # activations stay of size 1
    return unet
