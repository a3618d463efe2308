"""SDXL at its full size with random weights: that two steps fit in 24 GB on a CPU, and the exact counts.

make test-slow
"""

import gc
import math
import resource
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny_run
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from bilora_diffusion.adapters import AUXILIARY, PRIMARY, auxiliary_off, low_rank_layers
from bilora_diffusion.bases import PARTS
from bilora_diffusion.bases.clip_tokenizer import clip_tokenizer, sdxl_merges
from bilora_diffusion.bases.single_file import SDXL_CONFIG
from bilora_diffusion.lora_files.diffusers_format import save_diffusers
from bilora_diffusion.lora_files.facts import LoraFacts
from bilora_diffusion.lora_files.kohya import save_kohya
from bilora_diffusion.lora_files.verification import record_trained, strip_adapters, verify_file

pytestmark = pytest.mark.slow

GIB = 2**30
TRAINED = ("unet", "text_encoder", "text_encoder_2")
LAYERS = {"unet": 560, "text_encoder": 48, "text_encoder_2": 128}
PARAMETERS = {"unet": 5_806_080, "text_encoder": 294_912, "text_encoder_2": 1_310_720}
BASE_PARAMETERS = {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840}


class FullSize(tiny_run.Builder):
    """Builds runs on SDXL's own architecture."""

    def _copy(self, parts: Sequence[str], dtype: torch.dtype, _: frozenset[str]) -> StableDiffusionXLPipeline:
        merges = sdxl_merges()
        return StableDiffusionXLPipeline(
            **{part: sdxl_part(part, dtype) if part in parts else None for part in PARTS},
            tokenizer=clip_tokenizer(merges),
            tokenizer_2=clip_tokenizer(merges, pad_token="!"),
            scheduler=EulerDiscreteScheduler.from_pretrained(SDXL_CONFIG / "scheduler"),
            add_watermarker=False,
        )


def sdxl_part(part: str, dtype: torch.dtype) -> nn.Module:
    """A part of SDXL with random weights that keep its activations of size 1; the VAE in float32."""
    folder = SDXL_CONFIG / part
    with init_empty_weights():
        if part == "unet":
            model = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder))
        elif part == "vae":
            model = AutoencoderKL.from_config(AutoencoderKL.load_config(folder))
        else:
            kind = CLIPTextModel if part == "text_encoder" else CLIPTextModelWithProjection
            model = kind(CLIPTextConfig.from_pretrained(folder))
    # Three billion random numbers take minutes: these repeat, with a period that no row length divides.
    block = torch.randn(1_000_003, generator=torch.Generator().manual_seed(len(part)))
    for module in model.modules():
        for name, empty in module.named_parameters(recurse=False):
            if empty.ndim == 1:
                value = torch.full(empty.shape, float(name == "weight"))
            else:
                value = (block / math.sqrt(empty[0].numel())).repeat(-(-empty.numel() // len(block)))
                value = value[: empty.numel()].view(empty.shape)
            value = value.to(torch.float32 if part == "vae" else dtype)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    return model.eval()


def fingerprint(models: dict[str, nn.Module]) -> dict[str, int]:
    """A weighted sum over the bits of everything but the adapters, part by part."""
    base = {part: [p for n, p in model.named_parameters() if ".lora_" not in n] for part, model in models.items()}
    return {
        part: sum(
            int(parameter.detach().view(torch.int16).sum(dtype=torch.int64)) * number
            for number, parameter in enumerate(parameters, start=1)
        )
        for part, parameters in base.items()
    }


def numel(parameters) -> int:
    return sum(parameter.numel() for parameter in parameters)


def test_two_steps_on_sdxl(tmp_path: Path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    tiny_run.write_pictures(pictures, [(128, 128), (160, 128)], "a photo of a sks dog, number", seed=0)
    run = FullSize(pictures)(
        precision="bf16",
        train_text_encoder=True,
        resolution=128,
        lora_layers=None,
        rank=4,
        lora_alpha=8.0,
        auxiliary_rank=4,
        train_batch_size=1,
        learning_rate=1e-3,
        auxiliary_learning_rate=1e-3,
    )
    models = run.parts.models

    assert {part: numel(p for n, p in m.named_parameters() if ".lora_" not in n) for part, m in models.items()} == (
        BASE_PARAMETERS
    )
    for adapter in (PRIMARY, AUXILIARY):
        layers = low_rank_layers(models, adapter)
        assert {part: sum(layer.part == part for layer in layers) for part in TRAINED} == LAYERS
        assert {part: numel(p for x in layers if x.part == part for p in (x.A, x.B)) for part in TRAINED} == PARAMETERS
        assert len(run.parameters(adapter)) == 1_472
        assert numel(run.parameters(adapter).values()) == 7_411_712
        assert all(p.dtype == torch.float32 for p in run.parameters(adapter).values())
    assert len(run.parts.trainer.primary) == len(run.parts.method.parameters) == 1_472

    before, start = fingerprint(models), run.tensors()
    for number in range(2):
        step = run.step(number)
        assert step.applied
        assert math.isfinite(step.loss)
    assert fingerprint(models) == before
    measures = run.parts.method.measures()
    assert 0 < measures["c_over_rho"] <= 1 + 1e-6

    trained = run.tensors()
    zero = {name for name, tensor in trained.items() if "lora_B" in name and not tensor.any()}
    last = ".layers.11.self_attn."
    assert zero == {n for n in start if n.startswith("text_encoder.") and last in n and "lora_B" in n}
    assert len(zero) == 4
    assert sum(not torch.equal(start[name], tensor) for name, tensor in trained.items()) >= 1_472 - 8

    facts = LoraFacts(name="full size", base="random", method="bilora", rank=4, alpha=8, steps=2)
    files = [tmp_path / "diffusers.safetensors", tmp_path / "kohya.safetensors"]
    save_diffusers(files[0], models)
    save_kohya(files[1], models, facts=facts)
    with auxiliary_off(models.values()):
        record = record_trained(models)
    for model in models.values():
        strip_adapters(model)
    tokenizers = dict(zip(("tokenizer", "tokenizer_2"), run.parts.tokenizers, strict=True))
    scheduler = EulerDiscreteScheduler.from_pretrained(SDXL_CONFIG / "scheduler")
    pipeline = StableDiffusionXLPipeline(**models, **tokenizers, vae=None, scheduler=scheduler, add_watermarker=False)
    del run, model
    gc.collect()
    for file in files:
        result = verify_file(file, pipeline, record)
        assert result.layers == 736
        print(file.name, "differences", result.differences, "effects", result.effects)
    assert fingerprint(models) == before

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak memory {peak / GIB:.1f} GiB")
    assert peak < 24e9
