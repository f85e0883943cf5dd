"""Your own images: an .npz file of the arrays x_train, y_train, x_test and y_test."""

from __future__ import annotations

import zipfile
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np

from svag_fast.experiments.data.dataset import Dataset, DatasetNotFoundError, of_pixels

NAMES = ("x_train", "y_train", "x_test", "y_test")


def load(path: Path) -> Dataset:
    """Read a file that `numpy.savez(path, x_train=..., y_train=..., x_test=..., y_test=...)` wrote.

    Images are [n, H, W], [n, C, H, W] or [n, H, W, C], C 1 or 3. They are standardised, channel by channel, by the mean
    and deviation of the training images. uint8 stays so in memory, all else becomes float32. Labels are integers [n] or
    [n, 1] from 0. Objects, which only a pickle could hold, are refused.

    Raises:
        DatasetNotFoundError: there is no such file.
        ValueError: an array is missing or not of this kind; file and array are named.
    """
    arrays = _arrays(path, NAMES)
    x_train, x_test = (_images(path, name, arrays[name]) for name in ("x_train", "x_test"))
    y_train, y_test = (_labels(path, name, arrays[name]) for name in ("y_train", "y_test"))
    if not x_train.size:
        raise ValueError(f"{path}: x_train must hold images, got {list(x_train.shape)}")
    if x_train.dtype != x_test.dtype:  # bytes to 255 and numbers to 1 would be standardised alike
        of = (arrays[name].dtype for name in ("x_train", "x_test"))
        raise ValueError(f"{path}: x_train and x_test must both be uint8 or neither, got {' and '.join(map(str, of))}")
    mean, deviation = _moments(x_train)
    if not (deviation > 0).all():
        raise ValueError(f"{path}: x_train must not be the same everywhere in a channel")
    classes = int(y_train.max(initial=0)) + 1
    if classes > len(x_train):  # each class is an output of the net
        expected = f"labels below {len(x_train)}, its number of images"
        raise ValueError(f"{path}: y_train must hold {expected}, got {classes - 1}")
    return of_pixels(
        str(path), (x_train, y_train), (x_test, y_test), num_classes=classes, mean=mean.tolist(),
        deviation=deviation.tolist(),
    )  # fmt: skip


def train_size(path: Path) -> int | None:
    """Return the number of training images, None where the file can't be read."""
    try:
        stat = path.stat()
        return _train_size(path, stat.st_mtime_ns, stat.st_size)
    except (OSError, ValueError):
        return None


@lru_cache(maxsize=8)
def _train_size(path: Path, modified: int, size: int) -> int:
    return len(_arrays(path, ("y_train",))["y_train"])


def _arrays(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise DatasetNotFoundError(f"there is no file {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: np.asarray(file[name]) for name in names if name in getattr(file, "files", ())}
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} must be an .npz file of the arrays {', '.join(NAMES)}: {error}") from error
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"{path} must be an .npz file of the arrays {', '.join(NAMES)}: it lacks {', '.join(missing)}")
    return found


def _images(path: Path, name: str, images: np.ndarray) -> np.ndarray:
    """[n, C, H, W], uint8 or float32."""
    if images.dtype.kind not in "uif" or images.ndim not in (3, 4):
        raise ValueError(f"{path}: {name} must be numbers [n, H, W], [n, C, H, W] or [n, H, W, C], got {_of(images)}")
    if images.ndim == 3:
        images = images[:, None]
    elif (images.shape[1] in (1, 3)) == (images.shape[3] in (1, 3)):
        raise ValueError(f"{path}: {name} must have 1 or 3 channels, before or behind H and W, got {_of(images)}")
    elif images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.dtype == np.uint8:
        return images
    with np.errstate(over="ignore"):  # refused below
        images = images.astype(np.float32)
    if not np.isfinite(images).all():
        raise ValueError(f"{path}: {name} must be finite in float32")
    return images


def _moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each channel in float64, some images at a time: a copy in float64 may not fit."""
    parts = np.array_split(images, len(images) // 1000 + 1)
    count = images[:, 0].size
    mean = sum(part.sum(axis=(0, 2, 3), dtype=np.float64) for part in parts) / count
    centred = (part - mean[:, None, None] for part in parts)
    return mean, np.sqrt(sum((part * part).sum(axis=(0, 2, 3)) for part in centred) / count)


def _labels(path: Path, name: str, labels: np.ndarray) -> np.ndarray:
    if labels.dtype.kind not in "ui" or labels.ndim not in (1, 2) or labels.shape[1:] not in ((), (1,)):
        raise ValueError(f"{path}: {name} must be integers [n], got {_of(labels)}")
    return labels.reshape(-1)


def _of(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"
