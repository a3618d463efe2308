"""What holds for every training method, and what only Bi-LoRA promises.

A later method is added to `method_names.METHOD_NAMES`, and with that to all the invariants here.
"""

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from tiny_run import TinyRun, all_equal, deltas, difference
from torch import Tensor, nn

from bilora_diffusion import assembly, methods
from bilora_diffusion.adapters import AUXILIARY, PRIMARY, LowRank, auxiliary_off, low_rank_layers, product_norm
from bilora_diffusion.batches import Batch
from bilora_diffusion.fused import unfuse
from bilora_diffusion.method_names import METHOD_NAMES, WITH_NOISE
from bilora_diffusion.methods.ascent import NormalizedAscent, OptimizerAscent
from bilora_diffusion.methods.ball import clip_to_ball
from bilora_diffusion.methods.bilora import BiLoRA

every_method = pytest.mark.parametrize("method", METHOD_NAMES)
every_ascent = pytest.mark.parametrize("ascent", ["adamw", "sgd", "normalized"])

APPLIED = torch.tensor(True)
ACTIVE = {"rho": 2.0, "auxiliary_learning_rate": 0.02}
"""A perturbation that is felt within three steps: c / rho is 0.3 then and the loss a percent higher."""


@contextmanager
def gradients_at(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> Iterator[list[list[Tensor]]]:
    """Collects copies of the gradients that an optimiser's steps begin with."""
    seen: list[list[Tensor]] = []

    def copy_them(*_) -> None:
        seen.append([p.grad.clone() for p in parameters if p.grad is not None])

    handle = optimizer.register_step_pre_hook(copy_them)
    try:
        yield seen
    finally:
        handle.remove()


def norm_of(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))


@pytest.fixture(scope="module", autouse=True)
def shared_parts(build) -> Iterator[None]:
    """Hundreds of runs are built here, and none of the tests is about what they only read."""
    build.shares = True
    yield
    build.shares = False


@dataclass(frozen=True)
class Reference:
    """A plain LoRA: its weights at the start and after three steps, and the third step's batches."""

    start: dict[str, Tensor]
    trained: dict[str, Tensor]
    batches: list[Batch]


@pytest.fixture(scope="module")
def lora_of(build) -> Callable[[int], Reference]:
    """The reference for methods that show each draw so many steps in a row. Built once for all of them."""

    @functools.cache
    def reference(steps_per_draw: int) -> Reference:
        run = build("lora", steps_per_draw=steps_per_draw)
        start = run.tensors()
        run.train(3)
        return Reference(start, run.tensors(), run.batches(2))

    return reference


# --- over every method ---


@every_method
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_changes_the_primary_and_nothing_of_the_base(build, method, precision):
    """Every primary tensor but those of text encoder 1's last layer, which SDXL does not read: its B stay zero."""
    run = build(method, precision, train_text_encoder=True, adam_weight_decay_text_encoder=0.0, **ACTIVE)
    base, start = run.base_tensors(), run.tensors()
    run.train(2)
    assert all_equal(base, run.base_tensors())
    trained = run.tensors()
    still = {name for name, tensor in trained.items() if torch.equal(tensor, start[name])}
    last = {name for name in start if name.startswith("text_encoder.") and ".layers.2." in name}
    assert len(last) == 8
    assert still == last
    assert all((trained[name] == 0).all() for name in last if "lora_B" in name)
    assert {parameter.dtype for parameter in run.parameters(PRIMARY).values()} == {torch.float32}


NO_ASCENT = ("dual-lora", "rwp-lora", "rwp-full", "obar", "nbar")
RARER = (*NO_ASCENT, "s2-sam", "looksam", "eflat-lora")
"""Whose passes are another one's. Run by `make test-slow`."""


@pytest.mark.parametrize(
    "method", [pytest.param(one, marks=[pytest.mark.slow] * (one in RARER)) for one in METHOD_NAMES]
)
def test_gradient_checkpointing_gives_the_same_weights(build, method):
    plain, checkpointed = (
        build(method, train_text_encoder=True, gradient_checkpointing=on, **ACTIVE) for on in (False, True)
    )
    for run in (plain, checkpointed):
        run.train(2)
    # The recomputed numbers are the same; the sums over text positions may be taken in another order.
    assert difference(plain.tensors(), checkpointed.tensors()) < 1e-6
    if plain.auxiliary and method != "bilora-fresh":  # which empties it after each step
        assert difference(plain.tensors(AUXILIARY), checkpointed.tensors(AUXILIARY)) < 1e-6


