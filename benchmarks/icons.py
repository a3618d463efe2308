"""Emoji in two styles: flat (Noto) for a small base model to know, 3D (Fluent) for a LoRA to learn.

Every 3D icon has a flat twin of the same name, so a base that knows the flat ones knows each name: what a LoRA has to
learn from 23 icons is the style, and how far it learned more than those 23 is measured on the others.

Nothing of the pictures is committed: `build` fetches two npm packages (Noto emoji: Apache-2.0, Fluent emoji: MIT).
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bilora_diffusion.embedded.icons import fetch_package, on_white
from bilora_diffusion.randomness import generator

__all__ = ["FOLDER", "ICONS_A_CONCEPT", "Icons", "build", "load"]

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


def build() -> Path:
    """Fetches the packages where they are missing and writes all icons into one file."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    flat_archive, solid_archive = fetch_package(*FLAT_PACKAGE, FOLDER), fetch_package(*SOLID_PACKAGE, FOLDER)
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


def _pictures(archive: tarfile.TarFile, wanted: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The wanted members as (32, 32, 3) bytes on white, by the names given to them. Missing ones are left out."""
    return {
        wanted[m.name]: np.asarray(on_white(Image.open(io.BytesIO(archive.extractfile(m).read())), SIZE_PX))
        for m in archive
        if m.name in wanted
    }


def _tensor(pictures: np.ndarray) -> Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
