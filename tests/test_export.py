"""The LoRA files: what is in them, and that loading one gives back the trained model."""

import dataclasses
import errno
import json
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from bilora_diffusion import atomic
from bilora_diffusion.adapters import AUXILIARY, PRIMARY, TARGETS, add_adapter, auxiliary_off, parameters_of
from bilora_diffusion.atomic import atomic_write, write_bytes_atomically, write_text_atomically
from bilora_diffusion.bases.tiny import build_tiny_random
from bilora_diffusion.errors import UserError
from bilora_diffusion.lora_files.diffusers_format import DIFFUSERS_FILE, primary_layers, save_diffusers
from bilora_diffusion.lora_files.facts import LoraFacts, bilora_metadata, tag_frequency
from bilora_diffusion.lora_files.kohya import KOHYA_FILE, save_kohya, why_not_kohya
from bilora_diffusion.lora_files.outputs import PARTS, record_outputs
from bilora_diffusion.lora_files.verification import (
    TrainedRecord,
    Verification,
    VerificationError,
    record_trained,
    strip_adapters,
    verify_file,
)

RANK, ALPHA = 4, 8  # unequal on purpose: most mistakes in these files go unseen while alpha = rank
FACTS = LoraFacts(
    name="dog",
    base="tiny-random",
    method="bilora",
    rank=RANK,
    alpha=ALPHA,
    settings={"rho": 0.05, "auxiliary_rank": RANK},
    steps=7,
    captions=("a sks dog, red", "a sks dog"),
    num_images=2,
    instance_prompt="a sks dog",
    started_at=1_760_000_000.5,
    finished_at=1_760_000_060.5,
    versions={"torch": "2.15.0"},
)
EVERY_TARGET = (
    *TARGETS["unet"],
    *("proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv"),
    *("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"),
    *("add_embedding.linear_1", "add_embedding.linear_2"),
)
SAVE = {"diffusers": save_diffusers, "kohya": save_kohya}


def trained_pipeline(
    parts: Sequence[str] = PARTS,
    *,
    targets: Sequence[str] | None = None,
    use_dora: bool = False,
    base_dtype: torch.dtype = torch.float32,
) -> tuple[StableDiffusionXLPipeline, dict[str, nn.Module]]:
    """A tiny SDXL with both adapters on the given parts, neither of them at its starting point."""
    pipeline = build_tiny_random()
    for part in PARTS:
        model = getattr(pipeline, part).requires_grad_(False)
        if base_dtype != torch.float32:
            model.to(base_dtype)
    models = {part: getattr(pipeline, part) for part in parts}
    for part, model in models.items():
        for adapter, dora in ((PRIMARY, use_dora), (AUXILIARY, False)):
            add_adapter(
                part,
                model,
                adapter,
                rank=RANK,
                scale=ALPHA / RANK,
                init="gaussian",
                seed=0,
                targets=targets if part == "unet" else None,
                use_dora=dora,
            )
    draw = torch.Generator().manual_seed(1)
    for model in models.values():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.02 * torch.randn(parameter.shape, generator=draw)
            elif "lora_magnitude_vector" in name:
                parameter.data *= 1 + 0.1 * torch.rand(parameter.shape, generator=draw)
    return pipeline, models


def record_and_strip(pipeline: StableDiffusionXLPipeline, models: Mapping[str, nn.Module]) -> TrainedRecord:
    with auxiliary_off(models.values()):
        trained = record_trained({part: getattr(pipeline, part) for part in PARTS})
    for model in models.values():
        strip_adapters(model)
    return trained


def save(layout: str, path: Path, models: Mapping[str, nn.Module], dtype: torch.dtype | None = None) -> None:
    if layout == "diffusers":
        save_diffusers(path, models, dtype=dtype, metadata=bilora_metadata(FACTS))
    else:
        save_kohya(path, models, dtype=dtype, facts=FACTS)


