"""Latents kept on disk, so that the next run on the same pictures need not encode them.

A file is found by what its content follows from: the bytes of the picture, what is shown of it, how it was resized,
and the VAE's own weights and precision. So whatever changes, the file is not found, and a new one is made beside it;
nothing that was kept has to be thrown away by hand. Several processes or runs may fill one folder.
"""

import json
from collections.abc import Callable
from pathlib import Path

from torch import nn

from bilora_diffusion.data.checked_files import digest, fingerprint, make_folder, read_tensors, write_tensors
from bilora_diffusion.data.images import View
from bilora_diffusion.data.pictures import Picture
from bilora_diffusion.errors import UserError
from bilora_diffusion.sdxl import Moments

__all__ = ["LatentFiles"]

NAMES = ("mean", "std")
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
        make_folder(self.folder, folder)

    def keep(self, picture: Picture, view: View, target: tuple[int, int], encode: Callable[[], Moments]) -> Path:
        """The file with the posterior of what a view shows of a picture at (height, width) `target`: found, or made.

        The picture's file is read, but not decoded. A damaged file of ours is told of and written anew.

        Raises:
            UserError: the picture cannot be read, the disk is full or the folder cannot be written.
        """
        what = json.dumps([picture.digest(), view.crop_top_left, view.flipped, target, *self._how])
        path = self.folder / f"{digest(what.encode())}.safetensors"
        if read_tensors(path, NAMES) is not None:
            self.found += 1
            return path
        moments = encode()
        write_tensors(path, {"mean": moments.mean, "std": moments.std})
        self.made += 1
        return path

    def read(self, path: Path) -> Moments:
        """What a file of `keep` holds.

        Raises:
            UserError: it is gone or damaged since then.
        """
        tensors = read_tensors(path, NAMES)
        if tensors is None:
            raise UserError(
                f"the latents that were in {path} are gone: start the run again or go on with --resume_from_checkpoint "
                "latest, and leave the folder of --cache_dir_latents alone meanwhile"
            )
        return Moments(*tensors)
