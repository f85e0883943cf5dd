"""SVHN: 99,289 colour images of 32x32 of house numbers, from the .mat files that it is published as (Netzer, 2011)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from svag_fast.experiments.data.dataset import Dataset, of_pixels
from svag_fast.experiments.data.files import candidates, not_found, read_original

# The files for training and for the test with the checksums that torchvision publishes.
FILES = {
    "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
    "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
}
MEAN = DEVIATION = (127.5, 127.5, 127.5)  # the authors', 0.5 of pixels from 0 to 1


def load(roots: Sequence[Path], files: Mapping[str, str] = FILES) -> Dataset:
    """Read both files from the first of `roots` that holds them, itself or in a folder svhn or SVHN.

    Raises:
        DatasetNotFoundError: none does; the message says how to get them.
        OSError: a file can't be read, or is missing.
        ValueError: a checksum is wrong, or a file isn't SVHN's; it is named.
    """
    for folder in candidates(roots, ["svhn", "SVHN"]):
        if (folder / next(iter(files))).is_file():
            train, test = (_part(folder / name, md5) for name, md5 in files.items())
            return of_pixels("svhn", train, test, num_classes=10, mean=MEAN, deviation=DEVIATION)
    advice = "Download them from http://ufldl.stanford.edu/housenumbers, or add --download."
    raise not_found("svhn", ", ".join(files), roots, advice)


def _part(path: Path, md5: str) -> tuple[np.ndarray, np.ndarray]:
    """Images [n, 3, 32, 32] uint8 and labels [n] of one file."""
    from scipy.io import loadmat

    raw = read_original(path, md5)
    try:
        content = loadmat(io.BytesIO(raw), variable_names=("X", "y"))
        images, labels = content["X"], content["y"].reshape(-1).astype(np.int64)
    except Exception as error:  # whatever foreign bytes lead the parser to
        raise ValueError(f"{path} is no MATLAB file of X and y ({error!r})") from error
    if images.dtype != np.uint8 or images.shape != (32, 32, 3, len(labels)):
        raise ValueError(
            f"{path} must hold X, bytes [32, 32, 3, n], and y, n labels, got {images.dtype} {images.shape}"
        )
    # The file numbers the digit 0 as 10.
    return images.transpose(3, 2, 0, 1), np.where(labels == 10, 0, labels)
