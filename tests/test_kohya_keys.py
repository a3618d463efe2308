"""The Kohya file against the rules by which ComfyUI, A1111 and Forge read it.

None of them complains about a key it does not know: a misnamed file loads and does nothing. So their rules
stand here as code, in our own words, and are applied to every key. They were read at:

- ComfyUI a125cd84b054a57729b5eecab930ca9408719832: comfy/lora.py, comfy/utils.py,
  comfy/weight_adapter/lora.py
- AUTOMATIC1111/stable-diffusion-webui 82a973c04367123ae98bd9abdf80d9eda9b910e2:
  extensions-builtin/Lora/networks.py, network.py, network_lora.py
- lllyasviel/stable-diffusion-webui-forge dfdcbab685e57677014f05a3309b48cc87383167:
  extensions-builtin/sd_forge_lora/network.py
- kohya-ss/sd-scripts 48d368fa557731ad0488c07304dfeba8c07910eb: networks/lora.py, library/train_util.py
- Stability-AI/ModelSpec fe8dc608e557eff842eae7f78b8c90f38687d418: README.md

What is not covered: the programs themselves were not run.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from importlib import resources

import pytest
import safetensors
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from bilora_diffusion.adapters import AUXILIARY, PRIMARY, TARGETS, add_adapter
from bilora_diffusion.bases.tiny import build_tiny_random
from bilora_diffusion.lora_files.facts import LoraFacts, bilora_metadata
from bilora_diffusion.lora_files.kohya import kohya_name, save_kohya, why_not_kohya
from bilora_diffusion.lora_files.kohya_metadata import legacy_hash

RANK, ALPHA = 4, 10
FACTS = LoraFacts(
    name="dog",
    base="sdxl",
    method="bilora",
    rank=RANK,
    alpha=ALPHA,
    settings={"rho": 0.05, "auxiliary_rank": RANK},
    steps=7,
    resolution=1024,
    learning_rate=1e-4,
    optimizer="AdamW",
    seed=3,
    num_images=5,
    batch_size=2,
    accumulation=3,
    min_snr_gamma=5.0,
    captions=("a sks dog, red", "a sks dog"),
    instance_prompt="a sks dog",
    started_at=1_760_000_000.5,
    finished_at=1_760_000_060.5,
    versions={"torch": "2.15.0"},
)

# Where SDXL's UNet has transformers, in Stability's naming, by the resolution they are at (1 = half, 2 = a
# quarter).
SGM_TRANSFORMERS = {
    1: (
        "input_blocks_4_1",
        "input_blocks_5_1",
        "output_blocks_3_1",
        "output_blocks_4_1",
        "output_blocks_5_1",
    ),
    2: (
        *("input_blocks_7_1", "input_blocks_8_1", "middle_block_1"),
        *("output_blocks_0_1", "output_blocks_1_1", "output_blocks_2_1"),
    ),
}
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out_0")


def sgm_attention(depths: Mapping[int, int]) -> set[str]:
    """All attention projections of a UNet with SDXL's blocks and `depths` transformers by resolution."""
    return {
        f"{stem}_transformer_blocks_{layer}_attn{number}_{projection}"
        for level, stems in SGM_TRANSFORMERS.items()
        for stem, layer, number, projection in itertools.product(stems, range(depths[level]), (1, 2), PROJECTIONS)
    }


class ComfyUI:
    """Looks every base name up in a dictionary of exact names; a name that is not there is only logged."""

    def __init__(self, depths: Mapping[int, int], layers: tuple[int, int]):
        self.known = {f"lora_unet_{path}" for path in sgm_attention(depths)}
        for encoder, count in zip(("te1", "te2"), layers, strict=True):
            self.known |= {
                f"lora_{encoder}_text_model_encoder_layers_{layer}_{projection}"
                for layer in range(count)
                for projection in (
                    *(f"self_attn_{p}_proj" for p in ("q", "k", "v", "out")),
                    "mlp_fc1",
                    "mlp_fc2",
                )
            }

    def scales(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, float], set[str]]:
        """(base name -> factor on up @ down, keys it does not read)"""
        scales: dict[str, float] = {}
        read: set[str] = set()
        for base in self.known:
            up, down, alpha = f"{base}.lora_up.weight", f"{base}.lora_down.weight", f"{base}.alpha"
            if up not in tensors:
                continue
            product = tensors[up].flatten(1).float() @ tensors[down].flatten(1).float()  # no down: a KeyError
            assert product.ndim == 2
            scales[base] = tensors[alpha].item() / tensors[down].shape[0] if alpha in tensors else 1.0
            read |= {up, down, alpha}
        return scales, set(tensors) - read


