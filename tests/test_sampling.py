"""Pictures from a pipeline: the same whatever the batch and the mode; what was found is left as it was."""

from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EDMEulerScheduler, StableDiffusionXLPipeline
from PIL import Image

from bilora_diffusion.adapters import PRIMARY, add_adapter, parameters_of
from bilora_diffusion.bases.tiny import build_tiny_random
from bilora_diffusion.sampling import decode, embed_for_sampling, sample_pictures, use_sampling_scheduler
from bilora_diffusion.sdxl import encode_images, latents_from


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionXLPipeline:
    return build_tiny_random()


def draw(pipeline: StableDiffusionXLPipeline, prompt="a cat", numbers=(0,), seed=0, **more) -> list[Image.Image]:
    vae, pipeline.vae = pipeline.vae, None
    try:
        return sample_pictures(
            pipeline,
            prompt,
            numbers=list(numbers),
            seed=seed,
            load_vae=lambda: vae,
            **{"resolution": 64, "steps": 3, **more},
        )
    finally:
        pipeline.vae = vae


def same(one: list[Image.Image], other: list[Image.Image]) -> bool:
    return [picture.tobytes() for picture in one] == [picture.tobytes() for picture in other]


def nearly_same(one: list[Image.Image], other: list[Image.Image]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(max(abs(a - b) for a, b in zip(x.tobytes(), y.tobytes(), strict=True)) <= 2 for x, y in pairs)


def test_a_picture_depends_on_the_seed_and_its_number_alone(pipeline: StableDiffusionXLPipeline) -> None:
    torch.manual_seed(1)
    three = draw(pipeline, numbers=(0, 1, 5))
    torch.manual_seed(2)
    assert same(three, draw(pipeline, numbers=(0, 1, 5)))
    assert same(three[2:], draw(pipeline, numbers=(5,)))
    assert nearly_same(three, draw(pipeline, numbers=(0, 1, 5), batch_size=2))  # sums round by the batch's size
    assert not same(three[:1], three[1:2])
    assert not same(three[:1], draw(pipeline, seed=1))
    assert not same(three[:1], draw(pipeline, prompt="a dog"))


@pytest.mark.parametrize("resolution", [64, 96])
def test_size_and_range(resolution: int, pipeline: StableDiffusionXLPipeline) -> None:
    (picture,) = draw(pipeline, resolution=resolution)
    assert picture.size == (resolution, resolution) and picture.mode == "RGB"
    low, high = zip(*picture.getextrema(), strict=True)
    assert max(high) - min(low) > 50  # not black, not grey


@pytest.mark.parametrize("prompt", ["a cat", ""])
def test_embeddings_draw_what_the_text_draws(prompt: str, pipeline: StableDiffusionXLPipeline) -> None:
    embedded = embed_for_sampling(pipeline, prompt, torch.device("cpu"))
    assert same(draw(pipeline, prompt), draw(pipeline, embedded))


def test_it_draws_what_the_pipeline_itself_draws(pipeline: StableDiffusionXLPipeline) -> None:
    from bilora_diffusion.randomness import generator

    theirs = pipeline("a cat", num_inference_steps=3, height=64, width=64, generator=[generator(0, "sample", 0)]).images
    assert nearly_same(theirs, draw(pipeline))


def test_dropout_is_off_and_on_again_also_in_the_text_encoders() -> None:
    pipeline = build_tiny_random()
    parts = {name: getattr(pipeline, name) for name in ("unet", "text_encoder", "text_encoder_2")}
    for part, model in parts.items():
        model.requires_grad_(False)
        add_adapter(part, model, PRIMARY, rank=2, scale=1.0, init="gaussian", seed=0, dropout=0.5)
        for name, parameter in parameters_of(model, PRIMARY).items():
            if ".lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    drawn = draw(pipeline)
    for model in parts.values():
        model.train()
    assert same(drawn, draw(pipeline))
    assert all(model.training for model in parts.values())
    parts["text_encoder"].eval()

    def fail(*_, **__):
        raise RuntimeError("no picture")

    handle = parts["unet"].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError):
        draw(pipeline)
    handle.remove()
    assert [model.training for model in parts.values()] == [True, False, True]


def test_the_vae_is_loaded_once_and_after_the_unet(pipeline: StableDiffusionXLPipeline) -> None:
    calls: list[str] = []
    handle = pipeline.unet.register_forward_pre_hook(lambda *_: calls.append("unet"))
    vae, pipeline.vae = pipeline.vae, None
    try:
        sample_pictures(
            pipeline,
            "a cat",
            numbers=[0, 1],
            seed=0,
            resolution=64,
            steps=2,
            load_vae=lambda: calls.append("vae") or vae,
        )
    finally:
        pipeline.vae = vae
        handle.remove()
    assert calls == ["unet"] * 4 + ["vae"]


def test_decoding_undoes_encoding(pipeline: StableDiffusionXLPipeline) -> None:
    """For a VAE with a mean and a deviation of its latents too, as some bases have."""
    vae = pipeline.vae
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = decode(vae, latents)
    assert same(plain, [decode(vae, [latent])[0] for latent in latents])
    shifted = build_tiny_random().vae
    mean, std = [0.5, -0.2, 0.1, 0.0], [1.5, 0.5, 2.0, 1.0]
    shifted.register_to_config(latents_mean=mean, latents_std=std)
    moments = encode_images(shifted, torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1)
    noise = torch.zeros_like(moments.mean)
    fed, raw = latents_from(moments, shifted.config, noise), latents_from(moments, vae.config, noise)
    assert not torch.allclose(fed, raw)
    assert nearly_same(decode(shifted, fed), decode(vae, raw))


def test_the_schedulers_for_pictures() -> None:
    pipeline = build_tiny_random()
    use_sampling_scheduler(pipeline)
    assert isinstance(pipeline.scheduler, DPMSolverMultistepScheduler)
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    assert pipeline.scheduler.config.beta_schedule == "scaled_linear"
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, variance_type="learned_range", prediction_type="v_prediction"
    )
    use_sampling_scheduler(pipeline)
    assert pipeline.scheduler.config.variance_type == "fixed_small"
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    pipeline.scheduler = EDMEulerScheduler()
    use_sampling_scheduler(pipeline)
    assert isinstance(pipeline.scheduler, EDMEulerScheduler)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_draws_nearly_the_same(dtype: torch.dtype, pipeline: StableDiffusionXLPipeline) -> None:
    half = build_tiny_random()
    for part in (half.unet, half.text_encoder, half.text_encoder_2):
        part.to(dtype)
    (coarse,), (fine,) = draw(half), draw(pipeline)
    apart = torch.tensor(list(coarse.tobytes())).float() - torch.tensor(list(fine.tobytes())).float()
    assert apart.abs().mean() < 8


def test_nothing_is_printed(pipeline: StableDiffusionXLPipeline, capfd: pytest.CaptureFixture, tmp_path: Path) -> None:
    draw(pipeline)
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""
