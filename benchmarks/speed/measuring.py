"""The measurements: interleaved times, memory, kernels, the UNet's share, and what the device could do."""

import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from benchmarks.speed.contenders import BASELINE, Contender, Setting, Specification
from bilora_diffusion.compilation import uncompiled
from bilora_diffusion.memory.counting import StorageCounter

__all__ = ["Sample", "StepCounter", "base_tensors", "in_rounds", "matmul_flops_per_second", "prepare"]

STEPS_ON_A_GPU = 4
"""In a sample, without a wait in between: the host asks for the next while the GPU is at work."""
NEIGHBOURS = 3
"""So many others between two samples of the baseline."""


@dataclass(frozen=True)
class Sample:
    """One step, or the mean over a cycle of them.

    Arguments:
        place: in time, over all contenders.
        seconds: by the clock, the device's work included.
        cpu_seconds: of this process: what a busy machine changes least.
    """

    round: int
    place: int
    seconds: float
    cpu_seconds: float


class Runner:
    """A contender, the steps it took, and what was seen of it."""

    def __init__(self, name: str, contender: Contender, device: torch.device) -> None:
        self.name = name
        self.contender = contender
        self.device = device
        self.taken = 0
        self.samples: list[Sample] = []

    def step(self) -> None:
        self.contender.step(self.taken)
        self.taken += 1

    def cycle(self) -> None:
        """So many steps that all its kinds of them are among them."""
        for _ in range(self.contender.cycle):
            self.step()

    def sample(self, number: int, place: int) -> Sample:
        _wait(self.device)
        cycles = STEPS_ON_A_GPU if self.device.type == "cuda" else 1
        began, cpu = time.perf_counter(), time.process_time()
        for _ in range(cycles):
            self.cycle()
        _wait(self.device)
        steps = cycles * self.contender.cycle
        taken = Sample(number, place, (time.perf_counter() - began) / steps, (time.process_time() - cpu) / steps)
        self.samples.append(taken)
        return taken


def prepare(
    wanted: Sequence[Specification], setting: Setting, say: Callable[[str], None]
) -> tuple[list[Runner], dict[str, dict[str, Any]]]:
    """Builds all contenders, warms them up and looks at each by itself.

    Returns:
        the contenders, and for each name what does not need repeating: `flops`, `operations`, `counted_bytes`,
        `outside_unet`, and on CUDA `kernels` and `peak_memory_bytes` (None elsewhere).
    """
    runners, facts = [], {}
    on_cuda = setting.device.type == "cuda"
    shared = torch.cuda.memory_allocated() if on_cuda else 0
    for specification in wanted:
        before = torch.cuda.memory_allocated() if on_cuda else 0
        began = time.perf_counter()
        with StepCounter(setting.device, setting.base.tensors()) as counter:
            runner = Runner(specification.name, specification.build(setting), setting.device)
            assembled = time.perf_counter() - began
            # Where a contender lays the base's weights out in its own way, a run has them in place of the others.
            counter.leave_out(base_tensors(runner.contender.unet))
            with uncompiled():
                runner.cycle()  # not like the others: optimisers allocate their state
            found = _counted(runner, counter)
        found["counted_bytes"] += sum(tensor.nbytes for tensor in runner.contender.beside_unet())
        if specification.flags.get("compile"):
            for _ in range(2):
                runner.cycle()  # the programs are made in the first steps
        found |= {"peak_memory_bytes": None, "kernels": None}
        if on_cuda:
            own = torch.cuda.memory_allocated() - before
            found |= {"peak_memory_bytes": shared + own + _rise(runner), "kernels": _kernels(runner)}
        facts[runner.name] = found | {"outside_unet": _outside_unet(runner)}
        runners.append(runner)
        say(f"{runner.name} is ready, assembled in {assembled:.1f} s")
    return runners, facts


def base_tensors(unet: nn.Module) -> Iterator[Tensor]:
    """All but the adapters'."""
    yield from (parameter for name, parameter in unet.named_parameters() if ".lora_" not in name)
    yield from unet.buffers()


def in_rounds(runners: Sequence[Runner], enough: Callable[[int], bool], say: Callable[[str], None]) -> None:
    """Samples all contenders in turn, in another order each round, the baseline every few places.

    Arguments:
        enough: told the number of rounds done, says whether to stop.
    """
    by_name = {runner.name: runner for runner in runners}
    others = [name for name in by_name if name != BASELINE]
    order, place, done = random.Random(0), 0, 0
    while not enough(done):
        order.shuffle(others)
        for name in _with_baseline(others):
            by_name[name].sample(done, place)
            place += 1
        done += 1
        say(f"round {done}")


