"""The noise on the weights: its size, and that reading it from one table leaves nothing alike."""

import itertools
import math

import pytest
import torch
from tiny_run import Builder, TinyRun
from torch import Tensor

from bilora_diffusion.adapters import adapted_layers
from bilora_diffusion.methods import weight_noise
from bilora_diffusion.methods.row_norms import base_weight
from bilora_diffusion.methods.weight_noise import WeightNoise, table_length

SIGMA = 0.3
LAYERS = {"lora_layers": "to_k,to_q"}


def drawn(run: TinyRun, noise: WeightNoise, step: int) -> list[Tensor]:
    """N of each layer."""
    with noise.on(step, SIGMA):
        return [layer.perturbation.whole() for _, layer in adapted_layers(run.parts.models["unet"])]


@pytest.fixture
def run(build: Builder) -> TinyRun:
    return build("lora", **LAYERS)


def test_its_norm_is_a_share_of_each_rows(run: TinyRun) -> None:
    noise = WeightNoise(run.parts.models, seed=0)
    of_steps = [drawn(run, noise, step) for step in range(8)]
    for number, (_, layer) in enumerate(adapted_layers(run.parts.models["unet"])):
        rows = torch.stack([step[number].norm(dim=1) for step in of_steps]).square().mean(0).sqrt()
        inputs = of_steps[0][number].shape[1]
        expected = SIGMA * base_weight(layer).norm(dim=1)  # B is zero at the start
        torch.testing.assert_close(rows, expected, rtol=5 / math.sqrt(2 * 8 * inputs), atol=0)


def test_no_two_steps_layers_or_seeds_have_the_same(run: TinyRun) -> None:
    noise, other = (WeightNoise(run.parts.models, seed) for seed in (0, 1))
    found = [one for step in (0, 1) for one in drawn(run, noise, step)] + drawn(run, other, 0)
    for one, two in itertools.combinations([one.flatten() for one in found], 2):
        n = min(len(one), len(two))
        assert abs(torch.corrcoef(torch.stack([one[:n], two[:n]]))[0, 1]) < 6 / math.sqrt(n)
    again = drawn(run, WeightNoise(run.parts.models, seed=0), 1)
    assert all(torch.equal(one, two) for one, two in zip(again, drawn(run, noise, 1), strict=True))


def test_it_is_normal_and_reaches_the_whole_table(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_noise, "PLACES", 16)
    noise = WeightNoise(run.parts.models, seed=0)
    layers = noise._layers
    largest = max(one.size for _, one in layers)
    assert len(layers[0][1].table) == table_length(largest) == 16 * weight_noise.STRIDE + largest
    offsets = set()
    for step in range(200):
        with noise.on(step, SIGMA):
            perturbation = layers[0][1].layer.perturbation
            offsets.add(perturbation.offset)
            assert torch.isfinite(perturbation.whole()).all()
    assert offsets == {place * weight_noise.STRIDE for place in range(16)}
    table = layers[0][1].table
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        values = table.double() ** power
        assert abs(values.mean() - moment) < 5 * values.std() / math.sqrt(len(table))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_those_with_the_sum(run: TinyRun, dtype: torch.dtype) -> None:
    """In half precision too, where the table and the deviations are rounded as the weights are."""
    unet = run.parts.models["unet"]
    for _, layer in adapted_layers(unet):
        layer.get_base_layer().to(dtype)
    noise = WeightNoise({"unet": unet}, seed=0)
    random = torch.Generator().manual_seed(0)
    with noise.on(3, SIGMA):
        for _, layer in adapted_layers(unet):
            weight, bias = layer.get_base_layer().weight.detach(), layer.get_base_layer().bias
            perturbation = layer.perturbation
            assert perturbation.table.dtype == dtype
            whole = weight.double() + perturbation.whole().double()
            x = torch.randn(5, weight.shape[1], generator=random).to(dtype)
            g = torch.randn(5, weight.shape[0], generator=random).to(dtype)
            near = {"rtol": 0, "atol": 30 * torch.finfo(dtype).eps}
            y = perturbation.linear(x, weight, bias)
            expected = x.double() @ whole.mT + (0 if bias is None else bias.double())
            assert y.dtype == dtype
            torch.testing.assert_close(y.double(), expected, **near)
            torch.testing.assert_close(perturbation.backward(g, weight).double(), g.double() @ whole, **near)
