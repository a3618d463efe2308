"""Emoji in two styles: flat (Noto) for a small base model to know, 3D (Fluent) for a LoRA to learn.

Every 3D icon has a flat twin of the same name, so a base that knows the flat ones knows each name: what a LoRA has to
learn from 23 icons is the style, and how far it learned more than those 23 is measured on the others.

Nothing of the pictures is committed: `build` fetches two npm packages (Noto emoji: Apache-2.0, Fluent emoji: MIT).
"""

import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bilora_diffusion.randomness import generator

__all__ = ["FOLDER", "ICONS_A_CONCEPT", "Icons", "PatchPCA", "build", "load"]

FOLDER = Path("outputs/benchmarks")
FLAT_PACKAGE = ("emoji-datasource-google", "16.0.0")
SOLID_PACKAGE = ("@lobehub/fluent-emoji-3d", "1.1.0")
CATEGORIES = ("Animals & Nature", "Food & Drink", "Smileys & Emotion", "Activities")
SIZE_PX = 32
ICONS_A_CONCEPT = 23  # as the paper's 3D-icons data set
CONCEPTS = 5
SPLIT_SEED = 0


@dataclass(frozen=True)
class Icons:
    """All icons; row i of both styles has name i.

    Arguments:
        names: N of them, lower case.
        flat, solid: (N, 3, 32, 32), float32 in [-1, 1].
        sha256: of the pixels.
    """

    names: list[str]
    flat: Tensor
    solid: Tensor
    sha256: str

    def concept(self, seed: int) -> Tensor:
        """The rows whose 3D icons are trained on under this seed, (23,)."""
        if not 0 <= seed < CONCEPTS:
            raise ValueError(f"seed is {seed}; there are icons for the concepts 0 to {CONCEPTS - 1}")
        return self._order()[seed * ICONS_A_CONCEPT : (seed + 1) * ICONS_A_CONCEPT]

    def validation(self) -> Tensor:
        """Rows never trained on in 3D, to choose by."""
        return self._held_out()[::2]

    def test(self) -> Tensor:
        """Rows never trained on in 3D, to report the chosen configuration on."""
        return self._held_out()[1::2]

    def _held_out(self) -> Tensor:
        return self._order()[CONCEPTS * ICONS_A_CONCEPT :]

    def _order(self) -> Tensor:
        return torch.randperm(len(self.names), generator=generator(SPLIT_SEED, "icons"))


class PatchPCA:
    """A linear stand-in for a VAE: 4 x 4 patches of pixels -> 12 principal components, (B, 12, 8, 8).

    Each component is divided by the root of its standard deviation, then all by one number that makes the latents'
    standard deviation 1: between pixels' own proportions, where only mean colours matter, and whitening, where the
    finest detail counts as much as they do.

    Arguments:
        pixels: (N, 3, H, W) in [-1, 1] to fit to.
    """

    PATCH_PX = 4
    CHANNELS = 12

    def __init__(self, pixels: Tensor) -> None:
        patches = self._patches(pixels).transpose(1, 2).flatten(0, 1).double()
        self.mean = patches.mean(0)
        values, vectors = torch.linalg.eigh((patches - self.mean).T.cov())
        order = values.argsort(descending=True)[: self.CHANNELS]
        deviations = values[order].sqrt()
        # eigh leaves the signs open.
        signs = vectors[:, order].sum(0).sign()
        self.vectors = vectors[:, order] * signs
        self.scale = deviations.sqrt() * (deviations.mean()).sqrt()

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 12, H/4, W/4), float32."""
        patches = self._patches(pixels).transpose(1, 2).double()
        side = pixels.shape[-1] // self.PATCH_PX
        latents = (patches - self.mean) @ self.vectors / self.scale
        return latents.transpose(1, 2).unflatten(2, (side, side)).float()

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 12, h, w) -> (B, 3, 4h, 4w), float32, not clipped."""
        patches = latents.flatten(2).transpose(1, 2).double() * self.scale @ self.vectors.T + self.mean
        size = (latents.shape[-2] * self.PATCH_PX, latents.shape[-1] * self.PATCH_PX)
        folded = torch.nn.functional.fold(
            patches.transpose(1, 2), size, kernel_size=self.PATCH_PX, stride=self.PATCH_PX
        )
        return folded.float()

    def _patches(self, pixels: Tensor) -> Tensor:
        return torch.nn.functional.unfold(pixels, kernel_size=self.PATCH_PX, stride=self.PATCH_PX)


def build() -> Path:
    """Fetches the packages where they are missing and writes all icons into one file."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    flat_archive, solid_archive = _packed(*FLAT_PACKAGE), _packed(*SOLID_PACKAGE)
    with tarfile.open(flat_archive) as archive:
        entries = json.load(archive.extractfile("package/emoji.json"))
        files = {e["image"]: e["name"].lower() for e in entries if e["category"] in CATEGORIES and e["has_img_google"]}
        flat = _pictures(archive, {f"package/img/google/64/{image}": image for image in files})
    with tarfile.open(solid_archive) as archive:
        assets = {f"package/assets/{image.removesuffix('.png')}.webp": image for image in files}
        solid = _pictures(archive, assets)
    images = sorted(flat.keys() & solid.keys())
    path = FOLDER / "icons.npz"
    np.savez_compressed(
        path,
        names=np.array([files[image] for image in images]),
        flat=np.stack([flat[image] for image in images]),
        solid=np.stack([solid[image] for image in images]),
    )
    return path


def load() -> Icons:
    """Reads what `build` wrote."""
    path = FOLDER / "icons.npz"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run `python -m benchmarks.ascent data` first")
    with np.load(path) as arrays:
        names, flat, solid = arrays["names"].tolist(), arrays["flat"], arrays["solid"]
    digest = hashlib.sha256(flat.tobytes() + solid.tobytes()).hexdigest()
    return Icons(names, _tensor(flat), _tensor(solid), digest)


def _packed(package: str, version: str) -> Path:
    path = FOLDER / f"{package.strip('@').replace('/', '-')}-{version}.tgz"
    if not path.exists():
        subprocess.run(["npm", "pack", "--silent", f"{package}@{version}"], cwd=FOLDER, check=True)
    return path


def _pictures(archive: tarfile.TarFile, wanted: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The wanted members as (32, 32, 3) bytes on white, by the names given to them. Missing ones are left out."""
    return {wanted[m.name]: _on_white(archive.extractfile(m).read()) for m in archive if m.name in wanted}


def _on_white(content: bytes) -> np.ndarray:
    picture = Image.open(io.BytesIO(content)).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    flattened = Image.alpha_composite(white, picture).convert("RGB")
    return np.asarray(flattened.resize((SIZE_PX, SIZE_PX), Image.Resampling.LANCZOS))


def _tensor(pictures: np.ndarray) -> Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