class A1111:
    """Renames diffusers' spelling to Stability's, then looks for a module of that name in the model."""

    RESNET = (
        ("conv1", "in_layers_2"),
        ("conv2", "out_layers_3"),
        ("time_emb_proj", "emb_layers_1"),
        ("conv_shortcut", "skip_connection"),
    )

    def __init__(self, depths: Mapping[int, int], layers: tuple[int, int]):
        self.modules = {f"diffusion_model_{path}" for path in sgm_attention(depths)}
        for layer in range(layers[0]):
            stem = f"0_transformer_text_model_encoder_layers_{layer}"
            self.modules |= {f"{stem}_self_attn_{p}_proj" for p in ("q", "k", "v", "out")}
        for layer in range(layers[1]):
            stem = f"1_model_transformer_resblocks_{layer}"
            self.modules |= {
                f"{stem}_attn",
                f"{stem}_attn_out_proj",
                f"{stem}_mlp_c_fc",
                f"{stem}_mlp_c_proj",
            }

    @classmethod
    def renamed(cls, base: str) -> str:
        """The first rule that fits; most of ours fit none and go on as they are."""
        if match := re.match(r"lora_unet_conv_in(.*)", base):
            return f"diffusion_model_input_blocks_0_0{match[1]}"
        if match := re.match(r"lora_unet_conv_out(.*)", base):
            return f"diffusion_model_out_2{match[1]}"
        if match := re.match(r"lora_unet_time_embedding_linear_(\d+)(.*)", base):
            return f"diffusion_model_time_embed_{2 * int(match[1]) - 2}{match[2]}"
        if match := re.match(r"lora_unet_(down|up)_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", base):
            down, level, index = match[1] == "down", int(match[2]), int(match[4])
            block = f"input_blocks_{1 + 3 * level + index}" if down else f"output_blocks_{3 * level + index}"
            return f"diffusion_model_{block}_{int(match[3] == 'attentions')}_{cls.tail(match[3], match[5])}"
        if match := re.match(r"lora_unet_mid_block_(attentions|resnets)_(\d+)_(.+)", base):
            member = 1 if match[1] == "attentions" else 2 * int(match[2])
            return f"diffusion_model_middle_block_{member}_{cls.tail(match[1], match[3])}"
        if match := re.match(r"lora_unet_down_blocks_(\d+)_downsamplers_0_conv", base):
            return f"diffusion_model_input_blocks_{3 + 3 * int(match[1])}_0_op"
        if match := re.match(r"lora_unet_up_blocks_(\d+)_upsamplers_0_conv", base):
            level = int(match[1])
            return f"diffusion_model_output_blocks_{2 + 3 * level}_{2 if level > 0 else 1}_conv"
        if match := re.match(r"lora_te2_text_model_encoder_layers_(\d+)_(.+)", base):
            tail = match[2]
            for old, new in (("mlp_fc1", "mlp_c_fc"), ("mlp_fc2", "mlp_c_proj"), ("self_attn", "attn")):
                tail = tail.replace(old, new)
            return f"1_model_transformer_resblocks_{match[1]}_{tail}"
        return base

    @classmethod
    def tail(cls, kind: str, tail: str) -> str:
        return dict(cls.RESNET).get(tail, tail) if kind == "resnets" else tail

    def module(self, base: str) -> str | None:
        name = self.renamed(base)
        if name in self.modules:
            return name
        fused = re.fullmatch(r"(.*)_[qkv]_proj", name)  # text encoder 2 has one module for the three
        for other in (
            fused[1] if fused else None,
            name.replace("lora_unet", "diffusion_model"),
            name.replace("lora_te1_text_model", "0_transformer_text_model"),
        ):
            if other in self.modules:
                return other
        return None

    def scales(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, float], set[str]]:
        """(base name -> factor on up @ down, keys it does not read)"""
        bases: dict[str, set[str]] = {}
        for name in tensors:
            base, part = name.split(".", 1)
            bases.setdefault(base, set()).add(part)
        found = {base: self.module(base) for base in bases}
        scales: dict[str, float] = {}
        for base, parts in bases.items():
            if found[base] is None:
                continue
            assert {"lora_up.weight", "lora_down.weight"} <= parts, f"the whole file is refused for {base}"
            if base.startswith("lora_te2") and "self_attn" in base:
                stem = base.split("_self_attn_")[0]
                if not all(f"{stem}_self_attn_{p}_proj" in bases for p in ("q", "k", "v", "out")):
                    continue  # the layer is passed over without a word
            down = tensors[f"{base}.lora_down.weight"]
            scales[base] = tensors[f"{base}.alpha"].item() / down.shape[0] if "alpha" in parts else 1.0
        return scales, {name for name in tensors if name.split(".", 1)[0] not in scales}

    @staticmethod
    def version(metadata: Mapping[str, str]) -> str:
        """What the tab files it under; a LoRA of another version than the loaded model's is hidden."""
        if metadata.get("ss_base_model_version", "").startswith("sdxl_"):
            return "SDXL"
        return "SD2" if metadata.get("ss_v2") == "True" else ("SD1" if metadata else "Unknown")


