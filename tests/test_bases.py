"""Every way to a base gives the same model, reads only what is asked for, and refuses what is not SDXL."""

import importlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from transformers.utils import logging as transformers_logging

from bilora_diffusion.bases import PARTS, Base, fetching, single_file
from bilora_diffusion.bases.clip_tokenizer import clip_tokenizer, sdxl_merges
from bilora_diffusion.bases.quiet import quiet_libraries
from bilora_diffusion.bases.single_file import SDXL_CONFIG
from bilora_diffusion.bases.tiny import TINY_RANDOM, build_tiny_random, tiny_random_folder
from bilora_diffusion.errors import UserError


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict())


def assert_same_weights(model: nn.Module, reference: nn.Module) -> None:
    ours, theirs = weights_of(model), weights_of(reference)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


# --- the original layout, written from the tiny model: the inverse of what single_file.py has to read ---

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def original_unet_name(name: str) -> str:
    """SDXL's: three levels of two layers; going up three layers, the upsampler after the attention if any."""
    module, kind = name.rsplit(".", 1)
    if module in UNET_ENDS:
        return f"{UNET_ENDS[module]}.{kind}"
    if match := re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.+)", module):
        side, block, what, layer, rest = match.groups()
        number = 3 * int(block) + int(layer) + (1 if side == "down" else 0)
        place = f"{'input' if side == 'down' else 'output'}_blocks.{number}"
        inner = f"0.{RESNET[rest]}" if what == "resnets" else f"1.{rest}"
        return f"{place}.{inner}.{kind}"
    if match := re.fullmatch(r"down_blocks\.(\d)\.downsamplers\.0\.conv", module):
        return f"input_blocks.{3 * int(match[1]) + 3}.0.op.{kind}"
    if match := re.fullmatch(r"up_blocks\.(\d)\.upsamplers\.0\.conv", module):
        return f"output_blocks.{3 * int(match[1]) + 2}.2.conv.{kind}"
    if match := re.fullmatch(r"mid_block\.resnets\.(\d)\.(.+)", module):
        return f"middle_block.{2 * int(match[1])}.{RESNET[match[2]]}.{kind}"
    return f"middle_block.1.{module.removeprefix('mid_block.attentions.0.')}.{kind}"


def original_vae_name(name: str) -> str:
    def mirrored(match: re.Match[str]) -> str:
        return f"up.{3 - int(match[1])}."

    name = re.sub(r"up_blocks\.(\d)\.", mirrored, name)
    name = re.sub(r"down_blocks\.(\d)\.", r"down.\1.", name)
    name = re.sub(r"mid_block\.resnets\.(\d)\.", lambda match: f"mid.block_{int(match[1]) + 1}.", name)
    for ours, theirs in {
        "resnets.": "block.",
        "downsamplers.0.": "downsample.",
        "upsamplers.0.": "upsample.",
        "mid_block.attentions.0.": "mid.attn_1.",
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
        "conv_norm_out": "norm_out",
        "conv_shortcut": "nin_shortcut",
    }.items():
        name = name.replace(ours, theirs)
    return name


OPEN_CLIP = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def open_clip_weights(model: CLIPTextModelWithProjection) -> dict[str, Tensor]:
    weights = weights_of(model)
    written = {
        "positional_embedding": weights.pop("text_model.embeddings.position_embedding.weight"),
        "token_embedding.weight": weights.pop("text_model.embeddings.token_embedding.weight"),
        "ln_final.weight": weights.pop("text_model.final_layer_norm.weight"),
        "ln_final.bias": weights.pop("text_model.final_layer_norm.bias"),
        "text_projection": weights.pop("text_projection.weight").T.contiguous(),
        "logit_scale": torch.tensor(4.6),
    }
    for layer in range(model.config.num_hidden_layers):
        source, target = f"text_model.encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            stacked = [weights.pop(f"{source}self_attn.{letter}_proj.{kind}") for letter in "qkv"]
            written[f"{target}attn.in_proj_{kind}"] = torch.cat(stacked)
            for ours, theirs in OPEN_CLIP.items():
                written[f"{target}{theirs}.{kind}"] = weights.pop(f"{source}{ours}.{kind}")
    assert weights == {}
    return written


