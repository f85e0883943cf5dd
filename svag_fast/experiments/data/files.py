"""Where a data set's original files are, and whether they are the published ones."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from svag_fast.experiments.data.dataset import DatasetNotFoundError
from svag_fast.files import open_regular


def roots(data_dir: str | os.PathLike[str] | None = None) -> list[Path]:
    """Return the folders that may hold data sets, in the order in which they are searched.

    These are `data_dir`, what SVAG_FAST_DATA names, `data` here and at home, as in torchvision's examples, and where
    Debian's packages put theirs.
    """
    named = [name for name in (data_dir, os.environ.get("SVAG_FAST_DATA")) if name]
    shares = [Path(sys.prefix, "share"), Path("/usr/local/share"), Path("/usr/share")]
    homes = [Path("data"), Path("~/data").expanduser()]
    return list(dict.fromkeys([*map(Path, named), *homes, *(share / "datasets" for share in shares)]))


def candidates(roots: Sequence[Path], folders: Sequence[str]) -> Iterator[Path]:
    """Yield each root's folders of these names, then the root itself, which may be such a folder."""
    for root in roots:
        yield from (root / folder for folder in folders)
        yield root


def not_found(name: str, files: str, roots: Sequence[Path], advice: str) -> DatasetNotFoundError:
    """Return the error of a data set whose files are in none of the folders."""
    return DatasetNotFoundError(
        f"{name}'s files ({files}) are in none of {', '.join(map(str, roots))}. {advice} Then let --data-dir or "
        "SVAG_FAST_DATA name the folder above them."
    )


def read_original(path: Path, md5: str) -> bytes:
    """Return the bytes of a published file.

    Raises:
        OSError: it can't be read.
        ValueError: its MD5 checksum is another: the file is damaged, or not the published one.
    """
    with open_regular(path) as file:
        raw = file.read()
    found = hashlib.md5(raw, usedforsecurity=False).hexdigest()
    if found != md5:
        raise ValueError(
            f"{path} has the MD5 checksum {found}, and the published file has {md5}: it is damaged or another file. "
            "Remove it and download it again"
        )
    return raw
