"""Files that are either wholly there or untouched."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yield a new binary file that takes the place of ``path`` when the block ends, in one step and flushed to disk.

    A block that raises, a full disk, or a process that is killed in the middle leaves ``path`` as it was. The
    temporary file lies in the same folder, its name starts with a dot and ends in ``.tmp``.

    >>> with replace_file("summary.json") as file:  # doctest: +SKIP
    ...     file.write(b"{}")

    Raises:
        OSError: The folder is missing or not writable, or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    # not tempfile, which would make it readable by its owner alone
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that processes killed inside `replace_file` left in ``folder``."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink()


def _sync_folder(folder: Path) -> None:
    """Flush the folder's own entry, without which a power cut could undo the renaming."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
