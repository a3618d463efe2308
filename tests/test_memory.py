"""The memory estimate: what it counts, against exact sums and against what real runs keep."""

import json
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from quantisers import add_quantisers
from tiny_run import DEFAULTS, Builder, write_both
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bilora_diffusion.base_precision import QUANTISED
from bilora_diffusion.bases import Base
from bilora_diffusion.bases.single_file import SDXL_CONFIG
from bilora_diffusion.command_line import parse
from bilora_diffusion.config import TrainingConfig
from bilora_diffusion.memory import advice
from bilora_diffusion.memory.__main__ import main
from bilora_diffusion.memory.advice import check_memory, remedies
from bilora_diffusion.memory.counting import rounded
from bilora_diffusion.memory.estimate import GB, estimate
from bilora_diffusion.memory.parts import build_part, frozen_bytes
from bilora_diffusion.memory.simulation import META, MemoryCounter, cuda_arithmetic
from bilora_diffusion.memory.step import simulate_step
from bilora_diffusion.method_names import METHOD_NAMES
from bilora_diffusion.stored_linear import StoredLinear

README = Path(__file__).parents[1] / "README.md"
CONFIGS = README.parent / "configs"
SDXL_PARAMETERS = {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840}


def config_of(**flags) -> TrainingConfig:
    return TrainingConfig(**{**DEFAULTS, "instance_data_dir": "pictures", "method": "lora", **flags})


def sdxl(**flags) -> TrainingConfig:
    """On a base that is nowhere, so that SDXL's own shapes are taken."""
    return TrainingConfig(
        pretrained_model_name_or_path="nobody/nothing",
        instance_data_dir="pictures",
        **{"method": "lora", "train_batch_size": 1, "center_crop": True, **flags},
    )


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return Builder(*write_both(tmp_path_factory.mktemp("memory")))


# --- Counting ---


def test_storages_are_counted_once_and_as_long_as_they_live():
    known = torch.empty(1000, device=META)
    with MemoryCounter([known]) as counter:
        view = known[:10]
        first = torch.empty(1000, device=META)
        turned = first.view(10, 100).T
        del first
        assert (counter.live, counter.peak) == (4096, 4096)  # 4,000 bytes in blocks of 512; the view holds them
        second = turned * 2
        assert counter.live == 8192
        del turned
        assert (counter.live, counter.peak) == (4096, 8192)
        counter.restart()
        del second
        assert (counter.live, counter.peak) == (0, 4096)
    assert view.numel() == 10


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_chain_of_layers_needs_what_one_adds_up_by_hand(checkpointed: bool):
    """tanh keeps its output: n of them keep n, checkpointed one at a time they keep n inputs, one of which is given."""
    layers, size = 8, 4 * 1024
    with MemoryCounter() as counter:
        given = torch.empty(1024, device=META, requires_grad=True)
        x = given
        for _ in range(layers):
            x = checkpoint(lambda y: y.tanh().tanh(), x, use_reentrant=False) if checkpointed else x.tanh().tanh()
        # The given one, and of every layer both outputs or the last.
        assert counter.live == size * (1 + (layers if checkpointed else 2 * layers))
        x.sum().backward()
        del x
        assert counter.live == 2 * size  # the given one and its gradient


def test_half_precision_is_chosen_as_on_cuda():
    with META:
        x, linear, norm = torch.empty(4, 8, dtype=torch.bfloat16), nn.Linear(8, 8), nn.LayerNorm(8)
    with cuda_arithmetic(torch.bfloat16):
        assert torch.is_autocast_enabled("meta")
        assert linear(x.float()).dtype == torch.bfloat16
        assert norm(x).dtype == torch.float32
        assert torch.cat([x, x.float()]).dtype == torch.float32
        assert (x * 2).dtype == torch.bfloat16
    with cuda_arithmetic(torch.float32):
        assert not torch.is_autocast_enabled("meta")
        assert linear(x.float()).dtype == torch.float32


def test_attention_keeps_no_matrix():
    tokens, q = 1024, torch.empty(1, 2, 1024, 64, device=META, requires_grad=True)
    with MemoryCounter([q]) as counter, cuda_arithmetic(torch.float32):
        out = nn.functional.scaled_dot_product_attention(q, q, q)
        assert out.shape == q.shape
        assert q.numel() * 4 < counter.peak < q.numel() * 4 + 2 * tokens * 4 + 4096 < tokens * tokens * 4


# --- Against real runs ---


@pytest.mark.parametrize(
    "flags",
    [{}, {"method": "bilora", "rho": 1.0}, {"train_text_encoder": True}, {"use_dora": True}, {"lora_layers": None}],
)
def test_the_activations_are_those_of_a_real_run(build: Builder, flags: dict):
    run = build(**{"method": "lora", **flags})
    micro_batch = run.micro_batches()[0]
    weights = {p.untyped_storage().data_ptr() for m in run.parts.models.values() for p in m.parameters()}
    kept: dict[int, weakref.ref] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = weakref.ref(storage)  # some branches of the graph go before the forward ends
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = micro_batch.loss()
    assert loss.requires_grad
    real = sum(rounded(storage().nbytes()) for storage in kept.values() if storage() is not None)
    simulated = simulate_step(run.config, _bare(run.config), (8, 8), torch.float32).work
    # The backward pass begins with all that was kept, and makes a little more before it lets go of it.
    assert 0.98 * real < simulated < 1.08 * real


