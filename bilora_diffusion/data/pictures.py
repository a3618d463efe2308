"""1-> The pictures of a folder or a data set, each decoded once and found usable, with its caption."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from bilora_diffusion.data.folders import SUFFIXES, names_of_pictures, no_pictures
from bilora_diffusion.data.images import Source, image_size, load_alpha, load_image, load_mask
from bilora_diffusion.data.reading import read_each
from bilora_diffusion.errors import UserError

if TYPE_CHECKING:
    import datasets

__all__ = ["ALPHA", "DatasetCell", "Picture", "class_pictures", "find_pictures", "pictures_of_dataset"]

ALPHA: Literal["alpha"] = "alpha"
"""In the place of a mask's file: the mask is the picture's own transparency."""

TEXT_SUFFIXES = (".txt", ".TXT")
_UNREAD_SUFFIXES = (".avif", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jxl", ".psd", ".svg")
"""Endings of pictures, not of strays: leaving them out is worth a warning."""


@dataclass(frozen=True)
class DatasetCell:
    """The picture in one row of a Hugging Face dataset, read when asked for: data sets can exceed the
    memory.
    """

    table: "datasets.Dataset"
    row: int
    column: str

    def name(self) -> str:
        """The row and, where it is known, the file: `train[3] (photo.jpg)`."""
        path = self._cell().get("path")
        return f"train[{self.row}]" + (f" ({Path(path).name})" if path else "")

    def read(self) -> Source:
        """The bytes of the file, or its path.

        Raises:
            UserError: the row holds no picture.
        """
        cell = self._cell()
        if cell.get("bytes") is not None:
            return cell["bytes"]
        if not cell.get("path"):
            raise UserError(f"row {self.row} has no picture in column {self.column}")
        return Path(cell["path"])

    def _cell(self) -> dict[str, Any]:
        return self.table[self.row][self.column] or {}


@dataclass(frozen=True)
class Picture:
    """A picture that was decoded once and found usable.

    Attributes:
        name: for messages; the path relative to its folder, with forward slashes.
        source: where its pixels come from.
        caption: the whole prompt, never empty.
        size: (height, width) in px, upright.
        mask: file that says which part of it counts, or `ALPHA`; None: all of it.
    """

    name: str
    source: Source | DatasetCell
    caption: str
    size: tuple[int, int]
    mask: Path | Literal["alpha"] | None = None

    @classmethod
    def read(cls, name: str, source: Source | DatasetCell, caption: str) -> "Picture":
        """A picture of unknown size: decodes it once.

        Raises:
            UserError: see `image_size`.
        """
        picture = cls(name, source, caption, (0, 0))
        return replace(picture, size=image_size(picture._content(), name))

    def load(self) -> Image.Image:
        """The pixels, upright, RGB. Raises UserError as `load_image` does."""
        return load_image(self._content(), self.name)

    def digest(self) -> str:
        """Of the bytes of its file, which are not decoded: 32 hexadecimal digits.

        Raises:
            UserError: the file cannot be read.
        """
        content = self._content()
        try:
            if isinstance(content, Image.Image):
                content = repr((content.mode, content.size)).encode() + content.tobytes()
            elif isinstance(content, Path):
                content = content.read_bytes()
        except OSError as error:
            raise UserError(f"{self.name} cannot be read: {error.strerror}") from error
        return hashlib.blake2b(content, digest_size=16).hexdigest()

    def load_mask(self) -> Image.Image | None:
        """The mask, 8-bit grey, upright, of the picture's size; None without one.

        Raises:
            UserError: as `load_image`, or for another size.
        """
        if self.mask is None:
            return None
        if self.mask == ALPHA:
            mask, name = load_alpha(self._content(), self.name), self.name
        else:
            name = f"the mask {self.mask}"
            mask = load_mask(self.mask, name)
        if (mask.height, mask.width) != self.size:
            raise UserError(
                f"{name} is {mask.width} x {mask.height} px and the picture {self.name} {self.size[1]} x "
                f"{self.size[0]} px (width x height): a mask must have its picture's size"
            )
        return mask

    def _content(self) -> Source:
        return self.source.read() if isinstance(self.source, DatasetCell) else self.source


def find_pictures(
    folder: str | Path,
    *,
    instance_prompt: str | None,
    caption_column: str | None = None,
    flag: str = "--instance_data_dir",
) -> tuple[list[Picture], list[str]]:
    """The pictures of a folder, sorted by name, and warnings for the user.

    Taken are the folder's own pictures (`SUFFIXES`; hidden files left out) and those in subfolders that
    `metadata.jsonl` names. A picture's caption is the first there is of: column `caption_column` (default
    `text`) of its line in `metadata.jsonl`; the `.txt` file beside it; the instance prompt.

    Arguments:
        flag: that named the folder.

    Raises:
        UserError: the folder or `metadata.jsonl` is wrong, no picture is usable, or one has no caption.
    """
    folder = Path(folder)
    own = names_of_pictures(folder, flag)
    captions, warnings = _metadata_captions(folder, caption_column)
    names = sorted({*own, *captions})
    if not names:
        raise no_pictures(folder, flag)
    files = [path for path in folder.iterdir() if not path.name.startswith(".")]
    warnings += _warnings_of_unread(folder, files) + _warnings_of_captions(folder, files, names, captions)
    candidates = (
        (name, folder / name, captions.get(name) or _sidecar_caption(folder / name) or instance_prompt)
        for name in names
    )
    pictures, problems = _usable(candidates, len(names))
    _require_some(pictures, problems, f"{flag} {folder}")
    _require_captions(
        pictures,
        "give --instance_prompt, a .txt file beside each picture, or metadata.jsonl with a column `text` "
        "(or --caption_column)",
    )
    return pictures, warnings + problems


def class_pictures(folder: str | Path, prompt: str, limit: int | None = None) -> tuple[list[Picture], list[str]]:
    """The first `limit` usable class pictures of `--class_data_dir`, sorted by name, and warnings.

    A folder that is not there holds none: the trainer generates what is missing.

    Raises:
        UserError: `folder` is a file, or holds pictures of which none is usable.
    """
    folder = Path(folder)
    if not folder.exists():
        return [], []
    names = names_of_pictures(folder, "--class_data_dir")
    wanted = len(names) if limit is None else min(limit, len(names))
    pictures, problems = _usable(((name, folder / name, prompt) for name in names), wanted)
    if problems:
        _require_some(pictures, problems, f"--class_data_dir {folder}")
    return pictures, problems


def pictures_of_dataset(
    name: str,
    *,
    config_name: str | None = None,
    cache_dir: str | None = None,
    image_column: str | None = "image",
    caption_column: str | None = None,
    instance_prompt: str | None = None,
) -> tuple[list[Picture], list[str]]:
    """The pictures of `--dataset_name`'s train split (hub id or local folder), in its order, and warnings.

    As in the stock script, captions are used only if `caption_column` names their column; a row without one
    gets the instance prompt. Pictures are read from the data set when they are needed.

    Arguments:
        image_column: None for the first column.

    Raises:
        UserError: `datasets` is not installed, the data set, its train split or a column is not there, no
            picture is usable, or one has no caption.
    """
    table = _train_split(name, config_name, cache_dir)
    columns = table.column_names
    image_column = image_column or columns[0]
    for flag, column in (("--image_column", image_column), ("--caption_column", caption_column)):
        if column is not None and column not in columns:
            hint = "; a plain folder of pictures goes with --instance_data_dir" if Path(name).is_dir() else ""
            raise UserError(
                f"{flag} {column} is not in --dataset_name {name}: its columns are {', '.join(columns)}{hint}"
            )
    captions = table[caption_column] if caption_column else [None] * len(table)
    table = _undecoded(table, image_column, name)
    cells = (DatasetCell(table, row, image_column) for row in range(len(table)))
    candidates = (
        (cell.name(), cell, _caption(caption, f"--caption_column {caption_column}") or instance_prompt)
        for cell, caption in zip(cells, captions, strict=True)
    )
    pictures, problems = _usable(candidates, len(table))
    _require_some(pictures, problems, f"--dataset_name {name}")
    _require_captions(pictures, "give --instance_prompt, or --caption_column with the name of the caption column")
    if caption_column is None and "text" in columns:
        problems.insert(
            0,
            f"--dataset_name {name} has a column `text`, which is not used: every picture gets the instance "
            "prompt; give --caption_column text to train on it",
        )
    return pictures, problems


def _warnings_of_unread(folder: Path, files: Sequence[Path]) -> list[str]:
    suffixes = (path.suffix.lower() for path in files)
    unread = sorted({suffix for suffix in suffixes if suffix in _UNREAD_SUFFIXES and suffix not in SUFFIXES})
    if not unread:
        return []
    return [f"{folder} also holds {' '.join(unread)} files, which are not used: convert them to .jpg or .png"]


def _warnings_of_captions(
    folder: Path, files: Sequence[Path], names: Sequence[str], captions: Mapping[str, str]
) -> list[str]:
    """Of text files that would be captions if they were named like the pictures that have none."""
    without = [name for name in names if not captions.get(name) and _sidecar(folder / name) is None]
    stems = {Path(name).stem for name in names}
    texts = sorted(path for path in files if path.suffix in TEXT_SUFFIXES)
    strays = [path.name for path in texts if path.stem not in stems]
    if not without or not strays or len(texts) == 1 < len(names):  # one alone may be a note
        return []
    return [
        f"{len(strays)} .txt file(s) of {folder} belong to no picture (first: {strays[0]}), and {len(without)} "
        f"picture(s) have no caption of their own (first: {without[0]}): a caption is named like its picture"
    ]


def _caption(value: object, where: str) -> str:
    """The caption without blanks around it, "" for none."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: a caption must be text, not {str(value)[:80]}")
    return value.strip()


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # Windows editors put a mark in front
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _sidecar(picture: Path) -> Path | None:
    """The text file beside a picture, if there is one."""
    return next((path for suffix in TEXT_SUFFIXES if (path := picture.with_suffix(suffix)).is_file()), None)


