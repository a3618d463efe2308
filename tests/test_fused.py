"""The fused linear layer: peft's own outputs and gradients, and peft's forward where that is another thing."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from tiny_run import all_equal
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.speed.measuring import StepCounter
from bilora_diffusion import fused
from bilora_diffusion.adapters import AUXILIARY, PRIMARY, adapted_layers, auxiliary_off
from bilora_diffusion.base_prediction import only_base
from bilora_diffusion.fused import FusedLinear, fuse, unfuse
from bilora_diffusion.joined import Joiner, join
from bilora_diffusion.methods.interface import without_gradients

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")

IN, OUT = 24, 17
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}


class Model(nn.Module):
    """One adapted layer, `to_q`, between two that are not."""

    def __init__(self, bias: bool = True, kind: Callable[..., nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.before, self.to_q, self.after = nn.Linear(IN, IN), kind(IN, OUT, bias=bias), nn.Linear(OUT, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.tanh(self.to_q(torch.tanh(self.before(x)))))


def model(adapters: dict[str, int], dtype: torch.dtype = torch.float64, alpha: float = 6.0, **options) -> Model:
    """A fused model with adapters of the given ranks, all active, whose B is not zero."""
    made = Model(**{key: options.pop(key) for key in ("bias", "kind") if key in options}).requires_grad_(False)
    for name, rank in adapters.items():
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["to_q"], **options)
        inject_adapter_in_model(config, made, adapter_name=name)
    layer = made.to_q
    layer.set_adapter(list(adapters))
    for name in adapters:
        nn.init.normal_(layer.lora_B[name].weight, std=0.3)
    fuse(made.to(dtype))
    return made


def both(adapters: dict[str, int], dtype: torch.dtype = torch.float64, **options) -> tuple[Model, Model]:
    """The same model computed in the two ways."""
    one = model(adapters, dtype, **options)
    other = copy.deepcopy(one)
    unfuse(other)
    assert type(one.to_q) is FusedLinear and type(other.to_q) is Linear
    return one, other


def results(made: nn.Module, x: Tensor, context: AbstractContextManager | None = None) -> dict[str, Tensor]:
    """The output and the gradients by name, the input's among them; a gradient of zero counts as none."""
    x = x.clone().requires_grad_()
    with context or nullcontext():
        y = made(x)
    (y.float() if y.dtype.itemsize == 2 else y).square().sum().backward()
    found = {"output": y.detach(), "input": x.grad}
    found |= {name: p.grad for name, p in made.named_parameters() if p.grad is not None and p.grad.any()}
    return found


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, value in other.items():
        assert one[name].dtype == value.dtype and one[name].shape == value.shape
        assert (one[name] - value).abs().max() <= tolerance * value.abs().max(), name


