"""The adapters of every projection: W = W0 + s1 B1 A1 + s2 B2 A2.

The primary (1) is what the user keeps; the auxiliary (2) is the perturbation that the primary is trained under. Both
are ordinary peft LoRA adapters with names of their own, in float32 whatever the base's precision. A third, frozen one
takes away what the primary began with where that is not zero: see `initialisation`.

Reference:
    Bi-LoRA: Efficient Sharpness-Aware Minimization for Fine-Tuning Large-Scale Models (Liu et al., 2026),
    arXiv 2508.19564, Eq. 7.
"""

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Generator, Tensor, nn

from bilora_diffusion.errors import UserError
from bilora_diffusion.fused import fuse
from bilora_diffusion.randomness import generator

__all__ = [
    "AUXILIARY",
    "PRIMARY",
    "START",
    "TARGETS",
    "UNET",
    "LowRank",
    "adapted_layers",
    "add_adapter",
    "auxiliary_off",
    "low_rank_layers",
    "parameters_of",
    "product_norm",
    "weight_norms",
    "wide_dtype",
]

PRIMARY = "default"  # several helpers of diffusers and peft assume this name for what is saved
AUXILIARY = "auxiliary"
START = "start"

UNET = "unet"
TARGETS: dict[str, tuple[str, ...]] = {
    UNET: ("to_q", "to_k", "to_v", "to_out.0"),
    "text_encoder": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "text_encoder_2": ("q_proj", "k_proj", "v_proj", "out_proj"),
}
"""The modules that get adapters, by part: every attention projection, as in the paper's W_Q, W_K, W_V, W_O."""


@dataclass(frozen=True)
class LowRank:
    """One layer's adapter, a perturbation s B A of that layer's weight.

    Arguments:
        part: `unet`, `text_encoder` or `text_encoder_2`.
        name: the layer's path in its part.
        A: shape (r, in) for a linear layer, (r, in, k, k) for a convolution.
        B: shape (out, r) or (out, r, 1, 1).
        scale: s = alpha / r.
    """

    part: str
    name: str
    A: nn.Parameter
    B: nn.Parameter
    scale: float


def add_adapter(
    part: str,
    model: nn.Module,
    adapter: str,
    *,
    rank: int,
    scale: float,
    init: str,
    seed: int,
    targets: Sequence[str] | None = None,
    dropout: float = 0.0,
    use_dora: bool = False,
) -> None:
    """Attaches one adapter to every target of a frozen model and leaves all adapters active, all but `START` trainable.

    The starting values depend on the seed, the part and the adapter alone, not on the base's precision or device, and
    the global random state is left as it was: with or without an auxiliary, the primary starts from the same numbers.

    Arguments:
        part: which of `TARGETS` the model is.
        model: a diffusers or transformers model, its own parameters frozen.
        adapter: `PRIMARY`, `START` or `AUXILIARY`.
        rank: r, at least 1.
        scale: s = alpha / r; below zero for `START`.
        init: of A: `gaussian` (standard deviation 1 / r, as diffusers' scripts) or `kaiming` (uniform, variance
            1 / (3 in), as peft and the LoRA paper). B starts at zero.
        targets: ends of the module names to adapt, unset = `TARGETS[part]`.
        dropout: probability in [0, 1) on the adapter's input.
        use_dora: weight-decomposed adapter (DoRA).

    Raises:
        UserError: a target that names no module.
    """
    targets = list(targets or TARGETS[part])
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name, _ in model.named_modules()):
            raise UserError(f"--lora_layers: no module of the {part} is called '{target}'")
    config = LoraConfig(
        r=rank,
        lora_alpha=_plain_number(scale * rank),
        target_modules=targets,
        init_lora_weights="gaussian" if init == "gaussian" else True,
        lora_dropout=dropout,
        use_dora=use_dora,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # A second adapter is intended; peft's warning would start every run with an alarm.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        model.add_adapter(config, adapter_name=adapter)
    fuse(model)
    draw = generator(seed, "adapter", part, adapter)
    for _, layer in adapted_layers(model):
        if adapter in layer.lora_A:
            _set_start(layer, adapter, init, draw)
        # Adding an adapter deactivates and freezes the ones before it.
        layer.set_adapter([name for name in (PRIMARY, START, AUXILIARY) if name in layer.lora_A])
    for parameter in parameters_of(model, START).values():
        parameter.requires_grad_(False)


@torch.no_grad()
def _set_start(layer: BaseTunerLayer, adapter: str, init: str, draw: Generator) -> None:
    """A, B and a DoRA's magnitude in float32. peft gives them the base's precision, rounded as that is."""
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    start = torch.empty(A.shape)
    if init == "gaussian":
        nn.init.normal_(start, std=1 / len(start), generator=draw)
    else:
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=draw)
    A.data, B.data = start.to(A.device), torch.zeros_like(B, dtype=torch.float32)
    if adapter in layer.lora_magnitude_vector:
        # ||W0|| of each output, in the precision of peft's forward (float32, in a convolution the base's): otherwise a
        # fresh DoRA would change a bfloat16 base's outputs by a percent.
        magnitude, weight = layer.lora_magnitude_vector[adapter], layer.get_base_layer().weight
        weight = weight.float() if weight.ndim == 2 else weight
        magnitude.weight.data = magnitude.get_weight_norm(weight, torch.zeros_like(weight), 0.0).float()


