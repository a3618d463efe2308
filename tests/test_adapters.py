"""The two adapters of every projection: where they sit, how they start, their norm, and switching one off."""

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from bilora_diffusion.adapters import (
    AUXILIARY,
    PRIMARY,
    TARGETS,
    LowRank,
    adapted_layers,
    add_adapter,
    auxiliary_off,
    low_rank_layers,
    parameters_of,
    product_norm,
    weight_norms,
)
from bilora_diffusion.errors import UserError

PARTS = tuple(TARGETS)
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture
def part(tiny: StableDiffusionXLPipeline) -> Callable[..., nn.Module]:
    """A copy of a part of the tiny base, with the adapters that are asked for; in the UNet on a few layers only."""

    def make(name: str, *adapters: str, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
        model = copy.deepcopy(getattr(tiny, name))
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        for adapter in adapters:
            dora = options.get("use_dora", False) and adapter == PRIMARY
            settings = {"rank": 4, "scale": 2.0, "init": "gaussian", "seed": 0} | options | {"use_dora": dora}
            settings.setdefault("targets", ["to_q"] if name == "unet" else None)
            add_adapter(name, model, adapter, **settings)
        return model

    return make


def output(model: nn.Module, autocast: torch.dtype | None = None) -> Tensor:
    """The UNet's or a text encoder's answer to fixed inputs."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad(), torch.autocast("cpu", autocast) if autocast else nullcontext():
        if not hasattr(model, "conv_in"):
            ids = torch.randint(1, 50, (2, 77), generator=draw)
            return model(ids, output_hidden_states=True).hidden_states[-2]
        dtype = model.conv_in.weight.dtype
        latents, embeds, pooled = (
            torch.randn(shape, generator=draw).to(dtype) for shape in ((2, 4, 8, 8), (2, 77, 64), (2, 32))
        )
        sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(2, 1)
        known = {"text_embeds": pooled, "time_ids": sizes}
        return model(latents, torch.tensor([20, 801]), encoder_hidden_states=embeds, added_cond_kwargs=known).sample


def give_values(model: nn.Module, adapter: str, size: float = 0.1) -> None:
    draw = torch.Generator().manual_seed(len(adapter))
    for layer in low_rank_layers({"unet": model}, adapter):
        layer.B.data = size * torch.randn(layer.B.shape, generator=draw)


# --- where they sit ---


@pytest.mark.parametrize("name", PARTS)
def test_every_attention_projection_gets_both_adapters(part, name):
    wanted = {
        path
        for path, module in part(name).named_modules()
        if isinstance(module, nn.Linear) and path.endswith(TARGETS[name])
    }
    layers = dict(adapted_layers(part(name, PRIMARY, AUXILIARY, targets=None)))
    assert len(wanted) > 10
    assert set(layers) == wanted
    for layer in layers.values():
        assert layer.active_adapters == [PRIMARY, AUXILIARY]
        assert set(layer.lora_A) == set(layer.lora_B) == {PRIMARY, AUXILIARY}
        assert layer.scaling == {PRIMARY: 2.0, AUXILIARY: 2.0}


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_trainable_parameters_are_exactly_the_two_adapters(part, use_dora):
    unet = part("unet", PRIMARY, AUXILIARY, use_dora=use_dora)
    primary, auxiliary = parameters_of(unet, PRIMARY), parameters_of(unet, AUXILIARY)
    trainable = {id(parameter) for parameter in unet.parameters() if parameter.requires_grad}
    assert trainable == {id(parameter) for parameter in [*primary.values(), *auxiliary.values()]}
    assert len(primary) + len(auxiliary) == len(trainable)
    factors = {name for name in primary if "magnitude" not in name}
    assert factors == set(auxiliary)  # the same names, the adapter's own taken out
    assert (len(primary) > len(factors)) == use_dora
    assert not any(PRIMARY in name.split(".") for name in primary)


def test_a_rank_and_a_scale_make_an_alpha(part):
    unet = part("unet", PRIMARY, AUXILIARY, rank=3, scale=8 / 3)
    assert unet.peft_config[PRIMARY].lora_alpha == 8
    assert isinstance(unet.peft_config[PRIMARY].lora_alpha, int)
    assert all(layer.scale == pytest.approx(8 / 3) for layer in low_rank_layers({"unet": unet}, AUXILIARY))
    assert part("unet", PRIMARY, rank=4, scale=0.3).peft_config[PRIMARY].lora_alpha == pytest.approx(1.2)


def test_a_target_that_names_no_module_is_refused(part):
    with pytest.raises(UserError, match="no module of the unet is called 'to_nothing'"):
        part("unet", PRIMARY, targets=["to_q", "to_nothing"])
    with pytest.raises(UserError, match="'o_q'"):  # the end of a name, but not a name
        part("unet", PRIMARY, targets=["o_q"])


# --- how they start ---


def start(model: nn.Module, adapter: str = PRIMARY) -> Tensor:
    return torch.cat([layer.A.detach().flatten() for layer in low_rank_layers({"unet": model}, adapter)])


def test_the_start_depends_on_seed_part_and_adapter_alone(part):
    alone = start(part("text_encoder", PRIMARY))
    assert torch.equal(alone, start(part("text_encoder", PRIMARY, AUXILIARY)))
    assert torch.equal(alone, start(part("text_encoder", AUXILIARY, PRIMARY)))
    for dtype in HALVES:
        assert torch.equal(alone, start(part("text_encoder", PRIMARY, dtype=dtype)))
    assert not torch.equal(alone, start(part("text_encoder_2", PRIMARY)))
    assert not torch.equal(alone, start(part("text_encoder", PRIMARY, seed=1)))
    assert not torch.equal(alone, start(part("text_encoder", AUXILIARY), AUXILIARY))


def test_adding_adapters_leaves_the_global_random_state(part):
    before = torch.get_rng_state()
    part("unet", PRIMARY, AUXILIARY)
    assert torch.equal(before, torch.get_rng_state())


def test_the_start_has_the_distribution_that_was_asked_for(part):
    gaussian = low_rank_layers({"unet": part("unet", PRIMARY, rank=8, init="gaussian")}, PRIMARY)
    values = torch.cat([layer.A.flatten() for layer in gaussian])
    assert values.std().item() == pytest.approx(1 / 8, rel=0.02)
    kaiming = low_rank_layers({"unet": part("unet", PRIMARY, rank=8, init="kaiming")}, PRIMARY)
    values = torch.cat([(layer.A * math.sqrt(layer.A.shape[1])).flatten() for layer in kaiming])
    assert values.std().item() == pytest.approx(1 / math.sqrt(3), rel=0.02)
    assert values.abs().max() <= 1  # uniform on +-1 / sqrt(in)
    assert all((layer.B == 0).all() for layer in [*gaussian, *kaiming])


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_adapters_are_float32_and_fresh_ones_change_nothing(part, dtype, use_dora):
    """A DoRA too: with its magnitude rounded to bfloat16 it changed the output by 1.6 %."""
    bare = part("unet", dtype=dtype)
    autocast = None if dtype == torch.float32 else dtype
    unet = part("unet", PRIMARY, AUXILIARY, dtype=dtype, use_dora=use_dora)
    adapters = parameters_of(unet, PRIMARY) | {f"aux.{n}": p for n, p in parameters_of(unet, AUXILIARY).items()}
    assert all(parameter.dtype == torch.float32 for parameter in adapters.values())
    base = [p for name, p in unet.named_parameters() if not {PRIMARY, AUXILIARY} & set(name.split("."))]
    assert all(parameter.dtype == dtype and not parameter.requires_grad for parameter in base)
    assert torch.equal(output(bare, autocast), output(unet, autocast))


# --- what they compute ---


def test_low_rank_layers_are_the_perturbation_that_the_model_computes(part):
    unet = part("unet", PRIMARY, AUXILIARY, rank=3, targets=["to_k", "conv1"])
    give_values(unet, AUXILIARY)
    layers = low_rank_layers({"unet": unet}, AUXILIARY)
    live = dict(adapted_layers(unet))
    assert [layer.name for layer in layers] == list(live)
    assert {layer.A.ndim for layer in layers} == {2, 4}
    for layer in layers:
        dense = layer.scale * (layer.B.flatten(1) @ layer.A.flatten(1))
        expected = live[layer.name].get_delta_weight(AUXILIARY)
        assert torch.allclose(dense.view(expected.shape), expected, atol=1e-7)


def test_a_plain_auxiliary_adds_to_a_primary_dora(part):
    """W = m (W0 + s B1 A1) / ||W0 + s B1 A1|| + s B2 A2: the perturbation is outside of the norm."""
    unet = part("unet", PRIMARY, AUXILIARY, use_dora=True, targets=["to_q"])
    give_values(unet, PRIMARY)
    give_values(unet, AUXILIARY)
    _, layer = next(adapted_layers(unet))
    magnitude = layer.lora_magnitude_vector[PRIMARY].weight.data
    magnitude *= torch.linspace(0.8, 1.2, len(magnitude))
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
    delta_1, delta_2 = (
        layer.scaling[name] * layer.lora_B[name].weight @ layer.lora_A[name].weight for name in (PRIMARY, AUXILIARY)
    )
    direction = layer.weight + delta_1
    W = magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True) + delta_2
    assert delta_2.norm() > 0.1
    assert torch.allclose(layer(x), x @ W.T, atol=1e-5)


# --- their size ---


def dense_norm(layers: list[LowRank]) -> float:
    products = (layer.scale * layer.B.double().flatten(1) @ layer.A.double().flatten(1) for layer in layers)
    return math.sqrt(sum(product.square().sum().item() for product in products))


def test_the_norm_of_the_products_is_the_dense_norm():
    draw = torch.Generator().manual_seed(0)
    shapes = [((3, 7), (5, 3), 1.0), ((3, 7), (5, 3), 0.5), ((2, 9), (4, 2), 2.0)]
    shapes += [((3, 4, 3, 3), (6, 3, 1, 1), 1.5), ((3, 4, 3, 3), (6, 3, 1, 1), 1e-3), ((1, 8), (8, 1), 3.0)]
    layers = [
        LowRank(
            "unet",
            str(number),
            nn.Parameter(torch.randn(A, generator=draw)),
            nn.Parameter(10 ** (-number) * torch.randn(B, generator=draw)),
            scale,
        )
        for number, (A, B, scale) in enumerate(shapes)
    ]
    norm = product_norm(layers)
    assert norm.dtype == torch.float64
    assert not norm.requires_grad
    assert norm.item() == pytest.approx(dense_norm(layers), rel=1e-12)
    for layer in layers:  # a small layer beside a large one: each counts with its own scale
        assert product_norm([layer]).item() == pytest.approx(dense_norm([layer]), rel=1e-12)


def test_the_norm_of_a_whole_model(part):
    unet = part("unet", PRIMARY, AUXILIARY)
    give_values(unet, AUXILIARY)
    layers = low_rank_layers({"unet": unet}, AUXILIARY)
    assert product_norm(layers).item() == pytest.approx(dense_norm(layers), rel=1e-12)
    assert product_norm(low_rank_layers({"unet": unet}, PRIMARY)).item() == 0


def test_the_size_of_the_weights(part):
    models = {"unet": part("unet", PRIMARY, targets=["to_k", "conv1"]), "text_encoder": part("text_encoder", PRIMARY)}
    norm, spectral = weight_norms(models)
    values = [
        torch.linalg.svdvals(layer.get_base_layer().weight.double().flatten(1))
        for model in models.values()
        for _, layer in adapted_layers(model)
    ]
    assert norm == pytest.approx(math.sqrt(sum(value.square().sum().item() for value in values)), rel=1e-6)
    assert spectral == pytest.approx(math.sqrt(sum(value.square().mean().item() for value in values)), rel=1e-6)


# --- switching the auxiliary off ---


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_the_auxiliary_the_model_is_one_that_never_had_it(part, name, dtype):
    alone, both = part(name, PRIMARY, dtype=dtype), part(name, PRIMARY, AUXILIARY, dtype=dtype, rank=4)
    give_values(alone, PRIMARY)
    give_values(both, PRIMARY)
    give_values(both, AUXILIARY)
    perturbed = output(both)
    with auxiliary_off([both]):
        assert torch.equal(output(alone), output(both))
    assert not torch.equal(output(alone), perturbed)
    assert torch.equal(output(both), perturbed)


def test_the_auxiliary_comes_back_as_it_was(part):
    unet = part("unet", PRIMARY, AUXILIARY, rank=3, scale=8 / 3)
    give_values(unet, AUXILIARY)

    def state():
        return [
            (dict(layer.scaling), layer.active_adapters, [p.requires_grad for p in layer.parameters()])
            for _, layer in adapted_layers(unet)
        ]

    before, answer = state(), output(unet)
    with pytest.raises(KeyError), auxiliary_off([unet]):
        assert all(scaling[AUXILIARY] == 0 and scaling[PRIMARY] != 0 for scaling, _, _ in state())
        assert [rest for _, *rest in state()] == [rest for _, *rest in before]
        raise KeyError
    assert state() == before
    assert torch.equal(output(unet), answer)


def test_switching_off_may_be_nested(part):
    unet = part("unet", PRIMARY, AUXILIARY)
    give_values(unet, AUXILIARY)
    perturbed = output(unet)
    with auxiliary_off([unet]):
        clean = output(unet)
        with auxiliary_off([unet]):
            assert torch.equal(output(unet), clean)
        assert torch.equal(output(unet), clean)
    assert torch.equal(output(unet), perturbed)


def test_switching_off_what_is_not_there_does_nothing(part):
    unet = part("unet", PRIMARY)
    give_values(unet, PRIMARY)
    answer = output(unet)
    with auxiliary_off([unet]):
        assert torch.equal(output(unet), answer)
