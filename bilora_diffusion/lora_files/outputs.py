"""The outputs on fixed inputs by which a trained model and a loaded file are compared."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bilora_diffusion.randomness import generator

__all__ = ["PARTS", "Outputs", "base_dtype", "compare_outputs", "record_outputs"]

PARTS = ("unet", "text_encoder", "text_encoder_2")

Outputs = dict[str, Tensor]
"""Name -> value, float32 on the CPU: `unet`, `text_encoder.hidden`, `text_encoder.pooled`, ..."""

TIMESTEPS = (20, 801)  # one where nearly all is picture, one where nearly all is noise
LATENT_SIDE = 16  # divisible by the 4 of SDXL's two halvings; small, as SDXL's UNet may run on a CPU here
TOKENS = 77


@torch.no_grad()
def record_outputs(models: Mapping[str, nn.Module]) -> Outputs:
    """The models' outputs on fixed inputs, the same on every call.

    The UNet predicts at two timesteps for noise and random conditioning; a text encoder gives the hidden
    states that SDXL reads (the last but one) and its pooled output, for a fixed sequence of tokens. Models
    run in evaluation mode where they are and as they are; their mode and the global random state are left as
    found.
    """
    outputs: Outputs = {}
    for part, model in models.items():
        with _evaluation_mode(model), _full_precision():
            if part == "unet":
                outputs["unet"] = _as_float(_unet_output(model))
            else:
                hidden, pooled = _text_outputs(model)
                outputs[f"{part}.hidden"] = _as_float(hidden)
                outputs[f"{part}.pooled"] = _as_float(pooled)
    return outputs


def compare_outputs(outputs: Outputs, reference: Outputs) -> dict[str, float]:
    """||x - y|| / ||y|| of every output, in float64; infinite where one is not finite or all zero."""
    return {name: _relative_difference(outputs[name], reference[name]) for name in reference}


def base_dtype(model: nn.Module) -> torch.dtype:
    """The base's own dtype: adapters are in float32 on any base."""
    return next(p.dtype for name, p in model.named_parameters() if ".lora_" not in name and p.is_floating_point())


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Inside, no dropout; afterwards every module has the mode it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _full_precision() -> Iterator[None]:
    """Inside, no TF32: a start that is added and taken away cancels to the rounding of the products."""
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32


def _unet_output(unet: nn.Module) -> Tensor:
    """The prediction for noise (2, C, 16, 16) at `TIMESTEPS`, one row each."""
    config = unet.config
    rows, draw = len(TIMESTEPS), generator(0, "verification", "unet")
    place = {"device": _device(unet), "dtype": base_dtype(unet)}
    pooled_width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    latents = torch.randn(rows, config.in_channels, LATENT_SIDE, LATENT_SIDE, generator=draw)
    prompt_embeds = torch.randn(rows, TOKENS, config.cross_attention_dim, generator=draw)
    pooled_prompt_embeds = torch.randn(rows, pooled_width, generator=draw)
    side = 8.0 * LATENT_SIDE
    conditions = {
        "text_embeds": pooled_prompt_embeds.to(**place),
        "time_ids": torch.tensor([[side, side, 0.0, 0.0, side, side]]).expand(rows, -1).to(**place),
    }
    timesteps = torch.tensor(TIMESTEPS, device=place["device"])
    return unet(
        latents.to(**place),
        timesteps,
        encoder_hidden_states=prompt_embeds.to(**place),
        added_cond_kwargs=conditions,
        return_dict=False,
    )[0]


def _text_outputs(encoder: nn.Module) -> tuple[Tensor, Tensor]:
    """The last hidden state but one (1, 77, width) and the pooled output (1, width) for fixed tokens."""
    config = encoder.config
    length = min(TOKENS, config.max_position_embeddings)
    # The multiplier only scatters the ids; the last is the highest, which CLIP pools at, in any vocabulary.
    ids = torch.arange(length) * 7919 % (config.vocab_size - 1)
    ids[-1] = config.vocab_size - 1
    out = encoder(ids[None].to(_device(encoder)), output_hidden_states=True)
    pooled = out.text_embeds if "text_embeds" in out else out.pooler_output
    return out.hidden_states[-2], pooled


def _relative_difference(value: Tensor, reference: Tensor) -> float:
    reference = reference.double()
    difference = ((value.double() - reference).norm() / reference.norm()).item()
    return difference if math.isfinite(difference) else math.inf


def _as_float(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu()


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