def test_checkpointing_is_really_on(build, monkeypatch):
    calls = []
    original = assembly.checkpoint
    monkeypatch.setattr(assembly, "checkpoint", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    build(gradient_checkpointing=False).train(1)
    assert not calls
    build(gradient_checkpointing=True).train(1)
    assert len(calls) > 5


@pytest.mark.parametrize(
    ("method", "prior"),
    [
        *(pytest.param(one, False, marks=[pytest.mark.slow] * (one in NO_ASCENT)) for one in METHOD_NAMES),
        ("bilora", True),
    ],
)
def test_four_micro_batches_of_one_equal_a_batch_of_four(build, method, prior):
    flags = {"with_prior_preservation": prior, "prior_loss_weight": 0.5, "adam_epsilon": 1e-4, **ACTIVE}
    flags["ascent_basis"] = "tracked"  # a sketch of four rows is not the sum of four sketches
    whole = build(method, train_batch_size=4, **flags)
    parts = build(method, train_batch_size=1, gradient_accumulation_steps=4, **flags)
    start = whole.tensors()
    loss, weights = (1e-3, 0.05) if method == "bilora-echo" else (1e-6, 1e-4)
    assert whole.train(2) == pytest.approx(parts.train(2), rel=loss)  # the second with the auxiliary on
    # adam_epsilon keeps entries without a gradient from taking whole steps in the direction of a rounding error.
    assert difference(whole.tensors(), parts.tensors(), start) < weights
    if whole.auxiliary and method not in ("bilora-fresh", "bilora-echo"):  # which fill it anew
        assert difference(deltas(whole, AUXILIARY), deltas(parts, AUXILIARY)) < 1e-4


@every_method
def test_no_gradient_outlives_its_step(build, method):
    run = build(method, **ACTIVE)
    micro_batches = run.micro_batches()
    run.parts.method.accumulate(micro_batches)
    first = [p.grad.clone() for p in run.parts.trainer.trained]
    assert norm_of(first) > 0
    run.parts.trainer.training_step(micro_batches, 0)
    assert all(p.grad is None for model in run.parts.models.values() for p in model.parameters())


@every_method
def test_the_same_seed_gives_the_same_start_and_draws(build, lora_of, method):
    """The primary's start, batches, noise and timesteps depend on nothing that differs between methods, the draws
    not on what was trained before either."""
    run = build(method, **ACTIVE)
    reference = lora_of(run.config.shown_in_a_row)
    assert all_equal(reference.start, run.tensors())
    run.train(2)
    for one, other in zip(reference.batches, run.batches(2), strict=True):
        assert torch.equal(one.latents, other.latents)
        assert torch.equal(one.noise, other.noise)
        assert torch.equal(one.timesteps, other.timesteps)
        assert torch.equal(one.conditioning.time_ids, other.conditioning.time_ids)
        assert torch.equal(one.conditioning.prompt_embeds, other.conditioning.prompt_embeds)
    assert not torch.equal(run.batches(2)[0].noise, build(method, seed=1).batches(2)[0].noise)


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        *((method, {}) for method in METHOD_NAMES),
        ("looksam", {"looksam_every": 1}),
        ("bilora-fresh", {"ascent_basis": "tracked"}),
        ("bilora", {"ascent": "normalized", "ema_decay": 0.5}),
    ],
)
def test_a_loss_that_is_not_finite_skips_the_step_as_a_whole(build, method, flags):
    run = build(method, lr_scheduler="linear", **ACTIVE, **flags)
    run.train(1)
    before = run.tensors(), run.tensors(AUXILIARY), run.parts.trainer.state_dict()
    before = copy.deepcopy(before)
    batch = run.batches(1)[0]
    bad = replace(batch, latents=batch.latents.clone().fill_(math.inf))
    step = run.parts.trainer.training_step(run.parts.trainer.micro_batches([bad]), 1)
    assert not step.applied
    assert not math.isfinite(step.loss)
    assert all_equal(before[0], run.tensors())
    if method != "bilora-echo":  # which keeps nothing in it
        assert all_equal(before[1], run.tensors(AUXILIARY))
    after = run.parts.trainer.state_dict()
    assert flat(learnt(before[2])) == flat(learnt(after))
    assert after["schedulers"][0]["last_epoch"] == 2  # of the steps, skipped or not
    assert all(p.grad is None for p in run.parts.trainer.trained)
    assert run.step(2).applied


COUNTED = {"schedulers", "lr", "step", "steps", "initial_lr", "optimization_step", "cur_decay_value"}
"""What of a state the host counts, step by step."""


def learnt(state):
    """A nested state without it; AdamW's own `step`, a tensor, is what it divides its moments by."""
    if isinstance(state, dict):
        kept = {name: value for name, value in state.items() if name not in COUNTED or isinstance(value, Tensor)}
        return {name: learnt(value) for name, value in kept.items()}
    return [learnt(value) for value in state] if isinstance(state, (list, tuple)) else state


def flat(state) -> list:
    """A nested state as a list that can be compared."""
    if isinstance(state, dict):
        return [item for key in sorted(state, key=str) for item in [key, *flat(state[key])]]
    if isinstance(state, (list, tuple)):
        return [item for value in state for item in flat(value)]
    return [state.tolist() if isinstance(state, Tensor) else state]


