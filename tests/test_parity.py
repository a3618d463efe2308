"""The trainer beside transcriptions of what it implements, written out here from the sources.

Algorithm 1 of the paper in float64, SAM's gradient in closed form, and the step of the official diffusers recipe.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from stack import Stack, StackBatch
from tiny_run import difference
from torch import Tensor, nn

from bilora_diffusion.adapters import AUXILIARY, PRIMARY, adapted_layers, add_adapter, low_rank_layers, parameters_of
from bilora_diffusion.methods import BiLoRA, build_ascent
from bilora_diffusion.methods.lora_sam import LoRASAM
from bilora_diffusion.training import Trainer

RANK, AUXILIARY_RANK, SCALE = 3, 2, 2.0


# --- Algorithm 1, transcribed ---


@dataclass
class AdamW:
    """Loshchilov and Hutter, 2019, Algorithm 2, for one tensor; sign = -1 descends, +1 ascends."""

    rate: float
    sign: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decay: float = 0.0
    m: Tensor | float = 0.0
    v: Tensor | float = 0.0
    t: int = 0

    def __call__(self, x: Tensor, g: Tensor) -> Tensor:
        b1, b2 = self.betas
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g**2
        m, v = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
        return x * (1 - self.rate * self.decay) + self.sign * self.rate * m / (v.sqrt() + self.eps)


@dataclass
class SGD:
    rate: float
    sign: float

    def __call__(self, x: Tensor, g: Tensor) -> Tensor:
        return x + self.sign * self.rate * g


def algorithm_1(
    layers: list[dict[str, Tensor]],
    gradients: Callable[[list[Tensor], int], list[Tensor]],
    steps: int,
    rho: float,
    descent: Callable[[], Callable],
    ascent: Callable[[], Callable],
    length: float | None = None,
) -> list[float]:
    """K steps in float64, in place. Returns c / rho before each clip.

    Arguments:
        layers: W0, A1, B1, A2, B2 of each layer.
        gradients: dL/dW of every layer for the weights W of all of them, in a step.
        descent, ascent: give an update rule for one tensor.
        length: of the ascent's gradients taken together, as the first-order move of all s B2 A2; None: as they are.
    """
    rules = [{n: (descent if n.endswith("1") else ascent)() for n in ("A1", "B1", "A2", "B2")} for _ in layers]
    shares = []
    for step in range(steps):
        W = [x["W0"] + SCALE * x["B1"] @ x["A1"] + SCALE * x["B2"] @ x["A2"] for x in layers]
        found = []
        for x, G in zip(layers, gradients(W, step), strict=True):
            G = SCALE * G
            found.append({"B1": G @ x["A1"].T, "A1": x["B1"].T @ G, "B2": G @ x["A2"].T, "A2": x["B2"].T @ G})
        if length is not None:
            moves = [SCALE * (g["B2"] @ x["A2"] + x["B2"] @ g["A2"]) for x, g in zip(layers, found, strict=True)]
            eta = length / math.sqrt(sum(move.square().sum().item() for move in moves))
            found = [g | {"A2": eta * g["A2"], "B2": eta * g["B2"]} for g in found]
        for x, rule, g in zip(layers, rules, found, strict=True):
            x |= {name: rule[name](x[name], g[name]) for name in g}
        c = math.sqrt(sum((SCALE * x["B2"] @ x["A2"]).square().sum().item() for x in layers))
        shares.append(c / rho)
        for x in layers:
            x |= {name: x[name] * math.sqrt(min(1, rho / c)) for name in ("A2", "B2")}
    return shares


def compare(layers: list[dict[str, Tensor]], start: list[dict[str, Tensor]], models: dict[str, nn.Module]) -> float:
    """The largest relative difference of a kind of factor over all layers: of the primary in what training changed.

    Not all factors in one number: a wrong B2 would drown in the much larger A1.
    """
    factors = {"1": low_rank_layers(models, PRIMARY), "2": low_rank_layers(models, AUXILIARY)}
    worst = 0.0
    for name in ("A1", "B1", "A2", "B2"):
        ours = {str(i): getattr(layer, name[0]).detach().double() for i, layer in enumerate(factors[name[1]])}
        theirs, began = ({str(i): x[name] for i, x in enumerate(these)} for these in (layers, start))
        worst = max(worst, difference(theirs, ours, began))
    return worst


def transcript_of(models: dict[str, nn.Module]) -> list[dict[str, Tensor]]:
    """The layers as Algorithm 1 takes them."""
    pairs = zip(low_rank_layers(models, PRIMARY), low_rank_layers(models, AUXILIARY), strict=True)
    live = [layer for model in models.values() for _, layer in adapted_layers(model)]
    return [
        {
            "W0": layer.get_base_layer().weight.detach().double(),
            "A1": one.A.detach().double().clone(),
            "B1": one.B.detach().double().clone(),
            "A2": two.A.detach().double().clone(),
            "B2": two.B.detach().double().clone(),
        }
        for layer, (one, two) in zip(live, pairs, strict=True)
    ]


# --- on a stack of linear layers ---


# The rates differ between primary and auxiliary, and rho is such that some steps are clipped and some are not.
RULES = {
    "sgd": (lambda: SGD(0.05, -1), lambda: SGD(0.3, +1), 0.4),
    "adamw": (lambda: AdamW(0.01, -1, decay=0.1), lambda: AdamW(0.03, +1, betas=(0.8, 0.95), decay=0.02), 0.5),
    "normalized": (lambda: SGD(0.05, -1), lambda: SGD(1.0, +1), 0.4),
}
FRACTION = 0.2


@pytest.mark.parametrize("kind", RULES)
def test_bilora_is_algorithm_1_on_a_stack_of_linear_layers(kind):
    descent, ascent, rho = RULES[kind]
    stack = Stack()
    models: dict[str, nn.Module] = {"unet": stack}
    for adapter, rank in ((PRIMARY, RANK), (AUXILIARY, AUXILIARY_RANK)):
        targets = ["layers.0", "layers.1", "layers.2"]
        add_adapter("unet", stack, adapter, rank=rank, scale=SCALE, init="kaiming", seed=0, targets=targets)
    for parameter in stack.parameters():
        parameter.data = parameter.data.double()
    primary = list(parameters_of(stack, PRIMARY).values())
    one = descent()
    optimizer = (
        torch.optim.SGD(primary, lr=one.rate)
        if isinstance(one, SGD)
        else torch.optim.AdamW(primary, lr=one.rate, betas=one.betas, eps=one.eps, weight_decay=one.decay)
    )
    two = ascent()
    layers = low_rank_layers(models, AUXILIARY)
    method = BiLoRA(
        layers,
        rho,
        build_ascent(
            kind,
            layers,
            learning_rates={"unet": two.rate},
            rho=rho,
            fraction=FRACTION,
            weight_decay=getattr(two, "decay", 0.0),
            betas=getattr(two, "betas", (0.9, 0.999)),
            eps=getattr(two, "eps", 1e-8),
        ),
    )
    trainer = Trainer(
        models, None, {"unet": primary}, optimizer, method, [], compute_dtype=torch.float32, max_grad_norm=0, seed=0
    )
    draw = torch.Generator().manual_seed(1)
    steps, micro = 12, 2
    x = torch.randn(steps, micro, 8, 6, generator=draw, dtype=torch.float64)
    y = torch.rand(steps, micro, 8, 4, generator=draw, dtype=torch.float64)

    def gradients(W: list[Tensor], step: int) -> list[Tensor]:
        W = [w.requires_grad_() for w in W]
        losses = [(stack(x[step, m], W) - y[step, m]).square().mean() for m in range(micro)]
        return list(torch.autograd.grad(torch.stack(losses).mean(), W))

    reference = transcript_of(models)
    start = copy.deepcopy(reference)
    length = FRACTION * rho if kind == "normalized" else None
    shares = algorithm_1(reference, gradients, steps, rho, descent, ascent, length)
    for step in range(steps):
        batches = [StackBatch(stack, x[step, m], y[step, m], 1 / micro) for m in range(micro)]
        trainer.training_step(batches, step)
    clipped = sum(share > 1 for share in shares)
    assert 2 <= clipped <= steps - 2
    assert method.measures()["clipped_share"].item() == pytest.approx(clipped / steps)
    assert method.measures()["c_over_rho"].item() == pytest.approx(min(shares[-1], 1), rel=1e-6)
    # All in float64 but the clip's factor and the normalized ascent's rate, which are rounded to float32 as the
    # adapters are. Seen: 2e-8, normalized 5e-7.
    assert compare(reference, start, models) < (2e-6 if kind == "normalized" else 2e-7)


# --- on the tiny UNet ---


@pytest.mark.parametrize("ascent", ["sgd", "adamw"])
def test_bilora_is_algorithm_1_on_the_unet(build, tiny, ascent):
    """The reference has no adapters at all: a plain float64 UNet is given the weights W and asked for dL/dW."""
    eps = 1e-4  # of Adam: entries whose gradient is a rounding error do not take whole steps
    rate, rho = {"sgd": (1.0, 0.06), "adamw": (5e-3, 0.3)}[ascent]  # the clip begins to bind within the four steps
    run = build(
        lora_layers="to_q",
        rank=RANK,
        lora_alpha=SCALE * RANK,
        auxiliary_rank=AUXILIARY_RANK,
        ascent=ascent,
        auxiliary_init="kaiming",  # the rates below are for its small first steps
        auxiliary_learning_rate=rate,
        adam_epsilon=eps,
        adam_weight_decay=0.05,
        max_grad_norm=1e6,
        rho=rho,
    )
    steps = 4
    batches = [run.batches(step)[0] for step in range(steps)]
    unet = copy.deepcopy(tiny.unet).double()
    modules = [unet.get_submodule(name) for name, _ in adapted_layers(run.parts.models["unet"])]
    schedule = DDPMScheduler.from_config(tiny.scheduler.config)

    def gradients(W: list[Tensor], step: int) -> list[Tensor]:
        for module, w in zip(modules, W, strict=True):
            module.weight = nn.Parameter(w)
        batch = batches[step]
        noisy = schedule.add_noise(batch.latents.double(), batch.noise.double(), batch.timesteps)
        known = {
            "text_embeds": batch.conditioning.pooled_prompt_embeds.double(),
            "time_ids": batch.conditioning.time_ids.double(),
        }
        embeds = batch.conditioning.prompt_embeds.double()
        output = unet(noisy, batch.timesteps, encoder_hidden_states=embeds, added_cond_kwargs=known).sample
        loss = (output - batch.noise.double()).square().mean()
        return list(torch.autograd.grad(loss, [module.weight for module in modules]))

    reference = transcript_of(run.parts.models)
    start = copy.deepcopy(reference)
    rules = {"sgd": lambda: SGD(rate, +1), "adamw": lambda: AdamW(rate, +1, eps=eps)}
    descent = lambda: AdamW(1e-3, -1, eps=eps, decay=0.05)  # noqa: E731
    shares = algorithm_1(reference, gradients, steps, rho, descent, rules[ascent])
    run.train(steps)
    assert 1 <= sum(share > 1 for share in shares) < steps
    # float32 forward and backward against float64. Seen: 2e-4.
    assert compare(reference, start, run.parts.models) < 1e-3
    assert run.parts.method.measures()["c_over_rho"].item() == pytest.approx(min(shares[-1], 1), rel=1e-4)


# --- a method of two passes ---


@dataclass
class QuadraticBatch:
    """L(w) = w' H w / 2."""

    w: nn.Parameter
    H: Tensor
    share: float

    def __len__(self) -> int:
        return 1

    def loss(self, rows: slice = slice(None)) -> Tensor:
        return self.w @ self.H @ self.w / 2

    def add_gradient(self, rows: slice = slice(None), weight: float = 1.0) -> Tensor:
        loss = self.loss(rows)
        (loss * weight * self.share).backward()
        return loss.detach()