TINY = {"depths": {1: 1, 2: 2}, "layers": (3, 3)}
FULL = {"depths": {1: 2, 2: 10}, "layers": (12, 32)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[dict[str, Tensor], dict[str, str], bytes]:
    """The tensors, the metadata and the bytes of a real file of all three parts."""
    path = tmp_path_factory.mktemp("kohya") / "x.safetensors"
    pipeline = build_tiny_random()
    models = {part: getattr(pipeline, part).requires_grad_(False) for part in TARGETS}
    for part, model in models.items():
        for adapter in (PRIMARY, AUXILIARY):
            add_adapter(part, model, adapter, rank=RANK, scale=ALPHA / RANK, init="gaussian", seed=0)
    assert why_not_kohya(models) is None
    save_kohya(path, models, facts=FACTS)
    with safetensors.safe_open(path, framework="pt") as file:
        return safetensors.torch.load_file(path), file.metadata(), path.read_bytes()


@pytest.fixture(scope="module")
def full_size() -> dict[str, object]:
    """SDXL's own three parts without weights."""
    folder = resources.files("bilora_diffusion") / "bases" / "sdxl_config"

    def config(part: str) -> dict:
        return json.loads((folder / part / "config.json").read_text())

    with torch.device("meta"):
        return {
            "unet": UNet2DConditionModel.from_config(config("unet")),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**config("text_encoder"))),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**config("text_encoder_2"))),
        }


def targets(part: str, model: torch.nn.Module) -> list[str]:
    ends = tuple(f".{target}" for target in TARGETS[part])
    return [name for name, _ in model.named_modules() if name.endswith(ends)]


def plain_tensors(bases: Iterable[str]) -> dict[str, Tensor]:
    small = {
        "lora_down.weight": torch.ones(RANK, 1),
        "lora_up.weight": torch.ones(1, RANK),
        "alpha": torch.tensor(ALPHA),
    }
    return {f"{base}.{part}": tensor for base in bases for part, tensor in small.items()}


# A real file


def test_every_layer_has_its_three_tensors(exported):
    tensors, _, _ = exported
    bases: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        base, part = name.split(".", 1)
        assert re.fullmatch(r"lora_(unet|te1_text_model|te2_text_model)_\w+", base)
        bases.setdefault(base, {})[part] = tensor
    assert len(bases) == 136 + 12 + 12
    for parts in bases.values():
        assert set(parts) == {"lora_down.weight", "lora_up.weight", "alpha"}
        down, up, alpha = parts["lora_down.weight"], parts["lora_up.weight"], parts["alpha"]
        assert down.ndim == up.ndim == 2
        assert down.shape[0] == up.shape[1] == RANK
        assert alpha.shape == ()
        assert alpha.dtype == torch.float32
        assert alpha.item() == ALPHA


