"""Runs that share their passes over the base come out as each does alone."""

import signal
import threading

import pytest
import torch
from tiny_run import Builder, TinyRun, difference

from benchmarks.quality.stacked import Member, stacked
from bilora_diffusion.adapters import auxiliary_off
from bilora_diffusion.method_names import METHOD_NAMES

FLAGS = {"lora_layers": "to_k", "rho": 0.5, "sigma": 0.3, "sigma_schedule": "constant", "looksam_every": 2}
STEPS = 3


def own_flags(method: str) -> dict:
    """Those of `FLAGS` that a method has, the noise on top of bilora's kind left out."""
    noisy = method in ("flat-lora", "rwp-full", "rwp-lora")
    return {name: value for name, value in FLAGS.items() if noisy or not name.startswith("sigma")}


OTHERS = (
    ("bilora", own_flags("bilora") | {"sigma": 0.3, "sigma_schedule": "constant"}),
    ("bilora-fresh", own_flags("bilora-fresh") | {"ascent_basis": "tracked", "train_batch_size": 3}),
    ("lora", {"lora_layers": "to_k", "gradient_accumulation_steps": 2, "use_dora": True}),
    ("lora", {"lora_layers": "to_k", "seed": 1, "init_lora_weights": "pissa"}),
)
RUNS = (*((method, own_flags(method)) for method in METHOD_NAMES), *OTHERS)


def train(run: TinyRun, member: Member | None = None) -> list[float]:
    losses = []
    for number in range(STEPS):
        micro_batches = run.micro_batches(number)
        losses.append(
            run.parts.trainer.training_step(member.bind(micro_batches) if member else micro_batches, number).loss
        )
    return losses


@pytest.mark.parametrize("settings", [RUNS[first::3] for first in range(3)])
def test_every_method_in_a_stack_is_what_it_is_alone(build: Builder, settings: tuple) -> None:
    """Two passes beside one, other numbers of rows, noise on the weights, sketches of gradients, other batches."""
    alone, together = ([build(method, **flags) for method, flags in settings] for _ in range(2))
    start = [run.tensors() for run in alone]
    expected = [train(run) for run in alone]
    losses = stacked(
        build.tiny.unet,
        [run.parts.models["unet"] for run in together],
        lambda number, member: train(together[number], member),
    )
    for (method, _), one, other, before, wanted, found in zip(
        settings, alone, together, start, expected, losses, strict=True
    ):
        assert found == pytest.approx(wanted, rel=1e-5), method
        # AdamW makes whole steps of gradients that are nothing but rounding: those few entries differ.
        assert difference(one.tensors(), other.tensors(), before) < 0.02, method
        for layer, like in zip(one.auxiliary, other.auxiliary, strict=True):  # of bilora-echo zero after a repeat
            assert torch.allclose(layer.B @ layer.A, like.B @ like.A, atol=0.02 * (layer.B @ layer.A).norm().item()), (
                method
            )
    assert len({tuple(one) for one in losses}) > len(losses) / 2  # they are not all the same run


def test_a_loss_without_a_graph_is_of_the_run_as_it_is_then(build: Builder) -> None:
    """The loss gap is: while one run looks at its loss without the auxiliary, the other goes on."""
    runs = [build(**own_flags("bilora")) for _ in range(2)]
    for run in runs:
        run.move_auxiliary()
    with torch.no_grad():
        perturbed = runs[0].micro_batches(0)[0].loss().item()
        with auxiliary_off(runs[0].parts.models.values()):
            plain = runs[0].micro_batches(0)[0].loss().item()
    assert plain != perturbed

    def look(number: int, member: Member) -> list[float]:
        if number == 1:
            return train(runs[1], member)
        (micro_batch,) = member.bind(runs[0].micro_batches(0))
        with torch.no_grad():
            seen = [micro_batch.loss().item()]
            with auxiliary_off(runs[0].parts.models.values()):
                seen.append(micro_batch.loss().item())
        return seen

    seen, losses = stacked(build.tiny.unet, [run.parts.models["unet"] for run in runs], look)
    assert seen == pytest.approx([perturbed, plain], rel=1e-6)
    assert len(losses) == STEPS


@pytest.mark.parametrize("failing", [0, 1])
def test_what_one_run_raises_is_raised_and_holds_nobody_up(build: Builder, failing: int) -> None:
    runs = [build("lora") for _ in range(3)]
    finished = []

    def run(number: int, member: Member) -> None:
        if number == failing:
            raise ValueError("no space left on device")
        finished.append((number, train(runs[number], member)))

    with pytest.raises(ValueError, match="no space left"):
        stacked(build.tiny.unet, [one.parts.models["unet"] for one in runs], run)
    assert sorted(number for number, _ in finished) == [number for number in range(3) if number != failing]


def test_a_failing_pass_ends_all_runs_with_its_reason(build: Builder) -> None:
    runs = [build("lora") for _ in range(2)]
    layer = runs[1].parts.models["unet"].get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_k")
    layer.forward = lambda *_: torch.empty(1).expand(-2)
    with pytest.raises(RuntimeError, match="several runs shared") as caught:
        stacked(build.tiny.unet, [one.parts.models["unet"] for one in runs], lambda n, member: train(runs[n], member))
    assert caught.value.__cause__ is not None


def test_ctrl_c_ends_every_run(build: Builder) -> None:
    """Those that train, and one that has left and evaluates its own UNet."""
    runs = [build("lora") for _ in range(3)]
    ended = []

    def run(number: int, member: Member) -> None:
        step = 0
        try:
            if number == 2:
                member.leave()
            for step in range(500):
                micro_batches = runs[number].micro_batches(step)
                if number == 2:
                    micro_batches[0].loss()
                else:
                    runs[number].parts.trainer.training_step(member.bind(micro_batches), step)
                if (number, step) == (0, 2):
                    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        finally:
            ended.append((number, step))

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            stacked(build.tiny.unet, [one.parts.models["unet"] for one in runs], run)
    finally:
        signal.signal(signal.SIGINT, before)
    assert sorted(number for number, _ in ended) == [0, 1, 2]
    assert all(step < 400 for _, step in ended), ended


@pytest.mark.parametrize(("methods", "a_step"), [(("lora", "nbar", "s2-sam"), 1), (("lora", "lora-sam", "looksam"), 2)])
def test_runs_share_their_passes(build: Builder, methods: tuple[str, ...], a_step: int) -> None:
    """A step costs the passes of one run, beside a method of two passes those of that method."""
    runs = [build(method, **own_flags(method)) for method in methods]
    passes = []

    def count(model: torch.nn.Module, _) -> None:
        if isinstance(model, type(build.tiny.unet)):
            passes.append(model)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        stacked(build.tiny.unet, [one.parts.models["unet"] for one in runs], lambda n, member: train(runs[n], member))
    finally:
        hook.remove()
    assert len(passes) == a_step * STEPS
