"""Prior preservation without class pictures: class rows are held to what the frozen base predicts for them."""

from pathlib import Path

import pytest
import torch
from tiny_run import Builder, TinyRun, all_equal, write_both
from torch import Tensor
from whole_run import main, quicken, refusal, summary, train, words

from bilora_diffusion.adapters import AUXILIARY, PRIMARY
from bilora_diffusion.base_prediction import only_base
from bilora_diffusion.batches import TrainingMicroBatch
from bilora_diffusion.data.latents import EncodedLatents
from bilora_diffusion.method_names import METHOD_NAMES

PRIOR = {"with_prior_preservation": True, "prior_source": "base_prediction", "class_prompt": "a picture"}
ACTIVE = {"rho": 2.0, "auxiliary_learning_rate": 0.02}


def of_the_bare_base(build: Builder, run: TinyRun, micro_batch: TrainingMicroBatch) -> Tensor:
    """What a base that never had an adapter predicts for the class rows."""
    models = {part: getattr(build.tiny, part).eval() for part in ("unet", "text_encoder", "text_encoder_2")}
    bare = TrainingMicroBatch(micro_batch.batch, models, run.parts.trainer.objective, torch.float32, 1.0, None)
    return bare.predictions(slice(1, None, 2))


def assert_rounded(seen: Tensor, expected: Tensor) -> None:
    """The same but for rounding, which on some processors is another one in a layer with adapters switched off."""
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-5)


def drift(run: TinyRun, draws: range) -> float:
    """How far the class prompt's predictions are from the base's, mean square, on given draws."""
    (micro_batch,) = run.parts.trainer.micro_batches([run.batch(draws)])
    held = micro_batch.batch.base_predictions[1::2]
    return (micro_batch.predictions(slice(1, None, 2)) - held).square().mean().item()


def test_a_class_row_is_its_instance_row_with_the_class_prompt(build: Builder) -> None:
    plain = build("lora", random_flip=True).batches(1)[0]
    run = build("lora", random_flip=True, prior_loss_weight=0.3, **PRIOR)
    batch = run.batches(1)[0]
    for name in ("latents", "noise", "timesteps"):
        instances, classes = getattr(batch, name)[::2], getattr(batch, name)[1::2]
        assert torch.equal(instances, classes)
        assert torch.equal(instances, getattr(plain, name))
    assert torch.equal(batch.conditioning.time_ids[::2], batch.conditioning.time_ids[1::2])
    assert batch.instances.tolist() == [1, 0, 1, 0]
    assert batch.weights.tolist() == pytest.approx([1, 0.3, 1, 0.3])
    class_prompt = run.parts.make_batch.prompts.embeddings["a picture"][0]
    assert [torch.equal(embeds, class_prompt) for embeds in batch.conditioning.prompt_embeds] == [False, True] * 2


