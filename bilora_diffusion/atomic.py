"""Files that are either the old one, whole, or the new one, whole, whenever the process or the machine stops.

The new content goes to a hidden neighbour of the file, is forced to the disk (unless it can be made again), and takes
the file's name in one step. One process writes a file at a time: the neighbour's name is fixed, so that what a killed
run left behind is overwritten by the next instead of piling up. Shared files have neighbours of each writer's own, of
which a killed one leaves its last.
"""

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bilora_diffusion.errors import UserError

__all__ = ["atomic_write", "write_bytes_atomically", "write_text_atomically"]

HINTS = {
    errno.ENOSPC: "the disk is full: free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up: free some space or choose another folder",
    errno.EACCES: "permission denied: choose a folder you may write to",
    errno.EPERM: "permission denied: choose a folder you may write to",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.ENOENT: "the folder does not exist",
}


@contextmanager
def atomic_write(path: str | os.PathLike[str], shared: bool = False, durable: bool = True) -> Iterator[Path]:
    """Gives a temporary path to write to; when the block ends without an exception it becomes `path`.

    The temporary file is in the same folder (a rename is atomic within one file system only) and its name
    ends in `.tmp`, so that no reader of that folder takes it for a model or a picture. A writer that goes by
    the ending must be told the format.

    Arguments:
        shared: other processes may write the same file at this moment; the last one's stays.
        durable: forced to the disk, milliseconds a file. Without, a machine that loses its power may leave a damaged
            file: for what is checked when it is read, and can be made again.

    Raises:
        UserError: the operating system refused (a full disk, no permission, no such folder). Whatever was at
            `path` before is untouched, and no temporary file is left.
    """
    target = Path(path)
    own = f".{uuid.uuid4().hex}" if shared else ""
    temporary = target.with_name(f".{target.name}{own}.tmp")
    try:
        yield temporary
        if durable:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, target)
        if durable:
            _sync_folder(target.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise UserError(f"{target} was not written: {_reason(error)}") from error
        raise


def write_bytes_atomically(
    path: str | os.PathLike[str], content: bytes, shared: bool = False, durable: bool = True
) -> None:
    """Writes a whole file; see `atomic_write` for the errors, `shared` and `durable`."""
    with atomic_write(path, shared, durable) as temporary:
        temporary.write_bytes(content)


def write_text_atomically(path: str | os.PathLike[str], content: str) -> None:
    """Writes a whole text file in UTF-8, line ends as they are; see `atomic_write` for the errors."""
    write_bytes_atomically(path, content.encode("utf-8"))


def _sync_folder(folder: Path) -> None:
    """Forces the rename itself to the disk, where a folder can be opened (not on Windows)."""
    if os.name != "posix":
        return
    with suppress(OSError):  # the content is safe already; some network file systems refuse this
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _reason(error: OSError) -> str:
    return HINTS.get(error.errno or 0) or error.strerror or str(error)
