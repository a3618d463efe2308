"""Principal components of pixel patches: the latent space the VAE is taught.

A VAE of this size trained for reconstruction alone finds latents that a diffusion model learns slowly. Here the space
is fixed first, by a linear map; the VAE's encoder learns that map and its decoder, which is not linear, learns to undo
it better than the map's transpose can. It also means that the UNet does not have to wait for the VAE.
"""

import torch
from torch import Tensor

__all__ = ["PatchPCA"]


class PatchPCA:
    """Patches of pixels as their first principal components, (B, 3, H, W) -> (B, channels, H / patch, W / patch).

    Each component is divided by the root of its standard deviation, then all by one number: between pixels' own
    proportions, where only mean colours matter, and whitening, where the finest detail counts as much as they do.
    The latents' standard deviation is about 1.

    Arguments:
        pixels: (N, 3, H, W) in [-1, 1] to fit to.
        patch: side of a patch in pixels; H and W are multiples of it.
        channels: components kept, at most 3 patch^2.
    """

    def __init__(self, pixels: Tensor, patch: int, channels: int) -> None:
        self.patch = patch
        patches = self._patches(pixels).transpose(1, 2).flatten(0, 1).double()
        self.mean = patches.mean(0)
        values, vectors = torch.linalg.eigh((patches - self.mean).T.cov())
        order = values.argsort(descending=True)[:channels]
        deviations = values[order].sqrt()
        # eigh leaves the signs open.
        signs = vectors[:, order].sum(0).sign()
        self.vectors = vectors[:, order] * signs
        self.scale = deviations.sqrt() * (deviations.mean()).sqrt()

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, channels, H / patch, W / patch), float32."""
        patches = self._patches(pixels).transpose(1, 2).double()
        size = (pixels.shape[-2] // self.patch, pixels.shape[-1] // self.patch)
        latents = (patches - self.mean) @ self.vectors / self.scale
        return latents.transpose(1, 2).unflatten(2, size).float()

    def decode(self, latents: Tensor) -> Tensor:
        """(B, channels, h, w) -> (B, 3, patch h, patch w), float32, not clipped."""
        patches = latents.flatten(2).transpose(1, 2).double() * self.scale @ self.vectors.T + self.mean
        size = (latents.shape[-2] * self.patch, latents.shape[-1] * self.patch)
        folded = torch.nn.functional.fold(patches.transpose(1, 2), size, kernel_size=self.patch, stride=self.patch)
        return folded.float()

    def _patches(self, pixels: Tensor) -> Tensor:
        return torch.nn.functional.unfold(pixels, kernel_size=self.patch, stride=self.patch)
