"""From rows of the data set to a micro-batch with its noise and timesteps drawn, and from that to its loss."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bilora_diffusion.data.dreambooth import Row
from bilora_diffusion.data.latents import LatentSource
from bilora_diffusion.diffusion import Objective, draw_noise, draw_timestep
from bilora_diffusion.fused import AllFactors
from bilora_diffusion.processes import to_device
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
        base_predictions: (B, 4, H/8, W/8), float32: what the class rows are held to in place of the truth
            (`--prior_source base_prediction`); None without.
        place_weights: (B, 1, H/8, W/8), the weight of each place of the latents in its row's loss: a mask, ones where a
            row has none; None where no row has one.
        is_repeat: the step before had the same rows at the same timesteps, under another noise.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    conditioning: Conditioning
    weights: Tensor
    instances: Tensor
    base_predictions: Tensor | None = None
    place_weights: Tensor | None = None
    is_repeat: bool = False

    def __len__(self) -> int:
        return len(self.latents)


class BatchMaker:
    """Draws noise and timesteps for rows and brings everything to the device.

    A row's draws depend on the seed and its draw number alone: not on its rank, its place in the batch or the method.
    Its timestep is that of the first draw that showed it.

    Arguments:
        prior_prompt: `--class_prompt` with `--prior_source base_prediction`: every instance row is followed by a class
            row that differs from it in the prompt alone. None otherwise.
    """

    def __init__(
        self,
        objective: Objective,
        latents: LatentSource,
        prompts: Prompts,
        *,
        seed: int,
        noise_offset: float,
        prior_loss_weight: float,
        device: torch.device,
        prior_prompt: str | None = None,
    ) -> None:
        self.objective = objective
        self.latents = latents
        self.prompts = prompts
        self.seed = seed
        self.noise_offset = noise_offset
        self.prior_loss_weight = prior_loss_weight
        self.device = device
        self.prior_prompt = prior_prompt

    def __call__(self, rows: Sequence[Row]) -> Batch:
        latents, noises, timesteps = [], [], []
        moments = self.latents.moments(rows)
        for row, moment in zip(rows, moments, strict=True):
            stream = (row.draw, "class" if row.is_class else "instance")
            posterior = torch.randn(moment.mean.shape, generator=generator(self.seed, "posterior", *stream))
            latents.append(latents_from(moment, self.latents.vae_config, posterior))
            shape = tuple(moment.mean.shape)
            noises.append(draw_noise(shape, generator(self.seed, "noise", *stream), self.noise_offset))
            timesteps.append(draw_timestep(self.objective, generator(self.seed, "timestep", row.first, stream[1])))
        sizes = [time_ids(row.original_size, row.crop_top_left, row.target) for row in rows]
        prompts = [row.prompt for row in rows]
        instances = [float(not row.is_class) for row in rows]
        places = self.latents.loss_weights(rows)
        if self.prior_prompt is not None:
            latents, noises, timesteps, sizes = map(_doubled, (latents, noises, timesteps, sizes))
            places = [place for own in places for place in (own, None)]
            prompts = [prompt for own in prompts for prompt in (own, self.prior_prompt)]
            instances = [1.0, 0.0] * len(rows)
        is_instance = torch.tensor(instances)
        weights = torch.where(is_instance > 0, 1.0, self.prior_loss_weight)
        conditioning = self.prompts.conditioning(prompts, torch.stack(sizes))
        place_weights = self._place_weights(places, latents)
        latents, noises, timesteps, weights, is_instance = (
            to_device(tensor, self.device)
            for tensor in (torch.stack(latents), torch.stack(noises), torch.stack(timesteps), weights, is_instance)
        )
        return Batch(
            latents,
            noises,
            timesteps,
            conditioning.to(self.device),
            weights,
            is_instance,
            place_weights=place_weights,
            is_repeat=any(row.draw != row.first for row in rows),
        )

    def _place_weights(self, weights: Sequence[Tensor | None], latents: Sequence[Tensor]) -> Tensor | None:
        if all(weight is None for weight in weights):
            return None
        ones = torch.ones(latents[0].shape[1:])
        stacked = torch.stack([ones if weight is None else weight for weight in weights])[:, None]
        return to_device(stacked, self.device)


def _doubled(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor for tensor in tensors for _ in range(2)]


@dataclass(frozen=True)
class TrainingMicroBatch:
    """A batch bound to the models whose loss it measures: `methods.MicroBatch`.

    Arguments:
        models: the trained parts, called at their present weights, whatever perturbation is on.
        compute_dtype: what the UNet is fed; autocast runs in it where it is a half precision.
        share: this micro-batch's part of the step's mean, 1 / micro-batches.
        scaler: fp16's loss scale, disabled otherwise.
        factors: of the models, to be joined for a pass all at once; None: layer by layer.
    """

    batch: Batch
    models: Mapping[str, nn.Module]
    objective: Objective
    compute_dtype: torch.dtype
    share: float
    scaler: torch.amp.GradScaler
    factors: AllFactors | None = None

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def is_repeat(self) -> bool:
        return self.batch.is_repeat

    def loss(self, rows: slice = slice(None)) -> Tensor:
        """The mean over instance rows plus the prior's weight times the mean over class rows, float32.

        With prior preservation a row and its class row stand side by side: slices are best of even length.
        """
        batch = self.batch
        latents, noise, timesteps = batch.latents[rows], batch.noise[rows], batch.timesteps[rows]
        noisy = self.objective.noisy_latents(latents, noise, timesteps)
        targets = self.objective.targets(latents, noise, timesteps)
        if batch.base_predictions is not None:
            is_instance = batch.instances[rows].reshape(-1, 1, 1, 1) > 0
            targets = torch.where(is_instance, targets, batch.base_predictions[rows])
        output = self._output(noisy, timesteps, batch.conditioning[rows])
        weights = None if batch.place_weights is None else batch.place_weights[rows]
        losses = self.objective.errors(output, targets, noisy, timesteps, weights)
        return (batch.weights[rows] * losses).sum() / batch.instances[rows].sum().clamp_min(1)

    @torch.no_grad()
    def predictions(self, rows: slice = slice(None)) -> Tensor:
        """What the models predict for some rows at their present weights, (B, 4, H/8, W/8), float32, no graph."""
        batch = self.batch
        timesteps = batch.timesteps[rows]
        noisy = self.objective.noisy_latents(batch.latents[rows], batch.noise[rows], timesteps)
        output = self._output(noisy, timesteps, batch.conditioning[rows])
        return self.objective.predictions(output, noisy, timesteps)

    def add_gradient(self, rows: slice = slice(None), weight: float = 1.0) -> Tensor:
        with nullcontext() if self.factors is None else self.factors.joined(self.compute_dtype):
            loss = self.loss(rows)
            self._backward(loss * (weight * self.share))
        return loss.detach()

    def _backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def in_float32(self) -> "TrainingMicroBatch":
        """The same draws for a loss computed without half precision; see `loss_gap.float32_computation`."""
        return replace(self, compute_dtype=torch.float32)

    def _output(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        fed = self.objective.model_input(noisy, timesteps).to(self.compute_dtype)
        with self._autocast(noisy.device):
            return denoise(self.models, fed, timesteps, conditioning)

    def _autocast(self, device: torch.device) -> AbstractContextManager:
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.compute_dtype)
