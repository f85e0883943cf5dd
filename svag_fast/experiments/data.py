"""Data sets that need no download by this package, whole in memory, and the drawing of batches from them."""

from __future__ import annotations

import gzip
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DIGITS_TRAIN = 1437  # of 1,797: four fifths


@dataclass(frozen=True)
class Dataset:
    """A classification data set, standardised with the mean and deviation of its training pixels.

    Attributes:
        name: the name that `load_dataset` knows.
        train_images: [n, C, H, W] float32.
        train_labels: [n] int64.
        test_images: [m, C, H, W] float32.
        test_labels: [m] int64.
        num_classes: number of classes.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int

    def to(self, device: torch.device | str) -> Dataset:
        """Return the same data set with its tensors on `device`."""
        return Dataset(
            self.name,
            self.train_images.to(device),
            self.train_labels.to(device),
            self.test_images.to(device),
            self.test_labels.to(device),
            self.num_classes,
        )


class DatasetNotFoundError(FileNotFoundError):
    """The files of a data set aren't on this machine; the message says how to get them."""


def load_dataset(name: str) -> Dataset:
    """Load "digits" (scikit-learn's, 1,797 images of 8x8) or "fashion-mnist" (70,000 of 28x28, from IDX files).

    Raises:
        ValueError: no data set has that name.
        DatasetNotFoundError: Fashion-MNIST's files aren't on this machine.
    """
    if name not in _LOADERS:
        raise ValueError(f"no data set is called {name!r}: expected {' or '.join(_LOADERS)}")
    return _LOADERS[name]()


def draw_batch(population: int, batch_size: int, *, replacement: bool, generator: torch.Generator) -> Tensor:
    """Draw the indices [batch_size] of a batch from 0 .. population - 1, fresh at every call.

    Args:
        population: size of the data set.
        batch_size: 1 <= batch_size, and <= population without replacement.
        replacement: independent draws; else all distinct.
        generator: decides the draw.
    """
    if replacement:
        return torch.randint(population, (batch_size,), generator=generator, dtype=torch.int64, device="cpu")
    return torch.randperm(population, generator=generator, dtype=torch.int64, device="cpu")[:batch_size]


def _standardised(
    name: str, train_images: np.ndarray, train_labels: np.ndarray, test_images: np.ndarray, test_labels: np.ndarray
) -> Dataset:
    """Images [n, H, W] of any numeric type to standardised [n, 1, H, W] tensors."""
    mean, deviation = train_images.mean(dtype=np.float64), train_images.std(dtype=np.float64)

    def images(pixels: np.ndarray) -> Tensor:
        return torch.from_numpy(((pixels - mean) / deviation).astype(np.float32)).unsqueeze(1)

    def labels(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int64))

    num_classes = int(train_labels.max()) + 1
    return Dataset(
        name, images(train_images), labels(train_labels), images(test_images), labels(test_labels), num_classes
    )


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # RandomState's stream is frozen by NumPy's policy: the split is the same for ever.
    order = np.random.RandomState(0).permutation(len(digits.target))
    train, test = order[:DIGITS_TRAIN], order[DIGITS_TRAIN:]
    return _standardised("digits", digits.images[train], digits.target[train], digits.images[test], digits.target[test])


def _fashion_mnist() -> Dataset:
    folder = _fashion_mnist_folder()
    return _standardised(
        "fashion-mnist",
        read_idx(folder / "train-images-idx3-ubyte"),
        read_idx(folder / "train-labels-idx1-ubyte"),
        read_idx(folder / "t10k-images-idx3-ubyte"),
        read_idx(folder / "t10k-labels-idx1-ubyte"),
    )


def _fashion_mnist_folder() -> Path:
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


_LOADERS: dict[str, Callable[[], Dataset]] = {"digits": _digits, "fashion-mnist": _fashion_mnist}