def rows(dtype: torch.dtype = torch.float64, *shape: int) -> Tensor:
    return torch.randn(*(shape or (3, 7)), IN, dtype=dtype)


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that a layer was computed in the fused way, the number of its adapters."""
    calls = []
    apply = fused._Stacked.apply

    def counting(*arguments):
        calls.append(len(arguments[6]))
        return apply(*arguments)

    monkeypatch.setattr(fused._Stacked, "apply", counting)
    return calls


ADAPTERS = {
    "one": {PRIMARY: 4},
    "two": {PRIMARY: 4, AUXILIARY: 4},
    "ranks": {PRIMARY: 4, AUXILIARY: 3},  # alpha is one, so the scales differ too
    "three": {PRIMARY: 2, AUXILIARY: 3, "other": 1},
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("adapters", ADAPTERS.values(), ids=ADAPTERS)
def test_outputs_and_gradients_are_pefts(adapters, dtype, bias, fused_calls):
    one, other = both(adapters, dtype, bias=bias)
    x = rows(dtype)
    seen = results(one, x)
    assert_same(seen, results(other, x), TOLERANCES[dtype])
    assert len(seen) == 2 + 2 * len(adapters)
    assert fused_calls == [len(adapters)]


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (0, 4)], ids=str)
def test_rows_of_any_shape(shape, fused_calls):
    one, other = both(ADAPTERS["two"])
    x = rows(torch.float64, *shape)
    assert torch.equal(torch.tensor(one(x).shape), torch.tensor(other(x).shape))
    assert torch.allclose(one(x), other(x), atol=1e-12)
    assert fused_calls


def test_an_input_that_is_not_contiguous_and_one_without_gradient():
    one, other = both(ADAPTERS["two"])
    x = torch.randn(IN, 7, 3, dtype=torch.float64).permute(2, 1, 0)
    assert_same(results(one, x), results(other, x), 1e-12)
    before = x.clone()
    outputs = [made.to_q(x) for made in (one, other)]  # as a cross-attention's text: only the factors have gradients
    for output in outputs:
        output.square().sum().backward()
    twins = dict(other.named_parameters())
    gradients = {name: p.grad for name, p in one.named_parameters() if p.grad is not None}
    assert len(gradients) == 4
    assert all(torch.allclose(gradient, twins[name].grad, rtol=1e-12) for name, gradient in gradients.items())
    assert torch.equal(x, before)


@pytest.mark.parametrize("active", [[PRIMARY], [AUXILIARY], []], ids=str)
def test_an_inactive_adapter_adds_nothing(active, fused_calls):
    one, other = both(ADAPTERS["two"])
    for made in (one, other):
        made.to_q.set_adapter(active)
    x = rows()
    assert_same(results(one, x), results(other, x), 1e-12)
    assert fused_calls == [1] * len(active)


def test_an_adapter_that_is_off_costs_nothing_and_comes_back(fused_calls):
    one, other = both(ADAPTERS["two"])
    x = rows()
    with auxiliary_off([one]), auxiliary_off([other]):
        assert_same(results(one, x), results(other, x), 1e-12)
    assert fused_calls == [1]
    one.zero_grad(), other.zero_grad()
    assert_same(results(one, x), results(other, x), 1e-12)
    assert fused_calls == [1, 2]


@pytest.mark.parametrize("frozen", ["A", "B"])
def test_frozen_factors_have_no_gradient(frozen):
    """As `bilora-fresh` does between its passes."""
    one, other = both(ADAPTERS["two"])
    for made in (one, other):
        getattr(made.to_q, f"lora_{frozen}")[AUXILIARY].requires_grad_(False)
        made.to_q.lora_A[PRIMARY].requires_grad_(False)
    x = rows()
    assert_same(results(one, x), results(other, x), 1e-12)


@pytest.mark.parametrize("chances", [(0.0, 0.0), (0.3, 0.6), (0.0, 0.5)], ids=str)
def test_gradients_by_finite_differences(chances):
    layer = model(ADAPTERS["ranks"]).to_q
    factors = [layer.lora_A[PRIMARY], layer.lora_B[PRIMARY], layer.lora_A[AUXILIARY], layer.lora_B[AUXILIARY]]
    scales = [layer.scaling[PRIMARY], layer.scaling[AUXILIARY]]
    A1, B1, A2, B2 = (factor.weight for factor in factors)
    x = rows(torch.float64, 3).requires_grad_()
    base = layer.base_layer

    def output(x: Tensor, *factors: Tensor) -> Tensor:
        torch.manual_seed(1)  # the same elements are dropped each time
        A1, B1, A2, B2 = factors
        one = join([(A1, B1, scales[0]), (A2, B2, scales[1])], torch.float64)
        own = one.scale, one.ranks, list(chances), one.down, one.up
        return fused._Stacked.apply(x, base.weight, base.bias, None, None, *own)

    assert torch.autograd.gradcheck(output, (x, A1, B1, A2, B2))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adapters", [ADAPTERS["one"], ADAPTERS["two"]], ids=["one", "two"])
def test_autocast_is_no_less_exact_than_pefts(adapters, half, fused_calls):
    """Half a base, adapters in float32: gradients in float32, and errors against float64 no larger than peft's."""
    exact = model(adapters)
    halved = copy.deepcopy(exact)
    for name, parameter in halved.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if ".lora_" in name else half)
    twin = copy.deepcopy(halved)
    unfuse(twin)
    x = rows(torch.float64, 64, 8)
    truth = results(exact, x)
    fused_calls.clear()
    one, other = (results(made, x.float(), torch.autocast("cpu", half)) for made in (halved, twin))
    assert fused_calls == [len(adapters)]
    for name in truth:
        assert one[name].dtype == other[name].dtype == (half if name == "output" else torch.float32)
        ours, pefts = ((seen[name].double() - truth[name]).norm() / truth[name].norm() for seen in (one, other))
        assert ours <= 1.5 * pefts + 1e-4, name


