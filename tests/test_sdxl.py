"""SDXL's conditioning and latents are those of diffusers' own pipeline, and what is no longer needed is freed."""

import copy
import gc
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from bilora_diffusion import assembly
from bilora_diffusion.data.latents import CachedLatents, EncodedLatents
from bilora_diffusion.errors import UserError
from bilora_diffusion.prompts import EmbeddedPrompts, TokenizedPrompts
from bilora_diffusion.sdxl import (
    Conditioning,
    Moments,
    denoise,
    embed_prompts,
    encode_images,
    latents_from,
    time_ids,
    tokenize,
)

PROMPTS = ["a sks dog", "", "A photo of a Dog, in the rain! " + "word " * 90]  # the last is cut to 77 tokens


def encoders_of(pipeline: StableDiffusionXLPipeline) -> tuple[nn.Module, nn.Module]:
    return pipeline.text_encoder, pipeline.text_encoder_2


def tokenizers_of(pipeline: StableDiffusionXLPipeline) -> tuple:
    return pipeline.tokenizer, pipeline.tokenizer_2


# --- prompts ---


@torch.no_grad()
def test_prompts_are_embedded_as_the_pipeline_does(tiny):
    expected, _, expected_pooled, _ = tiny.encode_prompt(
        PROMPTS, device=torch.device("cpu"), do_classifier_free_guidance=False
    )
    ids = tokenize(tokenizers_of(tiny), PROMPTS)
    assert ids.shape == (3, 2, 77)
    hidden, pooled = embed_prompts(encoders_of(tiny), ids)
    assert torch.equal(hidden, expected)
    assert torch.equal(pooled, expected_pooled)
    assert len({tuple(row.tolist()) for row in pooled}) == 3


@torch.no_grad()
def test_embedded_and_tokenized_prompts_say_the_same(tiny):
    sizes = torch.zeros(4, 6)
    asked = [PROMPTS[2], PROMPTS[0], PROMPTS[1], PROMPTS[0]]  # any order, any number of times
    embedded = EmbeddedPrompts(PROMPTS, tokenizers_of(tiny), encoders_of(tiny)).conditioning(asked, sizes)
    tokens = TokenizedPrompts(PROMPTS, tokenizers_of(tiny)).conditioning(asked, sizes)
    assert tokens.prompt_embeds is None and embedded.token_ids is None
    for row in range(4):  # one at a time: a batch of another size may round differently
        hidden, pooled = embed_prompts(encoders_of(tiny), tokens.token_ids[row : row + 1])
        assert torch.equal(embedded.prompt_embeds[row], hidden[0])
        assert torch.equal(embedded.pooled_prompt_embeds[row], pooled[0])


# --- micro-conditioning ---


def test_time_ids_are_the_pipelines(tiny):
    """(original height, width), (crop top, left), (target height, width)."""
    ids = time_ids((480, 640), (16, 96), (512, 256))
    expected = tiny._get_add_time_ids((480, 640), (16, 96), (512, 256), torch.float32, text_encoder_projection_dim=32)
    assert torch.equal(ids[None], expected)
    assert ids.tolist() == [480, 640, 16, 96, 512, 256]


def test_each_row_of_a_batch_tells_its_own_size_and_corner(build):
    """Of the four pictures (width x height) 64 x 64, 96 x 64, 64 x 80, 72 x 72, at 64 px from the centre."""
    run = build(train_batch_size=4)
    told = {tuple(row.tolist()) for row in run.batches(0)[0].conditioning.time_ids}
    assert told == {
        (64, 64, 0, 0, 64, 64),
        (64, 96, 0, 16, 64, 64),
        (80, 64, 8, 0, 64, 64),
        (72, 72, 0, 0, 64, 64),
    }


@torch.no_grad()
def test_the_unet_is_asked_as_the_pipeline_asks_it(tiny):
    """From tokens or from embeddings, for all rows or for some of them."""
    draw = torch.Generator().manual_seed(0)
    latents, timesteps = torch.randn(3, 4, 8, 8, generator=draw), torch.tensor([20, 500, 801])
    sizes = torch.stack([time_ids((64, 64 + 8 * n), (0, 4 * n), (64, 64)) for n in range(3)])
    ids = tokenize(tokenizers_of(tiny), PROMPTS)
    hidden, pooled = embed_prompts(encoders_of(tiny), ids)
    models = {"unet": tiny.unet, "text_encoder": tiny.text_encoder, "text_encoder_2": tiny.text_encoder_2}
    known = {"text_embeds": pooled, "time_ids": sizes}
    expected = tiny.unet(latents, timesteps, encoder_hidden_states=hidden, added_cond_kwargs=known).sample
    assert torch.equal(denoise(models, latents, timesteps, Conditioning(sizes, hidden, pooled)), expected)
    assert torch.equal(denoise(models, latents, timesteps, Conditioning(sizes, token_ids=ids)), expected)
    rows = slice(1, 3)
    some = denoise(models, latents[rows], timesteps[rows], Conditioning(sizes, token_ids=ids)[rows])
    assert torch.allclose(some, expected[rows], atol=1e-5)
    other = denoise(models, latents, timesteps, Conditioning(sizes.flip(0), hidden, pooled))
    assert not torch.allclose(other, expected, atol=1e-4)  # the sizes are heard


# --- latents ---


