"""Starts that are not zero: their formulas, a base that keeps its bits, and files that fit it."""

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig, inject_adapter_in_model
from tiny_run import Builder, TinyRun, all_equal
from torch import Tensor, nn

from bilora_diffusion import assembly
from bilora_diffusion.adapters import AUXILIARY, PRIMARY, START, adapted_layers, parameters_of
from bilora_diffusion.bases import PARTS
from bilora_diffusion.errors import UserError
from bilora_diffusion.finishing import lora_facts, save_loras
from bilora_diffusion.initialisation import weight_gradients
from bilora_diffusion.lora_files.description import describe
from bilora_diffusion.lora_files.difference import file_factors
from bilora_diffusion.lora_files.model_card import model_card
from bilora_diffusion.lora_files.outputs import compare_outputs, record_outputs
from bilora_diffusion.lora_files.verification import TrainedRecord, record_trained, verify_file
from bilora_diffusion.methods.row_norms import RowNorms
from bilora_diffusion.progress import Progress

MOVED = ("pissa", "pissa_niter_4", "olora", "lora_ga")
STARTS = ("gaussian", "kaiming", *MOVED)
ENCODERS = ("text_encoder", "text_encoder_2")


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "GRADIENT_ROWS", 4)


def layers(run: TinyRun) -> Iterator[tuple[str, str, nn.Module]]:
    for part, model in run.parts.models.items():
        for name, layer in adapted_layers(model):
            yield part, name, layer


def factors(layer: nn.Module, adapter: str = PRIMARY) -> tuple[Tensor, Tensor, float]:
    """A, B as matrices in float64, and the scale."""
    A, B = (one[adapter].weight.detach().flatten(1).double() for one in (layer.lora_A, layer.lora_B))
    return A, B, layer.scaling[adapter]


def weight(layer: nn.Module) -> Tensor:
    return layer.get_base_layer().weight.detach().flatten(1).double()


def merged(layer: nn.Module) -> Tensor:
    """W0 + s B A - s B0 A0, dense."""
    return weight(layer) + sum(s * B @ A for A, B, s in (factors(layer, one) for one in (PRIMARY, START)))


# The formulas


@pytest.mark.parametrize(("start", "tolerance"), [("pissa", 1e-5), ("pissa_niter_16", 2e-2)])
def test_pissa_takes_the_largest_singular_components(build: Builder, start: str, tolerance: float) -> None:
    for _, _, layer in layers(build("lora", init_lora_weights=start, lora_layers="to_k,conv1")):
        W, (A, B, s) = weight(layer), factors(layer)
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        best = (U[:, :4] * S[:4]) @ Vh[:4]
        # A randomised one need not find these very components, but ones that leave as little of the weight.
        assert (W - s * B @ A).norm() <= (W - best).norm() * (1 + tolerance)
        torch.testing.assert_close(A @ A.T, B.T @ B, rtol=1e-4, atol=1e-5)  # split evenly


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_the_start_is_the_one_that_peft_takes_out_of_the_weight(build: Builder, start: str) -> None:
    run = build("lora", init_lora_weights=start)
    theirs = copy.deepcopy(build.tiny.unet)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_k", "to_out.0"], init_lora_weights=start)
    inject_adapter_in_model(config, theirs)
    residuals = {name: weight(layer) for name, layer in adapted_layers(theirs)}
    for _, name, layer in layers(run):
        A, B, s = factors(layer)
        torch.testing.assert_close(residuals[name], weight(layer) - s * B @ A, rtol=1e-4, atol=1e-6)