def contents(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    return safetensors.torch.load_file(path), metadata


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], object]) -> None:
    tensors, metadata = contents(path)
    change(tensors, metadata)
    safetensors.torch.save_file(tensors, path, metadata)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Both files of one training of all three parts, the stripped pipeline, and the record of it."""
    folder = tmp_path_factory.mktemp("saved")
    pipeline, models = trained_pipeline()
    for layout in SAVE:
        save(layout, folder / f"{layout}.safetensors", models)
    return folder, pipeline, record_and_strip(pipeline, models)


# Round trips


@pytest.mark.parametrize("layout", SAVE)
@pytest.mark.parametrize(
    ("parts", "targets"),
    [(PARTS, None), (("unet",), None), (("unet", "text_encoder_2"), None), (("unet",), EVERY_TARGET)],
    ids=["all parts", "UNet", "UNet and text encoder 2", "every module of the UNet"],
)
def test_a_loaded_file_is_the_trained_model(tmp_path, layout, parts, targets):
    pipeline, models = trained_pipeline(parts, targets=targets)
    save(layout, tmp_path / "x.safetensors", models)
    trained = record_and_strip(pipeline, models)
    found = verify_file(tmp_path / "x.safetensors", pipeline, trained)
    assert isinstance(found, Verification)
    assert (found.file, found.layout) == ("x.safetensors", layout)
    assert found.layers == sum(map(len, trained.layers.values()))
    assert max(found.differences.values()) == 0  # float32 through and through: nothing may move
    adapted = [effect for name, effect in found.effects.items() if name.split(".")[0] in parts]
    assert min(adapted) > 0.01  # and the file does something


def test_text_encoders_that_were_freed_are_not_needed(tmp_path):
    pipeline, models = trained_pipeline(("unet",))
    pipeline.text_encoder = pipeline.text_encoder_2 = None
    save_diffusers(tmp_path / "x.safetensors", models)
    save_kohya(tmp_path / "y.safetensors", models, facts=FACTS)
    with auxiliary_off(models.values()):
        trained = record_trained(models)
    strip_adapters(pipeline.unet)
    assert set(verify_file(tmp_path / "x.safetensors", pipeline, trained).differences) == {"unet"}
    assert set(verify_file(tmp_path / "y.safetensors", pipeline, trained).differences) == {"unet"}


def test_dora_is_exact_in_diffusers_format_and_has_no_kohya_file(tmp_path):
    pipeline, models = trained_pipeline(use_dora=True)
    save_diffusers(tmp_path / "x.safetensors", models)
    assert "DoRA" in why_not_kohya(models)
    with pytest.raises(ValueError, match="DoRA"):
        save_kohya(tmp_path / "y.safetensors", models, facts=FACTS)
    assert not (tmp_path / "y.safetensors").exists()
    found = verify_file(tmp_path / "x.safetensors", pipeline, record_and_strip(pipeline, models))
    assert max(found.differences.values()) == 0


@pytest.mark.parametrize("layout", SAVE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(tmp_path, layout, dtype):
    pipeline, models = trained_pipeline()
    save(layout, tmp_path / "x.safetensors", models, dtype)
    tensors, _ = contents(tmp_path / "x.safetensors")
    assert {tensor.dtype for name, tensor in tensors.items() if not name.endswith(".alpha")} == {dtype}
    assert all(tensor.dtype == torch.float32 for name, tensor in tensors.items() if name.endswith(".alpha"))
    found = verify_file(tmp_path / "x.safetensors", pipeline, record_and_strip(pipeline, models))
    # The file's rounding and no more: far below what the adapters do.
    assert all(0 < value < 0.01 * found.effects[name] for name, value in found.differences.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_base(tmp_path, dtype):
    pipeline, models = trained_pipeline(base_dtype=dtype)
    assert all(parameter.dtype == torch.float32 for parameter in parameters_of(pipeline.unet, PRIMARY).values())
    for layout in SAVE:
        save(layout, tmp_path / f"{layout}.safetensors", models)
    trained = record_and_strip(pipeline, models)
    for layout in SAVE:
        found = verify_file(tmp_path / f"{layout}.safetensors", pipeline, trained)
        assert all(value < 0.2 * found.effects[name] for name, value in found.differences.items())
    with pytest.raises(VerificationError, match="different outputs: unet"):
        verify_file(tmp_path / "kohya.safetensors", pipeline, trained, tolerance=1e-7)


def test_a_user_loads_the_folder_or_the_file(tmp_path):
    _, models = trained_pipeline()
    save_diffusers(tmp_path / DIFFUSERS_FILE, models)
    save_kohya(tmp_path / KOHYA_FILE, models, facts=FACTS)
    with auxiliary_off(models.values()):
        expected = record_outputs(models)
    for arguments in ((tmp_path,), (str(tmp_path / DIFFUSERS_FILE),), (str(tmp_path / KOHYA_FILE),)):
        pipeline = build_tiny_random()
        pipeline.load_lora_weights(*arguments)
        outputs = record_outputs({part: getattr(pipeline, part) for part in PARTS})
        assert all(torch.equal(outputs[name], expected[name]) for name in expected)


# What is in the diffusers file


def test_keys_shapes_and_metadata_of_the_diffusers_file(saved):
    folder, _, trained = saved
    tensors, metadata = contents(folder / "diffusers.safetensors")
    assert len(tensors) == 2 * sum(map(len, trained.layers.values()))
    for name, tensor in tensors.items():
        part, rest = name.split(".", 1)
        assert part in PARTS
        assert part == "unet" or rest.startswith("text_model.encoder.layers.")
        assert rest.endswith((".lora_A.weight", ".lora_B.weight"))
        assert tensor.shape[0 if "lora_A" in name else 1] == RANK
        assert tensor.dtype == torch.float32
    adapters = json.loads(metadata.pop("lora_adapter_metadata"))
    assert set(adapters) == {f"{part}.{field}" for part in PARTS for field in ("r", "lora_alpha", "target_modules")}
    assert {adapters[f"{part}.r"] for part in PARTS} == {RANK}
    assert {adapters[f"{part}.lora_alpha"] for part in PARTS} == {ALPHA}
    assert adapters["text_encoder.target_modules"] == sorted(TARGETS["text_encoder"])
    assert metadata.pop("format") == "pt"
    assert metadata == bilora_metadata(FACTS)
    assert metadata["bilora_rho"] == "0.05"
    assert "bilora_captions" not in metadata  # one prompt says it all; where there is none, a caption has to
    without = bilora_metadata(dataclasses.replace(FACTS, instance_prompt=None))
    assert without["bilora_captions"] == "2 different ones, such as: a sks dog, red"


def test_the_auxiliary_is_in_no_file(saved):
    folder, _, _ = saved
    _, models = trained_pipeline()
    auxiliary = [p for model in models.values() for p in parameters_of(model, AUXILIARY).values()]
    for layout in SAVE:
        tensors, metadata = contents(folder / f"{layout}.safetensors")
        assert AUXILIARY not in "".join(tensors)
        assert AUXILIARY not in metadata.get("lora_adapter_metadata", "")
        for tensor in tensors.values():
            assert not any(torch.equal(tensor, other) for other in auxiliary)


def test_exported_tensors_are_copies():
    _, models = trained_pipeline(("text_encoder",))
    layers = primary_layers("text_encoder", models["text_encoder"])
    before = {name: tensor.clone() for name, tensor in layers.items()}
    for parameter in parameters_of(models["text_encoder"], PRIMARY).values():
        parameter.data.add_(1)
    assert all(torch.equal(layers[name], before[name]) for name in layers)


def test_a_part_without_the_primary_is_refused(tmp_path):
    pipeline = build_tiny_random()
    with pytest.raises(ValueError, match="unet has no adapter"):
        save_diffusers(tmp_path / "x.safetensors", {"unet": pipeline.unet})


# Stripping and recording


def test_stripping_leaves_the_base_bit_for_bit():
    fresh = build_tiny_random()
    pipeline, models = trained_pipeline(use_dora=True)
    for part, model in models.items():
        strip_adapters(model)
        expected = getattr(fresh, part).state_dict()
        state = model.state_dict()
        assert list(state) == list(expected)
        assert all(torch.equal(state[name], expected[name]) for name in expected)
    # and adapters can be attached again under any name
    add_adapter("unet", pipeline.unet, PRIMARY, rank=2, scale=1, init="gaussian", seed=0)


def test_outputs_are_the_same_on_every_call_and_touch_nothing():
    pipeline = build_tiny_random()
    pipeline.unet.train()
    models = {part: getattr(pipeline, part) for part in PARTS}
    state = torch.get_rng_state()
    first, second = record_outputs(models), record_outputs(models)
    assert set(first) == {"unet", *(f"{part}.{kind}" for part in PARTS[1:] for kind in ("hidden", "pooled"))}
    assert all(torch.equal(first[name], second[name]) and first[name].std() > 0 for name in first)
    assert torch.equal(state, torch.get_rng_state())
    assert pipeline.unet.training
    assert not pipeline.text_encoder.training


def test_recording_with_the_auxiliary_on_is_refused():
    _, models = trained_pipeline(("text_encoder",))
    with pytest.raises(ValueError, match="auxiliary_off"):
        record_trained(models)


# Damaged files: (layout, what is done, the list it must appear in, the name that must be told)

UNET_LAYER = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA_LAYER = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
TEXT_LAYER = "text_encoder.text_model.encoder.layers.1.self_attn.v_proj"


def drop(*names: str):
    return lambda tensors, _: [tensors.pop(name) for name in names]


def swap(one: str, other: str):
    return lambda tensors, _: tensors.update({one: tensors[other].clone(), other: tensors[one].clone()})


def forget_alpha(tensors, metadata):
    del metadata["lora_adapter_metadata"]


def alpha_is_rank(tensors, _):
    for name in tensors:
        if name.endswith(".alpha"):
            tensors[name] = torch.tensor(float(RANK))


DAMAGES = {
    "A lost": ("diffusers", drop(f"{UNET_LAYER}.lora_A.weight"), "missing", f"{UNET_LAYER}.lora_A.weight"),
    "B of a text encoder lost": (
        "diffusers",
        drop(f"{TEXT_LAYER}.lora_B.weight"),
        "missing",
        f"{TEXT_LAYER}.lora_B.weight",
    ),
    "layer lost": (
        "diffusers",
        drop(f"{UNET_LAYER}.lora_A.weight", f"{UNET_LAYER}.lora_B.weight"),
        "missing",
        f"{UNET_LAYER} (not loaded)",
    ),
    "alpha forgotten": (
        "diffusers",
        forget_alpha,
        "wrong_scale",
        f"{UNET_LAYER} (1, trained 2)",
    ),
    "swapped": (
        "diffusers",
        swap(f"{UNET_LAYER}.lora_A.weight", f"{UNET_LAYER[:-1]}k.lora_A.weight"),
        "different",
        f"{UNET_LAYER}.lora_A.weight",
    ),
    "foreign key": (
        "diffusers",
        lambda tensors, _: tensors.update({"unet.nowhere.lora_A.weight": torch.ones(4, 4)}),
        "unexpected",
        "unet.nowhere.lora_A.weight",
    ),
    "down lost": (
        "kohya",
        drop(f"{KOHYA_LAYER}.lora_down.weight"),
        "missing",
        f"{KOHYA_LAYER}.lora_down.weight",
    ),
    "one alpha lost": ("kohya", drop(f"{KOHYA_LAYER}.alpha"), "missing", f"{KOHYA_LAYER}.alpha"),
    "one alpha changed": (
        "kohya",
        lambda tensors, _: tensors.update({f"{KOHYA_LAYER}.alpha": torch.tensor(1.0)}),
        "wrong_scale",
        f"{KOHYA_LAYER}.alpha",
    ),
    "alpha is the rank": ("kohya", alpha_is_rank, "wrong_scale", f"{UNET_LAYER} (1, trained 2)"),
    "layers exchanged": (
        "kohya",
        swap(f"{KOHYA_LAYER}.lora_up.weight", f"{KOHYA_LAYER[:-1]}k.lora_up.weight"),
        "different",
        f"{UNET_LAYER} (B as loaded)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_found_and_the_key_named(saved, tmp_path, damage):
    folder, pipeline, trained = saved
    layout, change, kind, name = DAMAGES[damage]
    path = tmp_path / "damaged.safetensors"
    path.write_bytes((folder / f"{layout}.safetensors").read_bytes())
    rewrite(path, change)
    with pytest.raises(VerificationError) as caught:
        verify_file(path, pipeline, trained)
    assert name in getattr(caught.value, kind)
    assert str(caught.value).startswith("damaged.safetensors does not hold the trained model; ")
    # The pipeline is bare again: the good file still passes.
    verify_file(folder / f"{layout}.safetensors", pipeline, trained)


def test_a_truncated_file_is_found(saved, tmp_path):
    folder, pipeline, trained = saved
    path = tmp_path / "x.safetensors"
    path.write_bytes((folder / "kohya.safetensors").read_bytes()[:-100])
    with pytest.raises(VerificationError, match=r"x\.safetensors"):
        verify_file(path, pipeline, trained)


def test_a_file_of_another_training_differs_in_values_and_outputs(saved, tmp_path):
    _, pipeline, trained = saved
    _, models = trained_pipeline()
    for parameter in parameters_of(models["unet"], PRIMARY).values():
        parameter.data *= 1.01
    save_diffusers(tmp_path / "x.safetensors", models)
    with pytest.raises(VerificationError) as caught:
        verify_file(tmp_path / "x.safetensors", pipeline, trained)
    assert len(caught.value.different) == 4 * len(trained.layers["unet"])  # A and B, in the file and as loaded
    assert [line.split()[0] for line in caught.value.outputs] == ["unet"]


def test_a_trained_part_must_be_in_the_pipeline(saved):
    folder, _, trained = saved
    pipeline = build_tiny_random()
    pipeline.text_encoder = None
    with pytest.raises(ValueError, match="lacks a part that was trained: text_encoder"):
        verify_file(folder / "kohya.safetensors", pipeline, trained)


# Writing


@pytest.mark.parametrize("layout", SAVE)
@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "disk is full"), (errno.EACCES, "permission denied"), (errno.EIO, "Input/output")],
)
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, layout, number, words):
    _, models = trained_pipeline(("text_encoder",))
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")

    def refuse(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(atomic.os, "fsync", refuse)  # where a full disk often shows first
    with pytest.raises(UserError, match=words) as caught:
        save(layout, path, models)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.safetensors"]


@pytest.mark.skipif(os.name != "posix", reason="file size limits are a POSIX thing")
def test_a_write_that_stops_in_the_middle_leaves_the_old_file(tmp_path):
    import resource

    path = tmp_path / "x"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match="was not written"):
            write_bytes_atomically(path, bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_missing_folder_is_told_in_one_line(tmp_path):
    with pytest.raises(UserError, match="the folder does not exist"):
        write_text_atomically(tmp_path / "nowhere" / "x.json", "{}")


def test_what_a_killed_run_left_is_overwritten(tmp_path):
    (tmp_path / ".x.json.tmp").write_text("half a fi")
    write_text_atomically(tmp_path / "x.json", "ü\n")
    assert (tmp_path / "x.json").read_bytes() == b"\xc3\xbc\n"
    assert os.listdir(tmp_path) == ["x.json"]


def test_another_exception_passes_through_and_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "x") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="file modes are a POSIX thing")
def test_files_have_the_usual_mode(tmp_path):
    (tmp_path / "usual").touch()
    write_bytes_atomically(tmp_path / "x", b"")
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


# Facts


def test_tags_are_counted_by_comma():
    assert tag_frequency(FACTS.captions) == {"a sks dog": 2, "red": 1}


def test_facts_without_a_value_are_left_out():
    metadata = bilora_metadata(LoraFacts(name="x", base="b", method="lora", rank=4, alpha=4))
    assert not {"bilora_rho", "bilora_auxiliary_rank", "bilora_steps", "bilora_trained_at"} & set(metadata)
    assert all(isinstance(value, str) for value in metadata.values())
