"""Whether a run fits a card, and which flags would make it fit, by the same estimate."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from bilora_diffusion.base_precision import QUANTISED
from bilora_diffusion.config import TrainingConfig
from bilora_diffusion.errors import UserError
from bilora_diffusion.memory.estimate import GB, Estimate, estimate

__all__ = ["check_memory", "in_gb", "remedies"]

logger = logging.getLogger("bilora_diffusion")

SMALLER_PX = 768


def check_memory(config: TrainingConfig, device: torch.device, dtype: torch.dtype) -> int | None:
    """Says what the run will need and what the GPU has; warns where that is less. Never an error.

    Returns:
        the most bytes the run is expected to allocate; None away from CUDA, or where the estimate failed.
    """
    if device.type != "cuda":
        return None
    try:
        found = estimate(config, dtype)
        free, total = torch.cuda.mem_get_info(device)
        logger.info(
            f"memory: about {in_gb(found.needed)} GB needed ({found.largest.name}; an estimate), {in_gb(free)} of "
            f"{in_gb(total)} GB free"
        )
        if found.needed > free:
            logger.warning(_too_small(config, dtype, found, free))
    except Exception as error:  # whatever it is, the run may be well: it is told and goes on
        reason = " ".join(str(error).split())[:200]
        logger.warning(f"the memory that this run needs could not be estimated ({type(error).__name__}: {reason})")
        return None
    return found.allocated


def _too_small(config: TrainingConfig, dtype: torch.dtype, found: Estimate, free: int) -> str:
    ways = list(remedies(config, dtype, found, free))
    told = "; ".join(
        f"{'and ' if number else ''}{flag}: {in_gb(way.needed)} GB" for number, (flag, way) in enumerate(ways)
    )
    return "the GPU has less memory free than this run is estimated to need; " + (
        f"what would help, one on top of the other: {told}" if ways else "a smaller --resolution or --rank would help"
    )


def remedies(config: TrainingConfig, dtype: torch.dtype, found: Estimate, free: int) -> Iterator[tuple[str, Estimate]]:
    """Flags that save memory, the ones that cost least first, each on top of those before it, until the run fits.

    Arguments:
        found: the estimate of the run as it is.
        free: bytes to fit in.
    """
    for flag, changes in _savings(config, dtype):
        try:
            smaller = replace(config, **changes)
        except UserError:  # does not go with another flag
            continue
        precision = torch.bfloat16 if "mixed_precision" in changes else dtype
        way = estimate(smaller, precision)
        if way.needed >= found.needed:
            continue
        config, dtype, found = smaller, precision, way
        yield flag, way
        if way.needed <= free:
            return


def _savings(config: TrainingConfig, dtype: torch.dtype) -> Iterator[tuple[str, dict[str, Any]]]:
    if dtype == torch.float32:
        yield "--mixed_precision bf16", {"mixed_precision": "bf16"}
    if not config.gradient_checkpointing:
        yield "--gradient_checkpointing", {"gradient_checkpointing": True}
    if config.with_prior_preservation and not config.prior_from_base:
        yield "--prior_source base_prediction", {"prior_source": "base_prediction"}
    if not config.center_crop and config.crops_per_image is None:
        yield "--crops_per_image 4", {"crops_per_image": 4}
    if config.train_batch_size > 1:
        steps = config.gradient_accumulation_steps * config.train_batch_size
        yield (
            f"--train_batch_size 1 --gradient_accumulation_steps {steps}",
            {"train_batch_size": 1, "gradient_accumulation_steps": steps},
        )
    if config.base_precision not in QUANTISED:
        yield "--base_precision int8", {"base_precision": "int8"}
    if config.train_text_encoder:
        yield "--no-train_text_encoder", {"train_text_encoder": False}
    if config.base_precision != "nf4":
        yield "--base_precision nf4", {"base_precision": "nf4"}
    if not config.offload_base:
        yield "--offload_base", {"offload_base": True}
    if config.resolution is None or config.resolution > SMALLER_PX:
        yield f"--resolution {SMALLER_PX}", {"resolution": SMALLER_PX}


def in_gb(size: int) -> str:
    """Bytes as GB of 2^30, as cards are sold."""
    return f"{size / GB:.1f}"