def test_gradient_checkpointing_gives_the_same_gradients():
    one, _ = both(ADAPTERS["two"])
    x = rows()
    plain = results(one, x)
    one.zero_grad()
    assert_same(results(_Checkpointed(one), x), {_name(key): value for key, value in plain.items()}, 1e-12)


class _Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def _name(key: str) -> str:
    return key if key in ("output", "input") else f"inner.{key}"


def test_the_base_and_what_it_gives_are_untouched():
    one, _ = both(ADAPTERS["two"])
    before = {name: p.clone() for name, p in one.named_parameters()}
    results(one, rows())
    assert all(torch.equal(before[name], p) for name, p in one.named_parameters())


# --- where peft's own forward is needed ---


def _merge(made: Model) -> None:
    made.to_q.merge()


def _disable(made: Model) -> None:
    made.to_q._disable_adapters = True


def _train_the_base(made: Model) -> None:
    made.to_q.base_layer.weight.requires_grad_(True)


def _hook(made: Model) -> None:
    made.to_q.base_layer.register_forward_hook(lambda module, inputs, output: output * 2)


def _replace_forward(made: Model) -> None:
    """As accelerate's offloading does."""
    base = made.to_q.base_layer
    base.forward = lambda x: 2 * nn.functional.linear(x, base.weight, base.bias)


def _float32_adapter(made: Model) -> None:
    for factors in (made.to_q.lora_A, made.to_q.lora_B):
        factors[AUXILIARY].float()


class _Subclass(nn.Linear):
    """Stands for what a quantised layer is: a subclass with a product of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).round(decimals=1)


CASES = {
    "merged": (_merge, {}),
    "disabled": (_disable, {}),
    "trained base": (_train_the_base, {}),
    "hooked base": (_hook, {}),
    "offloaded base": (_replace_forward, {}),
    "another precision": (_float32_adapter, {}),
    "DoRA": (lambda made: None, {"use_dora": True}),
    "adapter with a bias": (lambda made: None, {"lora_bias": True}),
    "another kind of base": (lambda made: None, {"kind": _Subclass}),
}


@pytest.mark.parametrize(("change", "options"), CASES.values(), ids=CASES)
def test_falls_back_to_peft(change, options, fused_calls):
    one = model(ADAPTERS["two"], **options)
    change(one)
    x = rows()
    seen = one(x)
    assert not fused_calls
    unfuse(one)
    assert torch.equal(seen, one(x))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("adapters", ADAPTERS.values(), ids=ADAPTERS)
def test_dropout_drops_what_pefts_does(adapters, dtype, fused_calls):
    """For each adapter other elements, in training only; the gradients are of what was shown."""
    one, other = both(adapters, dtype, lora_dropout=0.4)
    x = rows(dtype)
    seen, expected = ([], [])
    for made, found in ((one.train(), seen), (other.train(), expected)):
        torch.manual_seed(1)
        found += [results(made, x), results(made, x)]
    assert len(fused_calls) == 2 and not torch.allclose(seen[0]["output"], seen[1]["output"])
    for found, wanted in zip(seen, expected, strict=True):
        assert_same(found, wanted, TOLERANCES[dtype])
    assert torch.allclose(one.eval()(x), other.eval()(x), atol=TOLERANCES[dtype])


def test_one_adapter_drops_and_the_other_does_not(fused_calls):
    one, other = both(ADAPTERS["ranks"])
    for made in (one.train(), other.train()):
        made.to_q.lora_dropout[AUXILIARY] = nn.Dropout(0.5)
    x = rows()
    torch.manual_seed(1)
    seen = results(one, x)
    torch.manual_seed(1)
    assert_same(seen, results(other, x), 1e-12)
    assert fused_calls == [2]


def test_another_kind_of_dropout_is_pefts(fused_calls):
    one = model(ADAPTERS["two"], lora_dropout=0.5).train()
    one.to_q.lora_dropout[PRIMARY] = nn.AlphaDropout(0.5)
    one(rows())
    assert not fused_calls


def test_dropout_keeps_a_byte_an_element():
    """Beside the input: a mask for each adapter, where peft's layers keep the dropped input too."""
    made = {False: model(ADAPTERS["two"], torch.float32, lora_dropout=0.5), True: model(ADAPTERS["two"], torch.float32)}
    x = rows(torch.float32, 64).requires_grad_()

    def kept(layer: nn.Module) -> int:
        sizes = {}

        def keep(tensor: Tensor) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer.train()(x)
        return sum(sizes.values())

    assert kept(made[False].to_q) - kept(made[True].to_q) == 2 * 64 * IN


