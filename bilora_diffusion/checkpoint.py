"""Checkpoints: whole or not there at all, and each with a LoRA file that can be used as it is.

    checkpoint-N/pytorch_lora_weights.safetensors   the primary, float32: loads in diffusers, and is resumed from
    checkpoint-N/auxiliary.safetensors              the auxiliary, where the method has one
    checkpoint-N/factors.safetensors                the primary itself and what it began with, where the file above
                                                    holds the difference (--init_lora_weights pissa and the like)
    checkpoint-N/training_state.pt                  optimisers, schedules, loss scale, the method's counters
    checkpoint-N/checkpoint.json                    step, draws, what the run was, its losses so far

A checkpoint is written into a folder of another name and renamed when it is complete; rotation renames before it
deletes. So a kill at any moment leaves no half checkpoint under the name that `latest` looks for.
"""

import io
import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from bilora_diffusion.adapters import AUXILIARY, PRIMARY, START, parameters_of
from bilora_diffusion.atomic import HINTS, write_bytes_atomically, write_text_atomically
from bilora_diffusion.errors import UserError
from bilora_diffusion.lora_files.diffusers_format import DIFFUSERS_FILE, portable_name
from bilora_diffusion.strict_json import strict_json

__all__ = [
    "Checkpoint",
    "checkpoints",
    "find_checkpoint",
    "load_checkpoint",
    "named_factors",
    "named_parameters",
    "remove_leftovers",
    "restore_adapters",
    "save_checkpoint",
]

