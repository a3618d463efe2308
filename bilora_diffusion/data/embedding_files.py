"""Embedded captions kept on disk, so that the next run with the same text encoders need not embed them.

As of latents: a file is found by what its content follows from, the caption's tokens and the encoders' own weights and
precision, so nothing that was kept ever has to be thrown away by hand.
"""

from collections.abc import Iterator, MutableMapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from bilora_diffusion.data.checked_files import digest, fingerprint, make_folder, read_tensors, write_tensors
from bilora_diffusion.errors import UserError
from bilora_diffusion.sdxl import tokenize

__all__ = ["EmbeddingFiles"]

NAMES = ("prompt_embeds", "pooled_prompt_embeds")


class EmbeddingFiles(MutableMapping[str, tuple[Tensor, ...]]):
    """Captions to their embeddings, (T, D) and (P,), in `folder/captions-<encoders>/<key>.safetensors`.

    They are read when they are asked for. What an earlier run left there is in it. Several processes or runs may fill
    one folder.

    Arguments:
        folder: `--cache_dir_latents`; made if it is not there.
        text_encoders: those that embed; read here, not held.

    Attributes:
        found, made: captions that came from a file, and that had to be embedded.

    Raises:
        UserError: the folder cannot be made or written, or, later, a file is gone.
    """

    def __init__(self, folder: str | Path, tokenizers: Sequence, text_encoders: Sequence[nn.Module]) -> None:
        self.found, self.made = 0, 0
        self.folder = Path(folder) / f"captions-{digest(*(fingerprint(one).encode() for one in text_encoders))}"
        self._tokenizers = tokenizers
        self._paths: dict[str, Path] = {}
        make_folder(self.folder, folder)

    def __contains__(self, prompt: object) -> bool:
        if prompt in self._paths:
            return True
        path = self._path(prompt)
        if read_tensors(path, NAMES) is None:
            return False
        self._paths[prompt] = path
        self.found += 1
        return True

    def __setitem__(self, prompt: str, embeddings: tuple[Tensor, ...]) -> None:
        path = self._path(prompt)
        write_tensors(path, dict(zip(NAMES, embeddings, strict=True)))
        self._paths[prompt] = path
        self.made += 1

    def __getitem__(self, prompt: str) -> tuple[Tensor, ...]:
        tensors = read_tensors(self._paths[prompt], NAMES)
        if tensors is None:
            raise UserError(
                f"the embedded caption that was in {self._paths[prompt]} is gone: start the run again or go on with "
                "--resume_from_checkpoint latest, and leave the folder of --cache_dir_latents alone meanwhile"
            )
        return tuple(tensors)

    def __delitem__(self, prompt: str) -> None:
        del self._paths[prompt]

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def _path(self, prompt: str) -> Path:
        return self.folder / f"{digest(tokenize(self._tokenizers, [prompt]))}.safetensors"