@pytest.mark.parametrize("reader", [ComfyUI, A1111])
def test_the_reader_takes_every_key_at_the_right_strength(exported, reader):
    tensors, _, _ = exported
    scales, unread = reader(**TINY).scales(tensors)
    assert unread == set()
    assert len(scales) == len(tensors) / 3
    assert set(scales.values()) == {ALPHA / RANK}


@pytest.mark.parametrize("reader", [ComfyUI, A1111])
def test_the_rules_do_refuse_other_names(reader):
    rules = reader(**FULL)
    wrong = (
        "lora_te1_encoder_layers_0_self_attn_q_proj",  # text_model lost, as with transformers 5
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q",  # no attention at full resolution
        "lora_unet_input_blocks_4_1_transformer_blocks_2_attn1_to_q",  # two layers deep there
        "lora_te2_text_model_encoder_layers_32_self_attn_q_proj",
        "unet",
    )
    for base in wrong:
        tensors = plain_tensors([base])
        assert rules.scales(tensors)[1] == set(tensors)


def test_convolutions_keep_their_four_dimensions(tmp_path):
    unet = build_tiny_random().unet.requires_grad_(False)
    add_adapter("unet", unet, PRIMARY, rank=RANK, scale=2, init="kaiming", seed=0, targets=["conv1", "conv_shortcut"])
    save_kohya(tmp_path / "x.safetensors", {"unet": unet}, facts=FACTS)
    tensors = safetensors.torch.load_file(tmp_path / "x.safetensors")
    base = "lora_unet_input_blocks_4_0"
    assert tensors[f"{base}_in_layers_2.lora_down.weight"].shape == (RANK, 32, 3, 3)
    assert tensors[f"{base}_in_layers_2.lora_up.weight"].shape == (64, RANK, 1, 1)
    assert tensors[f"{base}_skip_connection.lora_down.weight"].shape == (RANK, 32, 1, 1)
    with safetensors.safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["ss_network_args"])["conv_dim"] == str(RANK)


def test_layers_of_unequal_rank_have_no_kohya_file():
    unet = build_tiny_random().unet.requires_grad_(False)
    add_adapter("unet", unet, PRIMARY, rank=RANK, scale=1, init="kaiming", seed=0)
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    layer.scaling[PRIMARY] = 2.0
    assert "differ in rank or alpha" in why_not_kohya({"unet": unet})


# The names at full size


def test_all_names_of_full_size_sdxl_are_known_to_both_readers(full_size):
    names = {part: [kohya_name(part, name) for name in targets(part, model)] for part, model in full_size.items()}
    assert {part: len(bases) for part, bases in names.items()} == {
        "unet": 560,
        "text_encoder": 48,
        "text_encoder_2": 128,
    }
    bases = [base for part in names.values() for base in part]
    assert len(set(bases)) == 736
    tensors = plain_tensors(bases)
    for reader in (ComfyUI, A1111):
        scales, unread = reader(**FULL).scales(tensors)
        assert unread == set()
        assert set(scales) == set(bases)
        assert set(scales.values()) == {ALPHA / RANK}


def test_both_spellings_of_a_unet_module_are_the_same_module(full_size):
    """Our map of blocks against A1111's, for every module with a weight, in SDXL's own layout."""
    unet = full_size["unet"]
    modules = [name for name, module in unet.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]
    assert len(modules) > 722
    unlike = []
    for module in modules:
        ours = kohya_name("unet", module, unet.config).replace("lora_unet", "diffusion_model")
        if A1111.renamed(f"lora_unet_{module.replace('.', '_')}") != ours:
            unlike.append(module)
    # The reason to write Stability's names: in diffusers' spelling A1111 loses these.
    assert unlike == [
        "add_embedding.linear_1",
        "add_embedding.linear_2",
        "up_blocks.0.upsamplers.0.conv",
    ]
    assert kohya_name("unet", "up_blocks.0.upsamplers.0.conv") == "lora_unet_output_blocks_2_2_conv"
    assert kohya_name("unet", "add_embedding.linear_2") == "lora_unet_label_emb_0_2"


