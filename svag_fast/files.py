"""Files that are either wholly there or untouched."""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yield a new binary file that takes the place of ``path`` when the block ends, in one step and flushed to disk.

    A block that raises, a full disk, or a process that is killed in the middle leaves ``path`` as it was. The
    temporary file is in the same folder, its name starts with a dot and ends in ``.tmp``.

    >>> with replace_file("summary.json") as file:  # doctest: +SKIP
    ...     file.write(b"{}")

    Raises:
        OSError: The folder is missing or not writable, or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # as _LEFTOVER has it
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


_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that processes killed inside `replace_file` left in ``folder``, and nothing else."""
    for entry in os.scandir(folder):
        if is_leftover(entry):
            Path(entry).unlink(missing_ok=True)


def is_leftover(entry: os.DirEntry[str]) -> bool:
    """Whether it is a temporary file of `replace_file`."""
    return _LEFTOVER.fullmatch(entry.name) is not None and entry.is_file(follow_symlinks=False)


@contextmanager
def open_regular(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yield the open file ``path``, for files that may come from anywhere: a pipe would be waited on for ever.

    Raises:
        OSError: It can't be read.
        ValueError: It is a folder, a pipe or a device.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(f"{path} is no file, but a folder, a pipe or a device")
    with os.fdopen(handle, "rb") as file:
        yield file


def read_text(path: str | os.PathLike[str], most: int) -> str:
    """Return the UTF-8 text of a file of at most ``most`` bytes, without a byte order mark.

    Raises:
        OSError: It can't be read.
        ValueError: It is too large, no text, or no file.
    """
    with open_regular(path) as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise ValueError(f"{path} is larger than {most:,} bytes, which no file of this kind is")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error.reason} at byte {error.start})") from error


def _sync_folder(folder: Path) -> None:
    """Flush the folder's own entry, without which a power cut could undo the renaming."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
