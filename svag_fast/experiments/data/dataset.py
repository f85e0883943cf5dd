"""A data set in memory, and how images become one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor


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


def standardised(
    name: str, train_images: np.ndarray, train_labels: np.ndarray, test_images: np.ndarray, test_labels: np.ndarray
) -> Dataset:
    """Return images [n, H, W] of any numeric type as standardised [n, 1, H, W] tensors."""
    import torch

    # Of the training pixels alone: the test set must not tell the model anything. In float64, since 60,000 images are
    # more pixels than float32 can count.
    mean, deviation = train_images.mean(dtype=np.float64), train_images.std(dtype=np.float64)

    def images(pixels: np.ndarray) -> Tensor:
        return torch.from_numpy(((pixels - mean) / deviation).astype(np.float32)).unsqueeze(1)

    def labels(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int64))

    num_classes = int(train_labels.max()) + 1
    return Dataset(
        name, images(train_images), labels(train_labels), images(test_images), labels(test_labels), num_classes
    )


def with_label_noise(dataset: Dataset, part: float) -> Dataset:
    """Return the data set with a part of its training labels redrawn uniformly from all classes, their own among them.

    Which ones, and what they become, is the same at every call. The test labels stay.

    Args:
        dataset: a data set.
        part: of the training labels, from 0 to 1.

    Raises:
        ValueError: part is not from 0 to 1.
    """
    import torch

    if not 0 <= part <= 1:
        raise ValueError(f"label_noise must be a number from 0 to 1, got {part}")
    # RandomState's stream is frozen by NumPy's policy.
    random = np.random.RandomState(1)
    labels = dataset.train_labels.clone()
    redrawn = torch.from_numpy(random.permutation(len(labels))[: round(part * len(labels))]).to(labels.device)
    drawn = random.randint(dataset.num_classes, size=len(redrawn)).astype(np.int64)
    labels[redrawn] = torch.from_numpy(drawn).to(labels.device)
    return replace(dataset, train_labels=labels)
