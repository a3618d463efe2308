"""The loss gap is measured in float32, leaves no trace, and is told from the rounding of float32."""

import copy
import math

import pytest
import torch
from tiny_run import TinyRun, all_equal
from torch import Tensor, nn

from bilora_diffusion.adapters import AUXILIARY, PRIMARY, auxiliary_off
from bilora_diffusion.loss_gap import ARITHMETIC_NOISE, LossGap, float32_computation, measure_loss_gap


def upcast(run: TinyRun) -> TinyRun:
    """The same models, every weight widened to float32 for good."""
    other = copy.copy(run)
    other.parts = copy.copy(run.parts)
    other.parts.models = {part: copy.deepcopy(model).float() for part, model in run.parts.models.items()}
    return other


def clean_and_perturbed(run: TinyRun) -> tuple[float, float]:
    """Both losses by the plain float32 path of the micro-batches, dropout off."""
    trainer = run.parts.trainer
    micro_batches = [
        type(one)(one.batch, run.parts.models, one.objective, torch.float32, one.share, trainer.scaler)
        for one in run.micro_batches()
    ]
    for model in run.parts.models.values():
        model.eval()
    with torch.no_grad():
        perturbed = torch.stack([one.loss() for one in micro_batches]).mean().item()
        with auxiliary_off(run.parts.models.values()):
            clean = torch.stack([one.loss() for one in micro_batches]).mean().item()
    return clean, perturbed


def snapshot(run: TinyRun) -> dict[str, Tensor]:
    return run.base_tensors() | run.tensors(PRIMARY) | run.tensors(AUXILIARY)


# --- float32 whatever the base ---


@pytest.mark.parametrize(("precision", "use_dora"), [("bf16", False), ("fp16", False), ("bf16", True)])
def test_a_half_base_computes_as_its_upcast_twin(build, precision, use_dora):
    run = build(precision=precision, use_dora=use_dora, train_text_encoder=True, gradient_accumulation_steps=2)
    run.move_auxiliary()
    gap = measure_loss_gap(run.parts.models.values(), run.parts.method, run.micro_batches())
    clean, perturbed = clean_and_perturbed(upcast(run))
    assert gap.perturbed == pytest.approx(perturbed, rel=1e-6)
    assert gap.clean == pytest.approx(clean, rel=1e-6)
    assert abs(gap.gap) > 100 * ARITHMETIC_NOISE
    half = run.micro_batches()[0].loss().item()
    assert abs(half / perturbed - 1) > 1e-5  # half precision would not do