@every_method
def test_dropout_follows_the_step_and_not_what_was_drawn_before(build, method):
    flags = {"lora_dropout": 0.5, "rho": 2.0}
    one, other = build(method, **flags), build(method, **flags)
    one.train(1)
    torch.rand(7)
    other.train(1)
    assert all_equal(one.tensors(), other.tensors())
    numbers = []
    for number in (0, 1):  # the same rows again as another step: other dropout
        torch.manual_seed(0)
        numbers.append(one.parts.trainer.training_step(one.micro_batches(0), number).loss)
    assert numbers[0] != numbers[1]


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("method", ["lora", "bilora", "dual-lora"])
def test_a_state_of_optimisers_that_were_not_fused_goes_on(build, method, fused):
    """As an older version or Apple's GPUs leave it."""
    run, other = build(method, **ACTIVE), build(method, **ACTIVE)
    run.train(1)
    state = copy.deepcopy(run.parts.trainer.state_dict())
    for held in (state["optimizer"], state["method"].get("ascent"), state["method"].get("optimizer")):
        for group in held["param_groups"] if held else ():
            group["fused"] = fused
    other.parts.trainer.load_state_dict(state)
    assert other.step(1).applied
    groups = [group for one in other.parts.trainer.schedulers for group in one.optimizer.param_groups]
    assert all(group["fused"] for group in groups)


@pytest.mark.parametrize(
    ("method", "ascent", "fused"),
    [
        *((method, "adamw", True) for method in METHOD_NAMES),
        ("bilora", "normalized", True),
        ("bilora", "adamw", False),
    ],
)
def test_a_step_is_taken_up_from_the_saved_state(build, method, ascent, fused):
    """Two steps, and the second again by a new run that is given the state after the first: the same bits."""
    flags = {"lr_scheduler": "cosine", "ascent": ascent, **ACTIVE}
    through, second = build(method, **flags), build(method, **flags)
    for model in [] if fused else [*through.parts.models.values(), *second.parts.models.values()]:
        unfuse(model)
    through.train(1)
    for adapter in (PRIMARY, AUXILIARY):
        values = through.tensors(adapter)
        for name, parameter in second.parameters(adapter).items():
            parameter.data.copy_(values[name])
    second.parts.trainer.load_state_dict(copy.deepcopy(through.parts.trainer.state_dict()))
    for run in (through, second):
        run.train(1, start=1)
    assert all_equal(through.tensors(), second.tensors())
    assert all_equal(through.tensors(AUXILIARY), second.tensors(AUXILIARY))
    assert flat(through.parts.method.measures()) == flat(second.parts.method.measures())


# --- the loss that a method is given ---


def test_the_loss_of_the_whole_is_the_mean_of_its_slices(build):
    run = build(train_batch_size=4, train_text_encoder=True)
    (micro_batch,) = run.micro_batches()
    assert len(micro_batch) == 4
    with torch.no_grad():
        whole = micro_batch.loss()
        rows = [micro_batch.loss(slice(n, n + 1)).item() for n in range(4)]
        assert micro_batch.loss().item() == whole.item()  # the draws are kept: as often as a method likes
    assert whole.dtype == torch.float32
    assert whole.item() == pytest.approx(sum(rows) / 4, rel=1e-6)
    assert len({round(row, 4) for row in rows}) == 4


def test_prior_rows_count_with_their_weight(build):
    """mean over instance rows + weight x mean over class rows, each class row with the class prompt."""
    run = build("lora", train_batch_size=2, with_prior_preservation=True, prior_loss_weight=0.3)
    (micro_batch,) = run.micro_batches()
    batch = micro_batch.batch
    assert batch.instances.tolist() == [1, 0, 1, 0]
    assert batch.weights.tolist() == pytest.approx([1, 0.3, 1, 0.3])
    class_prompt = run.parts.make_batch.prompts.embeddings["a picture"][0]
    assert [torch.equal(embeds, class_prompt) for embeds in batch.conditioning.prompt_embeds] == [False, True] * 2
    plain = replace(micro_batch, batch=replace(batch, weights=torch.ones(4), instances=torch.ones(4)))
    with torch.no_grad():
        rows = [plain.loss(slice(n, n + 1)).item() for n in range(4)]
        loss = micro_batch.loss().item()
        pairs = [micro_batch.loss(slice(n, n + 2)).item() for n in (0, 2)]
    assert loss == pytest.approx((rows[0] + rows[2]) / 2 + 0.3 * (rows[1] + rows[3]) / 2, rel=1e-6)
    assert loss == pytest.approx(sum(pairs) / 2, rel=1e-6)


# --- rho = 0 is LoRA ---


def test_a_radius_of_zero_gives_loras_tensors(build):
    lora, zero, relative = build("lora"), build(rho=0.0), build(rho_relative=0.0)
    for run in (lora, zero, relative):
        run.train(3)
    assert all_equal(lora.tensors(), zero.tensors())
    assert all_equal(lora.tensors(), relative.tensors())
    assert zero.tensors(AUXILIARY) == {}
    assert zero.parts.radius.rho == 0


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "peft's forward"])
def test_an_auxiliary_that_stays_zero_changes_nothing(build, fused):
    lora, present = build("lora", train_text_encoder=True), build(train_text_encoder=True, **ACTIVE)
    present.parts.method.rho = 0.0
    for model in [] if fused else [*lora.parts.models.values(), *present.parts.models.values()]:
        unfuse(model)
    for run in (lora, present):
        run.train(3)
    assert difference(lora.tensors(), present.tensors()) < 1e-6
    assert all((tensor == 0).all() for tensor in present.tensors(AUXILIARY).values())
    assert present.parts.method.measures()["c_over_rho"] == 0


