"""Latents kept on disk, so that the next run on the same pictures need not encode them.

A file is found by what its content follows from: the bytes of the picture, what is shown of it, how it was resized,
and the VAE's own weights and precision. So whatever changes, the file is not found, and a new one is made beside it;
nothing that was kept has to be thrown away by hand. Several processes or runs may fill one folder.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from bilora_diffusion.atomic import write_bytes_atomically
from bilora_diffusion.data.images import View
from bilora_diffusion.data.pictures import Picture
from bilora_diffusion.errors import UserError
from bilora_diffusion.sdxl import Moments

__all__ = ["LatentFiles", "fingerprint"]

logger = logging.getLogger("bilora_diffusion")

_PREPARATION = 1
"""To be raised when the same picture, shown in the same way, becomes other pixels."""


class LatentFiles:
    """Posteriors by picture and view, in `folder/<VAE>/<key>.safetensors`.

    Arguments:
        folder: `--cache_dir_latents`; made if it is not there.
        vae: the one that encodes; read here, not held.
        interpolation: filter that resized the pictures.

    Raises:
        UserError: the folder cannot be made.
    """

    def __init__(self, folder: str | Path, vae: nn.Module, interpolation: str) -> None:
        self.found, self.made = 0, 0  # what came from a file and what had to be encoded
        self._how = [_PREPARATION, interpolation]
        self.folder = Path(folder) / fingerprint(vae)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--cache_dir_latents {folder} cannot be made: {error.strerror}; name another") from error

    def keep(self, picture: Picture, view: View, target: tuple[int, int], encode: Callable[[], Moments]) -> Path:
        """The file with the posterior of what a view shows of a picture at (height, width) `target`: found, or made.

        The picture's file is read, but not decoded. A damaged file of ours is told of and written anew.

        Raises:
            UserError: the picture cannot be read, the disk is full or the folder cannot be written.
        """
        what = json.dumps([picture.digest(), view.crop_top_left, view.flipped, target, *self._how])
        path = self.folder / f"{_digest(what.encode())}.safetensors"
        if _read(path) is not None:
            self.found += 1
            return path
        moments = encode()
        tensors = {"mean": moments.mean.contiguous(), "std": moments.std.contiguous()}
        content = save(tensors, {"digest": _digest(*tensors.values())})
        write_bytes_atomically(path, content, shared=True, durable=False)
        self.made += 1
        return path

    def read(self, path: Path) -> Moments:
        """What a file of `keep` holds.

        Raises:
            UserError: it is gone or damaged since then.
        """
        moments = _read(path)
        if moments is None:
            raise UserError(
                f"the latents that were in {path} are gone: start the run again or go on with --resume_from_checkpoint "
                "latest, and leave the folder of --cache_dir_latents alone meanwhile"
            )
        return moments


def _read(path: Path) -> Moments | None:
    """None where there is no file, or, with a warning, a damaged one."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in ("mean", "std")}
            written = (file.metadata() or {}).get("digest")
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        return _damaged(path, str(error))
    if written != _digest(*tensors.values()):
        return _damaged(path, "its content is not what was written")
    return Moments(**tensors)


def _damaged(path: Path, reason: str) -> None:
    logger.warning(f"{path} is damaged ({' '.join(reason.split())[:100]}): its picture is encoded again")


def fingerprint(vae: nn.Module) -> str:
    """Of the VAE's architecture, weights and precision: 32 hexadecimal digits."""
    config = {name: value for name, value in dict(vae.config).items() if not name.startswith("_")}
    state = vae.state_dict()
    names = [(name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in state.items()]
    return _digest(json.dumps([config, names], sort_keys=True, default=str).encode(), *state.values())


def _digest(*parts: bytes | Tensor) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, Tensor):
            part = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest.update(part)
    return digest.hexdigest()
