"""Fashion-MNIST: 70,000 images of 28x28 in ten classes, from IDX files on this machine."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from svag_fast.experiments.data.dataset import Dataset, DatasetNotFoundError, standardised
from svag_fast.experiments.data.files import candidates, not_found

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def load(roots: Sequence[Path]) -> Dataset:
    """Read the four files from the first of `roots` that holds them, as Debian or as torchvision names the folder.

    Their checksums aren't looked at: they are packed again by whoever hands them on.

    Raises:
        DatasetNotFoundError: none does; the message says how to get them.
        ValueError: a file is no IDX file; it is named.
    """
    for folder in candidates(roots, ["fashion-mnist", "FashionMNIST/raw"]):
        if any(folder.glob("train-images-idx3-ubyte*")):
            return standardised("fashion-mnist", *(read_idx(folder / name) for name in FILES))
    advice = (
        "On Debian or Ubuntu: apt install dataset-fashion-mnist. Elsewhere put them into a folder fashion-mnist, or "
    )
    raise not_found("fashion-mnist", ", ".join(FILES), roots, advice + "add --download.")


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
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
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
