"""CIFAR-10 and CIFAR-100: 60,000 colour images of 32x32, from the files that they are published as (Krizhevsky, 2009).

That is the folder `cifar-10-batches-py` or `cifar-100-python` that torchvision unpacks, or the .tar.gz that holds it.
"""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from svag_fast.experiments.data import safe_pickle
from svag_fast.experiments.data.dataset import Dataset, of_pixels
from svag_fast.experiments.data.files import candidates, not_found, read_original

# The authors' of CIFAR-10, which they use for CIFAR-100 too; of pixels from 0 to 1.
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


@dataclass(frozen=True)
class Version:
    """A published version.

    Attributes:
        name: the name that `load_dataset` knows.
        folder: that holds the batches, with or without the archive.
        archive: name of the .tar.gz.
        archive_md5: its checksum; all are those that torchvision publishes.
        train: the training batches in order, file name to checksum.
        test: the same for the test.
        labels: key of the labels in a batch.
        num_classes: number of classes.
    """

    name: str
    folder: str
    archive: str
    archive_md5: str
    train: Mapping[str, str]
    test: Mapping[str, str]
    labels: bytes
    num_classes: int


CIFAR10 = Version(
    "cifar10",
    "cifar-10-batches-py",
    "cifar-10-python.tar.gz",
    "c58f30108f718f92721af3b95e74349a",
    {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    },
    {"test_batch": "40351d587109b95175f43aff81a1287e"},
    b"labels",
    10,
)
CIFAR100 = Version(
    "cifar100",
    "cifar-100-python",
    "cifar-100-python.tar.gz",
    "eb9058c3a382ffc7106e4002c42a8d85",
    {"train": "16019d7e3df5f24257cddd939b257f8d"},
    {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    b"fine_labels",
    100,
)


def load(version: Version, roots: Sequence[Path]) -> Dataset:
    """Read the batches from the first of `roots` that holds their folder or their archive.

    Raises:
        DatasetNotFoundError: none does; the message says how to get them.
        OSError: a file can't be read, or a part of the folder is missing.
        ValueError: a checksum is wrong, or a file is no batch; it is named.
    """
    for folder in candidates(roots, [version.folder]):
        archive, files = folder / version.archive, {**version.train, **version.test}
        if (folder / next(iter(files))).is_file():
            return _dataset(version, {name: read_original(folder / name, md5) for name, md5 in files.items()}, folder)
        if archive.is_file():
            return _dataset(version, _unpacked(archive, version.archive_md5, version.folder, list(files)), archive)
    advice = f"Download {version.archive} from https://www.cs.toronto.edu/~kriz/cifar.html, or add --download."
    raise not_found(version.name, f"{version.folder} or {version.archive}", roots, advice)


def _unpacked(path: Path, md5: str, folder: str, files: Sequence[str]) -> dict[str, bytes]:
    """The archive's files. In memory: nothing goes onto the disk, wherever the archive says that it belongs."""
    unpacked = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(read_original(path, md5))) as tar:
            for name in files:
                file = tar.extractfile(f"{folder}/{name}")
                unpacked[name] = file.read() if file else b""
    except (KeyError, EOFError, zlib.error, tarfile.TarError) as error:
        raise ValueError(f"{path} must be an archive of {', '.join(files)} in {folder}: {error}") from error
    return unpacked


def _dataset(version: Version, batches: Mapping[str, bytes], source: Path) -> Dataset:
    parts = []
    for files in (version.train, version.test):
        read = [_batch(batches[name], version, f"{source}: {name}") for name in files]
        images, labels = (np.concatenate(arrays) for arrays in zip(*read, strict=True))
        parts.append((images, labels))
    mean, deviation = ([255 * value for value in values] for values in (MEAN, DEVIATION))
    return of_pixels(version.name, *parts, num_classes=version.num_classes, mean=mean, deviation=deviation)


def _batch(raw: bytes, version: Version, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Images [n, 3, 32, 32] uint8 and labels [n] int64 of one file."""
    try:
        content: Any = safe_pickle.loads(raw)
    except ValueError as error:
        raise ValueError(f"{where} is no batch: {error}") from error
    images, labels = (content.get(key) if isinstance(content, dict) else None for key in (b"data", version.labels))
    if not (
        isinstance(images, np.ndarray)
        and images.shape[1:] == (3 * 32 * 32,)
        and isinstance(labels, list)
        and len(labels) == len(images)
        and all(type(label) is int and abs(label) < 1 << 31 for label in labels)
    ):
        text = version.labels.decode()
        raise ValueError(f"{where} must hold data, bytes [n, 3072], and {text}, a list of n integers")
    return images.reshape(-1, 3, 32, 32), np.array(labels, dtype=np.int64)
