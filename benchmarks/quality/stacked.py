"""Several runs over one frozen base: what they give it to do at the same time goes through it as one batch.

Each run stays the trainer's own, with its adapters, its method, its optimiser and its draws, in a thread of its own.
Where it would call its UNet it hands its rows over and waits; once every run has come to such a call, one pass over a
common UNet computes the rows of all, and one backward pass the gradients of all. The common UNet has no adapters: where
a run has an adapted layer, the run's rows go through that layer, with its factors, its noise and whatever else its
method has put on it. So runs need not be alike: a method of two passes takes part twice as often, and is done later.
"""

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from bilora_diffusion.adapters import UNET, adapted_layers
from bilora_diffusion.batches import TrainingMicroBatch

__all__ = ["Member", "stacked"]

Result = TypeVar("Result")


@dataclass(eq=False)
class _Call:
    """What one run wants: rows forward, or the gradient of its last rows back.

    Arguments:
        inputs: of the UNet for some rows, None of a backward pass.
        gradient: of the output, None of a forward pass.
        with_graph: a backward pass may follow.
    """

    member: int
    inputs: dict[str, Tensor] | None = None
    gradient: Tensor | None = None
    with_graph: bool = False
    output: Tensor | None = None
    error: BaseException | None = None
    done: bool = False


@dataclass(eq=False)
class _Pass:
    """A forward pass of several runs' rows that waits for its backward pass.

    Arguments:
        output: of all rows, with its graph.
        rows: (member, number of rows) in their order.
    """

    output: Tensor
    rows: list[tuple[int, int]]
    gradients: dict[int, Tensor] = field(default_factory=dict)


