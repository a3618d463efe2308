"""From rows of the data set to a micro-batch with its noise and timesteps drawn, and from that to its loss."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bilora_diffusion.data.dreambooth import Row
from bilora_diffusion.data.latents import LatentSource
from bilora_diffusion.diffusion import Objective, draw_noise, draw_timestep
from bilora_diffusion.prompts import Prompts
from bilora_diffusion.randomness import generator
from bilora_diffusion.sdxl import Conditioning, denoise, latents_from, time_ids

__all__ = ["Batch", "BatchMaker", "TrainingMicroBatch"]


@dataclass(frozen=True)
class Batch:
    """B rows of one micro-batch on the device, everything random drawn.

    Arguments:
        latents, noise: (B, 4, H/8, W/8), float32.
        timesteps: (B,).
        conditioning: of the same B rows.
        weights: (B,): 1 for an instance row, `--prior_loss_weight` for a class row.
        instances: (B,): 1 for an instance row, 0 for a class row.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    conditioning: Conditioning
    weights: Tensor
    instances: Tensor

    def __len__(self) -> int:
        return len(self.latents)


class BatchMaker:
    """Draws noise and timesteps for rows and brings everything to the device.

    A row's draws depend on the seed and its draw number alone: not on its rank, its place in the batch or the method.
    """

    def __init__(
        self,
        objective: Objective,
        latents: LatentSource,
        prompts: Prompts,
        *,
        seed: int,
        resolution: int,
        noise_offset: float,
        prior_loss_weight: float,
        device: torch.device,
    ) -> None:
        self.objective = objective
        self.latents = latents
        self.prompts = prompts
        self.seed = seed
        self.target = (resolution, resolution)
        self.noise_offset = noise_offset
        self.prior_loss_weight = prior_loss_weight
        self.device = device

    def __call__(self, rows: Sequence[Row]) -> Batch:
        latents, noises, timesteps = [], [], []
        moments = self.latents.moments(rows)
        for row, moment in zip(rows, moments, strict=True):
            stream = (row.draw, "class" if row.is_class else "instance")
            posterior = torch.randn(moment.mean.shape, generator=generator(self.seed, "posterior", *stream))
            latents.append(latents_from(moment, self.latents.vae_config, posterior))
            shape = tuple(moment.mean.shape)
            noises.append(draw_noise(shape, generator(self.seed, "noise", *stream), self.noise_offset))
            timesteps.append(draw_timestep(self.objective, generator(self.seed, "timestep", *stream)))
        sizes = torch.stack([time_ids(row.original_size, row.crop_top_left, self.target) for row in rows])
        instances = torch.tensor([float(not row.is_class) for row in rows])
        weights = torch.where(instances > 0, 1.0, self.prior_loss_weight)
        conditioning = self.prompts.conditioning([row.prompt for row in rows], sizes)
        latents, noises, timesteps, weights, instances = (
            tensor.to(self.device, non_blocking=True)
            for tensor in (torch.stack(latents), torch.stack(noises), torch.stack(timesteps), weights, instances)
        )
        return Batch(latents, noises, timesteps, conditioning.to(self.device), weights, instances)


@dataclass(frozen=True)
class TrainingMicroBatch:
    """A batch bound to the models whose loss it measures: `methods.MicroBatch`.

    Arguments:
        models: the trained parts, called at their present weights, whatever perturbation is on.
        compute_dtype: what the UNet is fed; autocast runs in it where it is a half precision.
        share: this micro-batch's part of the step's mean, 1 / micro-batches.
        scaler: fp16's loss scale, disabled otherwise.
    """

    batch: Batch
    models: Mapping[str, nn.Module]
    objective: Objective
    compute_dtype: torch.dtype
    share: float
    scaler: torch.amp.GradScaler

    def __len__(self) -> int:
        return len(self.batch)

    def loss(self, rows: slice = slice(None)) -> Tensor:
        """The mean over instance rows plus the prior's weight times the mean over class rows, float32.

        With prior preservation a row and its class row stand side by side: slices are best of even length.
        """
        batch = self.batch
        latents, noise, timesteps = batch.latents[rows], batch.noise[rows], batch.timesteps[rows]
        noisy = self.objective.noisy_latents(latents, noise, timesteps)
        fed = self.objective.model_input(noisy, timesteps).to(self.compute_dtype)
        with self._autocast(latents.device):
            output = denoise(self.models, fed, timesteps, batch.conditioning[rows])
        losses = self.objective.losses(output, latents, noise, noisy, timesteps)
        return (batch.weights[rows] * losses).sum() / batch.instances[rows].sum().clamp_min(1)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss * self.share).backward()

    def in_float32(self) -> "TrainingMicroBatch":
        """The same draws for a loss computed without half precision; see `loss_gap.float32_computation`."""
        return replace(self, compute_dtype=torch.float32)

    def _autocast(self, device: torch.device) -> AbstractContextManager:
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.compute_dtype)
