"""One optimiser step of the trainer on `meta`: its own adapters, method, forward and backward pass, without data."""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler
from torch import nn

from bilora_diffusion import methods
from bilora_diffusion.adapters import PRIMARY, UNET, adapted_layers, parameters_of
from bilora_diffusion.assembly import attach_primary, enable_checkpointing
from bilora_diffusion.bases.single_file import SDXL_CONFIG
from bilora_diffusion.batches import Batch, TrainingMicroBatch
from bilora_diffusion.config import TrainingConfig
from bilora_diffusion.diffusion import build_objective
from bilora_diffusion.memory.counting import rounded
from bilora_diffusion.memory.simulation import META, MemoryCounter, cuda_arithmetic
from bilora_diffusion.methods.building import FRESH_ROWS
from bilora_diffusion.methods.gradient_sketch import OVERSAMPLING
from bilora_diffusion.methods.weight_noise import table_length
from bilora_diffusion.sdxl import Conditioning

__all__ = ["StepMemory", "rows_in_batch", "simulate_step"]

NOISE_METHODS = ("flat-lora", "rwp-full", "rwp-lora")
EIGHT_BIT_FROM = 4096
"""Entries; bitsandbytes keeps the moments of smaller tensors in float32."""
TOKENS = 77


@dataclass(frozen=True)
class StepMemory:
    """Bytes beside the frozen base.

    Arguments:
        state: what stays from step to step: adapters, the optimiser's moments, what the method keeps.
        work: the most on top of that within a step: activations and gradients.
    """

    state: int
    work: int


class _MicroBatch(TrainingMicroBatch):
    """Computes as on CUDA."""

    def _autocast(self, device: torch.device) -> AbstractContextManager[None]:
        return cuda_arithmetic(self.compute_dtype)


def rows_in_batch(config: TrainingConfig) -> int:
    """Rows of a micro-batch: with prior preservation every picture brings a class row."""
    return config.train_batch_size * (2 if config.with_prior_preservation else 1)


def simulate_step(
    config: TrainingConfig, models: Mapping[str, nn.Module], size: tuple[int, int], dtype: torch.dtype
) -> StepMemory:
    """Attaches what the run trains to bare models and takes a step.

    Arguments:
        models: the trained parts by name, on `meta`, frozen; they have adapters afterwards.
        size: of the latents, height and width.
        dtype: of the computation.
    """
    known = [tensor for model in models.values() for tensor in (*model.parameters(), *model.buffers())]
    counter = MemoryCounter(known)
    with counter:
        with META:
            attach_primary(config, models, seed=0)
            method = _method(config, models)
        if config.gradient_checkpointing:
            for part, model in models.items():
                enable_checkpointing(part, model, context_fn=_recomputing)
        primary = [p for model in models.values() for p in parameters_of(model, PRIMARY).values()]
        trained = [*primary, *method.parameters]
        with _gradients(trained):  # what a first step leaves behind
            applied = torch.ones((), dtype=torch.bool, device=META)
            method.before_step(applied)
            method.after_step(applied)
        state = counter.live
        counter.restart()
        micro_batch = _micro_batch(config, models, size, dtype)
        with _gradients(trained if config.gradient_accumulation_steps > 1 else []):
            method.accumulate([micro_batch])
        for parameter in trained:
            parameter.grad = None
        work = counter.peak - state
    drawn = _noise_bytes(config, models, primary) + _sketch_bytes(config, models)
    return StepMemory(state + _optimiser_bytes(config, primary), work + drawn)


