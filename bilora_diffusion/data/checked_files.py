"""Tensors in files that can tell whether they are whole, found by what their content follows from."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from bilora_diffusion.atomic import write_bytes_atomically
from bilora_diffusion.errors import UserError

__all__ = ["digest", "fingerprint", "make_folder", "read_tensors", "write_tensors"]

logger = logging.getLogger("bilora_diffusion")


def make_folder(folder: Path, wanted: str | Path) -> None:
    """Arguments: wanted: what `--cache_dir_latents` says.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--cache_dir_latents {wanted} cannot be made: {error.strerror}; name another") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Any number of processes may write the same at once.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    content = save(tensors, {"digest": digest(*tensors.values())})
    write_bytes_atomically(path, content, shared=True, durable=False)


def read_tensors(path: Path, names: Sequence[str]) -> list[Tensor] | None:
    """None where there is no file, or, with a warning, a damaged one."""
    try:
        with safe_open(path, "pt") as file:
            tensors = [file.get_tensor(name) for name in names]
            written = (file.metadata() or {}).get("digest")
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        return _damaged(path, str(error))
    if written != digest(*tensors):
        return _damaged(path, "its content is not what was written")
    return tensors


def _damaged(path: Path, reason: str) -> None:
    logger.warning(f"{path} is damaged ({' '.join(reason.split())[:100]}): what was in it is made again")


def fingerprint(model: nn.Module) -> str:
    """Of a model's architecture, weights and precision: 32 hexadecimal digits."""
    config = model.config if isinstance(model.config, Mapping) else model.config.to_dict()
    config = {name: value for name, value in dict(config).items() if not name.startswith("_")}
    state = model.state_dict()
    names = [(name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in state.items()]
    return digest(json.dumps([config, names], sort_keys=True, default=str).encode(), *state.values())


def digest(*parts: bytes | Tensor) -> str:
    """32 hexadecimal digits."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, Tensor):
            part = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        found.update(part)
    return found.hexdigest()
