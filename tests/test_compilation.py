"""--compile: the plain run's numbers and names, no graph break, and no program made twice."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from tiny_run import Builder, TinyRun, difference, write_both
from torch._dynamo.utils import counters
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler
from whole_run import in_one_and_in_two, lora, quicken, summary, train, words

from bilora_diffusion import compilation
from bilora_diffusion.cli import main
from bilora_diffusion.compilation import check_compiler
from bilora_diffusion.errors import UserError
from bilora_diffusion.loss_gap import measure_loss_gap


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No programs of another test, and a backend that needs no compiler: autograd's tracing is that of the real one."""
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):
        yield
    torch._dynamo.reset()


def graphs() -> int:
    """The programs made so far."""
    return counters["stats"]["unique_graphs"]


def look_aside(run: TinyRun) -> None:
    """What a run does between its steps: the loss gap in float32, and a pass without a gradient for a preview."""
    trainer, batches = run.parts.trainer, run.micro_batches()
    measure_loss_gap(trainer.models.values(), run.parts.method, batches)
    with trainer.as_exported(), torch.no_grad():
        batches[0].loss()


def assert_same_courses(build: Builder, method: str, warm: int = 1, within: float = 1e-4, **flags: Any) -> None:
    """The same run plain and compiled, of which the last steps may compile nothing any more.

    Arguments:
        warm: steps in which programs are made.
        within: difference of the trained weights, as a share of what training changed.
    """
    flags = {"lora_layers": "to_k", **flags}  # tracing takes its time by the layer
    plain, compiled = (build(method, compile=on, **flags) for on in (False, True))
    start, steps = plain.tensors(), warm + 2
    losses = plain.train(steps)
    seen = compiled.train(warm)
    with torch.compiler.set_stance("fail_on_recompile"):
        look_aside(compiled)
        seen += compiled.train(steps - warm, start=warm)
    assert seen == pytest.approx(losses, rel=within)
    assert difference(plain.tensors(), compiled.tensors(), start) < within
    assert graphs() > 0
    # torch 2.11 does not know what a text encoder's layer does, and compiles it in pieces.
    assert flags.get("train_text_encoder") or not counters["graph_break"]


SMALL = {"lora_layers": "to_q"}

METHODS: dict[str, tuple[int, dict[str, Any]]] = {
    "lora": (3, {}),
    "bilora": (3, {}),
    "lora-sam": (3, {}),
    "flat-lora": (6, {"sigma_schedule": "cosine", "warm": 2}),  # the ramp begins without noise
    # two passes, of other gradients and fewer rows
    "bilora-fresh": (6, {"ascent_share": 0.5, "ascent_basis": "tracked"}),
}
"""The programs that there may be: for a block's two widths, and for one whose input has no gradient."""


RARER = ("flat-lora", "bilora-fresh")


def test_a_base_with_its_channels_last(build):
    assert_same_courses(build, "lora", channels_last=True)


@pytest.mark.parametrize("method", [pytest.param(one, marks=[pytest.mark.slow] * (one in RARER)) for one in METHODS])
def test_the_plain_runs_weights_and_no_program_after_the_first_steps(method, build):
    """Though the auxiliary is switched off and on in between, for the loss gap and for a preview."""
    programs, flags = METHODS[method]
    assert_same_courses(build, method, **flags)
    assert graphs() == programs


def test_whoever_overlaps_leaves_it_compiled():
    """Runs in threads enter and leave in any order."""
    one, other = compilation.uncompiled(), compilation.uncompiled()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert stance() == "force_eager"
    other.__exit__(None, None, None)
    assert stance() == "default"


