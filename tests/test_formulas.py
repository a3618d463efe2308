"""Every method beside its description, written out here in float64 with dense matrices, on a small network."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from stack import Stack, StackBatch
from torch import Tensor, nn

from bilora_diffusion.adapters import AUXILIARY, PRIMARY, add_adapter, low_rank_layers, parameters_of
from bilora_diffusion.methods.ascent import OptimizerAscent
from bilora_diffusion.methods.balancedness import Balancedness
from bilora_diffusion.methods.bilora import BiLoRA
from bilora_diffusion.methods.bilora_echo import BiLoRAEcho
from bilora_diffusion.methods.bilora_fresh import BiLoRAFresh, orthonormal_rows
from bilora_diffusion.methods.combined import Combined
from bilora_diffusion.methods.dual_lora import DualLoRA
from bilora_diffusion.methods.eflat_lora import EFlatLoRA
from bilora_diffusion.methods.flat_lora import FlatLoRA
from bilora_diffusion.methods.gradient_sketch import GradientSketch
from bilora_diffusion.methods.interface import Method
from bilora_diffusion.methods.looksam import LookSAM
from bilora_diffusion.methods.lora_sam import LoRASAM
from bilora_diffusion.methods.rwp_lora import RWPLoRA
from bilora_diffusion.methods.s2_sam import S2SAM
from bilora_diffusion.methods.weight_noise import WeightNoise
from bilora_diffusion.randomness import generator, stream_seed
from bilora_diffusion.training import Trainer

RANK, AUXILIARY_RANK, SCALE, RATE, STEPS, MICRO = 3, 2, 2.0, 0.05, 8, 2
SEED = 5

Factors = list[list[Tensor]]
"""[A, B] of each layer."""
Gradient = Callable[[Sequence[Tensor], slice], list[Tensor]]
"""dL/dW of each layer at given weights, over some of the step's micro-batches."""
WHOLE = slice(None)


class Experiment:
    """The network, its draws, and two trainings of it: the package's and a transcript's."""

    def __init__(self) -> None:
        self.stack = Stack()
        self.models: dict[str, nn.Module] = {"unet": self.stack}
        self.add(PRIMARY, RANK)
        draw = torch.Generator().manual_seed(1)
        self.x = torch.randn(STEPS, MICRO, 8, 6, generator=draw, dtype=torch.float64)
        self.y = torch.rand(STEPS, MICRO, 8, 4, generator=draw, dtype=torch.float64)
        self.primary = list(parameters_of(self.stack, PRIMARY).values())
        self.layers = low_rank_layers(self.models, PRIMARY)
        self.weights = [layer.get_base_layer().weight.detach() for layer in self.stack.layers]
        for layer in self.layers:  # away from zero: a method may treat a B of zeros in a way of its own
            layer.B.data = 0.3 * torch.randn(layer.B.shape, generator=draw, dtype=torch.float64)
        self.start: Factors = [[layer.A.detach().clone(), layer.B.detach().clone()] for layer in self.layers]

    def add(self, adapter: str, rank: int) -> None:
        targets = ["layers.0", "layers.1", "layers.2"]
        add_adapter("unet", self.stack, adapter, rank=rank, scale=SCALE, init="kaiming", seed=0, targets=targets)
        for parameter in self.stack.parameters():
            parameter.data = parameter.data.double()

    def gradients(self, step: int) -> Gradient:
        def of(weights: Sequence[Tensor], micro: slice = WHOLE) -> list[Tensor]:
            leaves = [w.detach().requires_grad_() for w in weights]
            rows = list(zip(self.x[step][micro], self.y[step][micro], strict=True))
            loss = sum((self.stack(x, leaves) - y).square().mean() for x, y in rows) / len(rows)
            return list(torch.autograd.grad(loss, leaves))

        return of

    def merged(self, factors: Factors) -> list[Tensor]:
        return [W + SCALE * B @ A for W, (A, B) in zip(self.weights, factors, strict=True)]

    def factor_gradients(self, factors: Factors, step: int, micro: slice = WHOLE) -> Factors:
        """[dL/dA, dL/dB] of each layer."""
        dense = self.gradients(step)(self.merged(factors), micro)
        return chain(dense, factors)

    def train(self, method: Method, steps: int = STEPS, repeats: int = 1) -> Trainer:
        """Every step but each `repeats`-th is said to repeat the rows of the one before."""
        optimizer = torch.optim.SGD(self.primary, lr=RATE)
        trainer = Trainer(
            self.models,
            None,
            {"unet": self.primary},
            optimizer,
            method,
            [],
            compute_dtype=torch.float32,
            max_grad_norm=0,
            seed=0,
        )
        for step in range(steps):
            batches = [
                StackBatch(self.stack, self.x[step, m], self.y[step, m], 1 / MICRO, is_repeat=step % repeats > 0)
                for m in range(MICRO)
            ]
            assert trainer.training_step(batches, step).applied
        return trainer

    def same(self, expected: Factors, tolerance: float = 1e-9) -> None:
        """The trained factors are the transcript's, as a share of what training changed, and something changed."""
        for layer, factors, began in zip(self.layers, expected, self.start, strict=True):
            for ours, theirs, start in zip((layer.A, layer.B), factors, began, strict=True):
                change = (theirs - start).norm()
                assert change > 0
                assert (ours.detach() - theirs).norm() < tolerance * change

    def differs(self, expected: Factors) -> bool:
        pairs = zip(self.layers, expected, self.start, strict=True)
        return all((layer.B.detach() - B).norm() > 1e-4 * (B - began[1]).norm() for layer, (_, B), began in pairs)