def _recomputing() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What a checkpointed block is surrounded by the first time, and the second."""
    return nullcontext(), cuda_arithmetic(torch.get_autocast_dtype(META.type))


@contextmanager
def _gradients(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Inside, these have gradients; afterwards none has."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    yield
    for parameter in parameters:
        parameter.grad = None


def _method(config: TrainingConfig, models: Mapping[str, nn.Module]) -> methods.Method:
    # Noise and sketches draw numbers: `_noise_bytes` and `_sketch_bytes` have what they take.
    changes: dict[str, Any] = {"sigma": None, "seed": 0, "ascent_basis": "tracked"}
    if config.method in NOISE_METHODS:
        changes["method"] = "lora"
    rates = dict.fromkeys(models, config.learning_rate)
    plain = replace(config, **changes)
    return methods.build(plain, models, rates=rates, auxiliary_rates=rates, seed=0, steps=1)[0]


def _micro_batch(
    config: TrainingConfig, models: Mapping[str, nn.Module], size: tuple[int, int], dtype: torch.dtype
) -> TrainingMicroBatch:
    rows, unet = rows_in_batch(config), models[UNET].config
    with META:
        latents = torch.empty(rows, unet.in_channels, *size)
        if "text_encoder" in models:
            told = {"token_ids": torch.empty(rows, 2, TOKENS, dtype=torch.int64)}
        else:
            pooled = unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim
            told = {
                "prompt_embeds": torch.empty(rows, TOKENS, unet.cross_attention_dim, dtype=dtype),
                "pooled_prompt_embeds": torch.empty(rows, pooled, dtype=dtype),
            }
        batch = Batch(
            latents,
            torch.empty_like(latents),
            torch.empty(rows, dtype=torch.int64),
            Conditioning(torch.empty(rows, 6), **told),
            weights=torch.empty(rows),
            instances=torch.empty(rows),
            base_predictions=torch.empty_like(latents) if config.prior_from_base else None,
            is_repeat=config.method == "bilora-echo",  # the step with the auxiliary; `_sketch_bytes` has the other's
        )
    scheduler = EulerDiscreteScheduler.from_pretrained(SDXL_CONFIG / "scheduler")
    objective = build_objective(scheduler, edm=config.do_edm_style_training, snr_gamma=config.snr_gamma)
    share = 1 / config.gradient_accumulation_steps
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return _MicroBatch(batch, models, objective, dtype, share, scaler)


def _optimiser_bytes(config: TrainingConfig, primary: list[nn.Parameter]) -> int:
    """AdamW's two moments, in 8 bits where asked for; Prodigy's four tensors; Adafactor's rows and columns; the moving
    average. Paged ones count whole."""
    entries = [parameter.numel() for parameter in primary]
    if config.optimizer == "prodigy":
        total = sum(4 * rounded(4 * count) for count in entries)
    elif config.optimizer == "adafactor":
        total = sum(rounded(4 * parameter.numel() // side) for parameter in primary for side in parameter.shape[:2])
    elif config.use_8bit_adam:
        total = sum(2 * rounded(count if count >= EIGHT_BIT_FROM else 4 * count) for count in entries)
    else:
        total = sum(2 * rounded(4 * count) for count in entries)
    if config.ema_decay is not None:
        total += sum(rounded(4 * count) for count in entries)
    return total


def _sketch_bytes(config: TrainingConfig, models: Mapping[str, nn.Module]) -> int:
    """Of passes that bilora-echo and bilora-fresh take the gradient along in: two thin matrices for each layer."""
    if config.method != "bilora-echo" and (config.method, config.ascent_basis) != ("bilora-fresh", "gradient"):
        return 0
    passes = config.gradient_accumulation_steps
    if config.method == "bilora-fresh":
        passes = math.ceil(passes * (FRESH_ROWS if config.ascent_share is None else config.ascent_share))
    columns = (config.auxiliary_rank or config.rank) + OVERSAMPLING
    shapes = [layer.get_base_layer().weight.shape for model in models.values() for _, layer in adapted_layers(model)]
    return passes * sum(rounded(4 * columns * side) for shape in shapes for side in (shape[0], shape[1:].numel()))


def _noise_bytes(config: TrainingConfig, models: Mapping[str, nn.Module], primary: list[nn.Parameter]) -> int:
    """What noise takes within a step.

    On the factors: itself and what it displaces. On the weights: a norm and a deviation for each row, the table, and
    the largest layer's sum of weight and noise.
    """
    if config.method == "rwp-lora":
        return 2 * sum(rounded(4 * parameter.numel()) for parameter in primary)
    if config.method not in NOISE_METHODS and not config.sigma:
        return 0
    shapes = [layer.get_base_layer().weight.shape for model in models.values() for _, layer in adapted_layers(model)]
    largest = max(shape.numel() for shape in shapes)
    return sum(2 * rounded(4 * shape[0]) for shape in shapes) + 4 * (table_length(largest) + largest)