def _plain_number(value: float) -> float | int:
    """3.0 as 3: readers of the file compare alpha as an integer when it is one."""
    nearest = round(value)
    return nearest if math.isclose(value, nearest, rel_tol=1e-12) else value


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """The layers of a model that carry adapters, with their paths."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def parameters_of(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """The parameters of one adapter by name. `requires_grad` cannot tell them apart: two adapters are trained."""
    return {
        re.sub(rf"\.{adapter}(?=\.|$)", "", name): parameter
        for name, parameter in model.named_parameters()
        if adapter in name.split(".")
    }


def low_rank_layers(models: Mapping[str, nn.Module], adapter: str) -> list[LowRank]:
    """One adapter's factors over all parts, in the order of the modules."""
    return [
        LowRank(part, name, layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter])
        for part, model in models.items()
        for name, layer in adapted_layers(model)
        if adapter in layer.lora_A
    ]


@contextmanager
def auxiliary_off(models: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, the models compute W0 + s1 B1 A1: what a user will get.

    The auxiliary's scale is set to zero rather than the adapter deactivated: peft's switch also freezes parameters.
    May be nested.
    """
    layers = [layer for model in models for _, layer in adapted_layers(model) if AUXILIARY in layer.lora_A]
    scales = [layer.scaling[AUXILIARY] for layer in layers]
    try:
        for layer in layers:
            layer.scaling[AUXILIARY] = 0.0
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling[AUXILIARY] = scale


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64, except on Apple's GPUs, which do not have it: float32 there."""
    return torch.float32 if device.type == "mps" else torch.float64


def product_norm(layers: Sequence[LowRank]) -> Tensor:
    """c = sqrt(sum_j ||s_j B_j A_j||_F^2) over all layers, a scalar on their device, without a host copy.

    ||B A||_F^2 = sum((B' B) * (A A')) needs r x r products only. Layers of one shape are taken together.
    """
    groups: dict[tuple[torch.Size, torch.Size], list[LowRank]] = {}
    for layer in layers:
        groups.setdefault((layer.A.shape, layer.B.shape), []).append(layer)
    device = layers[0].A.device
    dtype = wide_dtype(device)  # the ball is small beside the factors, and TF32 products would blur its edge
    total = torch.zeros((), dtype=dtype, device=device)
    for group in groups.values():
        A = torch.stack([layer.A.detach().flatten(1) for layer in group]).to(dtype)
        B = torch.stack([layer.B.detach().flatten(1) for layer in group]).to(dtype)
        squares = ((B.mT @ B) * (A @ A.mT)).sum((1, 2))
        # From a list of Python numbers: the copy does not wait for the device.
        scales = torch.tensor([layer.scale**2 for layer in group], dtype=dtype)
        total += (squares * scales.to(squares.device, non_blocking=True)).sum()
    return total.clamp_min(0).sqrt()


@torch.no_grad()
def weight_norms(models: Mapping[str, nn.Module]) -> tuple[float, float]:
    """The size of the weights that the adapters sit on.

    Returns:
        (||W||_F, root of the sum of the layers' mean squared singular values) over all adapted layers, where the
        second counts ||W_j||_F^2 / min(out, in) for each: the yardstick for a perturbation of low rank, which has all
        its energy in r directions.
    """
    squared, spectral = 0.0, 0.0
    for model in models.values():
        for _, layer in adapted_layers(model):
            weight = layer.get_base_layer().weight.flatten(1)
            energy = weight.float().square().sum(dtype=wide_dtype(weight.device)).item()
            squared += energy
            spectral += energy / min(weight.shape)
    return math.sqrt(squared), math.sqrt(spectral)