def test_a_perturbation_is_felt(build):
    """The invariants above hold for an auxiliary that does nothing as well: this one shows that it does something."""
    lora, bilora = build("lora"), build(**ACTIVE)
    start = lora.tensors()
    lora_losses, bilora_losses = lora.train(4), bilora.train(4)
    assert bilora_losses[0] == lora_losses[0]  # s B2 A2 = 0 at the start
    assert bilora_losses[-1] > lora_losses[-1] * (1 + 1e-3)
    assert difference(lora.tensors(), bilora.tensors(), start) > 1e-2
    assert bilora.parts.method.measures()["c_over_rho"] > 0.1


STRONG = {
    "bilora": ACTIVE,
    "bilora-fresh": {"rho": 1.0},
    "bilora-echo": {"rho": 0.1},
    "dual-lora": ACTIVE,
    "flat-lora": {"sigma": 0.5, "sigma_schedule": "constant"},
    "rwp-full": {"sigma": 0.5},
    "rwp-lora": {"sigma": 0.5},
    "lora-sam": {"rho": 1.0},
    "looksam": {"rho": 1.0, "looksam_every": 2},
    "s2-sam": {"rho": 1.0},
    "eflat-lora": {"rho": 0.2},
    "obar": {"bar_strength": 20.0},
    "nbar": {"bar_strength": 20.0},
}
"""Felt within three steps."""
NOTHING = {"rho": 0.0, "looksam_alpha": 0.0, "sigma": 0.0, "bar_strength": 0.0}


def test_every_method_has_its_strength_here():
    assert {"lora", *STRONG} == set(METHOD_NAMES)


@pytest.mark.parametrize("method", STRONG)
def test_with_no_strength_it_is_lora_and_with_some_it_is_not(build, lora_of, method):
    zero, strong = build(method, **NOTHING), build(method, **STRONG[method])
    for run in (zero, strong):
        run.train(3)
    lora = lora_of(zero.config.shown_in_a_row)
    assert all_equal(lora.trained, zero.tensors())
    assert difference(lora.trained, strong.tensors(), lora.start) > 1e-3


def test_rwp_full_is_flat_lora_without_a_ramp(build):
    runs = [build("rwp-full", sigma=0.3), build("flat-lora", sigma=0.3, sigma_schedule="constant")]
    for run in runs:
        run.train(3)
    assert all_equal(*(run.tensors() for run in runs))


@pytest.mark.parametrize("method", [name for name in STRONG if name not in ("obar", "nbar")])
def test_a_perturbation_leaves_no_trace(build, method):
    """Looked at outside a step, as for the loss gap: no weight, gradient, hook or later step is changed."""
    run, other = (build(method, use_dora=method == "flat-lora", **STRONG[method]) for _ in range(2))
    for one in (run, other):
        one.train(1)
    weights = {**run.base_tensors(), **run.tensors(), **{f"2 {n}": t for n, t in run.tensors(AUXILIARY).items()}}
    micro_batches = run.micro_batches(1)
    with torch.no_grad():
        plain = micro_batches[0].loss()
        with auxiliary_off(run.parts.models.values()):
            exported = micro_batches[0].loss()
        for _ in range(2):
            with run.parts.method.perturbed(micro_batches):
                inside = micro_batches[0].loss()
        assert torch.equal(micro_batches[0].loss(), plain)
    if method in ("bilora", "dual-lora", "bilora-echo"):
        assert inside == plain  # the perturbation is on all the time
    assert inside != exported
    if method in ("bilora-fresh", "bilora-echo", "lora-sam", "looksam"):
        assert inside > exported  # they climb the very loss
    after = {**run.base_tensors(), **run.tensors(), **{f"2 {n}": t for n, t in run.tensors(AUXILIARY).items()}}
    assert all_equal(weights, after)
    modules = [module for model in run.parts.models.values() for module in model.modules()]
    assert not any(module._forward_hooks for module in modules)
    assert all(p.grad is None and p.requires_grad for p in run.parts.trainer.trained)
    for one in (run, other):
        one.train(2, start=1)
    assert all_equal(run.tensors(), other.tensors())


@pytest.mark.parametrize("method", WITH_NOISE)
def test_noise_on_top(build, method):
    flags = {**STRONG[method], "sigma_schedule": "constant"}
    alone, together, again = (
        build(method, **flags),
        build(method, sigma=0.5, **flags),
        build(method, sigma=0.5, **flags),
    )
    noise = build("flat-lora", sigma=0.5, sigma_schedule="constant")
    losses = {name: run.train(3) for name, run in (("alone", alone), ("together", together), ("noise", noise))}
    assert together.parts.method.settings["sigma"] == 0.5
    assert losses["together"][0] != losses["alone"][0]
    if method == "bilora":  # the auxiliary is still zero
        assert losses["together"][0] == losses["noise"][0]
    again.train(1)
    again.parts.trainer.load_state_dict(copy.deepcopy(again.parts.trainer.state_dict()))
    again.train(2, start=1)
    assert all_equal(together.tensors(), again.tensors())


