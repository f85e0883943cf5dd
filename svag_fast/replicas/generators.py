"""The generators that all replicas would share: whether something drew from them, and back again."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch


class Generators(NamedTuple):
    """Where the global generators of torch, Python and NumPy stand."""

    torch: tuple[bytes, ...]
    python: tuple[Any, ...]
    numpy: tuple[Any, ...]
    gpus: tuple[int, ...]

    @classmethod
    def now(cls, gpus: Iterable[int] = ()) -> Generators:
        """Return where they stand, torch's of these GPUs too; equal where nothing was drawn in between."""
        gpus = tuple(gpus)
        states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(index) for index in gpus)]
        kind, keys, *rest = np.random.get_state(legacy=True)
        numpy = (kind, tuple(np.asarray(keys).tolist()), *rest)
        return cls(tuple(state.numpy().tobytes() for state in states), random.getstate(), numpy, gpus)

    def restore(self) -> None:
        """Put them there again."""
        first, *others = (torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in self.torch)
        torch.set_rng_state(first)
        for index, state in zip(self.gpus, others, strict=True):
            torch.cuda.set_rng_state(state, index)
        random.setstate(self.python)
        np.random.set_state(self.numpy)
