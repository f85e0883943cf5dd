"""Image data sets, whole in memory, from the files that they are published as (docs/data.md).

Nothing here imports torch before it is used: ``config`` reads the table.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from svag_fast.experiments.data import cifar, digits, fashion_mnist, npz, svhn
from svag_fast.experiments.data.dataset import Dataset as Dataset
from svag_fast.experiments.data.dataset import DatasetNotFoundError as DatasetNotFoundError
from svag_fast.experiments.data.dataset import with_label_noise as with_label_noise
from svag_fast.experiments.data.digits import TRAIN_SIZE as DIGITS_TRAIN
from svag_fast.experiments.data.fashion_mnist import read_idx as read_idx
from svag_fast.experiments.data.files import roots
from svag_fast.experiments.data.sampling import draw_batch as draw_batch


class Source(NamedTuple):
    """A row of the table of data sets: what is known of one before it is loaded."""

    train_size: int
    test_size: int
    load: Callable[[Sequence[Path]], Dataset]
    torchvision: str | None = None
    """The class of torchvision.datasets that downloads it."""


DATASETS = {
    "digits": Source(DIGITS_TRAIN, 360, lambda roots: digits.load()),
    "fashion-mnist": Source(60_000, 10_000, fashion_mnist.load, "FashionMNIST"),
    "cifar10": Source(50_000, 10_000, partial(cifar.load, cifar.CIFAR10), "CIFAR10"),
    "cifar100": Source(50_000, 10_000, partial(cifar.load, cifar.CIFAR100), "CIFAR100"),
    "svhn": Source(73_257, 26_032, svhn.load, "SVHN"),
}


def check_name(name: str) -> None:
    """Refuse what can't be a data set: neither a name of the table nor that of an .npz file.

    Raises:
        ValueError: the names that there are.
    """
    if name not in DATASETS and not name.endswith(".npz"):
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)} or FILE.npz, got {name!r}")


def train_size(name: str) -> int | None:
    """Return the number of training images, None where the data set isn't known or its .npz file can't be read."""
    if name in DATASETS:
        return DATASETS[name].train_size
    return npz.train_size(Path(name)) if name.endswith(".npz") else None


def load_dataset(name: str, *, label_noise: float = 0.0, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Load a data set by its name in `DATASETS`, or from an .npz file.

    Args:
        name: of the data set, or the path of a file; see :func:`svag_fast.experiments.data.npz.load`.
        label_noise: the part of the training labels that is redrawn; see :func:`with_label_noise`.
        data_dir: searched before the folders of :func:`svag_fast.experiments.data.files.roots`.

    Raises:
        ValueError: no data set has that name, its files aren't the published ones, or label_noise is not from 0 to 1.
        DatasetNotFoundError: its files aren't on this machine.
    """
    check_name(name)
    if name not in DATASETS:
        return with_label_noise(npz.load(Path(name)), label_noise)
    source = DATASETS[name]
    data = source.load(roots(data_dir))
    found = len(data.train_labels), len(data.test_labels), len(data.train_images), len(data.test_images)
    if found != 2 * (source.train_size, source.test_size):
        raise ValueError(
            f"{name} must be {source.train_size:,} images for training and {source.test_size:,} for the test, got "
            f"{found[2]:,} with {found[0]:,} labels and {found[3]:,} with {found[1]:,}"
        )
    return with_label_noise(data, label_noise)


def download(name: str, data_dir: str | os.PathLike[str]) -> None:
    """Download a data set's files into `data_dir` by torchvision, which leaves whole ones as they are.

    Raises:
        ValueError: torchvision has no such data set.
        DatasetNotFoundError: torchvision isn't installed, or could not download.
    """
    check_name(name)
    kind = DATASETS[name].torchvision if name in DATASETS else None
    if kind is None:
        raise ValueError(f"dataset must be one that torchvision has, where it is downloaded, got {name!r}")
    try:
        import torchvision
    except ImportError as error:
        raise DatasetNotFoundError("a download needs torchvision: pip install 'svag_fast[vision]'") from error
    for training in (True, False):
        part = {"split": "train" if training else "test"} if kind == "SVHN" else {"train": training}
        try:
            getattr(torchvision.datasets, kind)(str(data_dir), download=True, **part)
        except (OSError, RuntimeError) as error:
            raise DatasetNotFoundError(f"{name} could not be downloaded into {data_dir}: {error}") from error
