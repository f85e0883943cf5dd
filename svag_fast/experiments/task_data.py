"""A task's data on a device: any samples of it as one batch, by their numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import Dataset, default_collate


class TaskData:
    """Samples by number.

    Args:
        data: a tensor, a tuple of tensors, or a map-style Dataset; see :class:`svag_fast.experiments.task.Task`.
        collate: makes a batch of a list of a Dataset's items.
        device: where batches go; tensors go there at once, as a whole.
    """

    def __init__(self, data: Any, collate: Callable[[list[Any]], Any] | None, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.collate = collate or default_collate
        self.data = data if isinstance(data, Dataset) else tree_map(self._there, data)

    def _there(self, tensor: Tensor) -> Tensor:
        # Detached: data that asks for a gradient would get one at every step.
        return tensor.detach().to(self.device)

    def __len__(self) -> int:
        if isinstance(self.data, Dataset):
            return len(self.data)  # type: ignore[arg-type]
        return len(self.data if isinstance(self.data, Tensor) else self.data[0])

    def take(self, indices: Tensor) -> Any:
        """Return the samples [k] of these numbers as a batch on the device."""
        if isinstance(self.data, Dataset):
            return self._moved(self.collate([self.data[i] for i in indices.tolist()]))
        # A blocking copy would wait for the step before. From memory that isn't pinned, as here, the other kind has
        # read everything too when it returns.
        there = indices.to(self.device, non_blocking=True)
        return tree_map(lambda tensor: tensor[there], self.data)

    def slices(self, size: int, limit: int | None) -> list[Any]:
        """Return the numbers of all samples, or of the first `limit`, in batches of `size`."""
        count = len(self) if limit is None else min(limit, len(self))
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    def part(self, numbers: range) -> Any:
        """Return samples that follow each other as a batch on the device."""
        if isinstance(self.data, Dataset):
            return self._moved(self.collate([self.data[i] for i in numbers]))
        # Not a view, as of a model that works in place.
        return tree_map(lambda tensor: tensor[numbers.start : numbers.stop].clone(), self.data)

    def _moved(self, batch: Any) -> Any:
        return tree_map(lambda x: self._there(x) if isinstance(x, Tensor) else x, batch)


def rows_of(batch: Any) -> int | None:
    """Return the number of samples in a batch: the length of its first tensor; None where it has none."""
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()]
    return len(tensors[0]) if tensors else None
