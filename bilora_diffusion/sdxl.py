"""SDXL's conditioning and latents: prompts to embeddings, pictures to latents, sizes to micro-conditioning.

Reference:
    SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis (Podell et al., 2023),
    arXiv 2307.01952, Section 2.2 (micro-conditioning).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bilora_diffusion.processes import to_device

__all__ = [
    "Conditioning",
    "Moments",
    "denoise",
    "embed_prompts",
    "encode_images",
    "latents_from",
    "time_ids",
    "tokenize",
]


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told about B rows beside the noisy latents.

    Arguments:
        time_ids: (B, 6): original height and width, crop top and left, target height and width, in pixels.
        prompt_embeds: (B, T, D), the penultimate hidden states of both text encoders side by side, T = 77 tokens
            in SDXL; None where the text encoders are trained and run in every step.
        pooled_prompt_embeds: (B, P), the second text encoder's pooled output; None likewise.
        token_ids: (B, 2, T), one row a tokenizer; None where the embeddings are given.
    """

    time_ids: Tensor
    prompt_embeds: Tensor | None = None
    pooled_prompt_embeds: Tensor | None = None
    token_ids: Tensor | None = None

    def __getitem__(self, rows: slice) -> "Conditioning":
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device) -> "Conditioning":
        return self._map(lambda tensor: to_device(tensor, device))

    def _map(self, change) -> "Conditioning":
        return Conditioning(**{name: None if tensor is None else change(tensor) for name, tensor in vars(self).items()})


def tokenize(tokenizers: Sequence, prompts: Sequence[str]) -> Tensor:
    """Token ids of both tokenizers, padded and cut to their length T (SDXL: 77): (B, 2, T), int64."""
    ids = [
        tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        for tokenizer in tokenizers
    ]
    return torch.stack(ids, dim=1)


def embed_prompts(text_encoders: Sequence[nn.Module], token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Both text encoders' penultimate hidden states side by side, and the second one's pooled output.

    Arguments:
        text_encoders: CLIPTextModel and CLIPTextModelWithProjection.
        token_ids: (B, 2, T).

    Returns:
        (B, T, D1 + D2) and (B, P).
    """
    outputs = [
        encoder(ids, output_hidden_states=True) for encoder, ids in zip(text_encoders, token_ids.unbind(1), strict=True)
    ]
    hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return hidden, outputs[1].text_embeds


def time_ids(original_size: tuple[int, int], crop_top_left: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """SDXL's micro-conditioning of one row: (6,), float32, in pixels, each pair as (vertical, horizontal)."""
    return torch.tensor([*original_size, *crop_top_left, *target], dtype=torch.float32)


def denoise(models: Mapping[str, nn.Module], latents: Tensor, timesteps: Tensor, given: Conditioning) -> Tensor:
    """The UNet's output for B rows, running the text encoders first where the rows come as tokens.

    Arguments:
        models: `unet`, and `text_encoder`, `text_encoder_2` where they are trained.
        latents: (B, 4, H/8, W/8), scaled as the UNet expects them.
        timesteps: (B,).
    """
    if given.token_ids is None:
        embeds, pooled = given.prompt_embeds, given.pooled_prompt_embeds
    else:
        embeds, pooled = embed_prompts((models["text_encoder"], models["text_encoder_2"]), given.token_ids)
    dtype = latents.dtype
    return models["unet"](
        latents,
        timesteps,
        encoder_hidden_states=embeds.to(dtype),
        added_cond_kwargs={"text_embeds": pooled.to(dtype), "time_ids": given.time_ids},
        return_dict=False,
    )[0]


@dataclass(frozen=True)
class Moments:
    """The VAE's posterior of pictures: what is worth keeping of it, so that each epoch samples its latents anew.

    Arguments:
        mean, std: (..., 4, H/8, W/8), float32.
    """

    mean: Tensor
    std: Tensor


@torch.no_grad()
def encode_images(vae: nn.Module, pixels: Tensor) -> Moments:
    """Arguments: pixels: (B, 3, H, W) in [-1, 1]. Computed in the VAE's own precision, float32 here."""
    posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    return Moments(posterior.mean.float().cpu(), posterior.std.float().cpu())


def latents_from(moments: Moments, vae_config, noise: Tensor) -> Tensor:
    """A sample of the posterior, scaled as the UNet expects it.

    Arguments:
        vae_config: for `scaling_factor` and, in some bases, `latents_mean` and `latents_std`.
        noise: standard normal, of the mean's shape.
    """
    sample = moments.mean + moments.std * noise
    mean, std = getattr(vae_config, "latents_mean", None), getattr(vae_config, "latents_std", None)
    if mean is None or std is None:
        return sample * vae_config.scaling_factor
    shape = (-1, 1, 1)
    return (sample - torch.tensor(mean).view(shape)) * vae_config.scaling_factor / torch.tensor(std).view(shape)
