"""Two perturbations in one step: the gradient is taken at the sum of both."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from bilora_diffusion.methods.interface import Method, MicroBatch

__all__ = ["Combined"]


class Combined(Method):
    """A method under another's perturbation, such as Bi-LoRA under Flat-LoRA's noise.

    Arguments:
        method: finds its own perturbation, if it looks for one, with the other's on.
        under: perturbs without looking at the batch and trains nothing itself.
    """

    perturbs = True

    def __init__(self, method: Method, under: Method) -> None:
        super().__init__()
        self.method = method
        self.under = under
        self.parameters = method.parameters
        self.schedulable = method.schedulable
        self.settings = {**under.settings, **method.settings}

    @contextmanager
    def perturbed(self, micro_batches: Sequence[MicroBatch]) -> Iterator[None]:
        with self.under.perturbed(micro_batches), self.method.perturbed(micro_batches):
            yield

    def accumulate(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        with self.under.perturbed(micro_batches):
            return self.method.accumulate(micro_batches)

    def before_step(self, applied: Tensor) -> None:
        self.method.before_step(applied)
        self.under.before_step(applied)

    def after_step(self, applied: Tensor) -> None:
        self.method.after_step(applied)
        self.under.after_step(applied)

    def measures(self) -> dict[str, Tensor]:
        return {**self.under.measures(), **self.method.measures()}

    def state_dict(self) -> dict[str, Any]:
        return {"method": self.method.state_dict(), "under": self.under.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.method.load_state_dict(state["method"])
        self.under.load_state_dict(state["under"])