def stance() -> str:
    return torch._dynamo.eval_frame._stance.stance


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "text encoders, bf16": (
        "bilora",
        # Without it, peft's forward in the place of the fused one changes the weights by 0.08 in bfloat16.
        {"precision": "bf16", "train_text_encoder": True, "within": 0.2},
    ),
    "dropout": ("flat-lora", {"lora_dropout": 0.3, "sigma_schedule": "constant"}),
    "DoRA": ("lora", {"use_dora": True}),
    "prior, checkpointing": (
        "bilora",
        {"with_prior_preservation": True, "prior_source": "base_prediction", "gradient_checkpointing": True},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_other_passes(name, build):
    method, flags = CASES[name]
    assert_same_courses(build, method, **flags)


@pytest.mark.slow
def test_buckets_share_programs(build):
    shapes = "64,64;64,96;80,64"
    flags = {"use_aspect_ratio_buckets": True, "aspect_ratio_buckets": shapes, "train_batch_size": 1}
    run = build("lora", compile=True, **flags)
    seen = set()
    for number in range(6):
        (batch,) = run.batches(number)
        seen.add(batch.latents.shape)
        run.step(number)
        assert graphs() <= 3 and not counters["graph_break"]
    assert len(seen) > 2


def test_names_and_classes_are_as_they_were(build):
    plain, compiled = (build("bilora", compile=on, train_text_encoder=True) for on in (False, True))
    for part, model in plain.parts.models.items():
        other = compiled.parts.models[part]
        assert list(model.state_dict()) == list(other.state_dict())
        assert [type(module) for module in model.modules()] == [type(module) for module in other.modules()]


# --- whole runs ---


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_both(tmp_path_factory.mktemp("compiled"))[0]


@pytest.fixture
def no_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the backend that needs no compiler."""
    monkeypatch.setattr("bilora_diffusion.run.check_compiler", lambda device: None)


def test_a_run_to_the_verified_file(pictures: Path, tmp_path: Path, no_check: None, monkeypatch) -> None:
    quicken(monkeypatch, verify=True)
    flags = {
        "max_train_steps": 2,
        "train_text_encoder": True,
        "loss_gap_steps": 1,
        "validation_prompt": "a sks picture",
        "validation_steps": 1,
    }
    plain, compiled = (train(pictures, tmp_path / str(on), compile=on, **flags) for on in (False, True))
    assert graphs() > 0
    assert plain.keys() == compiled.keys() and difference(plain, compiled) < 1e-5
    assert summary(tmp_path / "True")["verified"] is True
    assert len(list((tmp_path / "True" / "previews").glob("step_*.png"))) == 2


@pytest.mark.slow
def test_resuming_gives_the_same_bits(pictures: Path, tmp_path: Path, no_check: None, monkeypatch) -> None:
    quicken(monkeypatch)
    whole, parts = in_one_and_in_two(pictures, tmp_path, compile=True, **SMALL)
    # Nor is the flag a part of the run's identity.
    other = train(pictures, tmp_path / "other", resume_from_checkpoint=parts / "checkpoint-2", **SMALL)
    assert difference(other, lora(whole)) < 1e-4


# --- the compiler ---


def _has_compiler() -> bool:
    try:
        return bool(cpp_builder.get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


@pytest.mark.skipif(not _has_compiler() and not os.environ.get("BILORA_TESTS_NEED_COMPILER"), reason="no C++ compiler")
def test_the_real_compiler(build, monkeypatch):
    """One block, for time; dropout draws what it draws without."""
    monkeypatch.setattr(compilation, "BACKEND", "inductor")
    blocks = compilation._blocks
    monkeypatch.setattr(compilation, "_blocks", lambda model: list(blocks(model))[-1:])
    flags = {"sigma_schedule": "constant", "lora_dropout": 0.3, "lora_layers": None}
    assert_same_courses(build, "flat-lora", within=1e-3, **flags)
    assert graphs() == 1


def test_no_compiler_is_told_in_one_line(pictures: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "inductor")
    monkeypatch.setattr("bilora_diffusion.run.assemble", lambda *_, **__: pytest.fail("loaded before it was known"))
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        assert main(words(pictures, tmp_path / "run", compile=True, **SMALL)) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(told) == 1
    assert re.search(r"--compile: .*no-such-compiler.*install a C\+\+ compiler.*leave --compile out", told[0])
    assert not (tmp_path / "run" / "checkpoint-1").exists()


def test_a_device_without_a_hint_is_told_too(monkeypatch):
    monkeypatch.setattr(torch, "ones", _fail)
    with pytest.raises(UserError, match=r"--compile: .*\(one\): this device may not be supported, or leave"):
        check_compiler(torch.device("meta"))


def _fail(*_: Any, **__: Any) -> None:
    raise RuntimeError("\none\ntwo")


def test_a_failure_in_the_first_step_is_told_in_one_line(
    pictures: Path, tmp_path: Path, no_check: None, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(compilation, "BACKEND", _fail)
    assert main(words(pictures, tmp_path / "run", compile=True, **SMALL)) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(told) == 1 and "--compile: torch.compile failed" in told[0] and "leave --compile out" in told[0]


@pytest.mark.parametrize(("backend", "warned"), [("INDUCTOR", True), ("NO", False), (None, False)])
def test_accelerates_own_setting_is_said_to_do_nothing(backend, warned, monkeypatch):
    from bilora_diffusion.run import _launcher_warnings

    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND", raising=False)
    if backend:
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
    assert [("--dynamo_backend inductor" in line, "--compile" in line) for line in _launcher_warnings()] == (
        [(True, True)] if warned else []
    )
