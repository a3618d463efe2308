"""What is measured of a finished training: what it draws, how flat it lies, what rounding does to it."""

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from diffusers import StableDiffusionXLPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from bilora_diffusion.adapters import PRIMARY, adapted_layers
from bilora_diffusion.embedded.check import draw, features
from bilora_diffusion.embedded.icons import SOLID_STYLE, Icons
from bilora_diffusion.embedded.scorer import Scorer, styled_text
from bilora_diffusion.embedded.words import concept_caption, flat_caption
from bilora_diffusion.methods import MicroBatch
from bilora_diffusion.methods.displacement import displaced
from bilora_diffusion.sharpness.landscape import Landscape
from bilora_diffusion.sharpness.measures import worst_case

__all__ = ["PICTURES", "adapted", "pictures", "rounding", "sharpness"]

PICTURES = 48  # test names that are drawn
HALF = 24  # of them for what needs less
FEW_STEPS = 8
GUIDANCE = 2.0
WORST_SIZES = (0.005, 0.01, 0.02)  # shares of the adapted weights' norm


@torch.no_grad()
def pictures(
    base: StableDiffusionXLPipeline, unet: nn.Module, icons: Icons, lists: Mapping[str, list[str]], seed: int
) -> dict[str, float]:
    """What is drawn for unseen names, beside their true 3D icons, the training icons, and what the base draws.

    Similarities are of `embedded.check.features`, in [-2, 2].
    """
    names = lists["test"][:PICTURES]
    captions = [concept_caption(name) for name in names]
    flat = [flat_caption("noto", name) for name in names[:HALF]]
    trained = copy.copy(base)
    trained.register_modules(unet=unet)
    drawn = draw(trained, captions, seed=seed, guidance_scale=GUIDANCE)
    few = draw(trained, captions[:HALF], seed=seed, guidance_scale=GUIDANCE, steps=FEW_STEPS)
    other = draw(trained, captions[:HALF], seed=seed + 1000, guidance_scale=GUIDANCE)
    flat_drawn = draw(trained, flat, seed=seed, guidance_scale=GUIDANCE)
    flat_of_base = draw(base, flat, seed=seed, guidance_scale=GUIDANCE)
    solid = icons.pixels[SOLID_STYLE]
    everything, rows = features(solid), icons.rows(names)
    ours, true, concept = features(drawn), everything[rows], everything[icons.rows(lists["concept"])]
    ranks = ((ours @ everything.T).argsort(dim=1, descending=True) == rows[:, None]).int().argmax(1) + 1
    return {
        "similarity_to_true": (ours * true).sum(1).mean().item(),
        "similarity_to_true_few_steps": (features(few) * true[:HALF]).sum(1).mean().item(),
        "distance_to_true": _distance(drawn, solid[rows]),
        "retrieved_top_1": (ranks == 1).float().mean().item(),
        "retrieved_top_10": (ranks <= 10).float().mean().item(),
        "nearest_training_picture": (ours @ concept.T).amax(1).mean().item(),
        "diversity": 2 - (ours[:HALF] * features(other)).sum(1).mean().item(),
        "scorer_3d": Scorer.shipped()(drawn, [styled_text(name, SOLID_STYLE) for name in names]).mean().item(),
        "flat_kept": (features(flat_drawn) * features(flat_of_base)).sum(1).mean().item(),
    }


def _distance(drawn: Tensor, true: Tensor) -> float:
    """The mean squared difference of colours in [0, 1]."""
    return ((drawn.float() - true.float()) / 255).square().mean().item()


def sharpness(models: Mapping[str, nn.Module], micro_batches: Sequence[MicroBatch]) -> dict[str, list | float]:
    """The rise of the loss after steps along the gradient in the space of the merged weights.

    The base's weights are moved for it, which moves the merged ones alike, and have their old bits afterwards.
    """
    points = [layer.get_base_layer().weight for layer in adapted(models)]
    for point in points:
        point.requires_grad_(True)
    try:
        landscape = Landscape(points, micro_batches)
        found = worst_case(landscape, WORST_SIZES, lambda text: None)
        at = landscape.loss()
        return {"sizes": list(WORST_SIZES), "rises": [loss - at for loss in found["losses"]], "loss": at}
    finally:
        for point in points:
            point.requires_grad_(False)


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