def original_layout(pipeline: StableDiffusionXLPipeline) -> dict[str, Tensor]:
    """The whole model as one file of the original code."""
    unet, vae = weights_of(pipeline.unet), weights_of(pipeline.vae)
    # The original VAE's attention is made of 1 x 1 convolutions.
    vae = {
        name: weight[..., None, None] if re.search(r"attentions.*to_.*weight", name) else weight
        for name, weight in vae.items()
    }
    clip = weights_of(pipeline.text_encoder) | {"embeddings.position_ids": torch.arange(77)[None]}
    return {
        **{f"model.diffusion_model.{original_unet_name(name)}": weight for name, weight in unet.items()},
        **{f"first_stage_model.{original_vae_name(name)}": weight for name, weight in vae.items()},
        **{f"conditioner.embedders.0.transformer.text_model.{name}": weight for name, weight in clip.items()},
        **{
            f"conditioner.embedders.1.model.{name}": weight
            for name, weight in open_clip_weights(pipeline.text_encoder_2).items()
        },
    }


@pytest.fixture(scope="module")
def tiny() -> StableDiffusionXLPipeline:
    return build_tiny_random()


@pytest.fixture(scope="module")
def checkpoint(tiny: StableDiffusionXLPipeline) -> dict[str, Tensor]:
    return original_layout(tiny)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[dict[str, Tensor]], Path]:
    def write_checkpoint(weights: dict[str, Tensor]) -> Path:
        save_file({name: weight.contiguous() for name, weight in weights.items()}, tmp_path / "tiny.safetensors")
        return tmp_path / "tiny.safetensors"

    return write_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the tiny folder, to be spoilt."""
    return Path(shutil.copytree(tiny_random_folder(), tmp_path / "model"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- the tiny base ---


def test_the_tiny_base_is_always_the_same_and_leaves_the_random_state_alone(
    tiny: StableDiffusionXLPipeline,
) -> None:
    before = torch.get_rng_state()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again = build_tiny_random()
    assert torch.equal(state, torch.get_rng_state())
    torch.set_rng_state(before)
    for part in PARTS:
        assert_same_weights(getattr(again, part), getattr(tiny, part))


def test_the_tiny_base_has_the_structure_of_sdxl(tiny: StableDiffusionXLPipeline) -> None:
    theirs = json.loads((SDXL_CONFIG / "unet" / "config.json").read_text())
    for name in (
        "down_block_types",
        "up_block_types",
        "layers_per_block",
        "addition_embed_type",
        "in_channels",
    ):
        assert list(tiny.unet.config[name]) if name.endswith("types") else tiny.unet.config[name] == theirs[name]
    assert tiny.unet.config.use_linear_projection
    assert tiny.vae_scale_factor == 8
    assert tiny.vae.config.scaling_factor == 0.13025
    ours = tiny.scheduler.config
    schedule = json.loads((SDXL_CONFIG / "scheduler" / "scheduler_config.json").read_text())
    assert {name: ours[name] for name in schedule if not name.startswith("_")} == {
        name: value for name, value in schedule.items() if not name.startswith("_")
    }


@torch.no_grad()
def unet_output(pipeline: StableDiffusionXLPipeline, prompt: str, dtype: torch.dtype) -> Tensor:
    embeds, _, pooled, _ = pipeline.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
    return pipeline.unet(
        torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype),
        torch.tensor([500]),
        encoder_hidden_states=embeds,
        added_cond_kwargs={
            "text_embeds": pooled,
            "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]], dtype=dtype),
        },
    ).sample.float()


def test_the_tiny_base_listens_to_its_prompt(tiny: StableDiffusionXLPipeline) -> None:
    cat, dog = (unet_output(tiny, f"a photo of a {name}", torch.float32) for name in ("cat", "dog"))
    assert 0.3 < cat.std() < 2
    assert (cat - dog).norm() > 0.05 * cat.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_tiny_base_runs_in_half_precision(tiny: StableDiffusionXLPipeline, dtype: torch.dtype) -> None:
    half = Base(TINY_RANDOM).load("unet", "text_encoder", "text_encoder_2", dtype=dtype)
    reference = unet_output(tiny, "a cat", torch.float32)
    assert (unet_output(half, "a cat", dtype) - reference).norm() < 0.1 * reference.norm()


def test_the_tiny_tokenizer_takes_any_prompt(tiny: StableDiffusionXLPipeline) -> None:
    for tokenizer, padding in ((tiny.tokenizer, 513), (tiny.tokenizer_2, 0)):
        ids = tokenizer("Ünï 日本 🙂!", padding="max_length", max_length=77, truncation=True).input_ids
        assert len(ids) == 77
        assert ids[0] == 512
        assert ids[-1] == padding
        assert ids[1 : ids.index(513)] == tokenizer("ünï 日本 🙂!").input_ids[1:-1]


def test_the_vae_of_the_tiny_base_gives_latents_of_unit_size(tiny: StableDiffusionXLPipeline) -> None:
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = tiny.vae.encode(pixels).latent_dist.mean * tiny.vae.config.scaling_factor
        decoded = tiny.vae.decode(latents / tiny.vae.config.scaling_factor).sample
    assert latents.shape == (2, 4, 8, 8)
    assert 0.2 < latents.std() < 3
    assert 0.1 < decoded.std() < 2


# --- the three ways to the same weights ---


@pytest.mark.parametrize("way", ["name", "folder", "file"])
def test_each_way_to_a_base_gives_the_same_model(
    way: str,
    tiny: StableDiffusionXLPipeline,
    checkpoint: dict[str, Tensor],
    write: Callable[[dict[str, Tensor]], Path],
) -> None:
    config = None
    if way == "name":
        name = TINY_RANDOM
    elif way == "folder":
        name = str(tiny_random_folder())
    else:
        name, config = str(write(checkpoint)), tiny_random_folder()
    loaded = Base(name).load(*PARTS, config_folder=config)
    for part in PARTS:
        assert_same_weights(getattr(loaded, part), getattr(tiny, part))
        assert not getattr(loaded, part).training
        assert type(getattr(loaded, part)) is type(getattr(tiny, part))
    for tokenizer in ("tokenizer", "tokenizer_2"):
        assert (
            getattr(loaded, tokenizer)("a cat", padding="max_length", max_length=77).input_ids
            == getattr(tiny, tokenizer)("a cat", padding="max_length", max_length=77).input_ids
        )
    assert isinstance(loaded.scheduler, EulerDiscreteScheduler)
    assert loaded.scheduler.config.prediction_type == "epsilon"
    assert loaded.config.force_zeros_for_empty_prompt is True
    assert loaded.watermark is None
    assert Base(name).native_resolution(config) == 64


def test_a_single_file_stored_in_half_precision_loads_in_any_dtype(
    checkpoint: dict[str, Tensor], write: Callable[[dict[str, Tensor]], Path]
) -> None:
    path = write({name: w.half() if w.is_floating_point() else w for name, w in checkpoint.items()})
    for dtype in (torch.float32, torch.bfloat16):
        pipeline = Base(str(path)).load(*PARTS, dtype=dtype, config_folder=tiny_random_folder())
        assert pipeline.vae.dtype == torch.float32
        for part in ("unet", "text_encoder", "text_encoder_2"):
            assert {weight.dtype for weight in getattr(pipeline, part).parameters()} == {dtype}


def test_the_vae_stays_in_float32() -> None:
    for name in (TINY_RANDOM, str(tiny_random_folder())):
        pipeline = Base(name).load("unet", "vae", dtype=torch.float16)
        assert pipeline.unet.dtype == torch.float16
        assert pipeline.vae.dtype == torch.float32


@pytest.mark.parametrize("part", PARTS)
def test_only_the_parts_asked_for_are_loaded_and_read(
    part: str, folder: Path, checkpoint: dict[str, Tensor], write: Callable[[dict[str, Tensor]], Path]
) -> None:
    assert all(getattr(Base(TINY_RANDOM).load(part), other) is None for other in PARTS if other != part)
    for other in PARTS:
        if other != part:  # reading it would fail
            for weights in (folder / other).glob("*.safetensors"):
                weights.write_bytes(b"spoilt")
    pipeline = Base(str(folder)).load(part)
    assert [name for name in PARTS if getattr(pipeline, name) is not None] == [part]
    assert pipeline.tokenizer is not None
    assert pipeline.tokenizer_2 is not None

    prefix = {
        "unet": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder": "conditioner.embedders.0.",
        "text_encoder_2": "conditioner.embedders.1.",
    }[part]
    kept = (prefix, "model.diffusion_model.input_blocks.0.0.")  # the latter is looked at to tell SDXL
    path = write({n: w if n.startswith(kept) else w.flatten()[:1] for n, w in checkpoint.items()})
    pipeline = Base(str(path)).load(part, config_folder=tiny_random_folder())
    assert [name for name in PARTS if getattr(pipeline, name) is not None] == [part]


def test_no_part_at_all_gives_tokenizers_and_scheduler() -> None:
    pipeline = Base(str(tiny_random_folder())).load()
    assert all(getattr(pipeline, part) is None for part in PARTS)
    assert pipeline.tokenizer_2.pad_token == "!"


def test_an_unknown_part_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="transformer"):
        Base(TINY_RANDOM).load("transformer")


def test_names_of_text_encoder_1_as_transformers_4_wrote_them(folder: Path, tiny: StableDiffusionXLPipeline) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{name}": weight for name, weight in load_file(path).items()}
    weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(weights, path, metadata={"format": "pt"})
    assert_same_weights(Base(str(folder)).load("text_encoder").text_encoder, tiny.text_encoder)


def test_tokenizers_as_transformers_4_wrote_them(folder: Path) -> None:
    merges = sdxl_merges()
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        shutil.rmtree(folder / name)
        (folder / name).mkdir()
        vocabulary = clip_tokenizer(merges).get_vocab()
        (folder / name / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        (folder / name / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / name / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "CLIPTokenizer", "pad_token": pad, "model_max_length": 77})
        )
    pipeline = Base(str(folder)).load()
    for tokenizer, pad in ((pipeline.tokenizer, "<|endoftext|>"), (pipeline.tokenizer_2, "!")):
        ours = clip_tokenizer(merges, pad_token=pad)
        for text in ("a photo of a cat", "Hello!  sks dog, 3d-icon's (style:1.2)", "héllo 日本 🙂 !", ""):
            arguments = {"padding": "max_length", "max_length": 77, "truncation": True}
            assert tokenizer(text, **arguments).input_ids == ours(text, **arguments).input_ids


# --- what is shipped for single files ---


def test_the_shipped_tokenizers_are_sdxls(
    checkpoint: dict[str, Tensor], write: Callable[[dict[str, Tensor]], Path]
) -> None:
    pipeline = Base(str(write(checkpoint))).load()
    first, second = pipeline.tokenizer, pipeline.tokenizer_2
    assert len(first) == len(second) == 49408
    assert (first.pad_token_id, second.pad_token_id) == (49407, 0)
    for tokenizer in (first, second):
        assert tokenizer.model_max_length == 77
        assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
        assert tokenizer("A PHOTO  of a\ncat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
        assert tokenizer.tokenize("cats") == ["cats</w>"]
        assert tokenizer.decode(tokenizer("3d icon").input_ids, skip_special_tokens=True) == "3 d icon"


def test_the_shipped_configuration_has_the_size_of_sdxl() -> None:
    with torch.device("meta"):
        models = {
            "unet": UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(SDXL_CONFIG / "unet")),
            "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(SDXL_CONFIG / "vae")),
            "text_encoder": CLIPTextModel(CLIPTextConfig.from_pretrained(SDXL_CONFIG / "text_encoder")),
            "text_encoder_2": CLIPTextModelWithProjection(
                CLIPTextConfig.from_pretrained(SDXL_CONFIG / "text_encoder_2")
            ),
        }
    counts = {part: sum(weight.numel() for weight in model.parameters()) for part, model in models.items()}
    assert counts == {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    }
    assert models["text_encoder"].config.hidden_act == "quick_gelu"
    assert models["text_encoder_2"].config.hidden_act == "gelu"


def test_the_native_resolution_of_a_single_file_is_sdxls(
    checkpoint: dict[str, Tensor], write: Callable[[dict[str, Tensor]], Path]
) -> None:
    assert Base(str(write(checkpoint))).native_resolution() == 1024


@pytest.mark.parametrize(
    ("flags", "prediction", "zero_snr"),
    [
        ((), "epsilon", False),
        (("v_pred",), "v_prediction", False),
        (("v_pred", "ztsnr"), "v_prediction", True),
    ],
)
def test_a_single_file_says_what_its_unet_predicts(
    flags: tuple[str, ...],
    prediction: str,
    zero_snr: bool,
    checkpoint: dict[str, Tensor],
    write: Callable[[dict[str, Tensor]], Path],
) -> None:
    path = write(checkpoint | {flag: torch.zeros(0) for flag in flags})
    scheduler = Base(str(path)).load().scheduler
    assert scheduler.config.prediction_type == prediction
    assert scheduler.config.rescale_betas_zero_snr is zero_snr
    assert scheduler.config.timestep_spacing == ("trailing" if zero_snr else "leading")


# --- another VAE ---


def test_another_vae_replaces_the_bases_own(tmp_path: Path, folder: Path, tiny: StableDiffusionXLPipeline) -> None:
    vae = AutoencoderKL.from_config(tiny.vae.config)
    vae.save_pretrained(tmp_path / "vae-alone")
    for weights in (folder / "vae").glob("*.safetensors"):
        weights.write_bytes(b"spoilt: must not be read")
    for name in (TINY_RANDOM, str(folder)):
        loaded = Base(name, vae=str(tmp_path / "vae-alone")).load("vae", "unet", dtype=torch.bfloat16)
        assert_same_weights(loaded.vae, vae)
        assert loaded.vae.dtype == torch.float32
        assert loaded.unet.dtype == torch.bfloat16
    assert Base(str(folder), vae=str(tmp_path / "vae-alone")).load("unet").vae is None
    whole = Base(TINY_RANDOM, vae=str(tiny_random_folder())).load("vae")
    assert_same_weights(whole.vae, tiny.vae)


def test_a_vae_in_a_file_of_its_own_is_read_in_either_layout(
    tmp_path: Path, tiny: StableDiffusionXLPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(single_file, "SDXL_CONFIG", tiny_random_folder())
    original = {
        name.removeprefix("first_stage_model."): weight
        for name, weight in original_layout(tiny).items()
        if name.startswith("first_stage_model.")
    }
    prefixed = {f"first_stage_model.{name}": weight for name, weight in original.items()}
    for layout in (original, prefixed, weights_of(tiny.vae)):
        save_file({name: w.contiguous() for name, w in layout.items()}, tmp_path / "vae.safetensors")
        loaded = Base(TINY_RANDOM, vae=str(tmp_path / "vae.safetensors")).load("vae").vae
        assert_same_weights(loaded, tiny.vae)


@pytest.mark.parametrize("name", ["nowhere.safetensors", "vae.pt", "lora.safetensors", "empty-folder"])
def test_what_is_no_vae_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "vae.pt").write_bytes(b"x")
    (tmp_path / "empty-folder").mkdir()
    save_file({"unet.to_q.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="--pretrained_vae_model_name_or_path") as error:
        Base(TINY_RANDOM, vae=str(tmp_path / name)).load("vae")
    assert "\n" not in str(error.value)


# --- what is refused ---


def refusal(name: object, **fields: str) -> str:
    with pytest.raises(UserError) as error:
        Base(str(name), **fields).load(*PARTS)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("--")
    return message


def test_a_folder_that_is_another_model_is_refused_by_its_name(folder: Path) -> None:
    index = folder / "model_index.json"
    original = index.read_text()
    index.write_text(json.dumps({"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "x"]}))
    assert "StableDiffusionPipeline, not an SDXL base" in refusal(folder)
    index.write_text(json.dumps({"_class_name": "FluxPipeline", "transformer": ["diffusers", "x"]}))
    assert "FluxPipeline, not an SDXL base" in refusal(folder)
    index.write_text(original)
    edit(index, text_encoder=[None, None])
    assert "refiner" in refusal(folder)
    index.write_text(original)
    edit(folder / "unet" / "config.json", in_channels=9)
    assert "reads 9 channels" in refusal(folder)
    edit(folder / "unet" / "config.json", in_channels=4, addition_embed_type=None)
    assert "size conditioning" in refusal(folder)
    index.write_text("{")
    assert "model_index.json is missing or damaged" in refusal(folder)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    assert "no model_index.json" in refusal(tmp_path)
    (tmp_path / "sdxl.safetensors").touch()
    assert "name the file (sdxl.safetensors)" in refusal(tmp_path)
    (tmp_path / "config.json").touch()
    assert "single part" in refusal(tmp_path)
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    assert "--init_lora_from" in refusal(tmp_path)


@pytest.mark.parametrize("part", PARTS)
def test_a_cut_file_in_a_folder_is_told(part: str, folder: Path) -> None:
    (weights,) = (folder / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    assert f"{weights.name} is damaged or cut short" in refusal(folder)


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_weight_in_a_folder_is_told_not_made_up(part: str, folder: Path) -> None:
    (path,) = (folder / part).glob("*.safetensors")
    weights = load_file(path)
    dropped = sorted(weights)[3]
    del weights[dropped]
    save_file(weights, path, metadata={"format": "pt"})
    message = refusal(folder)
    assert f"lacks 1 of the weights of its {part}" in message
    assert dropped in message


def test_a_variant_that_is_not_there_is_told(folder: Path) -> None:
    assert "--variant" in refusal(folder, variant="fp16")
    for path in list(folder.glob("*/*.safetensors")):
        path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))
    assert "diffusion_pytorch_model.fp16.safetensors only; name that --variant" in refusal(folder)
    pipeline = Base(str(folder), variant="fp16").load(*PARTS)
    assert all(getattr(pipeline, part) is not None for part in PARTS)


def test_a_sharded_unet_loads(folder: Path, tiny: StableDiffusionXLPipeline) -> None:
    for path in (folder / "unet").iterdir():
        path.unlink()
    tiny.unet.save_pretrained(folder / "unet", max_shard_size="5MB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    assert_same_weights(Base(str(folder)).load("unet").unet, tiny.unet)


def test_a_tokenizer_without_vocabulary_is_told(folder: Path) -> None:
    (folder / "tokenizer_2" / "tokenizer.json").unlink()
    assert "tokenizer_2" in refusal(folder)


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        (["lora_unet_down_blocks_1.lora_down.weight"], "is a LoRA"),
        (["unet.down_blocks.1.attn1.to_q.lora_A.weight"], "is a LoRA"),
        (["unet.down_blocks.1.attn1.to_q.lora.up.weight"], "is a LoRA"),
        (["cond_stage_model.transformer.text_model.x", "model.diffusion_model.x"], "Stable Diffusion 1 or 2"),
        (["model.diffusion_model.double_blocks.0.x"], "Flux"),
        (["model.diffusion_model.joint_blocks.0.x"], "Stable Diffusion 3"),
        (["control_model.input_blocks.0.0.weight"], "ControlNet"),
        (["encoder.conv_in.weight", "decoder.conv_in.weight"], "is a VAE"),
        (["down_blocks.0.resnets.0.conv1.weight"], "UNet alone"),
        (["edm_mean", "edm_std", "model.diffusion_model.input_blocks.0.0.weight"], "EDM"),
        (["something"], "not an SDXL checkpoint"),
        (
            ["model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.model.ln_final.bias"],
            "refiner",
        ),
        (["model.diffusion_model.input_blocks.0.0.weight"], "without SDXL's two text encoders"),
    ],
)
def test_a_single_file_that_is_another_model_is_refused(
    keys: list[str], complaint: str, write: Callable[[dict[str, Tensor]], Path]
) -> None:
    assert complaint in refusal(write({key: torch.zeros(1) for key in keys}))


def test_single_files_that_are_spoilt_are_refused(
    checkpoint: dict[str, Tensor], write: Callable[[dict[str, Tensor]], Path], tmp_path: Path
) -> None:
    def refused(weights: dict[str, Tensor], *parts: str) -> str:
        with pytest.raises(UserError) as error:
            Base(str(write(weights))).load(*parts, config_folder=tiny_random_folder())
        assert "\n" not in str(error.value)
        return str(error.value)

    def without(pattern: str) -> dict[str, Tensor]:
        return {name: weight for name, weight in checkpoint.items() if not re.search(pattern, name)}

    first = "model.diffusion_model.input_blocks.0.0.weight"
    assert "9 channels" in refused(checkpoint | {first: torch.zeros(32, 9, 3, 3)})
    assert "holds no VAE" in refused(without("first_stage"), "vae")
    for part, complaint, pattern in (
        ("unet", "unet is incomplete", r"output_blocks\.4\.0\.in_layers\.2\.bias"),
        ("text_encoder", "lacks 1 of the weights of its text_encoder", r"0\..*layers\.1\.mlp\.fc1\.bias"),
        ("text_encoder_2", "lacks 3 of the weights of its text_encoder_2", r"1\.attn\.in_proj_bias"),
        ("vae", "vae is incomplete", r"first.*encoder\.norm_out\.bias"),
    ):
        assert complaint in refused(without(pattern), part)
    # A file of another size than its configuration: here SDXL's.
    path = write(checkpoint)
    for part in PARTS:
        with pytest.raises(UserError, match="incomplete or not built as SDXL's"):
            Base(str(path)).load(part)
    path.write_bytes(path.read_bytes()[:100_000])
    assert "damaged or cut short" in refusal(path)
    path.write_bytes(b"")
    assert "damaged or cut short" in refusal(path)
    (tmp_path / "model.ckpt").touch()
    assert "pickle" in refusal(tmp_path / "model.ckpt")
    (tmp_path / "model.gguf").touch()
    assert "not a .safetensors" in refusal(tmp_path / "model.gguf")


def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    for name in (
        "/no/such/folder",
        "./models/sdxl",
        "a/b/c",
        "sdxl.safetensors",
        "~/sdxl",
        "C:\\models\\sdxl",
    ):
        assert "there is no file or folder" in refusal(name)
    assert "is an address" in refusal("https://example.org/sdxl.safetensors")


# --- the hub, without a network ---


def hub_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, "404 Client Error\nmore")
    return error


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (GatedRepoError, "is gated"),
        (RepositoryNotFoundError, "no model on the hub that you may read"),
        (RevisionNotFoundError, "no revision nope"),
    ],
)
def test_what_the_hub_answers_is_one_line(kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(*_: object, **__: object) -> str:
        raise hub_error(kind)

    monkeypatch.setattr(fetching, "snapshot_download", answer)
    assert message in refusal("owner/model", revision="nope")


def test_a_hub_id_offline_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "the hub cannot be asked" in refusal("owner/model", cache_dir=str(tmp_path))


def test_a_model_in_the_hubs_cache_loads_offline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: StableDiffusionXLPipeline
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit = "0123456789" * 4
    repository = tmp_path / "models--owner--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(tiny_random_folder(), repository / "snapshots" / commit)
    base = Base("owner/model", cache_dir=str(tmp_path))
    assert base.is_hub_id
    assert base.native_resolution() == 64
    loaded = base.load(*PARTS)
    for part in PARTS:
        assert_same_weights(getattr(loaded, part), getattr(tiny, part))
    shutil.rmtree(repository / "snapshots" / commit / "vae")
    assert base.load("unet").unet is not None
    assert "its vae" in refusal("owner/model", cache_dir=str(tmp_path))


def test_only_the_files_of_the_parts_asked_for_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(*_: object, allow_patterns: list[str], revision: str, **__: object) -> str:
        assert revision == "v1"
        asked.extend(allow_patterns)
        return str(tiny_random_folder())

    monkeypatch.setattr(fetching, "snapshot_download", answer)
    Base("owner/model", revision="v1").load("text_encoder")
    weights = [pattern for pattern in asked if "safetensors" in pattern]
    assert weights
    assert all(pattern.startswith("text_encoder/") for pattern in weights)


# --- names ---


@pytest.mark.parametrize(
    ("name", "hub_id", "shared"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", True, "stabilityai/stable-diffusion-xl-base-1.0"),
        ("tiny-random", False, "tiny-random"),
        ("/home/someone/models/my-sdxl/", False, "my-sdxl"),
        ("../secret/checkpoint.safetensors", False, "checkpoint.safetensors"),
        ("~/models/sdxl", False, "sdxl"),
    ],
)
def test_names_that_are_shared_hold_no_local_path(name: str, hub_id: bool, shared: str) -> None:
    assert Base(name).is_hub_id is hub_id
    assert Base(name).shared_name == shared


def test_a_folder_here_goes_before_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_random_folder(), tmp_path / "owner" / "model")
    base = Base("owner/model")
    assert not base.is_hub_id
    assert base.shared_name == "model"
    assert base.load("text_encoder").text_encoder is not None
    monkeypatch.chdir(tmp_path / "owner")
    assert Base(".").shared_name == "owner"


# --- quiet ---


def test_loading_says_nothing_and_leaves_the_libraries_settings(capfd: pytest.CaptureFixture[str]) -> None:
    levels = diffusers.logging.get_verbosity(), transformers_logging.get_verbosity()
    bars = diffusers.logging.is_progress_bar_enabled(), transformers_logging.is_progress_bar_enabled()
    Base(str(tiny_random_folder())).load(*PARTS, dtype=torch.float16)
    Base(TINY_RANDOM).load(*PARTS, dtype=torch.float16)
    with pytest.raises(RuntimeError), quiet_libraries():
        raise RuntimeError
    output = capfd.readouterr()
    assert (output.out, output.err) == ("", "")
    assert levels == (diffusers.logging.get_verbosity(), transformers_logging.get_verbosity())
    assert bars == (
        diffusers.logging.is_progress_bar_enabled(),
        transformers_logging.is_progress_bar_enabled(),
    )


@pytest.mark.parametrize(("rank", "shown"), [(None, True), ("0", True), ("1", False)])
def test_download_bars_are_shown_by_the_first_process_only(
    rank: str | None, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The user's own variable goes before; the package's attribute of the module's name is a class.
    module = importlib.import_module("huggingface_hub.utils.tqdm")
    monkeypatch.setattr(module, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    hidden_at_first = are_progress_bars_disabled()
    enable_progress_bars()
    try:
        with quiet_libraries():
            assert are_progress_bars_disabled() is not shown
        assert not are_progress_bars_disabled()
    finally:
        if hidden_at_first:
            disable_progress_bars()
