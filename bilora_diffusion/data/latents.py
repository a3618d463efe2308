"""Pictures as latents: computed once and kept where a picture is seen in a few crops only, else in every step.

What is kept is the VAE's posterior, not a sample of it: each epoch samples anew, with or without the cache.
"""

from collections.abc import Iterable, MutableMapping, Sequence
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bilora_diffusion.bars import progress_bar
from bilora_diffusion.data.dreambooth import DreamBoothDataset, Row, VariantKey
from bilora_diffusion.data.latent_files import LatentFiles
from bilora_diffusion.data.masks import latent_weights
from bilora_diffusion.data.tensor_file import TensorFile
from bilora_diffusion.errors import UserError
from bilora_diffusion.sdxl import Moments, encode_images

__all__ = ["CachedLatents", "EncodedLatents", "LatentSource"]


class LatentSource(Protocol):
    """Gives the posterior of each row's picture, and its mask on the same grid."""

    vae_config: object

    def moments(self, rows: Sequence[Row]) -> list[Moments]: ...

    def loss_weights(self, rows: Sequence[Row]) -> list[Tensor | None]:
        """(H/8, W/8) for each row: the weight of each place in the loss; None where all weigh 1."""


class EncodedLatents:
    """Runs the VAE on the rows' pixels in every step; needed where crops are drawn anew each time."""

    def __init__(self, dataset: DreamBoothDataset, vae: nn.Module) -> None:
        self.dataset = dataset
        self.vae = vae
        self.vae_config = vae.config

    def moments(self, rows: Sequence[Row]) -> list[Moments]:
        both = encode_images(self.vae, torch.stack([row.pixels for row in rows]))
        moments = [Moments(mean, std) for mean, std in zip(both.mean, both.std, strict=True)]
        for row, moment in zip(rows, moments, strict=True):
            _check_finite(moment, self.dataset, row.key)
        return moments

    def loss_weights(self, rows: Sequence[Row]) -> list[Tensor | None]:
        return [_weights(row.mask, self.vae_config) for row in rows]


class CachedLatents:
    """The posteriors of all pictures, of each crop, flipped and not, each encoded once: 0.5 MB of memory each at
    1024 px, or on disk.

    The VAE is not held: once this exists it can be freed.

    Arguments:
        files: where posteriors are kept from run to run, and read in every step; None: in memory.
        rank, processes: each process begins with a share of its own, so that `files` spare it the others'.
    """

    def __init__(
        self,
        dataset: DreamBoothDataset,
        vae: nn.Module,
        files: LatentFiles | None = None,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.vae_config = vae.config
        self.files = files
        self.kept: dict[VariantKey, Moments | Path] = {}
        self.weights: MutableMapping[VariantKey, tuple[Tensor, ...]] = {} if files is None else TensorFile(files.folder)
        pictures = [list(variants) for _, variants in groupby(dataset.variants(), key=lambda key: key[:2])]
        shares = [pictures[(rank + place) % processes :: processes] for place in range(processes)]
        with progress_bar("caching latents", len(pictures), "picture") as bar:
            for variants in chain.from_iterable(shares):
                for key in variants:
                    self._add(dataset, vae, key)
                self._check_some_weight(dataset, variants)
                dataset.let_go()  # none is shown a second time
                bar.update()

    def _add(self, dataset: DreamBoothDataset, vae: nn.Module, key: VariantKey) -> None:
        encode = partial(_encode, dataset, vae, key)
        if self.files is None:
            self.kept[key] = encode()
        else:
            self.kept[key] = self.files.keep(dataset.picture(*key[:2]), key[2], dataset.target(*key[:2]), encode)
        weights = _weights(dataset.mask(*key), self.vae_config)
        if weights is not None:
            self.weights[key] = (weights,)

    def _check_some_weight(self, dataset: DreamBoothDataset, variants: Iterable[VariantKey]) -> None:
        """Raises: UserError: nothing of this picture is ever learnt."""
        masked = [key for key in variants if key in self.weights]
        if masked and not any(self.weights[key][0].any() for key in masked):
            raise UserError(
                f"the mask of {_name(dataset, masked[0])} is black all over in every crop that is shown of it: crop "
                "the picture to its subject, or leave --center_crop or --crops_per_image out"
            )

    @property
    def bytes_in_memory(self) -> int:
        """Of the posteriors."""
        held = [moments for moments in self.kept.values() if isinstance(moments, Moments)]
        return sum(moments.mean.nbytes + moments.std.nbytes for moments in held)

    def moments(self, rows: Sequence[Row]) -> list[Moments]:
        kept = [self.kept[row.key] for row in rows]
        return [self.files.read(one) if isinstance(one, Path) else one for one in kept]

    def loss_weights(self, rows: Sequence[Row]) -> list[Tensor | None]:
        return [self.weights[row.key][0] if row.key in self.weights else None for row in rows]


def _encode(dataset: DreamBoothDataset, vae: nn.Module, key: VariantKey) -> Moments:
    both = encode_images(vae, dataset.pixels(*key)[None])
    moments = Moments(both.mean[0].clone(), both.std[0])  # on a CPU the mean is a view of what the variance came from
    _check_finite(moments, dataset, key)
    return moments


def _weights(mask: Tensor | None, vae_config: Any) -> Tensor | None:
    if mask is None:
        return None
    return latent_weights(mask, 2 ** (len(vae_config.block_out_channels) - 1))


def _check_finite(moment: Moments, dataset: DreamBoothDataset, key: VariantKey) -> None:
    """Raises: UserError: the VAE overflowed on this picture, which would poison the whole run."""
    if moment.mean.isfinite().all() and moment.std.isfinite().all():
        return
    raise UserError(
        f"the VAE gives non-finite latents for {_name(dataset, key)}: take another with "
        "--pretrained_vae_model_name_or_path (madebyollin/sdxl-vae-fp16-fix), or leave the picture out"
    )


def _name(dataset: DreamBoothDataset, key: VariantKey) -> str:
    return dataset.picture(*key[:2]).name
