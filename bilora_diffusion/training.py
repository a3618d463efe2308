"""The training step: Algorithm 1 of the paper, with any method in Bi-LoRA's place."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from bilora_diffusion.adapters import auxiliary_off
from bilora_diffusion.applied import copy_if, step_if
from bilora_diffusion.base_prediction import hold_to_base
from bilora_diffusion.batches import Batch, TrainingMicroBatch
from bilora_diffusion.compilation import uncompiled
from bilora_diffusion.diffusion import Objective
from bilora_diffusion.fused import AllFactors
from bilora_diffusion.methods import Method
from bilora_diffusion.optimizers import load_state
from bilora_diffusion.processes import Mark, Reading, average_gradients, process_number
from bilora_diffusion.randomness import stream_seed

__all__ = ["BegunStep", "Step", "Trainer"]


@dataclass(frozen=True)
class Step:
    """What came of one optimiser step.

    Arguments:
        loss: the back-propagated loss, mean over micro-batches and processes.
        applied: False where the step was skipped: the loss or a gradient was not finite.
        stop: some process wants to stop after this step.
        measures: what the method tells of itself, see `Method.measures`.
    """

    loss: float
    applied: bool
    stop: bool
    measures: dict[str, float]


class BegunStep:
    """A step that the device was asked for and may still be at work on.

    Attributes:
        done: when it has finished.
    """

    def __init__(self, loss: Tensor, applied: Tensor, wishes: Tensor, measures: Mapping[str, Tensor]) -> None:
        self._reading = Reading({"loss": loss, "applied": applied, "wishes": wishes, **measures})

    @property
    def done(self) -> Mark:
        return self._reading.taken

    def result(self) -> Step:
        """Waits for the device."""
        numbers = self._reading.numbers()
        loss, applied, wishes = (numbers.pop(name) for name in ("loss", "applied", "wishes"))
        return Step(loss, applied > 0, wishes > 0, numbers)


class Trainer:
    """The state that a step changes: adapters, optimisers, schedules, loss scale.

    Arguments:
        models: the trained parts by name, frozen but for their adapters, on one device.
        primary: the primary's parameters by part.
        optimizer: descends on them.
        method: see `methods.interface`.
        schedulers: learning-rate schedules of the optimiser and of the method's own; stepped together.
        compute_dtype: of the forward pass.
        max_grad_norm: bound on the global norm of the primary's gradient; 0 = none. The auxiliary's gradient has no
            part in it.
        base_prior: hold the class rows to the frozen base's prediction; see `base_prediction`.
        ema_decay: of the moving average of the primary that `as_exported` shows, None = the primary itself.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        objective: Objective,
        primary: Mapping[str, Sequence[nn.Parameter]],
        optimizer: torch.optim.Optimizer,
        method: Method,
        schedulers: Sequence[torch.optim.lr_scheduler.LRScheduler],
        *,
        compute_dtype: torch.dtype,
        max_grad_norm: float,
        seed: int,
        base_prior: bool = False,
        ema_decay: float | None = None,
    ) -> None:
        self.models = models
        self.factors = AllFactors(models.values())
        self.objective = objective
        self.primary = [parameter for part in primary.values() for parameter in part]
        self.optimizer = optimizer
        self.method = method
        self.schedulers = schedulers
        self.compute_dtype = compute_dtype
        self.max_grad_norm = max_grad_norm
        self.seed = seed
        self.base_prior = base_prior
        self.trained = [*self.primary, *method.parameters]
        self.average = None if ema_decay is None else EMAModel(self.primary, decay=ema_decay, foreach=True)
        device = self.primary[0].device.type
        self.scaler = torch.amp.GradScaler(device, enabled=compute_dtype == torch.float16)
        # The scaler takes its scale off the gradients of an optimiser. Both adapters must come off together and be
        # skipped together, so it is shown one that holds both and never steps.
        self._all_gradients = torch.optim.SGD(self.trained, lr=0.0) if self.scaler.is_enabled() else None

    def micro_batches(self, batches: Sequence[Batch]) -> list[TrainingMicroBatch]:
        """Binds the drawn rows of one optimiser step to the models, outside any perturbation."""
        share = 1 / len(batches)
        bound = [
            TrainingMicroBatch(batch, self.models, self.objective, self.compute_dtype, share, self.scaler, self.factors)
            for batch in batches
        ]
        return [hold_to_base(micro_batch) for micro_batch in bound] if self.base_prior else bound

    def training_step(self, micro_batches: Sequence[TrainingMicroBatch], number: int, stop: bool = False) -> Step:
        """`begin_step`, and its result."""
        return self.begin_step(micro_batches, number, stop).result()

    def begin_step(self, micro_batches: Sequence[TrainingMicroBatch], number: int, stop: bool = False) -> BegunStep:
        """One optimiser step, asked of the device: the host never waits for it, so it can ask for the next meanwhile.

        A step whose loss or gradient is not finite changes neither adapters nor moments nor the average, which is
        decided on the device. It counts as a step for all that the host counts: learning rates, ramps of noise and
        radii go on.

        Arguments:
            number: of this step in the run, from 0; the seed of what dropout draws.
            stop: this process would like the run to end after this step.
        """
        torch.manual_seed(stream_seed(self.seed, "dropout", number, self.rank))
        loss = self.method.accumulate(micro_batches)  # at W0 + s1 B1 A1 + s2 B2 A2
        wishes = torch.full_like(loss, float(stop))  # filled on the device: copying a number there would wait for it
        loss, wishes = average_gradients(self.trained, loss, wishes)
        norm, norm_of_primary = self._unscaled_norms()
        applied = torch.isfinite(loss) & torch.isfinite(norm)
        if self.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.primary, self.max_grad_norm, norm_of_primary)
        self.method.before_step(applied)
        step_if(self.optimizer, applied)  # descent on (A1, B1)
        self.method.after_step(applied)  # Bi-LoRA: ascent on (A2, B2), then the global clip
        for scheduler in self.schedulers:
            scheduler.step()
        if self.average is not None:
            before = torch._foreach_mul(self.average.shadow_params, 1.0)  # copies, in a few calls
            self.average.step(self.primary)
            copy_if(~applied, self.average.shadow_params, before)
        if self.scaler.is_enabled():
            self.scaler.update()
        for parameter in self.trained:
            parameter.grad = None
        return BegunStep(loss, applied, wishes, self.method.measures())

    @contextmanager
    def as_exported(self) -> Iterator[None]:
        """Inside, the models are what the written files hold: no perturbation, the primary's average if one is kept."""
        with auxiliary_off(self.models.values()), uncompiled():
            if self.average is None:
                yield
                return
            self.average.store(self.primary)
            try:
                self.average.copy_to(self.primary)
                yield
            finally:
                self.average.restore(self.primary)

    @property
    def rank(self) -> int:
        """Of this process: dropout differs between processes as it does between rows."""
        return process_number()

    def _unscaled_norms(self) -> tuple[Tensor, Tensor]:
        """Takes fp16's loss scale off all gradients.

        Returns:
            (the global norm of all of them, which tells whether one is not finite, that of the primary's alone).
        """
        if self._all_gradients is not None:
            self.scaler.unscale_(self._all_gradients)
        gradients = [parameter.grad for parameter in self.trained if parameter.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients))
        of_primary = sum(parameter.grad is not None for parameter in self.primary)  # they come first
        return torch.linalg.vector_norm(norms), torch.linalg.vector_norm(norms[:of_primary])

    def state_dict(self) -> dict[str, Any]:
        """All but the adapters' weights. Random numbers need no state: see `randomness`."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "scaler": self.scaler.state_dict(),
            "method": self.method.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        load_state(self.optimizer, state["optimizer"])
        for scheduler, saved in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        if state["scaler"]:  # empty where the run so far was not in fp16
            self.scaler.load_state_dict(state["scaler"])
        self.method.load_state_dict(state["method"])
        if self.average is not None:
            self.average.load_state_dict(dict(state["average"]))
            self.average.to(self.primary[0].device)