def test_olora_takes_the_first_columns(build: Builder) -> None:
    for _, _, layer in layers(build("lora", init_lora_weights="olora")):
        A, B, _ = factors(layer)
        torch.testing.assert_close(B.T @ B, torch.eye(4).double(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close((B @ A)[:, :4], weight(layer)[:, :4], rtol=1e-4, atol=1e-6)  # R is triangular


def test_lora_ga_takes_the_gradients_directions(build: Builder) -> None:
    run = build("lora", init_lora_weights="lora_ga", train_text_encoder=True)
    micro_batches = [*run.micro_batches(0), *run.micro_batches(1)]  # the four rows of GRADIENT_ROWS
    ours = weight_gradients(run.parts.models, micro_batches)
    parameters = {(part, name): layer.get_base_layer().weight for part, name, layer in layers(run)}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    total = sum(micro_batch.loss() for micro_batch in micro_batches)
    dense = dict(zip(parameters, torch.autograd.grad(total, list(parameters.values()), allow_unused=True), strict=True))
    unseen = {key for key, gradient in dense.items() if gradient is None}
    last = f"layers.{build.tiny.text_encoder.config.num_hidden_layers - 1}."
    assert unseen == {key for key in dense if key[0] == "text_encoder" and last in key[1]}
    for part, name, layer in layers(run):
        if (part, name) in unseen:
            assert not ours[part, name].any()
            continue
        G = dense[part, name].flatten(1).double()
        torch.testing.assert_close(ours[part, name].double(), G, rtol=1e-4, atol=1e-5 * G.abs().max().item())
        S = torch.linalg.svdvals(G)
        A, B, _ = factors(layer)
        c = len(G) ** 0.5 / 16
        torch.testing.assert_close(A @ A.T, c * torch.eye(4).double(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(B.T @ B, c * torch.eye(4).double(), rtol=1e-4, atol=1e-5)
        # Singular vectors of values that lie close may mix; what they hold of the gradient may not.
        energy = (G @ A.T).square().sum() / c, (B.T @ G).square().sum() / c
        torch.testing.assert_close(energy[0], S[:4].square().sum(), rtol=2e-3, atol=0)
        torch.testing.assert_close(energy[1], S[4:8].square().sum(), rtol=0.1, atol=1e-12)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_the_gradients_pass_leaves_nothing(build: Builder, precision: str) -> None:
    run = build("lora", precision, init_lora_weights="lora_ga")
    gradients = weight_gradients(run.parts.models, run.micro_batches(0))
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients.values())
    parameters = [p for model in run.parts.models.values() for p in model.parameters()]
    assert all(p.grad is None for p in parameters)
    assert {id(p) for p in parameters if p.requires_grad} == {id(p) for p in run.parts.trainer.primary}


@pytest.mark.parametrize(("start", "most"), [("pissa", 64), ("lora_ga", 32)])
def test_a_rank_that_a_layer_has_not(build: Builder, start: str, most: int) -> None:
    assert min(min(weight(layer).shape) for _, _, layer in layers(build("lora"))) == 64
    with pytest.raises(UserError, match=f"--init_lora_weights {start}: unet.* give --rank {most}"):
        build("lora", init_lora_weights=start, rank=most + 1)


def test_a_rank_that_no_layer_has_is_told(build: Builder) -> None:
    models = build("lora", lora_layers="to_q", rank=65).parts.models
    told = assembly.narrower_than(65, models)
    assert "--rank 65 is more than " in told and "narrowest is 64 wide" in told
    assert assembly.narrower_than(64, models) is None


# The model


@pytest.mark.parametrize(("start", "precision"), [*((start, "no") for start in STARTS), ("pissa", "bf16")])
def test_the_model_begins_as_the_base(build: Builder, start: str, precision: str) -> None:
    run = build("bilora", precision, init_lora_weights=start, train_text_encoder=True)
    bare = build("bilora", precision, train_text_encoder=True)  # B = 0
    base = record_outputs(bare.parts.models)
    differences = compare_outputs(record_outputs(run.parts.models), base)
    # In half precision too: what is taken away is summed in float32 with what is added.
    assert max(differences.values()) < 3e-6
    assert all(B.any() for _, _, layer in layers(run) for B in [factors(layer)[1]]) == (start in MOVED)


def test_the_default_start_has_no_third_adapter(build: Builder) -> None:
    run = build("bilora")
    assert {adapter for _, _, layer in layers(run) for adapter in layer.lora_A} == {PRIMARY, AUXILIARY}
    other = build("bilora", init_lora_weights="kaiming")
    A = run.tensors(), other.tensors()
    assert not any(torch.equal(A[0][name], A[1][name]) for name in A[0] if "lora_A" in name)
    assert all_equal(run.tensors(AUXILIARY), other.tensors(AUXILIARY))


@pytest.mark.parametrize(
    ("method", "start", "precision"),
    [
        ("lora", "pissa", "no"),
        ("bilora", "pissa_niter_4", "no"),
        ("bilora", "pissa", "bf16"),
        ("flat-lora", "olora", "no"),
        ("eflat-lora", "lora_ga", "bf16"),
    ],
)
def test_training_moves_the_primary_alone(build: Builder, method: str, start: str, precision: str) -> None:
    run = build(method, precision, init_lora_weights=start, sigma=0.2 if method == "flat-lora" else None)
    base, primary, began = run.base_tensors(), run.tensors(), run.tensors(START)
    plain = build(method, precision, sigma=0.2 if method == "flat-lora" else None)
    assert all_equal(base, plain.base_tensors())  # no initialisation moved it either
    losses = run.train(3)
    assert losses[0] == pytest.approx(plain.train(1)[0], rel=1e-4 if precision == "no" else 0.05)
    assert all_equal(base, run.base_tensors())
    assert all_equal(began, run.tensors(START))
    assert not any(torch.equal(value, primary[name]) for name, value in run.tensors().items())


def test_the_radius_is_measured_on_the_base(build: Builder) -> None:
    plain, moved = build("bilora").parts.radius, build("bilora", init_lora_weights="pissa").parts.radius
    assert (plain.rho, plain.relative, plain.singular_share) == (moved.rho, moved.relative, moved.singular_share)


@pytest.mark.parametrize("trained", [False, True])
def test_the_noise_is_a_share_of_the_merged_weight(build: Builder, trained: bool) -> None:
    run = build("flat-lora", init_lora_weights="pissa", lora_layers="to_k,conv1", learning_rate=0.1)
    run.train(2 if trained else 0)
    adapted = [layer for _, _, layer in layers(run)]
    for layer, norms in zip(adapted, RowNorms(adapted).now(), strict=True):
        rows = merged(layer).norm(dim=1)
        torch.testing.assert_close(norms.double(), rows, rtol=1e-4, atol=0)
        assert ((rows / weight(layer).norm(dim=1) - 1).abs().max() > 0.05) == trained


# The files


def exported(run: TinyRun, folder: Path) -> tuple[list[Path], TrainedRecord]:
    """What the run writes, and a record of what it trained."""
    with run.parts.trainer.as_exported():
        files = save_loras(folder, run.config, run.parts, Progress(0))
        return files, record_trained(run.parts.models)


def fresh_base(build: Builder, dtype: torch.dtype = torch.float32) -> StableDiffusionXLPipeline:
    return build._copy(PARTS, dtype)


AVERAGED = {"ema_decay": 0.5, "loraplus_lr_ratio": 4.0}
COMBINATIONS = [
    *itertools.product(
        ["lora", "bilora", "flat-lora"],
        [
            {"init_lora_weights": "pissa", **AVERAGED},
            {"init_lora_weights": "lora_ga"},
            {"use_dora": True, "init_lora_weights": "kaiming", **AVERAGED},
        ],
    ),
    ("lora", {"init_lora_weights": "olora", "lora_layers": "to_k,conv1"}),
    ("bilora", {"init_lora_weights": "pissa_niter_4", "train_text_encoder": True}),
]


@pytest.mark.parametrize(("method", "flags"), COMBINATIONS, ids=str)
def test_the_files_are_the_trained_model_on_the_base_as_it_was(
    build: Builder, tmp_path: Path, method: str, flags: dict
) -> None:
    run = build(
        method, **{"lora_layers": "to_k", **flags}, learning_rate=1e-2, sigma=0.1 if method == "flat-lora" else None
    )
    run.train(3)
    files, trained = exported(run, tmp_path)
    assert len(files) == (1 if run.config.use_dora else 2)
    pipeline = fresh_base(build)
    for file in files:
        found = verify_file(file, pipeline, trained)
        assert found.effects["unet"] > 1e-3
        # Float32's rounding of a start that is added and taken away, and nothing of one that is not there.
        assert max(found.differences.values()) <= (0 if run.config.use_dora else 3e-6)
        ranks = describe(file, file.name).ranks
        assert ranks == (run.config.file_rank,) == (4 if run.config.use_dora else 8,)


def test_a_half_precision_base_gets_what_was_trained(build: Builder, tmp_path: Path) -> None:
    run = build("bilora", "bf16", init_lora_weights="pissa", lora_layers="to_k")
    run.train(3)
    files, trained = exported(run, tmp_path)
    pipeline = fresh_base(build, torch.bfloat16)
    for file in files:
        assert verify_file(file, pipeline, trained).file == file.name


def test_a_change_that_is_rounded_keeps_its_digits(build: Builder) -> None:
    """Unlike the two halves [B, -B0] [A; A0], of which rounding leaves other remainders."""
    run = build("lora", init_lora_weights="pissa", lora_layers="to_k")
    run.train(2)
    for _, _, layer in layers(run):
        A, B = (one.flatten(1).double() for one in file_factors(layer))
        (A1, B1, _), (A0, B0, _) = factors(layer), factors(layer, START)
        change = B1 @ A1 - B0 @ A0
        assert (B @ A - change).norm() < 1e-5 * change.norm()

        def rounded(factor: Tensor) -> Tensor:
            return factor.to(torch.bfloat16).double()

        ours = (rounded(B) @ rounded(A) - change).norm() / change.norm()
        halves = (rounded(B1) @ rounded(A1) - rounded(B0) @ rounded(A0) - change).norm() / change.norm()
        assert ours < 0.005
        assert halves > 10 * ours


def test_a_layer_narrower_than_the_files_rank(build: Builder, tmp_path: Path) -> None:
    run = build("lora", init_lora_weights="pissa", rank=40, lora_alpha=80.0, lora_layers="to_k")
    run.train(2)
    files, trained = exported(run, tmp_path)
    for file in files:
        assert verify_file(file, fresh_base(build), trained).file == file.name
    assert describe(files[0], "x").ranks == (80,)


def test_the_files_tell_how_it_began(build: Builder, tmp_path: Path) -> None:
    run = build("bilora", init_lora_weights="pissa_niter_4")
    files, _ = exported(run, tmp_path)
    for file in files:
        with safetensors.safe_open(file, "pt") as content:
            metadata = content.metadata()
        assert metadata["bilora_init_lora_weights"] == "pissa_niter_4"
        assert (metadata["bilora_rank"], metadata["bilora_alpha"]) == ("8", "16.0")
        assert describe(file, "x").facts["init_lora_weights"] == "pissa_niter_4"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("8", "16.0")
    card = model_card(lora_facts(run.config, run.parts, Progress(0)))
    assert "| rank / alpha | 8 / 16 |" in card
    assert "PiSSA ([arXiv 2404.02948](https://arxiv.org/abs/2404.02948)), 4 power iterations; the file holds" in card
    plain = build("bilora")
    card = model_card(lora_facts(plain.config, plain.parts, Progress(0)))
    assert "| rank / alpha | 4 / 8 |\n| initial values | gaussian A, B = 0 |" in card


def test_the_start_is_no_parameter_of_the_primary(build: Builder) -> None:
    run = build("bilora", init_lora_weights="pissa")
    start = {id(p) for model in run.parts.models.values() for p in parameters_of(model, START).values()}
    assert start
    assert not start & {id(p) for p in run.parts.trainer.trained}
    assert all(not p.requires_grad for p in run.parameters(START).values())