def test_every_layer_computes_in_float32_and_one_is_wide_at_a_time(build):
    run = build(precision="bf16", train_text_encoder=True)
    models = run.parts.models.values()
    linears = [m for model in models for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    outputs, widest = set(), 0

    def watch(module: nn.Module, _, output: Tensor) -> None:
        nonlocal widest
        outputs.add(output.dtype)
        base = [layer.weight for layer in linears if layer.weight.numel() > 300]
        widest = max(widest, sum(weight.dtype == torch.float32 and not weight.requires_grad for weight in base))

    handles = [module.register_forward_hook(watch) for module in linears]
    (micro_batch,) = run.micro_batches()
    with torch.no_grad(), float32_computation(models):
        micro_batch.in_float32().loss()
    for handle in handles:
        handle.remove()
    assert outputs == {torch.float32}
    assert widest <= 1


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_measuring_leaves_no_trace(build, precision):
    run = build(precision=precision, train_text_encoder=True, lora_dropout=0.3)
    run.move_auxiliary()
    before, loss = snapshot(run), run.step(0).loss
    other = build(precision=precision, train_text_encoder=True, lora_dropout=0.3)
    other.move_auxiliary()
    random = torch.get_rng_state()
    measure_loss_gap(other.parts.models.values(), other.parts.method, other.micro_batches())
    assert torch.equal(torch.get_rng_state(), random)
    assert all_equal(snapshot(other), before)
    assert all(model.training for model in other.parts.models.values())
    assert all(p.grad is None for model in other.parts.models.values() for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain_modules(other))
    assert other.step(0).loss == loss  # and the step after it is the same


def plain_modules(run: TinyRun) -> list[nn.Module]:
    """The base's layers; transformers has hooks of its own on the larger modules."""
    return [m for model in run.parts.models.values() for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


def test_the_very_same_tensors_come_back_also_on_an_exception(build):
    run = build(precision="bf16")
    unet = run.parts.models["unet"]
    before = snapshot(run)
    pointers = [tensor.data_ptr() for tensor in unet.parameters()]
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_k.get_base_layer()

    def fail(*_) -> None:
        assert layer.weight.dtype == torch.float32
        raise KeyError

    (micro_batch,) = run.micro_batches()
    with pytest.raises(KeyError), torch.no_grad(), float32_computation([unet]):
        layer.register_forward_pre_hook(fail)  # after the hook that widened its weights
        micro_batch.in_float32().loss()
    layer._forward_pre_hooks.clear()
    assert all_equal(snapshot(run), before)
    assert [tensor.data_ptr() for tensor in unet.parameters()] == pointers
    micro_batch.loss().backward()


class Tied(nn.Module):
    """One weight in three places: in a module, in a module inside of it that runs in between, and in a sibling."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).bfloat16())
        self.inner, self.sibling = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.inner.weight = self.sibling.weight = self.weight
        self.register_buffer("shift", torch.tensor(0.3).bfloat16())
        self.wide: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        self.wide.append(self.weight.dtype)
        return self.sibling(x @ self.weight + self.shift)


def test_shared_weights_stay_wide_as_long_as_they_are_needed():
    model = Tied()
    weight, data = model.weight, model.weight.data.clone()
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), float32_computation([model]):
        result = model(x)
    assert model.wide == [torch.float32]
    assert torch.equal(result, copy.deepcopy(model).float()(x))
    assert model.weight is weight and model.weight.dtype == torch.bfloat16 and model.shift.dtype == torch.bfloat16
    assert torch.equal(model.weight.data, data)


def test_a_forward_that_failed_and_is_tried_again_loses_nothing():
    model = Tied()
    data, x = model.weight.data.clone(), torch.ones(2, 4)
    with torch.no_grad(), float32_computation([model]):
        with pytest.raises(RuntimeError):
            model(torch.ones(2, 5))
        model(x)
    assert model.weight.dtype == torch.bfloat16
    assert torch.equal(model.weight.data, data)


def test_tf32_is_off_inside_and_restored():
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = True
        with pytest.raises(KeyError), float32_computation([]):
            assert not matmul.allow_tf32 and not cudnn.allow_tf32
            raise KeyError
        assert matmul.allow_tf32 and cudnn.allow_tf32
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


# --- the gap and its noise ---


def test_the_constant_is_above_the_rounding_of_float32(build):
    """One loss, summed over other splits of the same rows: batch 8, 4 x 2, 2 x 4, 8 x 1, the rows reversed."""
    losses = []
    run = build(train_batch_size=8)
    run.move_auxiliary()
    for step in range(3):
        (whole,) = run.micro_batches(step)
        with torch.no_grad():
            kinds = [[whole.loss(slice(n, n + size)).item() for n in range(0, 8, size)] for size in (8, 4, 2, 1)]
        values = [math.fsum(kind) / len(kind) for kind in kinds]
        values.append(run_reversed(run, step))
        losses.append(max(abs(value / values[0] - 1) for value in values))
    assert 0 < max(losses) < ARITHMETIC_NOISE  # seen: 1e-7
    assert max(losses) > ARITHMETIC_NOISE / 100  # nor is the constant so wide that a small gap would pass for noise


def run_reversed(run: TinyRun, step: int) -> float:
    batch = run.batch(reversed(range(8 * step, 8 * step + 8)))
    (micro_batch,) = run.parts.trainer.micro_batches([batch])
    with torch.no_grad():
        return micro_batch.loss().item()


def test_a_gap_within_the_rounding_is_called_noise():
    assert LossGap(1.0, 1.0).is_noise
    assert LossGap(0.5 * (1 + ARITHMETIC_NOISE / 2), 0.5).is_noise
    assert not LossGap(0.5 * (1 + 2 * ARITHMETIC_NOISE), 0.5).is_noise
    assert not LossGap(0.5 * (1 - 2 * ARITHMETIC_NOISE), 0.5).is_noise
    assert LossGap(0.75, 0.5).gap == 0.25


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_an_auxiliary_of_zero_has_no_gap_and_one_that_ascended_has_one(build, precision):
    run = build(precision=precision, rho=2.0, auxiliary_learning_rate=0.02, lora_dropout=0.2)
    fresh = measure_loss_gap(run.parts.models.values(), run.parts.method, run.micro_batches())
    assert fresh.gap == 0 and fresh.is_noise
    run.train(3)
    gap = measure_loss_gap(run.parts.models.values(), run.parts.method, run.micro_batches())
    assert gap.gap > 1e-3 * gap.clean
    assert not gap.is_noise
    for layer in run.auxiliary:
        layer.B.data.zero_()
    # Of a trained primary, whose dropout would make two passes differ.
    assert measure_loss_gap(run.parts.models.values(), run.parts.method, run.micro_batches()).gap == 0


@pytest.mark.parametrize("method", ["lora-sam", "looksam", "bilora-fresh"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_perturbation_that_takes_a_pass_is_found_on_a_half_base(build, method, checkpointing):
    whole, half = (
        build(method, precision, rho=0.5, gradient_checkpointing=checkpointing) for precision in ("no", "bf16")
    )
    gaps = [measure_loss_gap(r.parts.models.values(), r.parts.method, r.micro_batches()) for r in (whole, half)]
    assert gaps[1].clean == pytest.approx(gaps[0].clean, rel=0.01)
    assert gaps[1].gap == pytest.approx(gaps[0].gap, rel=0.2)
    assert not gaps[1].is_noise


def test_the_gap_is_of_the_whole_step(build):
    """The mean over its micro-batches, at the same draws as the step's own loss."""
    run = build(gradient_accumulation_steps=2)
    run.move_auxiliary()
    micro_batches = run.micro_batches()
    gap = measure_loss_gap(run.parts.models.values(), run.parts.method, micro_batches)
    with auxiliary_off(run.parts.models.values()), torch.no_grad():
        clean = sum(one.loss().item() for one in micro_batches) / 2
    assert gap.clean == pytest.approx(clean, rel=1e-6)
    assert gap.perturbed == pytest.approx(run.parts.trainer.training_step(micro_batches, 0).loss, rel=1e-6)


def test_a_failure_while_measuring_puts_everything_back(build):
    run = build(precision="bf16")
    run.move_auxiliary()
    before, scales = snapshot(run), [layer.scale for layer in run.auxiliary]

    class Fails:
        def in_float32(self) -> "Fails":
            return self

        def loss(self) -> Tensor:
            raise KeyError

    with pytest.raises(KeyError):
        measure_loss_gap(run.parts.models.values(), run.parts.method, [Fails()])
    assert all_equal(snapshot(run), before)
    assert [layer.scale for layer in run.auxiliary] == scales
    assert all(model.training for model in run.parts.models.values())