def test_adapters_by_row_are_pefts(fused_calls):
    one, other = both(ADAPTERS["two"])
    x, names = rows(torch.float64, 3, 2), [PRIMARY, AUXILIARY, "__base__"]
    seen = one.to_q(x, adapter_names=names)
    assert torch.equal(seen, other.to_q(x, adapter_names=names)) and not fused_calls


def test_a_half_base_outside_autocast_is_pefts(fused_calls):
    """peft adds in float32 and rounds once: a picture drawn in half precision must not depend on the trainer."""
    one, other = both(ADAPTERS["two"], torch.float32)
    for made in (one, other):
        for name, parameter in made.named_parameters():
            parameter.data = parameter.data if ".lora_" in name else parameter.data.bfloat16()
    x = rows(torch.bfloat16)
    assert torch.equal(one(x), other(x)) and not fused_calls


def test_only_linear_layers_are_fused():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4)).requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0", "1"]), net)
    kinds = [type(layer) for _, layer in adapted_layers(net)]
    fuse(net)
    assert [type(layer) for _, layer in adapted_layers(net)] == [kinds[0], FusedLinear]
    unfuse(net)
    assert [type(layer) for _, layer in adapted_layers(net)] == kinds


# --- in the trainer ---


@pytest.mark.parametrize("method", ["lora", "bilora", "bilora-fresh", "flat-lora"])
def test_a_run_takes_pefts_steps(build, method, fused_calls):
    flags = {"lora_dropout": 0.3} if method in ("lora", "bilora") else {}
    runs = [build(method, train_text_encoder=True, auxiliary_learning_rate=0.01, **flags) for _ in range(2)]
    for part in runs[1].parts.models.values():
        unfuse(part)
    losses = [run.train(3) for run in runs]
    layers = sum(1 for part in runs[0].parts.models.values() for _ in adapted_layers(part))
    assert len(fused_calls) >= 3 * layers
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# --- the factors of all layers together ---

TOGETHER = {
    "lora": ("lora", "bf16", {}),
    "bilora": ("bilora", "no", {"train_text_encoder": True}),
    "half": ("bilora", "bf16", {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}),
    "fp16": ("bilora", "fp16", {"lora_dropout": 0.3}),
    "two passes": ("bilora-fresh", "bf16", {}),
    "another start": ("bilora", "bf16", {"init_lora_weights": "olora"}),
}


@pytest.mark.parametrize(("method", "precision", "flags"), TOGETHER.values(), ids=TOGETHER)
def test_joined_together_or_one_by_one_are_the_same_bits(build, method, precision, flags):
    runs = [build(method, precision, auxiliary_learning_rate=0.01, **flags) for _ in range(2)]
    runs[1].parts.trainer.factors = None
    losses = [run.train(3) for run in runs]
    assert losses[0] == losses[1]
    for adapter in (PRIMARY, AUXILIARY):
        assert all_equal(*(run.tensors(adapter) for run in runs))
    assert not any(layer._ready for part in runs[0].parts.models.values() for _, layer in adapted_layers(part))


