"""Steps that see the same rows under another noise, and the sketch of a gradient that the second of them follows."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from tiny_run import TinyRun, write_both
from torch import Tensor
from whole_run import StopAfter, main, metrics, quickened, refusal, summary, train, words

from bilora_diffusion import run as run_module
from bilora_diffusion.adapters import AUXILIARY, adapted_layers, auxiliary_off, product_norm
from bilora_diffusion.config import TrainingConfig
from bilora_diffusion.data.dreambooth import DrawBatches, DreamBoothDataset
from bilora_diffusion.errors import UserError
from bilora_diffusion.methods.eigen import jacobi
from bilora_diffusion.methods.gradient_sketch import Factors, GradientSketch, _cut, _sketch, _solved


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_both(tmp_path_factory.mktemp("echo"))[0]


def exact_gradients(run: TinyRun, step: int) -> list[Tensor]:
    """dL/dW of every adapted layer, by autograd on the weights themselves."""
    weights = [
        layer.get_base_layer().weight for model in run.parts.models.values() for _, layer in adapted_layers(model)
    ]
    for weight in weights:
        weight.requires_grad_(True)
    for micro_batch in run.micro_batches(step):
        micro_batch.add_gradient()
    found = [weight.grad.flatten(1) for weight in weights]
    for weight in weights:
        weight.requires_grad_(False)
        weight.grad = None
    for parameter in run.parts.trainer.trained:
        parameter.grad = None
    return found


def energy(matrices: list[Tensor]) -> float:
    return sum(matrix.double().square().sum().item() for matrix in matrices)


@pytest.mark.parametrize(
    ("flags", "share"),
    [
        ({}, 0.98),
        ({"gradient_checkpointing": True}, 0.98),
        ({"gradient_accumulation_steps": 2, "train_batch_size": 1}, 0.98),
        ({"use_dora": True}, 0.95),
        ({"lora_layers": "to_k,conv1"}, 0.8),  # of a random network's convolutions the gradients have full rank
    ],
)
@pytest.mark.parametrize("decomposed", ["by lapack", "by jacobi"])
def test_a_sketch_is_the_strongest_part_of_the_gradient(
    build, flags: dict, share: float, decomposed: str, monkeypatch: pytest.MonkeyPatch
):
    """By the part of the gradient that it explains, of what the best approximation of its rank explains."""
    if decomposed == "by jacobi":  # as off the CPU
        monkeypatch.setattr(torch.linalg, "eigh", jacobi)
    rank = 4
    run = build("lora", **flags)
    run.train(2)
    exact = exact_gradients(run, 5)
    sketch = GradientSketch(run.parts.models, rank, seed=0)
    with sketch.collecting(step=3):
        for micro_batch in run.micro_batches(5):
            micro_batch.add_gradient()
    factors = sketch.factors()
    explained = energy(exact) - energy([G - B @ A for G, (B, A) in zip(exact, factors, strict=True)])
    best = sum(torch.linalg.svdvals(G.double())[:rank].square().sum().item() for G in exact)
    assert share < explained / best <= 1 + 1e-5
    for B, A in factors:  # orthonormal columns, but for directions in which there is next to nothing
        assert (B @ A).norm().item() == pytest.approx(A.norm().item(), rel=1e-3)
    modules = [module for model in run.parts.models.values() for module in model.modules()]
    assert not any(module._forward_hooks for module in modules)


def test_a_sketch_of_half_precision(build):
    run = build("lora", "bf16")
    run.train(2)
    exact = exact_gradients(run, 5)
    sketch = GradientSketch(run.parts.models, 4, seed=0)
    with sketch.collecting(step=3):
        for micro_batch in run.micro_batches(5):
            micro_batch.add_gradient()
    rest = [G - B @ A for G, (B, A) in zip(exact, sketch.factors(), strict=True)]
    assert energy(rest) < 0.1 * energy(exact)


def test_a_layer_that_the_loss_does_not_see_has_no_part(build):
    """The last of text encoder 1."""
    run = build("bilora-echo", train_text_encoder=True, lora_layers="to_k", rho=0.5)
    run.train(1)
    for layer in run.auxiliary:
        unseen = layer.part == "text_encoder" and ".layers.2." in layer.name
        assert (layer.A.abs().max() == 0) == unseen
        assert layer.A.isfinite().all() and layer.B.isfinite().all()


def test_the_second_step_is_taken_under_the_first_ones_gradient(build):
    run = build("bilora-echo", rho=0.1)
    for step in range(4):
        micro_batches = run.micro_batches(step)
        assert micro_batches[0].is_repeat == (step % 2 == 1)
        with torch.no_grad():
            with auxiliary_off(run.parts.models.values()):
                clean = micro_batches[0].loss().item()
            with run.parts.method.perturbed(micro_batches):
                perturbed = micro_batches[0].loss().item()
        if step % 2:
            assert product_norm(run.auxiliary).item() == pytest.approx(0.1, rel=1e-4)
            assert perturbed > clean  # an ascent, though the noise is another
        else:
            assert product_norm(run.auxiliary).item() == 0 and perturbed == clean
        assert run.step(step).loss == pytest.approx(perturbed, rel=1e-5)


@pytest.mark.parametrize(("steps_per_draw", "skipped"), [(2, [2]), (2, [1, 2]), (3, [3])])
def test_after_a_step_that_was_skipped_nothing_is_followed(build, steps_per_draw: int, skipped: list[int]):
    """The repeat of a first step that was skipped is not taken under the gradient of other rows."""
    run = build("bilora-echo", rho=0.1, steps_per_draw=steps_per_draw)
    run.train(skipped[0])
    for number in skipped:
        micro_batches = run.micro_batches(number)
        object.__setattr__(micro_batches[0].batch, "latents", micro_batches[0].batch.latents * float("inf"))
        assert not run.parts.trainer.training_step(micro_batches, number).applied
    with torch.no_grad():
        repeat = run.micro_batches(skipped[-1] + 1)
        assert repeat[0].is_repeat
        with run.parts.method.perturbed(repeat), auxiliary_off(run.parts.models.values()):
            clean = repeat[0].loss()
        with run.parts.method.perturbed(repeat):
            assert repeat[0].loss() == clean
    assert all(tensor.isfinite().all() for tensor in run.tensors(AUXILIARY).values())
    assert torch.tensor(run.train(3, start=skipped[-1] + 1)).isfinite().all()


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_a_sketch_in_float16_neither_overflows_nor_vanishes(size: float):
    """Inputs as large as those of a feed-forward layer; the gradients carry fp16's loss scale."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(256, 3, generator=draw) @ torch.randn(3, 5120, generator=draw)
    g = torch.randn(256, 640, generator=draw)
    G = (g.mT @ x).double()
    B, A = _cut_sketches([_sketch((x * min(size, 1e3)).half(), (g * size).half(), 8, seed=0)], 3)
    found = (B @ A)[0].double() / (size * min(size, 1e3))
    assert ((found - G).norm() / G.norm()).item() < 0.02


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_in_a_sketch_is_not_hidden(bad: float):
    """Nor is it an error: whoever uses it finds a loss that is not finite, and skips the step."""
    draw = torch.Generator().manual_seed(0)
    x, g = torch.randn(64, 24, generator=draw), torch.randn(64, 16, generator=draw)
    fine = _sketch(x, g, 8, seed=0)
    g[3, 5] = bad
    _, (spoilt, whole) = _cut_sketches([_sketch(x, g, 8, seed=0), fine], 3)
    assert not spoilt.isfinite().any()
    assert torch.equal(whole, _cut_sketches([fine], 3)[1][0])


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sketch_of_any_size_has_the_gradients_direction(dtype: torch.dtype, size: float):
    """Neither of these precisions needs float16's scaling."""
    draw = torch.Generator().manual_seed(0)
    x, g = (
        torch.randn(256, 3, generator=draw) @ torch.randn(3, 64, generator=draw),
        torch.randn(256, 48, generator=draw),
    )
    x, g = x.to(dtype), (g * size).to(dtype)
    G = g.double().mT @ x.double()
    B, A = _cut_sketches([_sketch(x, g, 8, seed=0)], 3)
    assert ((B @ A)[0].double() - G).norm() / G.norm() < (1e-5 if dtype == torch.float32 else 0.02)


