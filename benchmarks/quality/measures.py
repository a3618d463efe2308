"""What is measured of a finished training: what it draws, and what rounding does to it."""

import copy
from collections.abc import Callable, Mapping

import torch
from diffusers import StableDiffusionXLPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from bilora_diffusion.adapters import PRIMARY, adapted_layers
from bilora_diffusion.embedded.check import draw, features
from bilora_diffusion.embedded.icons import SOLID_STYLE, Icons
from bilora_diffusion.embedded.scorer import Scorer, styled_text
from bilora_diffusion.embedded.words import concept_caption, flat_caption
from bilora_diffusion.methods.displacement import displaced

__all__ = ["adapted", "flat_icons", "pictures", "rounding"]

PICTURES = 60  # test names that are drawn
FEWER = 24  # of them for what needs less
FEW_STEPS = 8
GUIDANCE = 2.0


@torch.no_grad()
def pictures(
    base: StableDiffusionXLPipeline,
    unet: nn.Module,
    icons: Icons,
    solid: Tensor,
    lists: Mapping[str, list[str]],
    seed: int,
    flat_of_base: Tensor,
) -> dict[str, float]:
    """What is drawn for unseen names, beside their true icons, the training icons, and what the base draws.

    Similarities are of `embedded.check.features`, in [-2, 2].

    Arguments:
        solid: all names in the style that was learned: (N, 3, 64, 64), uint8.
        flat_of_base: `flat_icons` of the base with this seed.

    Returns:
        Means over the names; of ranks among all icons, 1 is the best. "scorer_3d" of 3D icons alone.
    """
    names = lists["test"][:PICTURES]
    captions = [concept_caption(name) for name in names]
    trained = copy.copy(base)
    trained.register_modules(unet=unet)
    drawn = draw(trained, captions, seed=seed, guidance_scale=GUIDANCE)
    few = draw(trained, captions[:FEWER], seed=seed, guidance_scale=GUIDANCE, steps=FEW_STEPS)
    other = draw(trained, captions[:FEWER], seed=seed + 1000, guidance_scale=GUIDANCE)
    flat = features(flat_icons(trained, lists, seed))
    everything, rows = features(solid), icons.rows(names)
    ours, true, concept = features(drawn), everything[rows], everything[icons.rows(lists["concept"])]
    ranks = ((ours @ everything.T).argsort(dim=1, descending=True) == rows[:, None]).int().argmax(1) + 1
    found = {
        "similarity_to_true": (ours * true).sum(1).mean().item(),
        "similarity_to_true_few_steps": (features(few) * true[:FEWER]).sum(1).mean().item(),
        "distance_to_true": _distance(drawn, solid[rows]),
        "names": len(names),
        "retrieval_rank": ranks.float().mean().item(),
        "retrieval_rank_median": ranks.float().median().item(),
        "retrieved_top_1": (ranks == 1).float().mean().item(),
        "retrieved_top_10": (ranks <= 10).float().mean().item(),
        "nearest_training_picture": (ours @ concept.T).amax(1).mean().item(),
        "diversity": 2 - (ours[:FEWER] * features(other)).sum(1).mean().item(),
        "flat_kept": (flat * features(flat_of_base)).sum(1).mean().item(),
    }
    if torch.equal(solid, icons.pixels[SOLID_STYLE]):  # the scorer knows no other style that is learned
        found["scorer_3d"] = Scorer.shipped()(drawn, [styled_text(name, SOLID_STYLE) for name in names]).mean().item()
    return found


@torch.no_grad()
def flat_icons(pipeline: StableDiffusionXLPipeline, lists: Mapping[str, list[str]], seed: int) -> Tensor:
    """What a pipeline draws for flat icons: (N, 3, 64, 64), uint8."""
    captions = [flat_caption("noto", name) for name in lists["test"][: min(FEWER, PICTURES)]]
    return draw(pipeline, captions, seed=seed, guidance_scale=GUIDANCE)


def _distance(drawn: Tensor, true: Tensor) -> float:
    """The mean squared difference of colours in [0, 1]."""
    return ((drawn.float() - true.float()) / 255).square().mean().item()


@torch.no_grad()
def rounding(models: Mapping[str, nn.Module], loss: Callable[[], float]) -> float:
    """The loss with the adapted merged weights rounded to 8 bits: symmetric, one scale for each output row."""
    layers = adapted(models)
    errors = []
    for layer in layers:
        weight = layer.get_base_layer().weight
        merged = weight + layer.get_delta_weight(PRIMARY).reshape(weight.shape)
        rows = merged.flatten(1)
        scale = rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny) / 127
        errors.append(((rows / scale).round() * scale - rows).reshape(weight.shape))
    with displaced([layer.get_base_layer().weight for layer in layers], errors):
        return loss()


def adapted(models: Mapping[str, nn.Module]) -> list[BaseTunerLayer]:
    """All layers that carry adapters."""
    return [layer for model in models.values() for _, layer in adapted_layers(model)]