def _bare(config: TrainingConfig) -> dict[str, nn.Module]:
    base = Base(config.pretrained_model_name_or_path)
    parts = ["unet", *(("text_encoder", "text_encoder_2") if config.train_text_encoder else ())]
    return {part: build_part(part, content, torch.float32) for part, content in base.configurations(*parts).items()}


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_every_method_keeps_what_its_real_run_keeps(build: Builder, method: str):
    """Adapters, moments and the method's own tensors, as they are after a step."""
    run = build(method, ema_decay=0.99)
    run.step(0)
    state = run.parts.trainer.state_dict()
    adapters = [p for model in run.parts.models.values() for n, p in model.named_parameters() if ".lora_" in n]
    method_own = [vars(run.parts.method), state["method"]]
    kept = _tensors([adapters, state["optimizer"], state["average"]["shadow_params"], method_own])
    real = sum({tensor.data_ptr(): rounded(tensor.nbytes) for tensor in kept if tensor.ndim > 0}.values())
    simulated = simulate_step(run.config, _bare(run.config), (8, 8), torch.float32).state
    assert simulated == pytest.approx(real, rel=0.02)


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    branches = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return [tensor for branch in branches for tensor in _tensors(branch)]


def test_checkpointing_and_smaller_batches_save_memory_and_accumulation_costs_gradients():
    def work(**flags: Any) -> int:
        config = config_of(**flags)
        return simulate_step(config, _bare(config), (8, 8), torch.float32).work

    whole = work()
    assert work(gradient_checkpointing=True) < 0.8 * whole
    assert 0.4 * whole < work(train_batch_size=1) < 0.6 * whole
    assert work(with_prior_preservation=True, class_prompt="x", class_data_dir="y") > 1.9 * whole
    assert work(gradient_accumulation_steps=2) > whole


# --- A whole run ---


def test_sdxl_has_its_parameters_and_is_where_public_reports_are():
    for part, count in SDXL_PARAMETERS.items():
        model = build_part(part, json.loads((SDXL_CONFIG / part / "config.json").read_text()), torch.bfloat16)
        assert sum(parameter.numel() for parameter in model.parameters()) == count
        assert frozen_bytes(model) == pytest.approx(2 * count, rel=1e-3)


def test_a_run_on_sdxl():
    found = estimate(sdxl(gradient_checkpointing=True), torch.bfloat16)
    assert "nobody/nothing" in found.not_read
    assert [phase.name for phase in found.phases] == ["picture encoding", "training step"]
    assert found.largest.name == "training step"
    assert 5 * GB < found.allocated < 7 * GB
    assert found.allocated < found.needed < found.card


def test_what_stays_and_what_comes_first():
    def phases(**flags: Any) -> dict[str, Any]:
        return {phase.name: phase for phase in estimate(config_of(**flags), torch.float32).phases}

    assert "text encoders" not in phases()["training step"].holds
    assert "text encoders" in phases(shuffle_caption=True)["training step"].holds
    anew = phases(center_crop=False, validation_prompt="x")
    assert "VAE" in anew["training step"].holds
    assert "picture encoding in the step" in anew
    assert anew["previews"].may_fail
    assert phases(center_crop=False, crops_per_image=3) == phases()
    assert "VAE" in phases(center_crop=False, crops_per_image=3, cache_latents=False)["training step"].holds
    prior = {"with_prior_preservation": True, "class_prompt": "x", "class_data_dir": "nowhere"}
    assert "class pictures" in phases(**prior)
    assert "class pictures" not in phases(**prior, prior_source="base_prediction")


@pytest.mark.parametrize("precision", ["bf16", "int8", "fp8", "nf4"])
def test_a_base_in_fewer_bits_takes_what_a_real_one_takes(build: Builder, precision: str):
    if precision in QUANTISED:
        add_quantisers()
    flags = {"base_precision": precision, "lora_layers": "to_q"}
    real = build("lora", **flags).parts.models["unet"]
    stored = [module.stored.nbytes for module in real.modules() if isinstance(module, StoredLinear)]
    others = [tensor.nbytes for name, tensor in real.named_parameters() if ".lora_" not in name]
    found = {phase.name: phase for phase in estimate(config_of(**flags), torch.float32).phases}["training step"]
    # In blocks of 512 bytes, which so small tensors do not fill.
    assert found.holds["frozen UNet"] == pytest.approx(sum(map(rounded, stored + others)), rel=0.02)