def _cut_sketches(sketches: list[Factors], rank: int) -> Factors:
    """As `GradientSketch.factors` has it, of layers of one shape."""
    Y, Zt = (torch.stack(some) for some in zip(*sketches, strict=True))
    (cut,) = _cut([(Y.float(), *_solved([(Y, Zt)]))], rank)
    return cut


# --- the draws ---


@pytest.mark.parametrize("flags", [{}, {"with_prior_preservation": True}, {"use_aspect_ratio_buckets": True}])
def test_steps_in_a_row_see_the_same_rows_under_another_noise(build, flags: dict):
    flags = {"train_batch_size": 2, "center_crop": False, "random_flip": True, "caption_dropout": 0.3, **flags}
    run = build("lora", steps_per_draw=3, **flags)
    plain = build("lora", **flags)
    shown: list[list] = []
    batches = DrawBatches(batch_size=2, rows_in=run.parts.dataset.rows_in)
    for step, draws in enumerate(islice(batches, 9)):
        batch, first = run.batch(draws), run.batch(range(draws[0] - step % 3 * 2, draws[-1] + 1 - step % 3 * 2))
        assert batch.is_repeat == (step % 3 > 0)
        assert torch.equal(batch.timesteps, first.timesteps)
        assert torch.equal(batch.conditioning.prompt_embeds, first.conditioning.prompt_embeds)
        assert torch.equal(batch.conditioning.time_ids, first.conditioning.time_ids)
        assert torch.equal(batch.noise, first.noise) == (step % 3 == 0)
        shown.append([(row.picture, row.view) for draw in draws for row in run.parts.dataset[draw]])
    assert shown[0] == shown[1] == shown[2] != shown[3] == shown[4] == shown[5]
    # What is new comes in the order of a run that repeats nothing, so that every epoch shows every picture.
    order = DrawBatches(batch_size=2, rows_in=plain.parts.dataset.rows_in)
    expected = [
        [row.picture for draw in draws for row in plain.parts.dataset.describe(draw)] for draws in islice(order, 3)
    ]
    assert [[picture for picture, _ in some] for some in shown[::3]] == expected
    assert len(run.parts.dataset) == len(plain.parts.dataset)  # as many steps with every method


