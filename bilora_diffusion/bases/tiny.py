"""`tiny-random`: a whole SDXL of three million parameters with random weights, built in about a second.

It has SDXL's blocks, its two text encoders, its conditioning on sizes and its scheduler, so every line of
the trainer that runs on SDXL runs on it; only the widths are small. Its native picture is 64 px (8 x 8
latents). It knows nothing: its pictures are coloured noise. Tests and the demonstration use it because it
needs no download.

The weights are the same on every call and are scaled so that each part does something: a random transformer
of the usual initialisation sends every prompt to nearly the same vector, and no gradient would reach its
adapters.
"""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from bilora_diffusion.bases.clip_tokenizer import clip_tokenizer, clip_vocabulary
from bilora_diffusion.bases.quiet import quiet_libraries
from bilora_diffusion.bases.text_config import small_text_config

__all__ = ["TINY_RANDOM", "build_tiny_random", "tiny_random_configurations", "tiny_random_folder"]

TINY_RANDOM = "tiny-random"
"""The name under which this base is asked for, wherever a base can be named."""

WEIGHT_SEED = 20_240_607  # any constant: changing it changes every golden number of the tests
TEXT_WIDTH = 32
TIME_WIDTH = 8


def build_tiny_random() -> StableDiffusionXLPipeline:
    """A tiny SDXL pipeline on the CPU, in float32 and evaluation mode, with the same weights on every call.

    The global random state is left as it was found.
    """
    tokens = len(clip_vocabulary())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(WEIGHT_SEED)
        text_encoder = CLIPTextModel(small_text_config(tokens, TEXT_WIDTH, "quick_gelu"))
        text_encoder_2 = CLIPTextModelWithProjection(small_text_config(tokens, TEXT_WIDTH, "gelu"))
        unet = _unet()
        vae = _vae()
        for encoder in (text_encoder, text_encoder_2):
            _enliven_text_encoder(encoder)
        _enliven_unet(unet)
        _enliven_vae(vae)
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=clip_tokenizer(),  # one token a byte: any prompt can be tokenised
        tokenizer_2=clip_tokenizer(pad_token="!"),
        unet=unet,
        # SDXL's own noise schedule (scheduler/scheduler_config.json of stable-diffusion-xl-base-1.0).
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            num_train_timesteps=1000,
            prediction_type="epsilon",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        add_watermarker=False,
    )
    for part in (vae, text_encoder, text_encoder_2, unet):
        part.eval()
    return pipeline


@functools.cache
def tiny_random_folder() -> Path:
    """The same base as a folder in the diffusers layout, for code that wants a path.

    One folder a process, under the system's temporary folder, removed when the process ends.
    """
    folder = Path(tempfile.mkdtemp(prefix="tiny-random-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with quiet_libraries():
        build_tiny_random().save_pretrained(folder)
    return folder


@functools.cache
def tiny_random_configurations() -> dict[str, dict[str, Any]]:
    """What the config.json of each part would hold."""
    pipeline = build_tiny_random()
    return {
        "unet": dict(pipeline.unet.config),
        "vae": dict(pipeline.vae.config),
        "text_encoder": pipeline.text_encoder.config.to_dict(),
        "text_encoder_2": pipeline.text_encoder_2.config.to_dict(),
    }


def _unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 64),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 4, 4),  # the number of heads, in spite of the name
        cross_attention_dim=2 * TEXT_WIDTH,
        use_linear_projection=True,
        upcast_attention=None,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * TIME_WIDTH,
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=64,
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,  # 4 blocks: 3 halvings, factor 8
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.13025,
        force_upcast=True,
    )


def _enliven_text_encoder(encoder: nn.Module) -> None:
    """Token vectors of size 1, as CLIP's hidden states are; the usual 0.02 leaves all prompts alike."""
    text_model = getattr(encoder, "text_model", encoder)  # transformers 5 flattened CLIPTextModel only
    nn.init.normal_(text_model.embeddings.token_embedding.weight, std=1.0)
    nn.init.normal_(text_model.embeddings.position_embedding.weight, std=0.3)
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)


def _enliven_unet(unet: nn.Module) -> None:
    """Attention that weighs (logits of size 1) and adds to the stream, and an output nearly the noise's size.

    A larger gain makes a chaotic model: bfloat16 rounding alone changes it by a fifth; this one, by 1 %.
    """
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear) and ".transformer_blocks." in name:
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    with torch.no_grad():
        unet.conv_out.weight.mul_(2.0)


def _enliven_vae(vae: nn.Module) -> None:
    """Latents of about the size 1 / scaling_factor and little variance, a decoder that answers to them."""
    with torch.no_grad():
        mean, log_variance = vae.quant_conv.weight.chunk(2)
        mean.mul_(45.0)
        log_variance.mul_(0.1)
        vae.quant_conv.bias[4:] = -6.0
        vae.decoder.conv_out.weight.mul_(2.0)
