"""A data set in memory, and how images become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Dataset:
    """A classification data set: images that `standardise` turns into what a net takes, and their labels.

    Attributes:
        name: the name that `load_dataset` knows.
        train_images: [n, C, H, W], float32 already standardised, or uint8.
        train_labels: [n] int64.
        test_images: [m, C, H, W], of the same dtype.
        test_labels: [m] int64.
        num_classes: number of classes.
        pixels: the mean and the deviation of each channel, two tensors [C, 1, 1] float32 in units of the images; None
            where the images are standardised already.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    pixels: tuple[Tensor, Tensor] | None = None

    def to(self, device: torch.device | str) -> Dataset:
        """Return the same data set with its tensors on `device`."""
        return replace(
            self,
            train_images=self.train_images.to(device),
            train_labels=self.train_labels.to(device),
            test_images=self.test_images.to(device),
            test_labels=self.test_labels.to(device),
            pixels=self.pixels and (self.pixels[0].to(device), self.pixels[1].to(device)),
        )

    def standardise(self, images: Tensor) -> Tensor:
        """Return some of the images [..., C, H, W] as float32 of the mean and deviation that a net takes.

        A quarter of the memory is enough for images that are whole numbers, so this is done when a batch is taken, on
        its device. Augmentation comes before, where a black border is 0.
        """
        if self.pixels is None:
            return images
        mean, deviation = self.pixels
        return (images - mean) / deviation

    def standardised(self) -> Dataset:
        """Return the same data set with all images standardised."""
        train, test = self.standardise(self.train_images), self.standardise(self.test_images)
        return replace(self, train_images=train, test_images=test, pixels=None)


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


def of_pixels(
    name: str,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    *,
    num_classes: int,
    mean: Sequence[float],
    deviation: Sequence[float],
) -> Dataset:
    """Return images [n, C, H, W] and their labels as a data set that keeps their dtype, uint8 or float32.

    Args:
        name: of the data set.
        train: images and labels [n] of any integer dtype.
        test: the same for the test.
        num_classes: labels are from 0 to num_classes - 1.
        mean: of each channel, in units of the images.
        deviation: of each channel, above 0.

    Raises:
        ValueError: sizes that don't agree, no image, or a label out of range.
    """
    import torch

    parts = {"training": train, "test": test}
    for part, (images, labels) in parts.items():
        if images.shape[1:] != train[0].shape[1:] or labels.shape != (len(images),) or not len(images):
            raise ValueError(
                f"{name}'s {part} images must be one or more, all of one size, with a label each, got images "
                f"{list(images.shape)} and labels {list(labels.shape)}"
            )
        if labels.min() < 0 or labels.max() >= num_classes:
            wrong = labels.min() if labels.min() < 0 else labels.max()
            raise ValueError(f"{name}'s {part} labels must be from 0 to {num_classes - 1}, got {wrong}")
    tensors = [
        (torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels.astype(np.int64)))
        for images, labels in parts.values()
    ]
    first, second = (
        torch.tensor(values, dtype=torch.float32, device="cpu").reshape(-1, 1, 1) for values in (mean, deviation)
    )
    return Dataset(name, *tensors[0], *tensors[1], num_classes, (first, second))


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
