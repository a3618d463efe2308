"""From `--method` and its flags to the method, with whatever it adds to the models beside the primary."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from bilora_diffusion.adapters import AUXILIARY, PRIMARY, LowRank, add_adapter, low_rank_layers, parameters_of
from bilora_diffusion.config import TrainingConfig
from bilora_diffusion.errors import UserError
from bilora_diffusion.method_names import METHOD_NAMES, WITH_NOISE
from bilora_diffusion.methods.ascent import Ascent, NormalizedAscent, OptimizerAscent
from bilora_diffusion.methods.balancedness import Balancedness
from bilora_diffusion.methods.bilora import BiLoRA
from bilora_diffusion.methods.bilora_echo import BiLoRAEcho
from bilora_diffusion.methods.bilora_fresh import BiLoRAFresh
from bilora_diffusion.methods.combined import Combined
from bilora_diffusion.methods.dual_lora import DualLoRA
from bilora_diffusion.methods.eflat_lora import EFlatLoRA
from bilora_diffusion.methods.flat_lora import FlatLoRA
from bilora_diffusion.methods.gradient_sketch import GradientSketch
from bilora_diffusion.methods.interface import Method
from bilora_diffusion.methods.looksam import LookSAM
from bilora_diffusion.methods.lora import LoRA
from bilora_diffusion.methods.lora_sam import LoRASAM
from bilora_diffusion.methods.radius import SINGULAR_SHARE, Radius, radius
from bilora_diffusion.methods.rwp_lora import RWPLoRA
from bilora_diffusion.methods.s2_sam import S2SAM
from bilora_diffusion.methods.weight_noise import WeightNoise
from bilora_diffusion.optimizers import has_fused_step

__all__ = ["DEFAULT_RHO", "DEFAULT_SIGMA", "ECHO_SHARE", "FRESH_ROWS", "FRESH_SHARE", "build", "build_ascent"]

DEFAULT_RHO = 0.05
"""Of the methods that climb in the space of the factors, as in Bi-LoRA's comparison (arXiv 2508.19564, R.3)."""
DEFAULT_SIGMA = 0.5
"""Of the noise on the weights, with a constant schedule: what benchmarks.quality found to keep late steps from
overfitting. Flat-LoRA's authors used 0.1 with a ramp on SDXL (arXiv 2409.14396, 4.4), which does nothing there."""
FACTOR_SIGMA = 0.1
"""Of `rwp-lora`, whose noise is on the factors: the weaker one that was tried, and the validation names' choice."""
ECHO_SHARE = 0.06
"""Of `bilora-echo`: 1 % of ||W||_F on the embedded base, which the validation names of benchmarks.quality chose."""
FRESH_SHARE = 0.06
"""Of `bilora-fresh`, as `ECHO_SHARE` was found: the primary cannot compensate a perturbation that is always new."""
FRESH_ROWS = 0.5
"""Of `--ascent_share` for `bilora-fresh`: all rows cost twice as much and were no better on the validation names."""


@dataclass(frozen=True)
class Setting:
    """What a method may be made of.

    Arguments:
        models: the trained parts, the primary already attached.
        rates, auxiliary_rates: learning rates by part.
        seed: of the run.
        steps: optimiser steps of the whole run.
    """

    config: TrainingConfig
    models: Mapping[str, nn.Module]
    rates: Mapping[str, float]
    auxiliary_rates: Mapping[str, float]
    seed: int
    steps: int

    @property
    def primary(self) -> list[nn.Parameter]:
        return [p for model in self.models.values() for p in parameters_of(model, PRIMARY).values()]

    @property
    def primary_layers(self) -> list[LowRank]:
        return low_rank_layers(self.models, PRIMARY)

    @property
    def rho(self) -> float:
        return DEFAULT_RHO if self.config.rho is None else self.config.rho

    @property
    def sigma(self) -> float:
        return DEFAULT_SIGMA if self.config.sigma is None else self.config.sigma