def test_the_ascent_pass_sees_the_share_of_the_rows(build):
    """Counted: the rows whose loss is computed in a step of four."""
    for share, expected in ((1.0, 8), (0.5, 6), (0.25, 5), (0.1, 5)):
        for method in ("lora-sam", "bilora-fresh"):
            run = build(method, train_batch_size=2, gradient_accumulation_steps=2, ascent_share=share, rho=0.5)
            micro_batches, rows = run.micro_batches(), []
            for one in micro_batches:
                loss = one.loss

                def counted(some: slice = slice(None), loss=loss, rows=rows) -> Tensor:
                    rows.append(len(range(2)[some]))
                    return loss(some)

                object.__setattr__(one, "loss", counted)
            run.parts.trainer.training_step(micro_batches, 0)
            assert sum(rows) == expected


# --- the ball ---


@every_ascent
@pytest.mark.parametrize("rho", [0.02, 1.0])
def test_the_perturbation_never_leaves_the_ball(build, ascent, rho):
    flags = {"auxiliary_learning_rate": 0.05, "ascent": ascent, "ascent_fraction": 0.9, "rho": rho}
    run = build(train_text_encoder=True, max_grad_norm=1e6, **flags)
    for number in range(3):
        run.step(number)
        norm = math.sqrt(sum(delta.double().square().sum().item() for delta in deltas(run, AUXILIARY).values()))
        assert 0 < norm <= rho * (1 + 1e-6)
        assert run.parts.method.measures()["c_over_rho"].item() == pytest.approx(norm / rho, rel=1e-5)


def random_layers(seed: int = 0, parts: Sequence[str] = ("unet", "unet", "text_encoder")) -> list[LowRank]:
    draw = torch.Generator().manual_seed(seed)
    shapes = [((3, 7), (5, 3)), ((2, 4, 3, 3), (6, 2, 1, 1)), ((3, 7), (5, 3))]
    return [
        LowRank(
            part,
            str(number),
            nn.Parameter(torch.randn(A, generator=draw)),
            nn.Parameter(torch.randn(B, generator=draw)),
            0.5 + number,
        )
        for number, (part, (A, B)) in enumerate(zip(parts, shapes, strict=True))
    ]


def copies(layers: Sequence[LowRank]) -> list[tuple[Tensor, Tensor]]:
    return [(layer.A.detach().clone(), layer.B.detach().clone()) for layer in layers]


def test_the_clip_lands_on_the_ball_and_keeps_the_direction():
    layers = random_layers()
    before, norm = copies(layers), product_norm(layers).item()
    rho = 0.3 * norm
    assert clip_to_ball(layers, rho).item() == norm
    assert product_norm(layers).item() == pytest.approx(rho, rel=1e-6)
    factor = math.sqrt(0.3)  # of every A and every B, of all layers alike: global, not per layer
    for layer, (A, B) in zip(layers, before, strict=True):
        assert torch.allclose(layer.A, factor * A, rtol=1e-6, atol=0)
        assert torch.allclose(layer.B, factor * B, rtol=1e-6, atol=0)


def test_inside_the_ball_not_a_bit_changes():
    layers = random_layers()
    before, norm = copies(layers), product_norm(layers).item()
    for rho in (norm, 1.001 * norm, 1e6 * norm):
        assert clip_to_ball(layers, rho).item() == norm
        for layer, (A, B) in zip(layers, before, strict=True):
            assert torch.equal(layer.A, A) and torch.equal(layer.B, B)


def test_a_perturbation_of_zero_stays_zero():
    layers = random_layers()
    for layer in layers:
        layer.B.data.zero_()
    before = copies(layers)
    assert clip_to_ball(layers, 0.1).item() == 0
    assert all(torch.equal(layer.A, A) for layer, (A, _) in zip(layers, before, strict=True))
    clip_to_ball(layers, 0.0)
    assert all(torch.isfinite(layer.A).all() for layer in layers)


def test_clipped_steps_and_the_norm_are_counted():
    """The share counts norms before the clip, c / rho is told after it."""
    layers, rho = random_layers(), 2.0
    sizes = iter([0.5, 1.6, 0.1, 3.0])

    class SetSize:
        schedulable = ()

        def step(self, applied: Tensor) -> None:
            factor = math.sqrt(next(sizes) * rho / product_norm(layers).item())
            for layer in layers:
                layer.A.data *= factor
                layer.B.data *= factor

    method = BiLoRA(layers, rho, SetSize())
    assert method.measures()["clipped_share"] == 0
    seen = []
    for _ in range(4):
        method.after_step(APPLIED)
        seen.append(tuple(float(method.measures()[name]) for name in ("c_over_rho", "clipped_share")))
    expected = [(0.5, 0), (1, 1 / 2), (0.1, 1 / 3), (1, 2 / 4)]
    assert seen == [pytest.approx(pair, rel=1e-6) for pair in expected]


