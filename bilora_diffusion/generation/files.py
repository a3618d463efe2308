"""Which files may be opened: `.safetensors` only, below given folders only, links followed before that is decided."""

import hashlib
import os
import re
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from bilora_diffusion.errors import UserError
from bilora_diffusion.flags import show
from bilora_diffusion.lora_files.description import LoraDescription, describe

__all__ = ["MOST_FILE_BYTES", "LoraFiles"]

SUFFIX = ".safetensors"
MOST_FILE_BYTES = 2 * 2**30
"""SDXL at rank 128 with every layer and both text encoders stays below this."""
MOST_LISTED = 500
AUXILIARY_FILE = "auxiliary.safetensors"  # of a checkpoint: no LoRA to draw with
MOST_DEPTH = 6


class LoraFiles:
    """LoRA files below folders, named `<folder's name>/<path below it>` with forward slashes.

    Arguments:
        folders: the folders' names, as they begin the files' names, and where they are. They need not exist yet.
    """

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self.folders = dict(folders)
        self._described: dict[Path, tuple[tuple[int, int], LoraDescription | UserError]] = {}
        self._lock = threading.Lock()

    @classmethod
    def below(cls, folders: Iterable[Path], reserved: Mapping[str, Path] | None = None) -> "LoraFiles":
        """Named by the folders' own last parts; one that is below another is left out.

        Arguments:
            reserved: more folders, with names that no other gets.
        """
        reserved, named = reserved or {}, {}
        for folder in dict.fromkeys(path.resolve() for path in folders):
            if any(folder.is_relative_to(other) for other in named.values()):
                continue
            stem, name, number = folder.name or "root", folder.name or "root", 2
            while name in named or name in reserved:
                name, number = f"{stem}-{number}", number + 1
            named[name] = folder
        return cls(named | reserved)

    def name_of(self, path: Path) -> str | None:
        """The name of a file on this disk; None if it is below none of the folders."""
        path = path.resolve()
        for start, folder in self.folders.items():
            if path.is_relative_to(folder.resolve()):
                return f"{start}/{path.relative_to(folder.resolve()).as_posix()}"
        return None

    def path(self, name: str) -> Path:
        """The file of a name; it exists and lies below its folder when every link is followed.

        Raises:
            UserError: for any other name.
        """
        if not isinstance(name, str) or "\0" in name or len(name) > 1000:
            raise UserError(f"{show(name)} is no name of a file")
        if not name.lower().endswith(SUFFIX):
            raise UserError(f"{show(name)} is not opened: only {SUFFIX} files are, never pickles")
        start, _, rest = name.replace("\\", "/").partition("/")
        unknown = UserError(f"there is no LoRA file {show(name)}: it is not below the folders that were given")
        if start not in self.folders or not rest:
            raise unknown
        folder = self.folders[start].resolve()
        try:
            path = (folder / rest).resolve(strict=True)
        except (OSError, RuntimeError):
            raise unknown from None
        if not path.is_relative_to(folder) or not path.is_file() or path.suffix.lower() != SUFFIX:
            raise unknown  # the same words whether there is such a file outside or not
        if path.stat().st_size > MOST_FILE_BYTES:
            raise UserError(f"{show(name)} is larger than {MOST_FILE_BYTES // 2**30} GiB: no LoRA of this size is read")
        return path

    def describe(self, name: str) -> LoraDescription:
        """What a file says of itself; its header is read once, until the file changes.

        Raises:
            UserError: it may not be opened, is damaged, or is no LoRA.
        """
        path = self.path(name)
        status = path.stat()
        stamp = (status.st_mtime_ns, status.st_size)
        with self._lock:
            known = self._described.get(path)
        if known is None or known[0] != stamp:
            try:
                known = (stamp, describe(path, name))
            except UserError as error:
                known = (stamp, error)
            with self._lock:
                self._described[path] = known
        if isinstance(known[1], UserError):
            raise UserError(str(known[1]))
        return known[1]

    def names(self) -> list[str]:
        """All LoRA files, the newest first. What is no LoRA (a base's weights, a damaged file) is left out."""
        found = [(path.stat().st_mtime, name) for name, path in self._candidates() if self._is_lora(name)]
        return [name for _, name in sorted(found, key=lambda one: (-one[0], one[1]))]

    def check(self, source: Path, shown_name: str) -> None:
        """Whether a file from elsewhere could be added; raises as `add`."""
        if not shown_name.lower().endswith(SUFFIX):
            raise UserError(f"{show(shown_name)} is not taken: only {SUFFIX} files are, never pickles")
        if source.stat().st_size > MOST_FILE_BYTES:
            raise UserError(f"{show(shown_name)} is larger than {MOST_FILE_BYTES // 2**30} GiB")
        describe(source, shown_name)

    def add(self, start: str, source: Path, shown_name: str) -> str:
        """Copies a file from elsewhere into one of the folders, if it is a LoRA; returns its name here.

        Arguments:
            start: the name of the folder.
            shown_name: what the person calls the file; only letters, digits, dot, dash and underscore of it are kept.

        Raises:
            UserError: it is too large, damaged, or no LoRA.
        """
        self.check(source, shown_name)
        stem = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(shown_name).stem).strip("._")[:80] or "lora"
        with source.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:8]
        folder = self.folders[start]
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{stem}-{digest}{SUFFIX}"
        if not target.exists():
            partial = target.with_suffix(".part")
            shutil.copyfile(source, partial)
            os.replace(partial, target)
        return f"{start}/{target.name}"

    def _candidates(self) -> Iterator[tuple[str, Path]]:
        count = 0
        for start, folder in self.folders.items():
            for parent, folders, files in os.walk(folder):  # does not follow links to folders
                depth = len(Path(parent).relative_to(folder).parts)
                folders[:] = sorted(one for one in folders if not one.startswith(".")) if depth < MOST_DEPTH else []
                for file in sorted(files):
                    if file.lower().endswith(SUFFIX) and not file.startswith(".") and count < MOST_LISTED:
                        name = f"{start}/{(Path(parent) / file).relative_to(folder).as_posix()}"
                        try:
                            path = self.path(name)
                        except UserError:
                            continue
                        count += 1
                        yield name, path

    def _is_lora(self, name: str) -> bool:
        try:
            self.describe(name)
        except UserError:
            return False
        return PurePosixPath(name).name != AUXILIARY_FILE