def _sidecar_caption(picture: Path) -> str:
    path = _sidecar(picture)
    return _read_text(path).strip() if path else ""


def _metadata_captions(folder: Path, caption_column: str | None) -> tuple[dict[str, str], list[str]]:
    """Captions, "" for none, by the name of each picture in `metadata.jsonl`; and warnings."""
    path = folder / "metadata.jsonl"
    if not path.is_file():
        unused = f"--caption_column {caption_column} is not used: {folder} has no metadata.jsonl"
        return {}, [unused] if caption_column else []
    column = caption_column or "text"
    captions: dict[str, str] = {}
    columns: dict[str, None] = {}
    warnings = []
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = _metadata_row(line, where)
        columns |= dict.fromkeys(row)
        name = _name_inside(folder, row["file_name"], where)
        caption = _caption(row.get(column), f"{where}, column {column}")
        if name in captions:
            warnings.append(f"{where} names {name} a second time: its first caption is used")
        captions.setdefault(name, caption)
    if columns and column not in columns:
        known = ", ".join(columns)
        if caption_column:
            raise UserError(f"--caption_column {column} is in no line of {path}: its columns are {known}")
        warnings.append(f"{path} has no column `text` (only {known}): name its captions with --caption_column")
    return captions, warnings


def _metadata_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error.msg} at character {error.colno})") from error
    example = 'it must look like {"file_name": "photo.jpg", "text": "a caption"}'
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object: {example}")
    if not isinstance(row.get("file_name"), str) or not row["file_name"].strip():
        raise UserError(f"{where} has no file_name: {example}")
    return row