class _Stack:
    """The common UNet, and the runs that wait for it.

    Arguments:
        unet: the base, without adapters; it is copied.
        adapted: the same with adapters, one for each run.
    """

    def __init__(self, unet: nn.Module, adapted: Sequence[nn.Module]) -> None:
        self._rows: list[tuple[int, int]] = []
        self._unet = copy.deepcopy(unet).requires_grad_(False).train()
        for name, _ in adapted_layers(adapted[0]):
            layers = [one.get_submodule(name) for one in adapted]
            self._unet.set_submodule(name, _Dealt(layers, self._rows))
        self._running = set(range(len(adapted)))
        self._waiting: list[_Call] = []
        self._passes: dict[int, _Pass] = {}
        self._changed = threading.Condition()
        self._stopped = False

    def answered(self, call: _Call) -> _Call:
        """Waits until all others have come to a call, too.

        Raises:
            RuntimeError: the common pass failed, or the stack is stopped.
        """
        with self._changed:
            self._waiting.append(call)
            self._answer_if_all_wait()
            self._changed.wait_for(lambda: call.done or self._stopped)
        self.check()
        if call.error is not None:
            raise RuntimeError("a pass that several runs shared failed") from call.error
        return call

    def leave(self, member: int) -> None:
        """The others wait for this one no longer."""
        with self._changed:
            self._running.discard(member)
            self._passes.pop(member, None)
            self._answer_if_all_wait()

    def stop(self) -> None:
        """Every run raises that waits or comes to a call."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def check(self) -> None:
        """Raises `RuntimeError` if the stack is stopped."""
        if self._stopped:
            raise RuntimeError("the stack was stopped")

    def _answer_if_all_wait(self) -> None:
        if self._stopped or not self._waiting or len(self._waiting) < len(self._running):
            return
        calls, self._waiting = self._waiting, []
        calls.sort(key=lambda call: call.member)  # whoever came first: a batch's order is the same in each repeat
        try:
            for with_graph in (False, True):
                self._forward([c for c in calls if c.inputs is not None and c.with_graph is with_graph], with_graph)
            self._backward([call for call in calls if call.gradient is not None])
        except BaseException as error:  # raised again in every run that waits
            for call in calls:
                call.error = error
        for call in calls:
            call.done = True
        self._changed.notify_all()

    def _forward(self, calls: Sequence[_Call], with_graph: bool) -> None:
        if not calls:
            return
        self._rows[:] = [(call.member, len(call.inputs["latents"])) for call in calls]
        given = {name: torch.cat([call.inputs[name] for call in calls]) for name in calls[0].inputs}
        with torch.set_grad_enabled(with_graph):
            output = self._unet(
                given["latents"],
                given["timesteps"],
                encoder_hidden_states=given["prompt_embeds"],
                added_cond_kwargs={name: given[name] for name in ("text_embeds", "time_ids")},
                return_dict=False,
            )[0]
        shared = _Pass(output, list(self._rows))
        for call, piece in zip(calls, output.detach().split([count for _, count in self._rows]), strict=True):
            call.output = piece.requires_grad_(with_graph)
            if with_graph:
                self._passes[call.member] = shared

    def _backward(self, calls: Sequence[_Call]) -> None:
        passes: dict[int, _Pass] = {}
        for call in calls:
            shared = self._passes.pop(call.member)
            shared.gradients[call.member] = call.gradient
            passes[id(shared)] = shared
        for shared in passes.values():
            pieces = shared.output.split([count for _, count in shared.rows])
            # A run that has left, or has no use for its gradient, has no part in it.
            gradients = [
                shared.gradients.get(member, torch.zeros_like(piece))
                for (member, _), piece in zip(shared.rows, pieces, strict=True)
            ]
            shared.output.backward(torch.cat(gradients))


class _Dealt(nn.Module):
    """Gives each run's rows to that run's layer. The layers are the runs', not its own submodules."""

    def __init__(self, layers: Sequence[nn.Module], rows: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.layers, self.rows = tuple(layers), rows

    def forward(self, x: Tensor) -> Tensor:
        pieces = x.split([count for _, count in self.rows])
        return torch.cat([self.layers[member](piece) for (member, _), piece in zip(self.rows, pieces, strict=True)])


class Member:
    """One run's place in a stack: what stands in its micro-batches for its UNet."""

    def __init__(self, stack: _Stack, number: int) -> None:
        self._stack, self._number = stack, number
        self._output: Tensor | None = None

    def __call__(
        self,
        latents: Tensor,
        timesteps: Tensor,
        *,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: dict[str, Tensor],
        return_dict: bool,
    ) -> tuple[Tensor]:
        """As the UNet; the output is where this run's own graph begins."""
        inputs = {"latents": latents, "timesteps": timesteps, "prompt_embeds": encoder_hidden_states}
        call = _Call(self._number, inputs | added_cond_kwargs, with_graph=torch.is_grad_enabled())
        self._output = self._stack.answered(call).output
        return (self._output,)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a loss to `.grad` of the run's parameters."""
        (gradient,) = torch.autograd.grad(loss, self._output)
        self._output = None
        self._stack.answered(_Call(self._number, gradient=gradient))

    def bind(self, micro_batches: Sequence[TrainingMicroBatch]) -> list[TrainingMicroBatch]:
        """The same draws, computed by the stack."""
        return [StackedMicroBatch(**vars(one) | {"models": {UNET: self}, "factors": None}) for one in micro_batches]

    def leave(self) -> None:
        """The run calls no more."""
        self._stack.leave(self._number)


class StackedMicroBatch(TrainingMicroBatch):
    """Of a run in a stack: float32, the UNet alone trained."""

    def _backward(self, loss: Tensor) -> None:
        self.models[UNET].backward(self.scaler.scale(loss))


def stacked(unet: nn.Module, adapted: Sequence[nn.Module], run: Callable[[int, Member], Result]) -> list[Result]:
    """Runs side by side in threads, as one stack.

    Arguments:
        unet: the base that they share, without adapters.
        adapted: each run's own, the base with its adapters.
        run: the i-th one with its place; it has left the stack when it ends.

    Returns:
        what they return. What one of them raises is raised, when all have ended; what is raised here meanwhile, such
        as by Ctrl-C, ends each at its next call, of its own UNet too.
    """
    stack = _Stack(unet, adapted)

    def in_thread(number: int) -> Result:
        member = Member(stack, number)
        try:
            return run(number, member)
        finally:
            member.leave()

    # A run calls its own UNet to evaluate it and to draw.
    hooks = [one.register_forward_pre_hook(lambda *_: stack.check()) for one in adapted]
    try:
        with ThreadPoolExecutor(len(adapted)) as pool:  # waits for its threads
            try:
                futures = [pool.submit(in_thread, number) for number in range(len(adapted))]
                wait(futures)
            except BaseException:
                stack.stop()
                raise
    finally:
        for hook in hooks:
            hook.remove()
    return [future.result() for future in futures]
