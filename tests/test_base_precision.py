"""The frozen base in fewer bits or elsewhere: what is stored, that it never changes, and that nothing else does."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import whole_run
from quantisers import add_quantisers
from tiny_run import all_equal, write_both
from torch import Tensor, nn
from whole_run import in_one_and_in_two, quicken, refusal, train, words

from bilora_diffusion import base_precision, fused
from bilora_diffusion.adapters import adapted_layers, weight_norms
from bilora_diffusion.base_precision import FLOATS, QUANTISED, store_base
from bilora_diffusion.errors import UserError
from bilora_diffusion.fused import unfuse
from bilora_diffusion.stored_linear import StoredLinear

CPU = torch.device("cpu")
ERRORS = {"fp32": 0.0, "bf16": 0.003, "fp16": 0.0004, "int8": 0.01, "fp8": 0.03, "nf4": 0.11}
"""Relative Frobenius error of a normal weight, a little above what is known of the formats."""
BITS = {"fp32": 32.0, "bf16": 16.0, "fp16": 16.0, "int8": 8.2, "fp8": 8.2, "nf4": 4.2}
ALL = (*FLOATS, *QUANTISED)
USUAL = {("bilora", "nf4"), ("bilora", "int8"), ("bilora", "fp8")} | {
    (method, "nf4") for method in ("flat-lora", "bilora-fresh", "rwp-full", "lora")
}
"""The others are run by `make test-slow`."""


@pytest.fixture(autouse=True)
def packages(request: pytest.FixtureRequest) -> None:
    """Only for the tests of a precision that needs one."""
    wanted = getattr(request.node, "callspec", None)
    if wanted is not None and wanted.params.get("precision") in QUANTISED:
        add_quantisers()


class Block(nn.Module):
    """A layer that is stored in another way, between two that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(128, 256)
        self.attentions = nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 256, bias=False))
        self.norm = nn.LayerNorm(256)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.attentions(self.first(x)))


def block(precision: str | None, offload: bool = False, dtype: torch.dtype = torch.float32) -> tuple[Block, Block]:
    """A model, and the same stored."""
    torch.manual_seed(0)
    plain = Block().requires_grad_(False).to(dtype)
    stored = copy.deepcopy(plain)
    store_base("unet", stored, precision, CPU, offload=offload)
    return plain, stored


def stored_layers(model: nn.Module) -> list[StoredLinear]:
    return [module for module in model.modules() if isinstance(module, StoredLinear)]


def tensors_of(layer: StoredLinear) -> list[Tensor]:
    """Copies of the bits that are kept."""
    parts = vars(layer.stored)
    tensors = [value for value in parts.values() if isinstance(value, Tensor)]
    if "state" in parts:
        tensors.append(parts["state"].absmax)
    flat = [getattr(one, name) for one in tensors if hasattr(one, "qdata") for name in ("qdata", "scale")]
    return [tensor.clone() for tensor in flat or tensors]


@pytest.mark.parametrize("precision", ALL)
def test_a_weight_is_kept_as_well_as_its_bits_allow(precision: str):
    plain, stored = block(precision)
    layers = stored_layers(stored)
    assert [name for name, one in stored.named_modules() if one in layers] == ["attentions.0", "attentions.2"]
    for layer, original in zip(layers, (plain.attentions[0], plain.attentions[2]), strict=True):
        error = (layer.weight - original.weight).norm() / original.weight.norm()
        assert error.item() <= ERRORS[precision] and (precision == "fp32" or error > 0)
        assert layer.weight.dtype is torch.float32 and not layer.weight.requires_grad
        assert layer.stored.nbytes * 8 / original.weight.numel() <= BITS[precision]
        assert layer.bias is original.bias is None or torch.equal(layer.bias, original.bias)


@pytest.mark.parametrize("precision", ALL)
@pytest.mark.parametrize("offload", [False, True])
def test_it_computes_with_the_weight_it_restores(precision: str, offload: bool):
    """Outputs and gradients are those of ordinary layers with the restored weights."""
    plain, stored = block(precision, offload)
    for layer, twin in zip(stored_layers(stored), (plain.attentions[0], plain.attentions[2]), strict=True):
        twin.weight.data = layer.weight
    x = torch.randn(3, 5, 128)
    results = []
    for model in (plain, stored):
        given = x.clone().requires_grad_()
        y = model(given)
        y.square().sum().backward()
        results.append((y.detach(), given.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "int8", "nf4"])
def test_it_computes_in_autocasts_precision(precision: str):
    _, stored = block(precision)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert stored.attentions(torch.randn(2, 256)).dtype is torch.bfloat16
        assert stored.attentions[0](torch.randn(2, 256, dtype=torch.float64)).dtype is torch.float64
    assert stored.attentions(torch.randn(2, 256)).dtype is torch.float32


@pytest.mark.parametrize("precision", ["bf16", "int8", "fp8", "nf4"])
def test_no_restored_weight_is_kept_for_the_backward_pass(build: Callable, precision: str):
    run = build(base_precision=precision, lora_layers=None)
    shapes = {tuple(layer.weight.shape) for layer in stored_layers(run.parts.models["unet"])}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run.micro_batches()[0].loss().backward()
    # Some activation may have a weight's shape too; hundreds of layers would leave hundreds.
    assert len(kept) > 500 and sum(shape in shapes for shape in kept) < 20


