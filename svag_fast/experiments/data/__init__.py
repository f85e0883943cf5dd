"""Data sets that need no download by this package, whole in memory, and the drawing of batches from them.

Nothing here imports torch before it is used: ``config`` reads the table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from svag_fast.experiments.data import digits, fashion_mnist
from svag_fast.experiments.data.dataset import Dataset as Dataset
from svag_fast.experiments.data.dataset import DatasetNotFoundError as DatasetNotFoundError
from svag_fast.experiments.data.dataset import with_label_noise as with_label_noise
from svag_fast.experiments.data.digits import TRAIN_SIZE as DIGITS_TRAIN
from svag_fast.experiments.data.fashion_mnist import read_idx as read_idx

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Source(NamedTuple):
    """A row of the table of data sets: what is known of one before it is loaded."""

    train_size: int
    load: Callable[[], Dataset]


DATASETS = {
    "digits": Source(DIGITS_TRAIN, digits.load),
    "fashion-mnist": Source(60_000, fashion_mnist.load),
}
TRAIN_SIZES = {name: source.train_size for name, source in DATASETS.items()}


def load_dataset(name: str, *, label_noise: float = 0.0) -> Dataset:
    """Load a data set by its name in `DATASETS`.

    Args:
        name: of the data set.
        label_noise: the part of the training labels that is redrawn; see :func:`with_label_noise`.

    Raises:
        ValueError: no data set has that name, or label_noise is not from 0 to 1.
        DatasetNotFoundError: its files aren't on this machine.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset must be {' or '.join(DATASETS)}, got {name!r}")
    return with_label_noise(DATASETS[name].load(), label_noise)


def draw_batch(population: int, batch_size: int, *, replacement: bool, generator: torch.Generator) -> Tensor:
    """Draw the indices [batch_size] of a batch from 0 .. population - 1, fresh at every call.

    Args:
        population: size of the data set.
        batch_size: 1 <= batch_size, and <= population without replacement.
        replacement: independent draws; else all distinct.
        generator: decides the draw.
    """
    import torch

    if replacement:
        return torch.randint(population, (batch_size,), generator=generator, dtype=torch.int64, device="cpu")
    return torch.randperm(population, generator=generator, dtype=torch.int64, device="cpu")[:batch_size]