def chain(dense: Sequence[Tensor], factors: Factors) -> Factors:
    return [[SCALE * B.T @ G, SCALE * G @ A.T] for G, (A, B) in zip(dense, factors, strict=True)]


def descend(factors: Factors, gradients: Factors) -> Factors:
    return moved(factors, gradients, -RATE)


def moved(factors: Factors, by: Factors, size: float) -> Factors:
    return [[f + size * d for f, d in zip(one, other, strict=True)] for one, other in zip(factors, by, strict=True)]


def norm(factors: Factors) -> float:
    return math.sqrt(sum(f.square().sum().item() for layer in factors for f in layer))


def inner(one: Factors, other: Factors) -> float:
    return sum((a * b).sum().item() for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def lora(experiment: Experiment) -> Factors:
    theta = experiment.start
    for step in range(STEPS):
        theta = descend(theta, experiment.factor_gradients(theta, step))
    return theta


def test_lora():
    experiment = Experiment()
    experiment.train(Method())
    experiment.same(lora(experiment))


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_lora_sam(share):
    """With half of the rows the direction comes from the first of the two micro-batches."""
    experiment, rho = Experiment(), 0.3
    theta = experiment.start
    for step in range(STEPS):
        g = experiment.factor_gradients(theta, step, WHOLE if share == 1 else slice(0, 1))
        climbed = moved(theta, g, rho / norm(g))
        theta = descend(theta, experiment.factor_gradients(climbed, step))
    experiment.train(LoRASAM(experiment.primary, rho, share))
    experiment.same(theta)
    assert experiment.differs(lora(experiment))


def test_s2_sam():
    experiment, rho = Experiment(), 0.3
    theta, before = experiment.start, None
    for step in range(STEPS):
        climbed = theta if before is None else moved(theta, before, rho / norm(before))
        before = experiment.factor_gradients(climbed, step)
        theta = descend(theta, before)
    experiment.train(S2SAM(experiment.primary, rho))
    experiment.same(theta)


def test_looksam():
    experiment, rho, every, alpha = Experiment(), 0.3, 3, 0.7
    theta = experiment.start
    for step in range(STEPS):
        g = experiment.factor_gradients(theta, step)
        if step % every == 0:
            use = experiment.factor_gradients(moved(theta, g, rho / norm(g)), step)
            v = moved(use, g, -inner(use, g) / norm(g) ** 2)
        else:
            use = moved(g, v, alpha * norm(g) / norm(v))
        theta = descend(theta, use)
    experiment.train(LookSAM(experiment.primary, rho, every, alpha))
    experiment.same(theta)


def test_looksam_at_every_step_is_lora_sam():
    one, other = Experiment(), Experiment()
    one.train(LookSAM(one.primary, 0.3, 1, 0.7))
    other.train(LoRASAM(other.primary, 0.3))
    one.same([[layer.A.detach(), layer.B.detach()] for layer in other.layers])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_flat_lora(schedule):
    """The noise is read here again from a table of the same seed, and added to dense weights."""
    experiment, sigma = Experiment(), 0.4
    theta = experiment.start
    for step in range(STEPS):
        k = step / STEPS
        f = {"constant": 1.0, "linear": k, "cosine": 0.5 * (1 - math.cos(math.pi * k))}[schedule]
        W = experiment.merged(theta)
        noisy = [w + n for w, n in zip(W, row_noise(W, f * sigma, step), strict=True)]
        theta = descend(theta, chain(experiment.gradients(step)(noisy, WHOLE), theta))
    noise = WeightNoise(experiment.models, SEED)
    experiment.train(FlatLoRA(noise, sigma, schedule, STEPS))
    experiment.same(theta, 1e-6)  # the rows' norms are taken in float32
    assert experiment.differs(lora(experiment))


def row_noise(weights: Sequence[Tensor], sigma: float, step: int) -> list[Tensor]:
    """Flat-LoRA's: each row as long as sigma of the weight's own, in the mean."""
    largest = max(W.numel() for W in weights)
    table = torch.randn(8 * 2**19 + largest, generator=generator(SEED, "noise table")).double()
    noise = []
    for number, W in enumerate(weights):
        begin = 8 * (stream_seed(SEED, "weight noise", f"unet.layers.{number}", step) % 2**19)
        std = sigma / math.sqrt(W.shape[1]) * W.norm(dim=1, keepdim=True)
        noise.append(table[begin : begin + W.numel()].view(W.shape) * std)
    return noise


def test_bilora_fresh_with_noise_on_top():
    """The noise is on in both passes: the ascent's gradient is taken under it, too."""
    experiment, rho, sigma = Experiment(), 0.4, 0.4
    experiment.add(AUXILIARY, AUXILIARY_RANK)
    theta = experiment.start
    for step in range(STEPS):
        W = experiment.merged(theta)
        noisy = [w + n for w, n in zip(W, row_noise(W, sigma, step), strict=True)]
        cut = [strongest(G) for G in experiment.gradients(step)(noisy, WHOLE)]
        size = math.sqrt(sum(G.square().sum().item() for G in cut))
        moved = [w + rho / size * G for w, G in zip(noisy, cut, strict=True)]
        theta = descend(theta, chain(experiment.gradients(step)(moved, WHOLE), theta))
    layers = low_rank_layers(experiment.models, AUXILIARY)
    sketch = GradientSketch(experiment.models, AUXILIARY_RANK, SEED)
    fresh = BiLoRAFresh(layers, experiment.primary, rho, 1.0, 1, sketch)
    noise = FlatLoRA(WeightNoise(experiment.models, SEED), sigma, "constant", STEPS)
    experiment.train(Combined(fresh, noise))
    experiment.same(theta, 1e-6)  # the rows' norms are taken in float32
    assert experiment.differs(lora(experiment))


def test_bilora_with_noise_on_top():
    """The second adapter moves by the gradient at the sum of both, and stands in the next step."""
    experiment, rho, rate, sigma = Experiment(), 0.4, 0.3, 0.4
    experiment.add(AUXILIARY, AUXILIARY_RANK)
    layers = low_rank_layers(experiment.models, AUXILIARY)
    theta, second = experiment.start, [[layer.A.detach().clone(), layer.B.detach().clone()] for layer in layers]
    for step in range(STEPS):
        W = experiment.merged(theta)
        noise = row_noise(W, sigma, step)
        both = [w + n + SCALE * B @ A for w, n, (A, B) in zip(W, noise, second, strict=True)]
        dense = experiment.gradients(step)(both, WHOLE)
        g, h = chain(dense, theta), chain(dense, second)
        theta, second = descend(theta, g), moved(second, h, rate)
        c = math.sqrt(sum((SCALE * B @ A).square().sum().item() for A, B in second))
        second = [[math.sqrt(min(1, rho / c)) * f for f in layer] for layer in second]
    ascent = OptimizerAscent(
        torch.optim.SGD([f for layer in layers for f in (layer.A, layer.B)], lr=rate, maximize=True)
    )
    on_top = FlatLoRA(WeightNoise(experiment.models, SEED), sigma, "constant", STEPS)
    experiment.train(Combined(BiLoRA(layers, rho, ascent), on_top))
    experiment.same(theta, 1e-6)
    assert experiment.differs(lora(experiment))


def test_rwp_lora():
    experiment, sigma = Experiment(), 0.4
    theta = experiment.start
    for step in range(STEPS):
        random = torch.Generator().manual_seed(stream_seed(SEED, "factor noise", step))
        noise = [
            [torch.randn(f.shape, generator=random).double() * f.norm(dim=1, keepdim=True) / math.sqrt(f.shape[1])
             for f in layer]
            for layer in theta
        ]  # fmt: skip
        theta = descend(theta, experiment.factor_gradients(moved(theta, noise, sigma), step))
    experiment.train(RWPLoRA(experiment.primary, sigma, SEED))
    experiment.same(theta, 1e-6)


@pytest.mark.parametrize("from_zero", [False, True])
def test_eflat_lora(from_zero):
    """Eq. 12 and 15 with dense pseudo-inverses; from B = 0, where one of them is zero, as well."""
    experiment, rho, beta = Experiment(), 0.2, 0.6
    if from_zero:
        for layer, began in zip(experiment.layers, experiment.start, strict=True):
            layer.B.data.zero_()
            began[1] = torch.zeros_like(began[1])
    theta = experiment.start
    E = [torch.zeros_like(B) for _, B in theta]
    for step in range(STEPS):
        at = [[A, B + e] for (A, B), e in zip(theta, E, strict=True)]
        g = experiment.factor_gradients(at, step)
        for number, ((A, B), (gA, gB)) in enumerate(zip(at, g, strict=True)):
            gW = (gB @ torch.linalg.pinv(A.T) + torch.linalg.pinv(B.T) @ gA) / (2 * SCALE)
            EB = rho * gW / gW.norm() @ torch.linalg.pinv(A) / SCALE
            E[number] = (1 - beta) * E[number] + beta * EB
        theta = descend(theta, g)
    experiment.train(EFlatLoRA(experiment.layers, rho, beta))
    experiment.same(theta, 1e-5)  # the ridge under the inverse
    assert experiment.differs(lora(experiment))


@pytest.mark.parametrize("by_gradients", [False, True], ids=["obar", "nbar"])
def test_balancedness(by_gradients):
    experiment, strength, rate = Experiment(), 3.0, 0.02
    theta, signs = experiment.start, set()
    for step in range(STEPS):
        g = experiment.factor_gradients(theta, step)
        m = strength * (1 - step / STEPS) * rate
        scaled = []
        for (A, B), (gA, gB) in zip(theta, g, strict=True):
            larger = gA.norm() >= gB.norm() if by_gradients else A.norm() < B.norm()
            sign = 1 if larger else -1
            signs.add(sign)
            scaled.append([A * (1 + sign * m), B * (1 - sign * m)])
        theta = descend(scaled, g)
    method = Balancedness(experiment.layers, strength, "linear", STEPS, {"unet": rate}, by_gradients=by_gradients)
    experiment.train(method)
    experiment.same(theta, 1e-6)
    assert signs == {1, -1}  # both branches were taken


def test_dual_lora():
    """Both adapters descend by plain gradients; the second is held in its ball."""
    experiment, rho, rate = Experiment(), 0.4, 0.3
    experiment.add(AUXILIARY, AUXILIARY_RANK)
    layers = low_rank_layers(experiment.models, AUXILIARY)
    theta, second = experiment.start, [[layer.A.detach().clone(), layer.B.detach().clone()] for layer in layers]
    clipped = []
    for step in range(STEPS):
        W = [w + SCALE * B @ A for w, (A, B) in zip(experiment.merged(theta), second, strict=True)]
        dense = experiment.gradients(step)(W, WHOLE)
        g, h = chain(dense, theta), chain(dense, second)
        theta, second = descend(theta, g), moved(second, h, -rate)
        c = math.sqrt(sum((SCALE * B @ A).square().sum().item() for A, B in second))
        clipped.append(c > rho)
        second = [[math.sqrt(min(1, rho / c)) * f for f in layer] for layer in second]
    optimizer = torch.optim.SGD([f for layer in layers for f in (layer.A, layer.B)], lr=rate)
    experiment.train(DualLoRA(layers, rho, optimizer))
    experiment.same(theta, 1e-6)
    assert set(clipped) == {True, False}
    with pytest.raises(ValueError, match="maximize=False"):
        DualLoRA(layers, rho, torch.optim.SGD([layers[0].A], lr=rate, maximize=True))


@pytest.mark.parametrize("repeats", [2, 3])
def test_bilora_echo(repeats):
    """In a network so small the sketch is the whole gradient, cut to its strongest directions."""
    experiment, rho = Experiment(), 0.3
    experiment.add(AUXILIARY, AUXILIARY_RANK)
    theta, echo = experiment.start, None
    for step in range(STEPS):
        weights = experiment.merged(theta)
        if step % repeats:
            weights = [W + e for W, e in zip(weights, echo, strict=True)]
        dense = experiment.gradients(step)(weights)
        cut = [strongest(G) for G in dense]
        size = math.sqrt(sum(G.square().sum().item() for G in cut))
        echo = [rho / size * G for G in cut]
        theta = descend(theta, chain(dense, theta))
    layers = low_rank_layers(experiment.models, AUXILIARY)
    sketch = GradientSketch(experiment.models, AUXILIARY_RANK, SEED)
    experiment.train(BiLoRAEcho(experiment.models, layers, rho, sketch, repeats), repeats=repeats)
    experiment.same(theta)
    assert experiment.differs(lora(experiment))


@pytest.mark.parametrize(("share", "every"), [(1.0, 1), (0.5, 1), (1.0, 3)])
def test_bilora_fresh(share, every):
    experiment, rho = Experiment(), 0.4
    experiment.add(AUXILIARY, AUXILIARY_RANK)
    layers = low_rank_layers(experiment.models, AUXILIARY)
    method = BiLoRAFresh(layers, experiment.primary, rho, share, every)
    theta, rows = experiment.start, [layer.A.detach().clone() for layer in layers]
    for step in range(STEPS):
        W = experiment.merged(theta)
        if step % every:
            theta = descend(theta, chain(experiment.gradients(step)(W, WHOLE), theta))
            continue
        G = experiment.gradients(step)(W, WHOLE if share == 1 else slice(0, 1))
        C = [g @ a.T for g, a in zip(G, rows, strict=True)]  # s B2 up to its length
        size = math.sqrt(sum(c.square().sum().item() for c in C))
        B2 = [rho * c / size / SCALE for c in C]
        E = [SCALE * b @ a for b, a in zip(B2, rows, strict=True)]
        assert math.sqrt(sum(e.square().sum().item() for e in E)) == pytest.approx(rho, rel=1e-6)
        G = experiment.gradients(step)([w + e for w, e in zip(W, E, strict=True)], WHOLE)
        theta = descend(theta, chain(G, theta))
        rows = [torch.linalg.qr((SCALE * b.T @ g).T).Q.T for b, g in zip(B2, G, strict=True)]
    experiment.train(method)
    experiment.same(theta, 1e-5)  # the rows are made orthonormal in float32
    for layer, row in zip(layers, rows, strict=True):
        ours = layer.A.detach()
        assert torch.allclose(ours.T @ ours, row.T @ row, atol=1e-5)  # the same space
        assert torch.allclose(ours @ ours.T, torch.eye(AUXILIARY_RANK, dtype=ours.dtype), atol=1e-5)
        assert (layer.B == 0).all()
    assert experiment.differs(lora(experiment))


@pytest.mark.parametrize(("share", "every"), [(1.0, 1), (0.5, 1), (1.0, 3)])
def test_bilora_fresh_along_the_gradient(share, every):
    experiment, rho = Experiment(), 0.4
    experiment.add(AUXILIARY, AUXILIARY_RANK)
    layers = low_rank_layers(experiment.models, AUXILIARY)
    sketch = GradientSketch(experiment.models, AUXILIARY_RANK, SEED)
    method = BiLoRAFresh(layers, experiment.primary, rho, share, every, sketch)
    theta = experiment.start
    for step in range(STEPS):
        W = experiment.merged(theta)
        if step % every:
            theta = descend(theta, chain(experiment.gradients(step)(W, WHOLE), theta))
            continue
        cut = [strongest(G) for G in experiment.gradients(step)(W, WHOLE if share == 1 else slice(0, 1))]
        size = math.sqrt(sum(G.square().sum().item() for G in cut))
        moved = [w + rho / size * G for w, G in zip(W, cut, strict=True)]
        theta = descend(theta, chain(experiment.gradients(step)(moved, WHOLE), theta))
    experiment.train(method)
    experiment.same(theta)
    assert all((factor == 0).all() for layer in layers for factor in (layer.A, layer.B))
    assert experiment.differs(lora(experiment))


def strongest(G: Tensor) -> Tensor:
    """The best approximation of the auxiliary's rank."""
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    return (U[:, :AUXILIARY_RANK] * S[:AUXILIARY_RANK]) @ Vh[:AUXILIARY_RANK]


def test_rows_are_made_orthonormal_whatever_they_are():
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(3, 7, generator=draw)
    rows = orthonormal_rows(matrix)
    assert torch.allclose(rows @ rows.T, torch.eye(3), atol=1e-6)
    assert torch.allclose(matrix @ rows.T @ rows, matrix, atol=1e-5)
    for poor in (torch.zeros(3, 7), matrix[:1].expand(3, 7)):
        rows = orthonormal_rows(poor)
        assert torch.allclose(rows @ rows.T, torch.eye(3), atol=1e-5)
    kernels = orthonormal_rows(torch.randn(2, 3, 3, 3, generator=draw))
    assert kernels.shape == (2, 3, 3, 3) and torch.allclose(kernels.flatten(1).norm(dim=1), torch.ones(2))
    tall = orthonormal_rows(torch.randn(4, 2, generator=draw))
    assert torch.allclose(tall[:2] @ tall[:2].T, torch.eye(2), atol=1e-6) and (tall[2:] == 0).all()