def test_an_offloaded_base_takes_one_layer_at_a_time():
    whole, offloaded = (
        {phase.name: phase for phase in estimate(config_of(**flags), torch.float32).phases}["training step"]
        for flags in ({}, {"offload_base": True})
    )
    assert offloaded.holds["frozen UNet"] < 0.6 * whole.holds["frozen UNet"]  # the tiny one has more convolutions
    key = "activations and gradients"
    assert whole.holds[key] <= offloaded.holds[key] < whole.holds[key] + 0.2 * whole.holds["frozen UNet"]


TOLD = dict(re.findall(r"\[(sdxl_\w+\.yaml)\]\(configs/.*?\| ([\d.]+ GB \| [\d.]+ GB) \|\n", README.read_text()))


def test_every_card_has_a_configuration():
    files = sorted(file.name for file in CONFIGS.glob("sdxl_*gb.yaml"))
    assert sorted(TOLD) == files and len(files) == 4


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in ("sdxl_16gb.yaml", "sdxl_12gb.yaml"))) for name in TOLD],
)
def test_the_configurations_for_cards_fit_them(name: str):
    """What they and the README say is what the estimate says now."""
    file = CONFIGS / name
    words = ["--config", str(file), "--instance_data_dir", "photos", "--pretrained_model_name_or_path", "no/base"]
    config = parse(words)
    found = estimate(config, torch.bfloat16)
    peak, card = (f"{size / GB:.1f}" for size in (found.allocated, found.card))
    assert TOLD[name] == f"{peak} GB | {card} GB"
    assert f"{peak} GB allocated, {card} GB of the card" in file.read_text()
    size = int(name.removeprefix("sdxl_").removesuffix("gb.yaml"))
    assert float(card) < 0.75 * size  # a screen and what is not known yet take some
    rows = config.train_batch_size * config.gradient_accumulation_steps
    assert (config.mixed_precision, config.center_crop, rows) == ("bf16", True, 4)


def test_nothing_random_is_drawn_and_a_run_is_not_changed():
    before = torch.get_rng_state()
    config = config_of(gradient_checkpointing=True, lora_dropout=0.1, train_text_encoder=True)
    first = estimate(config, torch.bfloat16)
    assert torch.equal(before, torch.get_rng_state())
    assert estimate(config, torch.bfloat16) == first


# --- What is said ---


def test_the_flags_that_help_make_it_fit():
    config = config_of(center_crop=False, resolution=256)
    at_first = estimate(config, torch.float32)
    ways = list(remedies(config, torch.float32, at_first, at_first.needed // 3))
    assert ways[0][0] == "--mixed_precision bf16"
    assert "--crops_per_image 4" in [flag for flag, _ in remedies(config, torch.float32, at_first, 0)]
    assert [way.needed for _, way in ways] == sorted((way.needed for _, way in ways), reverse=True)
    assert ways[-1][1].needed <= at_first.needed // 3 < ways[-2][1].needed
    smallest = {"base_precision": "nf4", "offload_base": True}
    for crop in ({}, {"center_crop": False, "crops_per_image": 2}):
        lean = config_of(mixed_precision="bf16", gradient_checkpointing=True, train_batch_size=1, **smallest, **crop)
        assert not list(remedies(lean, torch.bfloat16, estimate(lean, torch.bfloat16), 0))


@pytest.mark.parametrize("free", [1, 2**40])
def test_a_card_that_is_too_small_is_told_and_not_refused(free: int, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 2**40))
    with caplog.at_level("INFO", "bilora_diffusion"):
        found = check_memory(config_of(), torch.device("cuda"), torch.float32)
    assert found == estimate(config_of(), torch.float32).allocated
    assert caplog.records[0].message.startswith("memory: about ")
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == (free == 1)
    assert all("--gradient_checkpointing: " in warning for warning in warnings)


def test_an_estimate_that_fails_is_not_the_end_of_a_run(monkeypatch, caplog):
    def fail(*_: Any) -> None:
        raise RuntimeError("an operation without a shape")

    monkeypatch.setattr(advice, "estimate", fail)
    with caplog.at_level("INFO", "bilora_diffusion"):
        assert check_memory(config_of(), torch.device("cuda"), torch.float32) is None
    (told,) = caplog.records
    assert told.message.endswith("could not be estimated (RuntimeError: an operation without a shape)")
    assert check_memory(config_of(), torch.device("cpu"), torch.float32) is None
    assert len(caplog.records) == 1


def test_the_command(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    flags = ["--pretrained_model_name_or_path", "tiny-random", "--method", "lora", "--train_batch_size", "1"]
    savings = ["--center_crop", "--mixed_precision", "bf16"]
    assert main([*flags, *savings, "--cards", "24", "0.5"]) == 0
    told = capsys.readouterr().out
    assert "training step" in told
    assert "24 GB card: fits" in told
    assert "0.5 GB card: too small; with --gradient_checkpointing --base_precision nf4 --offload_base: " in told
    assert "still too small" in told
    assert main(["--rnak", "4"]) == 2
    assert "did you mean --rank" in capsys.readouterr().err