AUXILIARY_FILE = "auxiliary.safetensors"
FACTORS_FILE = "factors.safetensors"
STATE_FILE = "training_state.pt"
FACTS_FILE = "checkpoint.json"
_NAME = re.compile(r"checkpoint-(\d+)")
BEFORE_THE_FLAG = {"ascent_basis": "tracked"}
"""What runs did whose checkpoints were made before there was such a flag."""
# What reading a file that is cut short or is something else can raise.
_DAMAGE = (OSError, ValueError, RuntimeError, EOFError, TypeError, KeyError, pickle.PickleError, SafetensorError)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds beside the primary.

    Arguments:
        identity: the flags that a resumed run must share, by name.
        kept: flags that a resumed run cannot change, as their values are part of the optimiser's state.
        progress: the run so far: step, draws, losses and so on; JSON values.
        state: `Trainer.state_dict()`.
        auxiliary: the auxiliary's factors by name; empty where the method has none.
        factors: the primary's and `START`'s by adapter and name; empty where the LoRA file holds the primary itself.
    """

    identity: Mapping[str, Any]
    kept: Mapping[str, Any]
    progress: Mapping[str, Any]
    state: Mapping[str, Any]
    auxiliary: Mapping[str, Tensor]
    factors: Mapping[str, Tensor] = field(default_factory=dict)


def save_checkpoint(folder: Path, checkpoint: Checkpoint, write_lora: Callable[[Path], Any], limit: int | None) -> Path:
    """Writes `checkpoint-N`, N from its progress, then deletes the oldest above the limit.

    Arguments:
        folder: the run's output folder.
        write_lora: called with the folder to put the primary's LoRA file in.
        limit: how many to keep (--checkpoints_total_limit), None = all.

    Raises:
        UserError: the disk is full or the folder cannot be written; checkpoints that were there are as they were.
    """
    step = checkpoint.progress["step"]
    target = folder / f"checkpoint-{step}"
    unfinished = folder / f".unfinished-{target.name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        write_lora(unfinished)
        for name, values in ((AUXILIARY_FILE, checkpoint.auxiliary), (FACTORS_FILE, checkpoint.factors)):
            if values:
                tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in values.items()}
                write_bytes_atomically(unfinished / name, save(tensors))
        buffer = io.BytesIO()  # torch reports a full disk as a RuntimeError of its own; Python's files do not
        torch.save(dict(checkpoint.state), buffer)
        write_bytes_atomically(unfinished / STATE_FILE, buffer.getvalue())
        facts = {name: getattr(checkpoint, name) for name in ("identity", "kept", "progress")}
        write_text_atomically(unfinished / FACTS_FILE, strict_json(facts))
        replaced = _rename_away(target)
        os.rename(unfinished, target)
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)
        if limit is not None:
            _rotate(folder, step, limit)
    except OSError as error:
        reason = HINTS.get(error.errno or 0) or error.strerror
        raise UserError(f"{target} was not written: {reason}; earlier checkpoints are whole") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def _rotate(folder: Path, step: int, limit: int) -> None:
    """Deletes the oldest above the limit. Those of later steps were made before the run went back: they go first."""
    for _, path in sorted(checkpoints(folder), key=lambda one: (one[0] <= step, one[0]))[:-limit]:
        doomed = _rename_away(path)
        if doomed is not None:
            shutil.rmtree(doomed, ignore_errors=True)


def _rename_away(path: Path) -> Path | None:
    """Takes a checkpoint's name away before it is deleted: a kill while its files go must not leave a half one."""
    if not path.exists():
        return None
    doomed = path.with_name(f".unfinished-removal-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    return doomed


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint in an output folder, the oldest first."""
    return sorted(
        (int(match[1]), path)
        for path in folder.glob("checkpoint-*")
        if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    )


def remove_leftovers(folder: Path) -> None:
    """Deletes what a killed run left unfinished."""
    for path in folder.glob(".unfinished-*"):
        shutil.rmtree(path, ignore_errors=True)


def find_checkpoint(folder: Path, wanted: str) -> Path | None:
    """The checkpoint that --resume_from_checkpoint means: `latest`, a name in the output folder, or a path.

    Returns:
        None if `latest` was asked for and there is none.

    Raises:
        UserError: the one that was named is not there.
    """
    found = checkpoints(folder)
    if wanted == "latest":
        return found[-1][1] if found else None
    for path in (folder / wanted, Path(wanted)):
        if (path / FACTS_FILE).is_file():
            return path
    there = ", ".join(path.name for _, path in found) or "none"
    raise UserError(f"--resume_from_checkpoint {wanted}: no such checkpoint; in {folder} there is: {there}")


def load_checkpoint(path: Path, identity: Mapping[str, Any]) -> Checkpoint:
    """Reads a checkpoint back.

    Arguments:
        identity: this run's; each value must be the checkpoint's.

    Raises:
        UserError: it is of another method, rank or the like, or a file of it is missing or damaged.
    """
    try:
        facts = json.loads((path / FACTS_FILE).read_text(encoding="utf-8"))
        saved_identity, kept, progress = (dict(facts[name]) for name in ("identity", "kept", "progress"))
        with warnings.catch_warnings():  # of what is odd in a damaged file; the error says enough
            warnings.simplefilter("ignore")
            state = torch.load(path / STATE_FILE, map_location="cpu", weights_only=True)
        auxiliary, factors = (
            load_file(path / name) if (path / name).exists() else {} for name in (AUXILIARY_FILE, FACTORS_FILE)
        )
    except _DAMAGE as error:
        raise _damaged(path, error) from None
    for flag, value in identity.items():
        saved = saved_identity.get(flag, BEFORE_THE_FLAG.get(flag))
        if saved != value:
            raise UserError(
                f"{path} was made with --{flag} {_shown(saved)}, this run has {_shown(value)}: "
                f"give --{flag} {_shown(saved)} or start a new run in another --output_dir"
            )
    return Checkpoint(saved_identity, kept, progress, state, auxiliary, factors)


def _damaged(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return UserError(f"{path} is not a whole checkpoint ({reason}); resume from another")


@torch.no_grad()
def restore_adapters(path: Path, checkpoint: Checkpoint, models: Mapping[str, nn.Module]) -> None:
    """Puts all adapters' values back, bit by bit.

    Raises:
        UserError: the files hold other tensors than this run trains, or the LoRA file is damaged.
    """
    factors = named_factors(models)
    kept_apart = (factors, checkpoint.factors) if factors else _in_lora_file(path, models)
    for parameters, tensors in (kept_apart, (named_parameters(models, AUXILIARY), checkpoint.auxiliary)):
        wrong = set(parameters) ^ set(tensors) or {
            name for name, parameter in parameters.items() if parameter.shape != tensors[name].shape
        }
        if wrong:
            raise UserError(
                f"{path} holds other layers than this run trains, for one {min(wrong)}: resume from another"
            )
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def named_parameters(models: Mapping[str, nn.Module], adapter: str) -> dict[str, nn.Parameter]:
    """One adapter's parameters over all parts, by part and name."""
    return {
        f"{part}.{name}": parameter
        for part, model in models.items()
        for name, parameter in parameters_of(model, adapter).items()
    }


def named_factors(models: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The primary's and `START`'s parameters by adapter, part and name; none where there is no `START`."""
    start = named_parameters(models, START)
    primary = named_parameters(models, PRIMARY) if start else {}
    return {f"{START}.{name}": one for name, one in start.items()} | {
        f"primary.{name}": one for name, one in primary.items()
    }


def _in_lora_file(path: Path, models: Mapping[str, nn.Module]) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    """The primary's parameters and what the LoRA file has for them."""
    try:
        content = load_file(path / DIFFUSERS_FILE)
    except _DAMAGE as error:
        raise _damaged(path, error) from None
    primary = {
        f"{part}.{portable_name(part, name)}": parameter
        for part, model in models.items()
        for name, parameter in parameters_of(model, PRIMARY).items()
    }
    # A DoRA's magnitudes have no ".weight" in peft's names.
    bare = {name.removesuffix(".weight"): parameter for name, parameter in primary.items()}
    return bare, {name.removesuffix(".weight"): tensor for name, tensor in content.items()}


def _shown(value: Any) -> str:
    return "unset" if value is None else str(value)
