"""How primary and auxiliary turned over a run, from its checkpoints (the paper's Fig. 3)."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from bilora_diffusion.checkpoint import AUXILIARY_FILE, checkpoints
from bilora_diffusion.errors import UserError
from bilora_diffusion.lora_files.diffusers_format import DIFFUSERS_FILE

__all__ = ["cosines_to_the_last"]

Factors = dict[str, tuple[Tensor, Tensor]]
"""(A, B) by layer."""


def cosines_to_the_last(run: Path) -> dict[str, list]:
    """The cosine of B A over all layers, at each checkpoint, to that of the last one.

    Returns:
        `steps`, `primary`, and `auxiliary` where the method has one (None while it is zero).

    Raises:
        UserError: fewer than two checkpoints.
    """
    found = sorted(checkpoints(run))
    if len(found) < 2:
        raise UserError(
            f"--run {run}: {len(found)} checkpoint(s) there, two at least are needed (--checkpointing_steps)"
        )
    result: dict[str, list] = {"steps": [step for step, _ in found]}
    for name, file in (("primary", DIFFUSERS_FILE), ("auxiliary", AUXILIARY_FILE)):
        paths = [folder / file for _, folder in found]
        if all(path.exists() for path in paths):
            states = [_factors(load_file(path)) for path in paths]
            result[name] = [_cosine(state, states[-1]) for state in states]
    return result


def _factors(tensors: Mapping[str, Tensor]) -> Factors:
    pairs = {}
    for name, A in tensors.items():
        for one, other in (("lora_A", "lora_B"), ("lora.down", "lora.up")):
            if one in name:
                pairs[name] = (A.flatten(1).double(), tensors[name.replace(one, other)].flatten(1).double())
    return pairs


def _cosine(one: Factors, other: Factors) -> float | None:
    product = _inner(one, other)
    sizes = _inner(one, one) * _inner(other, other)
    return (product / sizes.sqrt()).item() if sizes > 0 else None


def _inner(one: Factors, other: Factors) -> Tensor:
    """The sum over layers of <B1 A1, B2 A2> = sum((B1' B2) * (A1 A2'))."""
    return torch.stack(
        [((B.mT @ other[name][1]) * (A @ other[name][0].mT)).sum() for name, (A, B) in one.items()]
    ).sum()
