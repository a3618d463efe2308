"""The denoising objective: noising, what the model should predict, how much each row counts.

Pure functions of latents, noise and timesteps; nothing random is drawn inside, so that a method can evaluate the same
draws twice and a test can check the arithmetic.
"""

from dataclasses import dataclass, field

import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, EulerDiscreteScheduler
from diffusers.training_utils import compute_snr
from torch import Generator, Tensor

from bilora_diffusion.errors import UserError

__all__ = ["Objective", "build_objective", "draw_noise", "draw_timestep"]

Scheduler = DDPMScheduler | EulerDiscreteScheduler | EDMEulerScheduler


@dataclass(frozen=True)
class Objective:
    """One training objective.

    Arguments:
        scheduler: holds the noise schedule: DDPM's discrete one, or for EDM-style training an Euler scheduler's sigmas.
        edm: preconditioned prediction of the clean latents (Karras et al., 2022).
        snr_gamma: gamma of min-SNR weighting, unset = every timestep counts the same.

    Reference:
        Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), arXiv 2206.00364.
        Efficient Diffusion Training via Min-SNR Weighting Strategy (Hang et al., 2023), arXiv 2303.09556.
    """

    scheduler: Scheduler
    edm: bool = False
    snr_gamma: float | None = None
    _schedules: dict[torch.device, tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        known = ("epsilon", "v_prediction") if self.edm else ("epsilon", "v_prediction", "sample")
        if self.prediction_type not in known:
            raise UserError(
                f"the base's scheduler predicts '{self.prediction_type}'; this trainer knows {', '.join(known)}"
            )

    @property
    def prediction_type(self) -> str:
        return self.scheduler.config.prediction_type

    def noisy_latents(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The forward process at each row's timestep, (B, 4, H/8, W/8)."""
        if self.edm:  # as the scheduler's own, which looks each timestep up on the host
            return latents + self._sigmas(timesteps, latents) * noise
        return self.scheduler.add_noise(latents, noise, timesteps)

    def model_input(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """What the UNet is fed: the noisy latents, for EDM divided by sqrt(sigma^2 + sigma_data^2)."""
        if not self.edm:
            return noisy
        sigma = self._sigmas(timesteps, noisy)
        if self._own_edm:
            return self.scheduler.precondition_inputs(noisy, sigma)
        return noisy / (sigma**2 + 1).sqrt()

    def losses(self, output: Tensor, latents: Tensor, noise: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """The weighted mean squared error of each row, (B,), float32."""
        return self.errors(output, self.targets(latents, noise, timesteps), noisy, timesteps)

    def targets(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a perfect model predicts, (B, 4, H/8, W/8), float32; see `predictions`."""
        latents, noise = latents.float(), noise.float()
        if self.edm or self.prediction_type == "sample":
            return latents
        if self.prediction_type == "epsilon":
            return noise
        return self.scheduler.get_velocity(latents, noise, timesteps)

    def predictions(self, output: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """The UNet's output as what the loss compares with `targets`, float32: for EDM the denoised latents."""
        output, noisy = output.float(), noisy.float()
        if not self.edm:
            return output
        sigma = self._sigmas(timesteps, noisy)
        if self._own_edm:
            return self.scheduler.precondition_outputs(noisy, output, sigma)
        if self.prediction_type == "epsilon":
            return noisy - sigma * output
        return noisy / (sigma**2 + 1) - output * sigma / (sigma**2 + 1).sqrt()

    def errors(
        self,
        output: Tensor,
        targets: Tensor,
        noisy: Tensor,
        timesteps: Tensor,
        place_weights: Tensor | None = None,
    ) -> Tensor:
        """The weighted mean squared distance of each row's prediction from its target, (B,), float32.

        Arguments:
            place_weights: (B, 1, H/8, W/8), of the squares in their mean, a mean of 1 for the usual size; None: all 1.
        """
        squares = (self.predictions(output, noisy, timesteps) - targets).square()
        if place_weights is not None:
            squares = squares * place_weights
        if not self.edm:
            return squares.flatten(1).mean(1) * self._snr_weights(timesteps)
        # sigma^-2 where the schedule is not EDM's own.
        weights = 1.0 if self._own_edm else self._sigmas(timesteps, squares) ** -2
        return (weights * squares).flatten(1).mean(1)

    @property
    def _own_edm(self) -> bool:
        return isinstance(self.scheduler, EDMEulerScheduler)

    def _snr_weights(self, timesteps: Tensor) -> Tensor | float:
        """min(snr, gamma) / snr for epsilon, / (snr + 1) for velocity, min(snr, gamma) for the sample itself."""
        if self.snr_gamma is None:
            return 1.0
        snr = compute_snr(self.scheduler, timesteps).float()
        clipped = snr.clamp_max(self.snr_gamma)
        if self.prediction_type == "v_prediction":
            return clipped / (snr + 1)
        if self.prediction_type == "sample":
            return clipped
        # A zero-terminal-SNR schedule has snr = 0 at its last timestep: the limit of the quotient there is 1.
        return torch.where(snr > 0, clipped / snr.clamp_min(torch.finfo(snr.dtype).tiny), 1.0)

    def _sigmas(self, timesteps: Tensor, like: Tensor) -> Tensor:
        """Each row's noise level, (B, 1, 1, 1)."""
        device = timesteps.device
        if device not in self._schedules:
            self._schedules[device] = self.scheduler.timesteps.to(device), self.scheduler.sigmas.to(device)
        schedule, sigmas = self._schedules[device]
        index = (schedule[None] == timesteps[:, None]).float().argmax(1)
        return sigmas.to(like)[index].reshape(-1, 1, 1, 1)


def build_objective(scheduler, *, edm: bool = False, snr_gamma: float | None = None) -> Objective:
    """The training objective that fits a base's sampling scheduler.

    Arguments:
        scheduler: the base pipeline's own, whatever its class. An EDM scheduler means EDM-style training in any case:
            the base knows nothing else.
        edm: `--do_edm_style_training`.

    Raises:
        UserError: min-SNR weighting with EDM-style training, which has no timesteps to weight.
    """
    own_edm = type(scheduler).__name__.startswith("EDM")
    if own_edm and snr_gamma is not None:
        raise UserError("--snr_gamma: the base's scheduler is EDM's, whose loss needs no min-SNR weights; leave it out")
    if own_edm:
        return Objective(EDMEulerScheduler.from_config(scheduler.config), edm=True)
    if edm:
        return Objective(EulerDiscreteScheduler.from_config(scheduler.config), edm=True)
    return Objective(DDPMScheduler.from_config(scheduler.config), snr_gamma=snr_gamma)


def draw_timestep(objective: Objective, generator: Generator) -> Tensor:
    """A timestep drawn uniformly from the schedule, a scalar (int64; EDM's may be fractional)."""
    index = torch.randint(objective.scheduler.config.num_train_timesteps, (), generator=generator)
    return objective.scheduler.timesteps[index] if objective.edm else index


def draw_noise(shape: tuple[int, int, int], generator: Generator, offset: float = 0.0) -> Tensor:
    """Gaussian noise for one row's latents, (C, h, w), float32 on the CPU.

    Arguments:
        offset: strength of a constant added to each channel, so that the mean brightness is learned too
            (--noise_offset; Guttenberg, "Diffusion with Offset Noise", 2023).
    """
    noise = torch.randn(shape, generator=generator)
    # Drawn in any case: the noise of a run must not depend on whether an option is on.
    constant = torch.randn((shape[0], 1, 1), generator=generator)
    return noise + offset * constant if offset else noise