def build(
    config: TrainingConfig,
    models: Mapping[str, nn.Module],
    *,
    rates: Mapping[str, float],
    auxiliary_rates: Mapping[str, float],
    seed: int,
    steps: int,
) -> tuple[Method, Radius | None]:
    """The method of `--method`, with whatever it adds to the models beside the primary.

    Returns:
        the method, and the radius of its ball where it has one.

    Raises:
        UserError: the method does not go with another flag.
    """
    setting = Setting(config, models, rates, auxiliary_rates, seed, steps)
    method, ball = _BUILDERS[config.method](setting)
    if config.sigma and config.method in WITH_NOISE:
        method = Combined(method, _flat_lora(setting)[0])
    return method, ball


def build_ascent(
    name: str,
    layers: Sequence[LowRank],
    *,
    learning_rates: Mapping[str, float],
    rho: float,
    fraction: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> Ascent:
    """The auxiliary's ascent by its name in `--ascent`.

    Arguments:
        learning_rates: eta2 by part.
        fraction: share of rho that one `normalized` step covers.
        weight_decay, betas, eps: of the AdamW ascent; the decay applies to SGD too.
    """
    if name == "normalized":
        return NormalizedAscent(layers, fraction * rho)
    groups = _groups(layers, learning_rates)
    shared = {"weight_decay": weight_decay, "maximize": True, "fused": has_fused_step(layers[0].A.device)}
    if name == "sgd":
        return OptimizerAscent(torch.optim.SGD(groups, **shared))
    return OptimizerAscent(torch.optim.AdamW(groups, betas=betas, eps=eps, **shared))


def _groups(layers: Sequence[LowRank], rates: Mapping[str, float]) -> list[dict]:
    return [
        {"params": [p for layer in layers if layer.part == part for p in (layer.A, layer.B)], "lr": rate}
        for part, rate in rates.items()
    ]


def _auxiliary(setting: Setting, share: float) -> tuple[list[LowRank], Radius]:
    """Attaches the second adapter; no layers where the ball's radius is 0: then it is LoRA, with its very numbers."""
    config = setting.config
    rank = config.auxiliary_rank or config.rank
    ball = radius(setting.models, rank, config.rho, config.rho_relative, share)
    if ball.rho == 0:
        return [], ball
    for part, model in setting.models.items():
        add_adapter(
            part,
            model,
            AUXILIARY,
            rank=rank,
            scale=(config.lora_alpha or config.rank) / config.rank,
            init=config.auxiliary_init,
            seed=setting.seed,
            targets=config.unet_targets if part == "unet" else None,
        )
    return low_rank_layers(setting.models, AUXILIARY), ball


def _told(method: Method, **settings: float | int | str) -> Method:
    method.settings = settings
    return method


def _lora(setting: Setting) -> tuple[Method, None]:
    return LoRA(), None


def _bilora(setting: Setting) -> tuple[Method, Radius]:
    config = setting.config
    layers, ball = _auxiliary(setting, SINGULAR_SHARE)
    rank = config.auxiliary_rank or config.rank
    if not layers:
        return _told(LoRA(), rho=0.0, auxiliary_rank=rank), ball
    ascent = build_ascent(
        config.ascent,
        layers,
        learning_rates=setting.auxiliary_rates,
        rho=ball.rho,
        fraction=config.ascent_fraction,
        weight_decay=config.auxiliary_weight_decay,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
    )
    method = BiLoRA(layers, ball.rho, ascent, config.rho_schedule, setting.steps)
    return _told(method, rho=ball.rho, auxiliary_rank=rank, rho_schedule=config.rho_schedule), ball


def _dual_lora(setting: Setting) -> tuple[Method, Radius]:
    config = setting.config
    layers, ball = _auxiliary(setting, SINGULAR_SHARE)
    rank = config.auxiliary_rank or config.rank
    if not layers:
        return _told(LoRA(), rho=0.0, auxiliary_rank=rank), ball
    optimizer = torch.optim.AdamW(
        _groups(layers, setting.auxiliary_rates),
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.auxiliary_weight_decay,
        fused=has_fused_step(layers[0].A.device),
    )
    return _told(DualLoRA(layers, ball.rho, optimizer), rho=ball.rho, auxiliary_rank=rank), ball


def _bilora_fresh(setting: Setting) -> tuple[Method, Radius]:
    config = setting.config
    layers, ball = _auxiliary(setting, FRESH_SHARE)
    share = FRESH_ROWS if config.ascent_share is None else config.ascent_share
    settings = {
        "rho": ball.rho,
        "auxiliary_rank": config.auxiliary_rank or config.rank,
        "ascent_share": share,
        "ascent_every": config.ascent_every,
        "ascent_basis": config.ascent_basis,
    }
    if not layers:
        return _told(LoRA(), **settings), ball
    sketch = None
    if config.ascent_basis == "gradient":
        sketch = GradientSketch(setting.models, config.auxiliary_rank or config.rank, setting.seed)
    method = BiLoRAFresh(layers, setting.primary, ball.rho, share, config.ascent_every, sketch)
    return _told(method, **settings), ball


def _bilora_echo(setting: Setting) -> tuple[Method, Radius]:
    config = setting.config
    layers, ball = _auxiliary(setting, ECHO_SHARE)
    rank, steps = config.auxiliary_rank or config.rank, config.shown_in_a_row
    settings = {"rho": ball.rho, "auxiliary_rank": rank, "steps_per_draw": steps}
    if not layers:
        return _told(LoRA(), **settings), ball
    sketch = GradientSketch(setting.models, rank, setting.seed)
    return _told(BiLoRAEcho(setting.models, layers, ball.rho, sketch, steps), **settings), ball


def _lora_sam(setting: Setting) -> tuple[Method, None]:
    share = 1.0 if setting.config.ascent_share is None else setting.config.ascent_share
    return _told(LoRASAM(setting.primary, setting.rho, share), rho=setting.rho, ascent_share=share), None


def _s2_sam(setting: Setting) -> tuple[Method, None]:
    return _told(S2SAM(setting.primary, setting.rho), rho=setting.rho), None


def _looksam(setting: Setting) -> tuple[Method, None]:
    every, alpha = setting.config.looksam_every, setting.config.looksam_alpha
    method = LookSAM(setting.primary, setting.rho, every, alpha)
    return _told(method, rho=setting.rho, looksam_every=every, looksam_alpha=alpha), None


def _eflat_lora(setting: Setting) -> tuple[Method, None]:
    beta = setting.config.eflat_beta
    return _told(EFlatLoRA(setting.primary_layers, setting.rho, beta), rho=setting.rho, eflat_beta=beta), None


def _flat_lora(setting: Setting, schedule: str | None = None) -> tuple[Method, None]:
    schedule = schedule or setting.config.sigma_schedule
    noise = WeightNoise(setting.models, setting.seed)
    method = FlatLoRA(noise, setting.sigma, schedule, setting.steps)
    return _told(method, sigma=setting.sigma, sigma_schedule=schedule), None


def _rwp_full(setting: Setting) -> tuple[Method, None]:
    return _flat_lora(setting, "constant")


def _rwp_lora(setting: Setting) -> tuple[Method, None]:
    sigma = FACTOR_SIGMA if setting.config.sigma is None else setting.config.sigma
    return _told(RWPLoRA(setting.primary, sigma, setting.seed), sigma=sigma), None


def _balancedness(*, by_gradients: bool) -> Callable[[Setting], tuple[Method, None]]:
    def builder(setting: Setting) -> tuple[Method, None]:
        config = setting.config
        if config.optimizer == "prodigy":
            raise UserError(
                f"--method {config.method} with --optimizer prodigy: its strength counts in learning rates, and "
                "Prodigy's means something else; use AdamW"
            )
        method = Balancedness(
            setting.primary_layers,
            config.bar_strength,
            config.bar_schedule,
            setting.steps,
            setting.rates,
            by_gradients=by_gradients,
        )
        return _told(method, bar_strength=config.bar_strength, bar_schedule=config.bar_schedule), None

    return builder


_BUILDERS: dict[str, Callable[[Setting], tuple[Method, Radius | None]]] = {
    "bilora": _bilora,
    "bilora-echo": _bilora_echo,
    "bilora-fresh": _bilora_fresh,
    "dual-lora": _dual_lora,
    "eflat-lora": _eflat_lora,
    "flat-lora": _flat_lora,
    "looksam": _looksam,
    "lora": _lora,
    "lora-sam": _lora_sam,
    "nbar": _balancedness(by_gradients=True),
    "obar": _balancedness(by_gradients=False),
    "rwp-full": _rwp_full,
    "rwp-lora": _rwp_lora,
    "s2-sam": _s2_sam,
}
assert set(_BUILDERS) == set(METHOD_NAMES)  # the names live apart, where they import fast
