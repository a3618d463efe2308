"""1-> The names of the pictures in a folder, known without torch: a wrong folder is told at once."""

from pathlib import Path

from PIL import features

from bilora_diffusion.errors import UserError

__all__ = ["SUFFIXES", "check_folder", "is_picture", "names_of_pictures", "no_pictures"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff") + ((".avif",) if features.check("avif") else ())
"""File name endings taken for pictures, in lower case; compare without regard to case."""


def is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def names_of_pictures(folder: Path, flag: str) -> list[str]:
    """Sorted; of the folder's own pictures, hidden files left out.

    Raises:
        UserError: no such folder, or it cannot be read.
    """
    if not folder.exists():
        raise UserError(f"{flag} {folder} is not there: check the path")
    if not folder.is_dir():
        raise UserError(f"{flag} {folder} is a file: give the folder that holds the pictures")
    try:
        return sorted(path.name for path in folder.iterdir() if is_picture(path))
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be read: {error.strerror}") from error


def no_pictures(folder: Path, flag: str) -> UserError:
    """What is told of a folder without any."""
    nested = any(is_picture(path) for path in folder.glob("*/*"))
    hint = "; its subfolders hold some: give one, or name them in metadata.jsonl" if nested else ""
    return UserError(f"{flag} {folder} holds no pictures (accepted: {' '.join(SUFFIXES)}){hint}")


def check_folder(folder: str | Path, flag: str) -> None:
    """Raises:
    UserError: as `names_of_pictures`, or neither it nor a `metadata.jsonl` names a picture.
    """
    folder = Path(folder)
    if not names_of_pictures(folder, flag) and not (folder / "metadata.jsonl").exists():
        raise no_pictures(folder, flag)
