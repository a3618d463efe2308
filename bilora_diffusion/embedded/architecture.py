"""The embedded base's models: SDXL's blocks, conditioning and text path at small widths, random until trained."""

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from bilora_diffusion.bases.text_config import small_text_config
from bilora_diffusion.embedded.icons import SIZE_PX
from bilora_diffusion.embedded.words import MAX_TOKENS

__all__ = ["LATENT_CHANNELS", "SCHEDULE", "VAE_FACTOR", "build_denoiser", "build_vae"]

LATENT_CHANNELS = 10
"""Of 4 x 4 patches: three colours, their slopes both ways, the brightness' curvature. Four channels, as SDXL has,
lose too much of 64 px."""
VAE_FACTOR = 4
TEXT_WIDTHS = (64, 96)
TIME_WIDTH = 8

SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}
"""SDXL's noise schedule (scheduler/scheduler_config.json of stable-diffusion-xl-base-1.0)."""


def build_denoiser(tokens: int, seed: int) -> dict[str, nn.Module]:
    """`unet`, `text_encoder` and `text_encoder_2`, which are trained together; random weights by `seed`.

    Arguments:
        tokens: size of the vocabulary.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        models = {
            "unet": _unet(),
            "text_encoder": CLIPTextModel(small_text_config(tokens, TEXT_WIDTHS[0], "quick_gelu", MAX_TOKENS)),
            "text_encoder_2": CLIPTextModelWithProjection(
                small_text_config(tokens, TEXT_WIDTHS[1], "gelu", MAX_TOKENS)
            ),
        }
        for name in ("text_encoder", "text_encoder_2"):
            model = getattr(models[name], "text_model", models[name])
            # CLIP's 0.02 leaves all captions alike for a long while.
            nn.init.normal_(model.embeddings.token_embedding.weight, std=0.5)
    return models


def build_vae(seed: int) -> AutoencoderKL:
    """Random weights by `seed`; `scaling_factor` is 1: the latents have the size the UNet wants."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(
            sample_size=SIZE_PX,
            in_channels=3,
            out_channels=3,
            latent_channels=LATENT_CHANNELS,
            down_block_types=("DownEncoderBlock2D",) * 3,  # 3 blocks: 2 halvings, factor 4
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(24, 48, 64),
            layers_per_block=1,
            norm_num_groups=8,
            mid_block_add_attention=False,
            scaling_factor=1.0,
            force_upcast=False,
        )


def _unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE_PX // VAE_FACTOR,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 96, 160),
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=(2, 4, 5),  # the number of heads, in spite of the name
        cross_attention_dim=sum(TEXT_WIDTHS),
        use_linear_projection=True,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=TEXT_WIDTHS[1] + 6 * TIME_WIDTH,
    )