def test_an_annealed_ball_falls_to_nothing_over_the_last_tenth() -> None:
    """The primary ends on its own; the auxiliary is never zeros, which no gradient would move again."""

    class Large:
        schedulable = ()

        def step(self, applied: Tensor) -> None:
            for layer in layers:
                layer.B.data *= 1e3 if product_norm(layers) < 1 else 1.0

        def state_dict(self) -> dict:
            return {}

        def load_state_dict(self, state: dict) -> None:
            pass

    layers, norms = random_layers(), []
    method = BiLoRA(layers, 2.0, Large(), "anneal", steps=50)
    for step in range(50):
        if step == 46:  # as a resumed run does
            saved, method = method.state_dict(), BiLoRA(layers, 2.0, Large(), "anneal", steps=50)
            method.load_state_dict(saved)
        method.after_step(APPLIED)
        norms.append(product_norm(layers).item())
    assert norms[:46] == pytest.approx([2.0] * 46, rel=1e-5)
    assert norms[46:] == pytest.approx([1.6, 1.2, 0.8, 0.4], rel=1e-5)
    method.after_step(APPLIED)  # a longer run that goes on
    assert product_norm(layers).item() == pytest.approx(0.4, rel=1e-5)


# --- the ascent ---


def one_pass(run: TinyRun, micro_batches: Sequence) -> tuple[float, list[Tensor]]:
    """The loss and the auxiliary's gradients (A and B alternating) at the present weights."""
    for parameter in run.parts.trainer.trained:
        parameter.grad = None
    loss = run.parts.method.accumulate(micro_batches)
    return loss.item(), [p.grad.clone() for p in run.parts.method.parameters]


# Rates for a rise of about a thousandth of the loss: far above float32's rounding, and nearly linear.
SMALL = {
    "sgd": {"auxiliary_learning_rate": 3e-3},
    "adamw": {"auxiliary_learning_rate": 1e-5},
    "normalized": {"ascent_fraction": 2e-3},
}


@every_ascent
@pytest.mark.parametrize("moved", [False, True], ids=["from zero", "from a perturbation"])
def test_the_loss_rises_along_a_small_ascent_step(build, ascent, moved):
    """Prop. 2: <G, e' - e> = eta2 (||A2 G'||^2 + ||B2' G||^2) + O(eta2^2) >= 0, and the loss follows it."""
    run = build(ascent=ascent, rho=5.0, **SMALL[ascent])
    if moved:
        run.move_auxiliary()
    micro_batches = run.micro_batches()
    loss, gradients = one_pass(run, micro_batches)
    before = [p.detach().clone() for p in run.parts.method.parameters]
    run.parts.method.ascent.step(APPLIED)
    steps = [p.detach() - old for p, old in zip(run.parts.method.parameters, before, strict=True)]
    predicted = sum((step.double() * gradient).sum().item() for step, gradient in zip(steps, gradients, strict=True))
    risen, _ = one_pass(run, micro_batches)
    assert predicted > 1e-5 * loss
    assert risen - loss == pytest.approx(predicted, rel=0.15)
    if ascent == "sgd":
        eta = SMALL["sgd"]["auxiliary_learning_rate"]
        assert predicted == pytest.approx(eta * norm_of(gradients) ** 2, rel=1e-3)


def test_two_adapters_that_both_descend_lower_the_loss_that_the_ascent_raises(build):
    """The sign: the same step with `maximize` off is Dual-LoRA, which the paper finds to gain nothing."""
    up, down = (build(ascent="sgd", rho=5.0, **SMALL["sgd"]) for _ in range(2))
    for group in down.parts.method.ascent.optimizer.param_groups:
        group["maximize"] = False
    losses = []
    for run in (up, down):
        micro_batches = run.micro_batches()
        start, _ = one_pass(run, micro_batches)
        run.parts.method.after_step(APPLIED)
        losses.append(one_pass(run, micro_batches)[0] - start)
    assert losses[0] > 0 > losses[1]


def test_an_ascent_by_a_descending_optimiser_is_refused():
    with pytest.raises(ValueError, match="maximize=True"):
        OptimizerAscent(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))


def dense(layers: Sequence[LowRank]) -> list[Tensor]:
    """s B A of every layer, float64."""
    factors = [[f.detach().double().flatten(1) for f in (layer.B, layer.A)] for layer in layers]
    return [layer.scale * B @ A for layer, (B, A) in zip(layers, factors, strict=True)]


@pytest.mark.parametrize("moved", [False, True], ids=["from zero", "from a perturbation"])
@pytest.mark.parametrize("size", [1e-4, 1e3], ids=["small gradients", "large gradients"])
def test_a_normalized_step_moves_the_perturbation_by_its_distance(moved, size):
    """Uphill, and as far as it should to first order; the gradient's own size does not matter."""
    layers, draw, gradients = random_layers(), torch.Generator().manual_seed(5), []
    for layer in layers:
        if not moved:
            layer.B.data.zero_()
        A, B = layer.A.detach().flatten(1), layer.B.detach().flatten(1)
        G = size * torch.randn(len(B), A.shape[1], generator=draw)  # dL/dW
        layer.A.grad = (layer.scale * B.T @ G).view_as(layer.A)
        layer.B.grad = (layer.scale * G @ A.T).view_as(layer.B)
        gradients.append(G)
    start, distance = dense(layers), 1e-4
    NormalizedAscent(layers, distance).step(APPLIED)
    moves = [end - begin for end, begin in zip(dense(layers), start, strict=True)]
    assert norm_of(moves) == pytest.approx(distance, rel=5e-3)
    assert sum((move * G).sum() for move, G in zip(moves, gradients, strict=True)) > distance * size


