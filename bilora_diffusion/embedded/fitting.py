"""The loop that all of the embedded base's models are trained with: resumable, seeded, averaged."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bilora_diffusion.atomic import atomic_write
from bilora_diffusion.errors import UserError

__all__ = ["FitSettings", "fit", "how_trained", "load_averages"]


@dataclass(frozen=True)
class FitSettings:
    """AdamW with a constant rate that falls linearly at the end, and an exponential average of the weights.

    Attributes:
        decay_from: share of the steps after which the learning rate falls to zero.
        save_every: steps between checkpoints; the probe is computed at each.
    """

    seed: int = 0
    steps: int = 1000
    batch: int = 32
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    decay_from: float = 0.65
    ema_decay: float = 0.998
    save_every: int = 250

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        fall = min(1.0, (1 - step / self.steps) / (1 - self.decay_from))
        return self.learning_rate * warm * fall


@dataclass
class _State:
    """Everything a resumed training needs beside the code."""

    models: Mapping[str, nn.Module]
    averages: dict[str, dict[str, Tensor]]
    optimizer: torch.optim.Optimizer
    step: int = 0
    probes: list[tuple[int, float, int]] = field(default_factory=list)
    seconds: float = 0.0


def fit(
    models: Mapping[str, nn.Module],
    loss: Callable[[int], Tensor],
    probe: Callable[[], Tensor],
    settings: FitSettings,
    path: Path,
    data: str,
    log: Callable[[str], None],
) -> None:
    """Trains `models` in place, or goes on where an earlier call was stopped; ends at once if that one was done.

    Arguments:
        models: on their device, in training mode.
        loss: the loss of a step's batch, which depends on the step alone; differentiable.
        probe: a fixed loss to follow, computed with the averaged weights.
        path: the checkpoint. Its stem names the training in the log.
        data: identifies what is trained on; a checkpoint goes on only with the same data and settings.

    Raises:
        UserError: the checkpoint is of another model, other settings or other data; or the loss is not finite.
    """
    state = _begin(models, settings)
    if path.exists():
        _restore(state, path, settings, data)
    parameters = [p for model in models.values() for p in model.parameters()]
    averaged = [average for part in state.averages.values() for average in part.values()]
    followed = [value for model in models.values() for value in model.state_dict().values()]
    began = time.perf_counter() - state.seconds
    while state.step < settings.steps:
        for group in state.optimizer.param_groups:
            group["lr"] = settings.rate(state.step)
        loss(state.step).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.step += 1
        decay = min(settings.ema_decay, (1 + state.step) / (10 + state.step))
        torch._foreach_lerp_(averaged, followed, 1 - decay)
        if state.step % settings.save_every == 0 or state.step == settings.steps:
            state.seconds = time.perf_counter() - began
            value = _probe_averages(state, probe)
            if not math.isfinite(value):
                raise UserError(
                    f"{path.stem}: the loss is {value} at step {state.step}; {path} keeps the last good step"
                )
            state.probes.append((state.step, value, round(state.seconds)))
            _save(state, settings, data, path)
            log(f"{path.stem}: step {state.step} of {settings.steps}, probe {value:.5f}, {state.seconds:.0f} s")


def load_averages(models: Mapping[str, nn.Module], path: Path) -> dict[str, object]:
    """Puts a checkpoint's averaged weights into `models`, frozen and in evaluation mode.

    Returns:
        `how_trained` they were.
    """
    saved = _saved(path)
    for name, model in models.items():
        model.load_state_dict(saved["averages"][name])
        model.requires_grad_(False).eval()
    return _how(saved)


def how_trained(path: Path) -> dict[str, object]:
    """Of a checkpoint: settings, steps, seconds, the probe's losses as (step, loss, seconds so far)."""
    return _how(_saved(path))


def _saved(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise UserError(f"{path} is missing: run `python -m bilora_diffusion.embedded build` first")
    return torch.load(path, map_location="cpu")


def _how(saved: dict[str, Any]) -> dict[str, object]:
    return {
        "settings": saved["settings"],
        "steps": saved["step"],
        "seconds": round(saved["seconds"]),
        "probes": saved["probes"],
    }


def _begin(models: Mapping[str, nn.Module], settings: FitSettings) -> _State:
    averages = {name: {key: value.clone() for key, value in m.state_dict().items()} for name, m in models.items()}
    parameters = [p for model in models.values() for p in model.parameters()]
    return _State(models, averages, torch.optim.AdamW(parameters, lr=settings.learning_rate, fused=True))


def _restore(state: _State, path: Path, settings: FitSettings, data: str) -> None:
    device = next(iter(next(iter(state.models.values())).parameters())).device
    saved = torch.load(path, map_location=device)
    for what, is_same in (("settings", saved["settings"] == vars(settings)), ("data", saved["data"] == data)):
        if not is_same:
            raise UserError(f"{path} is a checkpoint of other {what}; remove it to begin anew")
    try:
        for name, model in state.models.items():
            model.load_state_dict(saved["models"][name])
            for key, average in state.averages[name].items():
                average.copy_(saved["averages"][name][key])
    except (KeyError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path} is a checkpoint of another model ({reason}); remove it to begin anew") from error
    state.optimizer.load_state_dict(saved["optimizer"])
    state.step, state.probes, state.seconds = saved["step"], saved["probes"], saved["seconds"]


def _save(state: _State, settings: FitSettings, data: str, path: Path) -> None:
    content = {
        "models": {name: model.state_dict() for name, model in state.models.items()},
        "averages": state.averages,
        "optimizer": state.optimizer.state_dict(),
        "step": state.step,
        "settings": vars(settings),
        "data": data,
        "probes": state.probes,
        "seconds": state.seconds,
    }
    with atomic_write(path) as temporary:
        torch.save(content, temporary)


@torch.no_grad()
def _probe_averages(state: _State, probe: Callable[[], Tensor]) -> float:
    trained = {name: {k: v.clone() for k, v in model.state_dict().items()} for name, model in state.models.items()}
    for name, model in state.models.items():
        model.load_state_dict(state.averages[name])
    value = probe().item()
    for name, model in state.models.items():
        model.load_state_dict(trained[name])
    return value