def _with_baseline(others: Sequence[str]) -> Iterator[str]:
    """The baseline first, last, and after every few others: each other has one near before and after it."""
    for place, name in enumerate(others):
        if place % NEIGHBOURS == 0:
            yield BASELINE
        yield name
    yield BASELINE


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _rise(runner: Runner) -> int:
    """Bytes that a step needs for a while on top of what stays."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    runner.cycle()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _kernels(runner: Runner) -> float:
    """Kernels that a step launches, copies and fills left out."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        runner.cycle()
        torch.cuda.synchronize()
    kernels = [
        event
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.is_user_annotation
        and not event.name.startswith(("Memcpy", "Memset"))
    ]
    return len(kernels) / runner.contender.cycle


class StepCounter(StorageCounter):
    """Counts bytes, operations and the work of products, all in one: on a full-size step each counter takes seconds.

    Operations are torch's that compute something: no views, and nothing that only reserves memory. On a GPU each is at
    least one kernel, which the host has to launch; the same on every device, but for optimisers, which take all tensors
    in one operation on some. In several threads only what its own thread asks for, with the backward passes that it
    starts.

    Attributes:
        operations, flops: since `restart`, the latter of matrix products, convolutions and attention.
    """

    NOTHING = frozenset(
        {"_unsafe_view", "detach", "empty", "empty_like", "new_empty", "new_empty_strided", "promote_types"}
    )

    def __init__(self, device: torch.device, known: Iterable[Tensor] = ()) -> None:
        super().__init__(device, known)
        self.operations = self.flops = 0

    def restart(self) -> None:
        super().restart()
        self.operations = self.flops = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = self.seen(function(*args, **(kwargs or {})))
        kind = function.overloadpacket
        self.operations += not (function.is_view or kind.__name__ in self.NOTHING)
        if kind in PRODUCTS:
            self.flops += PRODUCTS[kind](*args, **(kwargs or {}), out_val=result)
        return result


def _product_in_place(_: Any, one: Tensor, other: Tensor, **__: Any) -> int:
    return 2 * one.shape[0] * one.shape[1] * other.shape[1]


PRODUCTS = flop_registry | {torch.ops.aten.addmm_: _product_in_place}
"""What torch's own counter knows, and the product that it does not."""


def _counted(runner: Runner, counter: StepCounter) -> dict[str, float | int]:
    """Of the steps of one cycle, as they are written: a counter cannot look into a program.

    Arguments:
        counter: on already, since before what is to be counted was made.

    Returns:
        `flops` and `operations` of a step, `counted_bytes`: the most that there was at once.
    """
    counter.restart()
    with uncompiled():
        runner.cycle()
    count = runner.contender.cycle
    return {
        "flops": counter.flops / count,
        "operations": counter.operations / count,
        "counted_bytes": counter.peak,
    }


def _outside_unet(runner: Runner) -> float:
    """The share of a step that passes neither in the UNet's forward nor in its backward pass."""
    clock = _Clock(runner.device)
    begin = clock.mark()
    with clock.watching(runner.contender.unet):
        runner.cycle()
    end = clock.mark()
    _wait(runner.device)
    return 1 - sum(clock.between(*span) for span in clock.spans) / clock.between(begin, end)


class _Clock:
    """When a module's forward and backward passes began and ended, in the device's own time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spans: list[tuple[Any, Any]] = []

    def mark(self) -> Any:
        if self.device.type != "cuda":
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) if self.device.type == "cuda" else end - begin

    @contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        begun: list[Any] = []

        def forward_begins(*_) -> None:
            begun.append(self.mark())

        def forward_ends(_, __, outputs: tuple[Tensor, ...]) -> None:
            self.spans.append((begun.pop(), self.mark()))
            if outputs[0].requires_grad:
                outputs[0].register_hook(backward_begins)

        def backward_begins(_) -> None:
            begin = self.mark()
            # The adapters are the graph's only leaves: the backward pass ends where the UNet's does.
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self.spans.append((begin, self.mark())))

        handles = [module.register_forward_pre_hook(forward_begins), module.register_forward_hook(forward_ends)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype) -> dict[str, float | int]:
    """What one large square product reaches: the median of some, after some to warm up."""
    size, repeats = (8192, 20) if device.type == "cuda" else (1024, 20)
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    taken = []
    for _ in range(repeats + 3):
        _wait(device)
        began = time.perf_counter() if device.type == "cuda" else time.process_time()
        one @ other
        _wait(device)
        taken.append((time.perf_counter() if device.type == "cuda" else time.process_time()) - began)
    return {"size": size, "flops_per_second": 2 * size**3 / statistics.median(taken[3:])}


def as_json(runners: Sequence[Runner], facts: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By name, every sample in the order it was taken."""
    return {
        runner.name: facts[runner.name] | {"samples": [list(asdict(one).values()) for one in runner.samples]}
        for runner in runners
    }