@pytest.mark.parametrize(
    ("method", "precision"),
    [
        pytest.param(method, precision, marks=[pytest.mark.slow] * ((method, precision) not in USUAL))
        for method in ("bilora", "flat-lora")
        for precision in ALL
    ],
)
def test_the_fused_layers_take_pefts_steps(build: Callable, precision: str, method: str):
    runs = [build(method, base_precision=precision, seed=4) for _ in range(2)]
    unfuse(runs[1].parts.models["unet"])
    layers = sum(1 for _ in adapted_layers(runs[0].parts.models["unet"]))
    with mock.patch.object(fused._Stacked, "apply", wraps=fused._Stacked.apply) as calls:
        losses = [run.train(2) for run in runs]
    assert calls.call_count == 2 * layers  # of the first run alone
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("method", "flags", "precision"),
    [
        pytest.param(method, flags, precision, marks=[pytest.mark.slow] * ((method, precision) not in USUAL))
        for method, flags in (
            ("bilora", {"train_text_encoder": True, "gradient_checkpointing": True}),
            ("bilora-fresh", {}),
            ("rwp-full", {}),
            ("lora", {"use_dora": True}),
            ("lora", {"init_lora_weights": "pissa"}),
        )
        for precision in ("nf4", "int8", "fp8")
    ],
)
def test_what_is_stored_never_changes(build: Callable, precision: str, method: str, flags: dict):
    run = build(method, base_precision=precision, **flags)
    layers = [layer for part in run.parts.models.values() for layer in stored_layers(part)]
    before = [tensors_of(layer) for layer in layers]
    start, others = run.tensors(), run.base_tensors()
    losses = run.train(2)
    assert all(torch.tensor(losses).isfinite()) and not all_equal(start, run.tensors())
    assert all_equal(others, run.base_tensors())
    for old, layer in zip(before, layers, strict=True):
        assert len(old) > 1 and all(torch.equal(one, two) for one, two in zip(old, tensors_of(layer), strict=True))


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_the_base_is_nearly_the_same(build: Callable, precision: str):
    """Norms, which a relative radius is measured by, and the first loss, before anything is trained."""
    plain, stored = (build(base_precision=one, lora_layers=None) for one in (None, precision))
    norms = [weight_norms(run.parts.models) for run in (plain, stored)]
    assert norms[0] == pytest.approx(norms[1], rel=0.01)
    assert plain.step(0).loss == pytest.approx(stored.step(0).loss, rel=0.02)


def test_a_base_in_more_bits_than_the_arithmetic(build: Callable):
    """Read in float32 and rounded where it is used: the bits of the products are those of a base in bfloat16."""
    wide, half = (build(precision="bf16", base_precision=one) for one in ("fp32", None))
    layers = stored_layers(wide.parts.models["unet"])
    assert layers and all(layer.weight.dtype is torch.float32 for layer in layers)
    assert wide.step(0).loss == pytest.approx(half.step(0).loss, rel=0.02)


def test_the_computations_own_precision_changes_nothing(build: Callable):
    plain, named = (build(precision="bf16", base_precision=one) for one in (None, "bf16"))
    assert not stored_layers(named.parts.models["unet"])
    assert plain.train(2) == named.train(2) and all_equal(plain.tensors(), named.tensors())


def test_a_base_that_is_offloaded_is_kept_where_it_was_put(monkeypatch: pytest.MonkeyPatch):
    """Where there is no GPU, the copy to the computer's memory stands for it."""
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.clone())
        return kept[-1]

    monkeypatch.setattr(base_precision, "_to_pinned_memory", keep)
    plain, stored = block(None, offload=True)
    x = torch.randn(4, 128)
    assert torch.equal(plain(x), stored(x)) and len(kept) == 2
    kept[0].zero_()
    assert not torch.equal(plain(x), stored(x))  # it is read at each use
    assert not any(tensor is kept[0] for tensor in (*stored.parameters(), *stored.buffers()))


@pytest.mark.parametrize(("precision", "package"), [("nf4", "bitsandbytes"), ("int8", "torchao"), ("fp8", "torchao")])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, precision: str, package: str):
    for name in (package, f"{package}.functional", f"{package}.quantization"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"--base_precision {precision} needs the package {package}: pip install"):
        block(precision)


@pytest.mark.parametrize("precision", QUANTISED)
def test_a_package_that_does_not_work_here_is_told(monkeypatch: pytest.MonkeyPatch, precision: str):
    import bitsandbytes.functional
    import torchao.quantization

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel\nfor this device")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", fail)
    monkeypatch.setattr(torchao.quantization, "quantize_", fail)
    with pytest.raises(UserError, match=r"cannot store weights here \(no kernel for this device\); use bf16"):
        block(precision)


# --- whole runs ---


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_both(tmp_path_factory.mktemp("base_precision"))[0]


@pytest.mark.parametrize("precision", ["nf4", "fp8"])
def test_a_whole_run_with_pictures(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str):
    """The file it writes is loaded into the same base and held against the trained model."""
    quicken(monkeypatch, verify=True)
    flags = {"base_precision": precision, "validation_prompt": "a sks picture", "max_train_steps": 2}
    written = train(pictures, tmp_path / "run", train_text_encoder=True, **flags)
    assert written and all(tensor.dtype is torch.float32 for tensor in written.values())
    summary = whole_run.summary(tmp_path / "run")
    assert max(summary["verification"][0]["differences"].values()) < 1e-4


@pytest.mark.parametrize("precision", ["nf4"])
def test_a_resumed_run_is_the_same(pictures: Path, tmp_path: Path, precision: str):
    with whole_run.quickened():
        in_one_and_in_two(pictures, tmp_path, base_precision=precision, lora_layers="to_q")


def test_offloading_without_a_gpu_is_told(pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with whole_run.quickened():
        train(pictures, tmp_path / "run", offload_base=True, max_train_steps=1, lora_layers="to_q")
    assert "--offload_base has no effect here" in caplog.text


def test_a_wrong_precision_is_refused(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    given = words(pictures, tmp_path / "run", base_precision="int4")
    assert "--base_precision is 'int4': it must be one of" in refusal(given, capsys)