def test_cached_latents_are_those_of_the_pictures(build, tiny):
    """Flipped and not, instance and class: the cache gives what the VAE gives in every step, to the last bit."""
    run = build(random_flip=True, with_prior_preservation=True)
    dataset = run.parts.dataset
    vae = copy.deepcopy(tiny.vae)
    cached = run.parts.make_batch.latents
    assert isinstance(cached, CachedLatents)
    assert len(cached.kept) == 2 * (4 + 3)
    assert not dataset.decode  # no file is opened any more
    dataset.decode = True
    vae.enable_slicing()
    encoded = EncodedLatents(dataset, vae)
    rows = [row for draw in range(6) for row in dataset[draw]]
    assert {row.flipped for row in rows} == {row.is_class for row in rows} == {False, True}
    for one, other in zip(cached.moments(rows), encoded.moments(rows), strict=True):
        assert torch.equal(one.mean, other.mean)
        assert torch.equal(one.std, other.std)


@pytest.mark.parametrize("cache", [True, False])
def test_latents_do_not_depend_on_the_cache(build, cache):
    reference, run = build("lora").batches(1)[0], build("lora", cache_latents=cache)
    assert isinstance(run.parts.make_batch.latents, CachedLatents if cache else EncodedLatents)
    assert torch.equal(run.batches(1)[0].latents, reference.latents)


def test_a_picture_is_sampled_anew_each_time_it_is_seen(build):
    run = build("lora", train_batch_size=4)
    first, second = run.batches(0)[0], run.batches(1)[0]
    names = [[row.picture for row in run.parts.dataset.describe(draw)] for draw in range(8)]
    again = names.index(names[0], 4)
    one, other = first.latents[0], second.latents[again - 4]
    std = run.parts.make_batch.latents.moments(run.parts.dataset.describe(0))[0].std
    scale = run.parts.make_batch.latents.vae_config.scaling_factor
    assert not torch.equal(one, other)
    assert ((one - other).abs() < 8 * std * scale).all()  # the same picture, up to the VAE's own variance


@torch.no_grad()
def test_latents_are_samples_of_the_posterior_as_the_unet_expects_them(tiny):
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    posterior = tiny.vae.encode(pixels).latent_dist
    moments = encode_images(tiny.vae, pixels)
    assert torch.equal(moments.mean, posterior.mean) and torch.equal(moments.std, posterior.std)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    latents = latents_from(moments, tiny.vae.config, noise)
    expected = posterior.sample(torch.Generator().manual_seed(1)) * tiny.vae.config.scaling_factor
    assert torch.allclose(latents, expected, rtol=1e-6, atol=1e-7)


def test_a_vae_that_tells_its_latents_mean_and_deviation():
    """Playground v2.5's: the inverse of what the pipeline does before it decodes."""
    config = SimpleNamespace(scaling_factor=0.5, latents_mean=[1.0, -2.0], latents_std=[5.0, 10.0])
    mean = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0))
    latents = latents_from(Moments(mean, torch.zeros(2, 3, 3)), config, torch.ones(2, 3, 3))
    back = latents * torch.tensor([5.0, 10.0]).view(2, 1, 1) / 0.5 + torch.tensor([1.0, -2.0]).view(2, 1, 1)
    assert torch.allclose(back, mean, atol=1e-6)


@pytest.mark.parametrize("source", [CachedLatents, EncodedLatents])
def test_a_vae_that_overflows_is_told_with_the_picture(build, tiny, source):
    dataset = build("lora", cache_latents=False).parts.dataset
    vae = copy.deepcopy(tiny.vae)
    vae.quant_conv.bias.data.fill_(float("inf"))
    with pytest.raises(UserError, match=r"non-finite latents for \d\.png"):
        source(dataset, vae).moments(dataset[0])


# --- what is freed ---

HEAVY = (AutoencoderKL, UNet2DConditionModel, CLIPTextModel, CLIPTextModelWithProjection)


def alive() -> Counter:
    gc.collect()
    return Counter(type(thing).__name__ for thing in gc.get_objects() if isinstance(thing, HEAVY))


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        ({}, {}),
        ({"center_crop": False, "crops_per_image": 2}, {}),
        ({"center_crop": False}, {"AutoencoderKL": 1}),
        ({"cache_latents": False}, {"AutoencoderKL": 1}),
        ({"validation_prompt": "a cat"}, {}),
        # transformers 5 builds text encoder 2 around a CLIPTextModel of its own.
        ({"train_text_encoder": True}, {"CLIPTextModel": 2, "CLIPTextModelWithProjection": 1}),
    ],
    ids=["all cached", "a few crops", "crops anew", "latents not cached", "with previews", "text encoders trained"],
)
def test_what_a_run_does_not_need_any_more_is_freed(build, flags, kept):
    before = alive()
    run = build(**flags)
    kept = Counter({"UNet2DConditionModel": 1, **kept})
    assert alive() - before == kept
    run.train(1)
    assert alive() - before == kept


def test_the_unet_comes_when_the_others_have_gone(build, monkeypatch):
    """The peak of memory: text encoders and VAE, 2 GB in bf16, are not held beside the UNet while it is loaded."""
    before, seen = alive(), []
    load = assembly._load_unet

    def watched(*arguments) -> nn.Module:
        seen.append(alive() - before)
        return load(*arguments)

    monkeypatch.setattr(assembly, "_load_unet", watched)
    build()
    assert seen == [Counter()]


def test_trained_text_encoders_get_their_gradient_through_the_unet(build):
    run = build("lora", train_text_encoder=True)
    run.parts.method.accumulate(run.micro_batches())

    def size(part: str) -> Tensor:
        return sum(p.grad.norm() for p in run.parts.models[part].parameters() if p.grad is not None)

    assert size("text_encoder") > 0 and size("text_encoder_2") > 0