def test_a_normalized_step_on_the_model_covers_its_share_of_rho(build):
    run = build(ascent="normalized", ascent_fraction=0.05, rho=0.7, train_text_encoder=True)
    run.step(0)
    assert run.parts.method.measures()["c_over_rho"].item() == pytest.approx(0.05, rel=1e-4)


def test_without_a_gradient_a_normalized_step_stays(build):
    layers = random_layers()
    before = copies(layers)
    NormalizedAscent(layers, 0.1).step(APPLIED)  # no gradient at all
    for layer in layers:
        layer.A.grad, layer.B.grad = torch.zeros_like(layer.A), torch.zeros_like(layer.B)
    NormalizedAscent(layers, 0.1).step(APPLIED)
    for layer, (A, B) in zip(layers, before, strict=True):
        assert torch.equal(layer.A, A) and torch.equal(layer.B, B)


def test_the_ball_and_the_normalized_step_never_wait_for_the_device():
    """On the meta device every copy to the host raises."""
    A, B = (nn.Parameter(torch.ones(shape, device="meta")) for shape in ((2, 4), (3, 2)))
    A.grad, B.grad = torch.ones_like(A), torch.ones_like(B)
    layers = [LowRank("unet", "0", A, B, 1.0)]
    NormalizedAscent(layers, 0.1).step(APPLIED)
    clip_to_ball(layers, 0.1)


# --- what the primary and the auxiliary have to do with each other ---


def test_clipping_the_primary_has_nothing_to_do_with_the_auxiliary(build):
    """The primary's gradient is brought to the bound by its own norm; the auxiliary ascends with its gradient whole."""
    bound = 0.01
    seen = {}
    for name, limit, size in (("clipped", bound, 0.05), ("free", 1e6, 0.05), ("large auxiliary", bound, 0.5)):
        run = build(ascent="sgd", max_grad_norm=limit, rho=1e3, train_text_encoder=True)
        run.move_auxiliary(size)
        trainer, ascent = run.parts.trainer, run.parts.method.ascent.optimizer
        collecting = gradients_at(trainer.optimizer, trainer.primary), gradients_at(ascent, run.parts.method.parameters)
        with collecting[0] as primary, collecting[1] as auxiliary:
            run.step(0)
        seen[name] = primary[0], auxiliary[0]
    assert norm_of(seen["free"][0]) > 10 * bound
    assert norm_of(seen["free"][1]) > 10 * bound
    assert norm_of(seen["clipped"][0]) == pytest.approx(bound, rel=1e-3)
    assert norm_of(seen["large auxiliary"][0]) == pytest.approx(bound, rel=1e-3)
    factor = bound / norm_of(seen["free"][0])
    for clipped, free in zip(seen["clipped"][0], seen["free"][0], strict=True):
        assert torch.allclose(clipped, factor * free, rtol=1e-3, atol=1e-9)
    for clipped, free in zip(seen["clipped"][1], seen["free"][1], strict=True):
        assert torch.equal(clipped, free)


def test_the_auxiliary_is_built_as_asked(build):
    run = build(auxiliary_rank=2, auxiliary_init="gaussian", rho=0.5, train_text_encoder=True, text_encoder_lr=3e-4)
    primary = low_rank_layers(run.parts.models, PRIMARY)
    assert [(layer.part, layer.name) for layer in run.auxiliary] == [(layer.part, layer.name) for layer in primary]
    assert {layer.A.shape[0] for layer in run.auxiliary} == {2}
    assert {layer.scale for layer in run.auxiliary} == {layer.scale for layer in primary} == {2.0}  # alpha 8 / rank 4
    assert torch.cat([layer.A.flatten() for layer in run.auxiliary]).std().item() == pytest.approx(0.5, rel=0.05)
    assert {id(p) for p in run.parts.method.parameters} == {id(p) for p in run.parameters(AUXILIARY).values()}
    assert build(auxiliary_rank=None).auxiliary[0].A.shape[0] == 4
    groups = run.parts.method.ascent.optimizer.param_groups
    assert [group["lr"] for group in groups] == [1e-3, 3e-4, 3e-4]
    assert [len(group["params"]) for group in groups] == [136, 24, 24]
    assert all(group["weight_decay"] == 0 for group in groups)


@every_ascent
def test_the_ascent_follows_the_schedule(build, ascent):
    run = build(ascent=ascent, lr_scheduler="linear", auxiliary_learning_rate=0.02, max_train_steps=4, rho=1.0)
    rates = []
    for number in range(3):
        rates.append([group["lr"] for one in run.parts.method.schedulable for group in one.param_groups])
        run.step(number)
    if ascent == "normalized":
        assert rates == [[]] * 3  # its length is a share of rho, from the first step to the last
    else:
        assert rates == [pytest.approx([0.02 * share]) for share in (1, 0.75, 0.5)]


