"""How much each perturbation raises the loss of the very batch whose gradient is taken, all at equal norm.

Sharpness-aware training descends at the weights where the loss is highest nearby. A perturbation that does not raise
the present batch's loss more than a random one of its norm is no ascent, whatever it cost.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Generator, Tensor
from torch.nn.functional import avg_pool2d

from benchmarks.quality.laboratory import Laboratory, rows_of
from benchmarks.quality.measures import adapted
from benchmarks.quality.plan import Configuration
from bilora_diffusion.adapters import auxiliary_off
from bilora_diffusion.batches import Batch
from bilora_diffusion.methods import MicroBatch
from bilora_diffusion.methods.displacement import displaced
from bilora_diffusion.randomness import generator
from bilora_diffusion.sharpness.landscape import Landscape, norm

__all__ = ["SHARES", "rises"]

SHARES = (0.005, 0.01, 0.02)
"""Norms of the perturbation, as shares of the adapted merged weights'."""
SEEN_AT = (50, 100, 200, 300, 399)
RANKS = (1, 4)


def _share_of(batch: Batch, share: float) -> Batch:
    return rows_of(batch, slice(round(share * len(batch))))


def _at_half_size(batch: Batch, _: Generator) -> Batch:
    """A pass on a quarter of the latents; the noise keeps its variance."""
    return replace(batch, latents=avg_pool2d(batch.latents, 2), noise=2 * avg_pool2d(batch.noise, 2))


def _with_other_noise(batch: Batch, random: Generator) -> Batch:
    return replace(batch, noise=torch.randn(batch.noise.shape, generator=random).to(batch.noise.device))


def _at_other_times(batch: Batch, random: Generator) -> Batch:
    times = torch.randint(0, 1000, batch.timesteps.shape, generator=random)
    return replace(_with_other_noise(batch, random), timesteps=times.to(batch.timesteps.device))


CHEAPER: dict[str, Callable[[Batch, Generator], Batch]] = {
    "half_rows": lambda batch, _: _share_of(batch, 0.5),
    "quarter_rows": lambda batch, _: _share_of(batch, 0.25),
    "half_size": _at_half_size,
    "other_noise": _with_other_noise,
    "other_times": _at_other_times,
}
"""Batches whose gradient costs less than that of the batch at hand, or could be known from an earlier epoch."""


def rises(laboratory: Laboratory, configuration: Configuration, seed: int) -> dict[str, Any]:
    """One training, stopped at some steps to look around.

    Returns:
        `Laboratory.circumstances`, and `own`: for each step seen the rise of the loss by the method's own perturbation
        scaled to each of `SHARES`; beside it the same for directions that any method could have: `gradient` (the
        maximiser to first order of this batch in the space of the merged weights), `gradient_rank_r` (each layer's
        part cut to its top r singular directions), those of `CHEAPER`, `previous` (the gradient of the batch before)
        and `random` (normal numbers, each row with the norm of the weight's row).
    """
    parts = laboratory.assembled(configuration, seed)
    found: dict[str, Any] = {"configuration": str(configuration), "seed": seed, "shares": list(SHARES), "seen": {}}
    found |= laboratory.circumstances(configuration, seed)
    previous: list[Tensor] = []
    repeats = parts.dataset.steps_per_draw
    seen_at = [step + (-step - 1) % repeats for step in SEEN_AT]  # the last step on its rows
    for step in range(max(seen_at) + 1):
        micro_batches = laboratory.drawn(parts, step)
        if step + 1 in seen_at:
            previous = _gradient(parts.models, micro_batches)
        if step in seen_at:
            found["seen"][step] = _look(parts, micro_batches, previous, seed + step)
        parts.trainer.training_step(micro_batches, step)
    return found


def _look(parts, micro_batches: Sequence[MicroBatch], previous: list[Tensor], seed: int) -> dict[str, Any]:
    layers = adapted(parts.models)
    weights = [layer.get_base_layer().weight for layer in layers]
    gradient = _gradient(parts.models, micro_batches)
    directions = {"gradient": gradient, "previous": previous}
    for rank in RANKS:
        directions[f"gradient_rank_{rank}"] = [_cut(layer, rank) for layer in gradient]
    for name, changed in CHEAPER.items():
        others = [replace(one, batch=changed(one.batch, generator(seed, name))) for one in micro_batches]
        directions[name] = _gradient(parts.models, others)
    random = generator(seed, "direction")
    drawn = [torch.randn(weight.shape, generator=random).to(weight.device) for weight in weights]
    directions["random"] = [
        one * (_row_norms(weight) / _row_norms(one)) for one, weight in zip(drawn, weights, strict=True)
    ]
    own = _own(parts, micro_batches)
    if norm(own) > 0:
        directions["own"] = own
    with torch.no_grad(), auxiliary_off(parts.models.values()):
        here = Landscape(weights, micro_batches).loss()
        size = norm([weight + _product(layer) for weight, layer in zip(weights, layers, strict=True)])
        seen: dict[str, Any] = {"loss": here, "own_share": norm(own) / size}
        for name, direction in directions.items():
            scale, rises_ = size / norm(direction), []
            for share in SHARES:
                with displaced(weights, direction, share * scale):
                    rises_.append(Landscape(weights, micro_batches).loss() - here)
            seen[name] = rises_
    return seen


def _gradient(models: Mapping[str, Any], micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
    """In the space of the merged weights, without the perturbation."""
    weights = [layer.get_base_layer().weight for layer in adapted(models)]
    trained = [parameter for model in models.values() for parameter in model.parameters() if parameter.requires_grad]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        with auxiliary_off(models.values()):
            return Landscape(weights, micro_batches).gradient()
    finally:
        for weight in weights:
            weight.requires_grad_(False)
        for parameter in trained:
            parameter.grad = None


@torch.no_grad()
def _own(parts, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
    """The method's perturbation as a change of the merged weights."""
    layers = adapted(parts.models)
    with auxiliary_off(parts.models.values()):
        plain = [_product(layer) for layer in layers]
    with parts.method.perturbed(micro_batches):
        return [_product(layer) + _noise(layer) - before for layer, before in zip(layers, plain, strict=True)]


def _product(layer: BaseTunerLayer) -> Tensor:
    """What all adapters add to the weight, in its shape."""
    weight = layer.get_base_layer().weight
    return sum(layer.get_delta_weight(name) for name in layer.active_adapters).reshape(weight.shape)


def _noise(layer: BaseTunerLayer) -> Tensor | float:
    """What is on the weight itself."""
    noise = getattr(layer, "perturbation", None)
    return 0.0 if noise is None else noise.whole()


def _cut(gradient: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(gradient.flatten(1), full_matrices=False)
    return ((U[:, :rank] * S[:rank]) @ Vh[:rank]).reshape(gradient.shape)


def _row_norms(weight: Tensor) -> Tensor:
    return weight.detach().flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1))