def test_what_is_joined_for_a_pass_is_gone_after_an_error(build):
    run = build("bilora", "bf16")
    layers = [layer for _, layer in adapted_layers(run.parts.models["unet"])]
    with pytest.raises(ZeroDivisionError), run.parts.trainer.factors.joined(torch.bfloat16):
        assert all(layer._ready for layer in layers)
        raise ZeroDivisionError
    assert not any(layer._ready for layer in layers)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("flags", [{}, {"gradient_checkpointing": True}], ids=["", "checkpointing"])
def test_an_auxiliary_asks_for_few_operations_more(build, precision, flags):
    """Joined layer by layer it would be six and more for each of the 64 layers, and as many again for LoRA in half."""
    counts = {}
    for method in ("lora", "bilora"):
        run = build(method, precision, lora_layers=None, **flags)
        layers = sum(1 for _ in adapted_layers(run.parts.models["unet"]))
        run.train(2)
        (micro_batch,) = run.micro_batches(2)
        with StepCounter(torch.device("cpu")) as counter:
            micro_batch.add_gradient()
        counts[method] = counter.operations
    assert 0 < counts["bilora"] - counts["lora"] < layers
    run = build("lora", precision, lora_layers=None, **flags)
    run.parts.trainer.factors = None
    (micro_batch,) = run.micro_batches()
    with StepCounter(torch.device("cpu")) as counter:
        micro_batch.add_gradient()
    saved = counter.operations - counts["lora"]
    assert saved > 3 * layers if precision == "bf16" else saved == 0


def test_a_layer_that_the_loss_does_not_see_has_no_gradient():
    factors = [torch.randn(2, 3, requires_grad=True), torch.randn(4, 2, requires_grad=True)]
    unseen = [one.detach().clone().requires_grad_() for one in factors]
    frozen = [one.detach().clone() for one in factors]
    layers = [[(*factors, 0.5), (*frozen, 0.25)], [(*unseen, 0.5), (*frozen, 0.25)]]
    seen, other = Joiner(layers).join(torch.bfloat16)
    assert seen.down.requires_grad and other.up.requires_grad and seen.scale == 1 and seen.ranks == (2, 2)
    assert torch.equal(seen.up[:, 2:], (frozen[1] * 0.25).bfloat16())
    seen.up.sum().backward()
    assert torch.equal(factors[1].grad, torch.full((4, 2), 0.5)) and factors[0].grad is None
    assert [one.grad for one in unseen] == [None, None] and frozen[1].grad is None


def test_where_there_is_nothing_to_join_nothing_is_copied():
    A, B = torch.randn(2, 3), torch.randn(4, 2)
    one = join([(A, B, 0.5)], torch.float32)
    assert one.down is A and one.up is B and one.scale == 0.5


def test_what_is_on_may_be_another_in_another_pass(build):
    run = build("bilora")
    unet = run.parts.models["unet"]
    layers = [layer for _, layer in adapted_layers(unet)]
    first, base = layers[0], layers[0].base_layer
    auxiliary = list(run.parameters(AUXILIARY).values())

    def ready() -> list[tuple[list[str], bool] | None]:
        """Of each layer the adapters that are joined, and whether `down` has a gradient."""
        with run.parts.trainer.factors.joined(torch.float32):
            return [layer._ready and (layer._ready[0], layer._ready[1].down.requires_grad) for layer in layers]

    usual = [([PRIMARY, AUXILIARY], True)] * len(layers)
    assert ready() == usual
    with auxiliary_off([unet]):
        assert ready() == [([PRIMARY], True)] * len(layers)
    with without_gradients([*auxiliary, *run.parts.trainer.primary]):
        assert ready() == [([PRIMARY, AUXILIARY], False)] * len(layers)
    with only_base([unet]):
        assert ready() == [None] * len(layers)
    handle = base.register_forward_hook(lambda *_: None)
    assert ready() == [None, *usual[1:]]
    handle.remove()
    base.weight.requires_grad_(True)
    assert ready() == [None, *usual[1:]]
    base.weight.requires_grad_(False)
    first.set_adapter([AUXILIARY])
    assert ready()[0][0] == [AUXILIARY]
    first.set_adapter([PRIMARY, AUXILIARY])
    assert ready() == usual
    unfuse(unet)
    with run.parts.trainer.factors.joined(torch.float32):
        assert not any(hasattr(layer, "_ready") for layer in layers)