def test_text_encoder_1_is_named_alike_under_every_transformers():
    expected = "lora_te1_text_model_encoder_layers_3_self_attn_q_proj"
    assert kohya_name("text_encoder", "encoder.layers.3.self_attn.q_proj") == expected
    assert kohya_name("text_encoder", "text_model.encoder.layers.3.self_attn.q_proj") == expected


def test_a_module_without_a_name_is_refused():
    for module in ("down_blocks.0.motion.1.x", "mid_block.resnets.0.norm1", "class_embedding"):
        with pytest.raises(ValueError, match="no name"):
            kohya_name("unet", module)


# Metadata


def test_metadata_are_strings_and_hold_the_minimum(exported):
    _, metadata, _ = exported
    assert all(isinstance(value, str) for value in metadata.values())
    expected = {
        "ss_v2": "False",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "10.0",
        "ss_output_name": "dog",
        "ss_resolution": "(1024, 1024)",
        "ss_total_batch_size": "6",
        "ss_learning_rate": "0.0001",
        "ss_min_snr_gamma": "5.0",
        "ss_noise_offset": "None",
        "ss_training_started_at": "1760000000.5",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "dog",
        "modelspec.resolution": "1024x1024",
        "modelspec.date": "2025-10-09T08:54:20",
        "modelspec.prediction_type": "epsilon",
        "modelspec.trigger_phrase": "a sks dog",
        **bilora_metadata(FACTS),
    }
    assert {name: metadata.get(name) for name in expected} == expected
    assert json.loads(metadata["ss_tag_frequency"]) == {"dog": {"a sks dog": 2, "red": 1}}
    assert json.loads(metadata["ss_dataset_dirs"]) == {"dog": {"n_repeats": 1, "img_count": 5}}
    # With alphas in the file, diffusers refuses one that has this as well.
    assert "lora_adapter_metadata" not in metadata


def test_user_interfaces_file_it_under_sdxl(exported):
    _, metadata, _ = exported
    assert A1111.version(metadata) == "SDXL"
    # Forge goes by either of these two.
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["ss_base_model_version"].startswith("sdxl_")
    # A1111 parses every value that looks like JSON; these must be what its dialogs expect.
    assert all(isinstance(json.loads(metadata[name]), dict) for name in ("ss_tag_frequency", "ss_dataset_dirs"))


def test_hashes_are_those_of_the_file(exported):
    tensors, metadata, file = exported
    behind_header = file[8 + int.from_bytes(file[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(behind_header).hexdigest()
    assert metadata["modelspec.hash_sha256"] == f"0x{metadata['sshs_model_hash']}"
    training = {name: value for name, value in metadata.items() if name.startswith("ss_")}
    assert metadata["sshs_legacy_hash"] == legacy_hash(safetensors.torch.save(tensors, training))
    assert legacy_hash(bytes(0x100000) + b"x" * 0x10000 + b"y") == hashlib.sha256(b"x" * 0x10000).hexdigest()[:8]


def test_facts_that_are_not_known_are_not_claimed(tmp_path):
    unet = build_tiny_random().unet.requires_grad_(False)
    add_adapter("unet", unet, PRIMARY, rank=2, scale=1, init="kaiming", seed=0)
    facts = LoraFacts(name="x", base="b", method="lora", rank=2, alpha=2, prediction_type="v_prediction")
    save_kohya(tmp_path / "x.safetensors", {"unet": unet}, facts=facts)
    with safetensors.safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert {name for name, value in metadata.items() if value == "None"} == {
        "ss_min_snr_gamma",
        "ss_noise_offset",
    }
    assert not {"ss_seed", "ss_tag_frequency", "ss_text_encoder_lr", "bilora_rho"} & set(metadata)
    assert metadata["modelspec.prediction_type"] == "v"