def test_the_radius_in_its_three_units(build):
    run = build(rho_relative=0.01)
    norm = math.sqrt(sum(w.double().square().sum().item() for w in adapted_weights(run)))
    assert run.parts.radius.rho == pytest.approx(0.01 * norm, rel=1e-6)
    assert run.parts.method.ball.rho == run.parts.radius.rho
    assert run.parts.radius.relative == pytest.approx(0.01, rel=1e-9)
    default = build()
    # A perturbation of rank 3 whose singular values are each the default's share of the layer's typical one.
    typical = math.sqrt(sum(w.double().square().sum().item() / min(w.shape) for w in adapted_weights(run)))
    assert default.parts.radius.rho == pytest.approx(methods.SINGULAR_SHARE * typical * math.sqrt(3), rel=1e-6)
    assert default.parts.radius.singular_share == pytest.approx(methods.SINGULAR_SHARE)
    assert build(rho=0.25).parts.radius.rho == 0.25


def adapted_weights(run: TinyRun) -> list[Tensor]:
    return [
        layer.get_base_layer().weight
        for model in run.parts.models.values()
        for layer in model.modules()
        if hasattr(layer, "get_base_layer")
    ]


def test_a_dora_is_trained_beside_a_plain_auxiliary(build):
    run = build(use_dora=True, **ACTIVE)
    start, base = run.tensors(), run.base_tensors()
    magnitudes = {name for name in start if "magnitude" in name}
    assert len(magnitudes) == len(run.auxiliary)
    assert not any("magnitude" in name for name in run.tensors(AUXILIARY))
    losses = run.train(3)
    assert losses[0] == pytest.approx(build("lora").train(1)[0], rel=1e-5)  # a fresh DoRA is the base
    assert all(not torch.equal(run.tensors()[name], start[name]) for name in magnitudes)
    assert all_equal(base, run.base_tensors())
    assert run.parts.method.measures()["c_over_rho"] > 0.1
    micro_batches = run.micro_batches(3)
    with torch.no_grad():
        perturbed = micro_batches[0].loss().item()
        with auxiliary_off(run.parts.models.values()):
            clean = micro_batches[0].loss().item()
    assert perturbed > clean


# --- half precision ---


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_takes_nearly_the_step_of_full_precision(build, precision):
    """One SGD ascent and one AdamW descent. The differences are those of the gradients; seen: 3 % and 0.5 %."""
    full, half = build(ascent="sgd", adam_epsilon=1e-3, **ACTIVE), None
    half = build(precision=precision, ascent="sgd", adam_epsilon=1e-3, **ACTIVE)
    if precision == "fp16":
        half.parts.trainer.scaler._init_scale = 256.0
    start, auxiliary = full.tensors(), full.tensors(AUXILIARY)
    assert all_equal(start, half.tensors())
    assert full.step(0).loss == pytest.approx(half.step(0).loss, rel=0.02)
    assert difference(full.tensors(), half.tensors(), start) < 0.1
    # B2 is eta2 dL/dB2 and nothing else: were a loss scale left on it or taken off twice, it would be off by 256.
    assert difference(full.tensors(AUXILIARY), half.tensors(AUXILIARY), auxiliary) < 0.1


def test_an_overflow_under_a_loss_scale_skips_primary_and_auxiliary_together(build):
    """And the step after it is the right one: after two unscalings the adversary would be dead (1 / 65536)."""
    flags = {"precision": "fp16", "ascent": "sgd", "adam_epsilon": 1e-3, **ACTIVE}
    run, reference = build(**flags), build(**flags)
    scaler = run.parts.trainer.scaler
    assert scaler.is_enabled()
    scaler._init_scale = 2.0**40  # no half-precision gradient can hold this
    start = copy.deepcopy((run.tensors(), run.tensors(AUXILIARY)))
    step = run.step(0)
    assert not step.applied
    assert math.isfinite(step.loss)
    assert all_equal(start[0], run.tensors()) and all_equal(start[1], run.tensors(AUXILIARY))
    assert scaler.get_scale() == 2.0**39  # once a step, not once an optimiser
    assert run.parts.method.measures()["clipped_share"] == 0

    scaler._scale.fill_(1024.0)
    reference.parts.trainer.scaler._init_scale = 32.0
    assert run.step(0).applied and reference.step(0).applied
    assert scaler.get_scale() == 1024.0
    assert difference(reference.tensors(), run.tensors(), start[0]) < 0.02
    assert difference(reference.tensors(AUXILIARY), run.tensors(AUXILIARY), start[1]) < 0.02


def test_the_bound_on_the_gradient_is_meant_without_the_loss_scale(build):
    run = build(precision="fp16", max_grad_norm=0.01, **ACTIVE)
    run.parts.trainer.scaler._init_scale = 512.0
    with gradients_at(run.parts.trainer.optimizer, run.parts.trainer.primary) as primary:
        assert run.step(0).applied
    assert norm_of(primary[0]) == pytest.approx(0.01, rel=1e-3)


def test_other_precisions_have_no_loss_scale(build):
    assert not build().parts.trainer.scaler.is_enabled()
    assert not build(precision="bf16").parts.trainer.scaler.is_enabled()