def test_sam_has_its_closed_form():
    """Its gradient on a quadratic is H (w + rho H w / ||H w||), H the mean over all micro-batches of the step."""
    draw = torch.Generator().manual_seed(0)
    roots = torch.randn(3, 5, 5, generator=draw, dtype=torch.float64)
    curvatures = roots @ roots.mT
    w = nn.Parameter(torch.randn(5, generator=draw, dtype=torch.float64))
    start, rho, rate = w.detach().clone(), 0.3, 0.01
    optimizer = torch.optim.SGD([w], lr=rate)
    trainer = Trainer(
        {}, None, {"unet": [w]}, optimizer, LoRASAM([w], rho), [], compute_dtype=torch.float32, max_grad_norm=0, seed=0
    )
    step = trainer.training_step([QuadraticBatch(w, H, 1 / 3) for H in curvatures], 0)
    H = curvatures.mean(0)
    climbed = start + rho * H @ start / (H @ start).norm()
    assert torch.allclose((start - w.detach()) / rate, H @ climbed, rtol=1e-10, atol=0)
    assert step.loss == pytest.approx((climbed @ H @ climbed / 2).item(), rel=1e-12)
    assert w.grad is None


def test_a_method_may_evaluate_the_draws_of_a_step_twice(build):
    """The same on the UNet: both passes see the same rows, noise and timesteps, and the weights come back."""
    run = build("lora", lora_layers="to_q")
    method = LoRASAM(run.parts.trainer.primary, rho=0.0)
    micro_batches, start = run.micro_batches(), run.tensors()
    twice = method.accumulate(micro_batches)
    gradients = [p.grad.clone() for p in run.parts.trainer.primary]
    for p in run.parts.trainer.primary:
        p.grad = None
    once = run.parts.method.accumulate(micro_batches)
    assert torch.equal(once, twice)
    assert all(torch.equal(g, p.grad) for g, p in zip(gradients, run.parts.trainer.primary, strict=True))
    assert all(torch.equal(start[name], tensor) for name, tensor in run.tensors().items())