def test_no_picture_is_encoded_twice(build: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    moments = EncodedLatents.moments

    def counting(self: EncodedLatents, rows: list) -> list:
        asked.append(len(rows))
        return moments(self, rows)

    monkeypatch.setattr(EncodedLatents, "moments", counting)
    batch = build("lora", center_crop=False, **PRIOR).batches(0)[0]
    assert asked == [2] and len(batch) == 4


@pytest.mark.parametrize(
    "flags",
    [
        {"method": "lora", "lora_dropout": 0.3},
        {"method": "lora", "use_dora": True},
        {"method": "lora", "do_edm_style_training": True},
        {"train_text_encoder": True, "gradient_checkpointing": True, **ACTIVE},
    ],
    ids=str,
)
def test_what_they_are_held_to_is_the_bare_bases(build: Builder, flags: dict) -> None:
    run = build(**flags, **PRIOR)
    run.train(3)
    (micro_batch,) = run.micro_batches(3)
    held = micro_batch.batch.base_predictions
    assert_rounded(held[1::2], of_the_bare_base(build, run, micro_batch))
    assert (held[::2] == 0).all() and not held.requires_grad
    assert not torch.allclose(micro_batch.predictions(slice(1, None, 2)), held[1::2], atol=1e-4)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_every_method_trains_with_it_and_perturbs_it(build: Builder, method: str) -> None:
    """Each pass of a step has one target, the base's, whatever is perturbed; and nothing is left switched off."""
    run = build(method, prior_loss_weight=2.0, **PRIOR, **ACTIVE)
    base = run.base_tensors()
    run.train(3)
    assert all_equal(base, run.base_tensors())
    micro_batches = run.micro_batches(3)
    fixed = of_the_bare_base(build, run, micro_batches[0])
    assert_rounded(micro_batches[0].batch.base_predictions[1::2], fixed)
    parameters = [*run.parameters(PRIMARY).values(), *run.parameters(AUXILIARY).values()]
    assert all(parameter.requires_grad and parameter.grad is None for parameter in parameters)
    class_row = slice(1, 2)  # alone it has its weight's share of the loss
    clean = micro_batches[0].loss(class_row).item()
    with run.parts.method.perturbed(micro_batches):
        perturbed = micro_batches[0].loss(class_row).item()
        if run.parts.method.perturbs:
            assert perturbed != clean or method in (
                "bilora",
                "bilora-echo",
                "dual-lora",
            )  # whose perturbation is always on
    assert clean > 0 and micro_batches[0].loss(class_row).item() == clean


def test_at_the_first_step_the_term_is_nothing(build: Builder) -> None:
    losses = [build("lora", prior_loss_weight=weight, **PRIOR).micro_batches()[0].loss().item() for weight in (0, 100)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    alone = build("lora").micro_batches()[0].loss().item()
    assert losses[0] == pytest.approx(alone, rel=1e-5)


def test_it_keeps_the_class_prompt_where_the_base_has_it(build: Builder) -> None:
    flags = {"learning_rate": 3e-3, "train_text_encoder": True}
    free, held = (build("lora", prior_loss_weight=weight, **flags, **PRIOR) for weight in (0.0, 3.0))
    for run in (free, held):
        run.train(12)
    unseen = range(100, 104)
    assert drift(held, unseen) < 0.5 * drift(free, unseen)


def test_the_loss_is_the_sum_of_its_pairs_and_of_both_terms(build: Builder) -> None:
    run = build("lora", prior_loss_weight=0.3, snr_gamma=5.0, **PRIOR)
    run.train(2)
    (micro_batch,) = run.micro_batches(2)
    with torch.no_grad():
        loss = micro_batch.loss().item()
        pairs = [micro_batch.loss(slice(n, n + 2)).item() for n in (0, 2)]
        instances = [micro_batch.loss(slice(n, n + 1)).item() for n in (0, 2)]
    assert loss == pytest.approx(sum(pairs) / 2, rel=1e-5)
    batch, objective = micro_batch.batch, run.parts.trainer.objective
    squares = (micro_batch.predictions() - batch.base_predictions).square().flatten(1).mean(1)
    weights = objective._snr_weights(batch.timesteps)
    classes = (squares * weights)[1::2].mean().item()
    assert loss == pytest.approx(sum(instances) / 2 + 0.3 * classes, rel=1e-4)


def test_only_base_puts_everything_back_after_an_error(build: Builder) -> None:
    run = build(**ACTIVE)
    run.train(2)
    (micro_batch,) = run.micro_batches(2)
    before = micro_batch.predictions()
    with pytest.raises(RuntimeError), only_base(run.parts.models.values()):
        assert not torch.equal(micro_batch.predictions(), before)
        raise RuntimeError
    assert torch.equal(micro_batch.predictions(), before)
    assert all(parameter.requires_grad for parameter in run.parameters(AUXILIARY).values())


# --- Whole runs ---


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_both(tmp_path_factory.mktemp("material"))[0]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)


def test_a_run_needs_no_class_pictures_and_says_what_was_kept(pictures: Path, tmp_path: Path) -> None:
    flags = {**PRIOR, "lora_layers": "to_q", "max_train_steps": 2, "loss_gap_steps": 1}
    train(pictures, tmp_path / "run", **flags)
    assert summary(tmp_path / "run")["steps"] == 2
    card = (tmp_path / "run" / "README.md").read_text()
    assert "held to the base's own prediction | `a picture`" in card and "class pictures" not in card
    # The configuration that was written gives the run again.
    assert main(["--config", str(tmp_path / "run" / "config.yaml"), "--output_dir", str(tmp_path / "again")]) == 0
    assert summary(tmp_path / "again")["losses"] == summary(tmp_path / "run")["losses"]


def test_a_caption_that_is_the_class_prompt_is_refused(pictures: Path, tmp_path: Path, capsys) -> None:
    flags = {**PRIOR, "class_prompt": "a sks picture of kind 2"}
    line = refusal(words(pictures, tmp_path / "run", **flags), capsys)
    assert "--class_prompt is also the caption of 2.png" in line
