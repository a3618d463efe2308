"""Pictures as latents: computed once and kept where every sight of a picture has the same pixels, else in every step.

What is kept is the VAE's posterior, not a sample of it: each epoch samples anew, with or without the cache.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bilora_diffusion.data.dreambooth import DreamBoothDataset, Row, VariantKey
from bilora_diffusion.data.images import View
from bilora_diffusion.data.latent_files import LatentFiles
from bilora_diffusion.data.masks import latent_weights
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
    """The posteriors of all pictures, flipped and not, in the computer's memory (0.5 MB each at 1024 px).

    The VAE is not held: once this exists it can be freed.

    Arguments:
        files: where posteriors are kept from run to run; None: nowhere.
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
        self.cache: dict[VariantKey, Moments] = {}
        self.weights: dict[VariantKey, Tensor | None] = {}
        variants = list(dataset.variants())
        for place in range(processes):
            for key, view in variants[(rank + place) % processes :: processes]:
                encode = partial(_encode, dataset, vae, key, view)
                if files is None:
                    self.cache[key] = encode()
                else:
                    self.cache[key] = files.get(dataset.picture(*key[:2]), view, dataset.target(*key[:2]), encode)
                self.weights[key] = _weights(dataset.mask(*key[:2], view), vae.config)
                _check_some_weight(self.weights[key], dataset, key)

    def moments(self, rows: Sequence[Row]) -> list[Moments]:
        return [self.cache[row.key] for row in rows]

    def loss_weights(self, rows: Sequence[Row]) -> list[Tensor | None]:
        return [self.weights[row.key] for row in rows]


def _encode(dataset: DreamBoothDataset, vae: nn.Module, key: VariantKey, view: View) -> Moments:
    both = encode_images(vae, dataset.pixels(*key[:2], view)[None])
    moments = Moments(both.mean[0], both.std[0])
    _check_finite(moments, dataset, key)
    return moments


def _weights(mask: Tensor | None, vae_config: Any) -> Tensor | None:
    if mask is None:
        return None
    return latent_weights(mask, 2 ** (len(vae_config.block_out_channels) - 1))


def _check_some_weight(weights: Tensor | None, dataset: DreamBoothDataset, key: VariantKey) -> None:
    """Raises: UserError: nothing of this picture is ever learnt."""
    if weights is not None and not weights.any():
        raise UserError(
            f"the mask of {_name(dataset, key)} is black all over in the only crop that is shown of it: crop the "
            "picture to its subject, or leave --center_crop out"
        )


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