def _name_inside(folder: Path, file_name: str, where: str) -> str:
    relative = Path(os.path.normpath(file_name.strip()))
    if relative.is_absolute() or relative.drive or ".." in relative.parts:
        raise UserError(f"{where} names {file_name}, which is outside the folder: give a path inside {folder}")
    if not (folder / relative).is_file():
        raise UserError(f"{where} names {file_name}, which is not in {folder}")
    return relative.as_posix()


_Candidate = tuple[str, Source | DatasetCell, str | None]


def _usable(candidates: Iterable[_Candidate], wanted: int) -> tuple[list[Picture], list[str]]:
    """The first `wanted` candidates (name, source, caption) that decode, and what is wrong with those that do
    not.

    A missing caption becomes "".
    """
    pictures: list[Picture] = []
    problems: list[str] = []
    candidates, seen = iter(candidates), -1
    while len(pictures) < wanted and seen < len(pictures) + len(problems):
        seen = len(pictures) + len(problems)
        missing = wanted - len(pictures)
        for found in read_each(_picture_or_problem, islice(candidates, missing), "reading pictures", missing):
            (problems if isinstance(found, str) else pictures).append(found)
    return pictures, problems


def _picture_or_problem(candidate: _Candidate) -> Picture | str:
    name, source, caption = candidate
    try:
        return Picture.read(name, source, (caption or "").strip())
    except UserError as error:
        return f"left out: {error}"


def _require_some(pictures: list[Picture], problems: list[str], place: str) -> None:
    if pictures:
        return
    if not problems:
        raise UserError(f"{place} holds no pictures")
    named = "; ".join(problem.removeprefix("left out: ") for problem in problems[:3])
    rest = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    raise UserError(f"{place} holds no usable picture: {named}{rest}")


def _require_captions(pictures: list[Picture], mend: str) -> None:
    missing = [picture.name for picture in pictures if not picture.caption]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(pictures)} pictures have no caption, the first is {missing[0]}: {mend}"
        )


def _train_split(name: str, config_name: str | None, cache_dir: str | None) -> "datasets.Dataset":
    try:
        import datasets
    except ImportError as error:
        raise UserError("--dataset_name needs the datasets library: pip install datasets") from error
    try:
        splits = datasets.load_dataset(name, config_name, cache_dir=cache_dir)
    except Exception as error:  # not found, no network, no such configuration, damaged: dozens of kinds
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"--dataset_name {name} cannot be loaded ({reason}): check the name, --dataset_config_name and the network"
        ) from error
    if "train" not in splits:
        raise UserError(f"--dataset_name {name} has no split `train`, only {', '.join(map(str, splits))}")
    return splits["train"]


def _undecoded(table: "datasets.Dataset", image_column: str, name: str) -> "datasets.Dataset":
    """The image column alone, as file contents: our own decoding turns them upright and flattens them."""
    import datasets

    try:
        return table.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    except Exception as error:
        columns = ", ".join(f"{column} ({feature})" for column, feature in table.features.items())
        raise UserError(
            f"--image_column {image_column} of --dataset_name {name} holds no pictures: its columns are "
            f"{' '.join(columns.split())[:300]}"
        ) from error
