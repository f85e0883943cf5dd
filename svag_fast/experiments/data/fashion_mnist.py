"""Fashion-MNIST: 70,000 images of 28x28 in ten classes, from IDX files on this machine."""

from __future__ import annotations

import gzip
import os
import sys
from pathlib import Path

import numpy as np

from svag_fast.experiments.data.dataset import Dataset, DatasetNotFoundError, standardised


def load() -> Dataset:
    """Read the four IDX files; `DatasetNotFoundError` says where they may be."""
    folder = _folder()
    return standardised(
        "fashion-mnist",
        read_idx(folder / "train-images-idx3-ubyte"),
        read_idx(folder / "train-labels-idx1-ubyte"),
        read_idx(folder / "t10k-images-idx3-ubyte"),
        read_idx(folder / "t10k-labels-idx1-ubyte"),
    )


def _folder() -> Path:
    shares = [Path(sys.prefix, "share"), Path("/usr/local/share"), Path("/usr/share")]
    folders = [share / "datasets" / "fashion-mnist" for share in shares]
    if data := os.environ.get("SVAG_FAST_DATA"):
        folders.insert(0, Path(data, "fashion-mnist"))
    for folder in folders:
        if any(folder.glob("train-images-idx3-ubyte*")):
            return folder
    raise DatasetNotFoundError(
        f"Fashion-MNIST's IDX files are in none of {', '.join(map(str, folders))}. On Debian or Ubuntu: "
        "apt install dataset-fashion-mnist. Elsewhere: put the four *-ubyte or *-ubyte.gz files into a folder "
        "fashion-mnist and let SVAG_FAST_DATA name the folder above it."
    )


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes (MNIST's format), from `path` or, compressed, from `path`.gz.

    Raises:
        DatasetNotFoundError: neither file is there.
        ValueError: it isn't an IDX file of unsigned bytes, or not whole.
    """
    compressed = path.with_name(path.name + ".gz")
    if path.exists():
        raw = path.read_bytes()
    elif compressed.exists():
        try:
            raw = gzip.decompress(compressed.read_bytes())
        except (gzip.BadGzipFile, EOFError) as error:
            raise ValueError(f"{compressed} is not a whole gzip file: {error}") from error
    else:
        raise DatasetNotFoundError(f"neither {path} nor {compressed} is there")
    dimensions = raw[3] if raw[:3] == b"\0\0\x08" and len(raw) > 3 else 0
    header = 4 + 4 * dimensions
    if not dimensions or len(raw) < header:
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    shape = np.frombuffer(raw, ">u4", dimensions, 4).astype(int)
    if len(raw) - header != shape.prod():
        raise ValueError(f"{path} says it holds {shape.prod()} bytes, but {len(raw) - header} follow its header")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)