# --- the official recipe ---


def test_lora_takes_the_steps_of_the_official_recipe(build, tiny: StableDiffusionXLPipeline):
    """train_dreambooth_lora_sdxl.py's step on the same draws, UNet and both text encoders: the same weights.

    Transcribed: peft's LoRA as the script configures it, DDPM noise, the mean squared error of the noise, one bound on
    the norm of all gradients, AdamW with a rate and a decay for the UNet and others for the text encoders.
    """
    rank, rate, text_rate = 4, 1e-4, 5e-6
    bound = 0.1  # the recipe's 1.0 would not bind on this base
    run = build(
        "lora",
        lora_layers=None,
        lora_alpha=None,
        rank=rank,
        learning_rate=rate,
        text_encoder_lr=text_rate,
        train_text_encoder=True,
        adam_weight_decay=0.1,
        adam_weight_decay_text_encoder=0.3,
        max_grad_norm=bound,
    )
    names = ("unet", "text_encoder", "text_encoder_2")
    unet, *encoders = (copy.deepcopy(getattr(tiny, name)).train() for name in names)
    models = dict(zip(names, (unet, *encoders), strict=True))
    for name, model in models.items():
        attention = (
            ["to_k", "to_q", "to_v", "to_out.0"] if name == "unet" else ["q_proj", "k_proj", "v_proj", "out_proj"]
        )
        settings = {"r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "init_lora_weights": "gaussian"}
        model.add_adapter(LoraConfig(**settings, target_modules=attention))
        set_peft_model_state_dict(model, get_peft_model_state_dict(run.parts.models[name]))  # the same random start
    groups = [[p for p in model.parameters() if p.requires_grad] for model in models.values()]
    optimizer = torch.optim.AdamW(
        [
            {"params": group, "lr": lr, "weight_decay": decay}
            for group, lr, decay in zip(groups, (rate, text_rate, text_rate), (0.1, 0.3, 0.3), strict=True)
        ],
        betas=(0.9, 0.999),
        eps=1e-8,
    )
    schedule = DDPMScheduler.from_config(tiny.scheduler.config)
    losses, norms = [], []
    for step in range(3):
        (batch,) = run.batches(step)
        noisy = schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
        ids = batch.conditioning.token_ids
        outputs = [encoder(ids[:, n], output_hidden_states=True) for n, encoder in enumerate(encoders)]
        prompt_embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        known = {"text_embeds": outputs[1].text_embeds, "time_ids": batch.conditioning.time_ids}
        predicted = unet(noisy, batch.timesteps, prompt_embeds, added_cond_kwargs=known, return_dict=False)[0]
        loss = nn.functional.mse_loss(predicted.float(), batch.noise.float(), reduction="mean")
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_([p for group in groups for p in group], bound).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    start = run.tensors()
    assert run.train(3) == pytest.approx(losses, rel=1e-6)
    theirs = {f"{part}.{name}": p for part in models for name, p in parameters_of(models[part], PRIMARY).items()}
    ours = run.tensors()
    assert min(norms) > bound
    assert difference(theirs, ours, start) < 1e-4  # seen: 9e-6