def test_a_step_of_several_micro_batches_is_repeated_whole(build):
    run = build("bilora-echo", train_batch_size=1, gradient_accumulation_steps=3, rho=0.1)
    dataset: DreamBoothDataset = run.parts.dataset
    firsts = [dataset.describe(draw)[0].first for draw in range(12)]
    assert firsts == [0, 1, 2, 0, 1, 2, 6, 7, 8, 6, 7, 8]
    assert [batch.is_repeat for batch in (*run.batches(0), *run.batches(1))] == [False] * 3 + [True] * 3


def test_a_run_that_goes_on_with_other_batches_still_climbs(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It begins with a new draw, so that a step's rows are all repeats or none; with the same batches it goes on."""
    monkeypatch.setattr(run_module, "Interruption", StopAfter(3))
    flags = {"method": "bilora-echo", "lora_layers": "to_q", "rho": 0.1, "loss_gap_steps": 2, "max_train_steps": 12}
    with quickened():
        assert main(words(pictures, tmp_path, **flags)) == 130
        monkeypatch.undo()
        train(pictures, tmp_path, train_batch_size=2, resume_from_checkpoint="latest", **flags)
    assert summary(tmp_path)["loss_gap_steps"] == [2, 5, 7, 9, 11]
    shown = {one["step"]: one["loss_gap"] for one in metrics(tmp_path) if "loss_gap" in one}
    assert sorted(shown) == [2, 5, 7, 9, 11] and all(abs(gap) > 1e-6 for gap in shown.values())


def test_a_checkpoint_of_other_draws_is_refused(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    flags = {"lora_layers": "to_q", "max_train_steps": 2, "checkpointing_steps": 1}
    with quickened():
        train(pictures, tmp_path, steps_per_draw=2, **flags)
    flags["max_train_steps"] = 4
    told = refusal(words(pictures, tmp_path, resume_from_checkpoint="latest", **flags), capsys)
    assert "was made with --steps_per_draw 2" in told


def test_an_older_checkpoint_of_bilora_fresh_goes_on_along_tracked_rows(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """They were made before there was another basis, and do not name it."""
    flags = {"lora_layers": "to_q", "max_train_steps": 2, "checkpointing_steps": 1, "method": "bilora-fresh"}
    with quickened():
        train(pictures, tmp_path, ascent_basis="tracked", **flags)
    file = tmp_path / "checkpoint-2" / "checkpoint.json"
    facts = json.loads(file.read_text())
    assert facts["identity"].pop("ascent_basis") == "tracked"
    file.write_text(json.dumps(facts))
    flags["max_train_steps"] = 3
    told = refusal(words(pictures, tmp_path, resume_from_checkpoint="latest", **flags), capsys)
    assert "was made with --ascent_basis tracked, this run has gradient" in told
    with quickened():
        train(pictures, tmp_path, resume_from_checkpoint="latest", ascent_basis="tracked", **flags)
    assert summary(tmp_path)["steps"] == 3


def test_one_step_a_draw_is_refused_with_echo():
    given = {"pretrained_model_name_or_path": "tiny-random", "instance_data_dir": "photos"}
    with pytest.raises(UserError, match="--method bilora-echo needs two or more steps on the same pictures"):
        TrainingConfig(**given, method="bilora-echo", steps_per_draw=1)
    assert TrainingConfig(**given, method="bilora-echo").shown_in_a_row == 2
    assert TrainingConfig(**given, method="lora").shown_in_a_row == 1
