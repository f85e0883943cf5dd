"""The global random generators as one run's own: seeded for it, and put back for everybody else."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class OwnRandom:
    """torch's generators (of the CPU and the run's GPU), Python's and NumPy's, for what a task draws from them.

    Args:
        seed: of all of them.
        device: the run's.
    """

    def __init__(self, seed: int, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._state: dict[str, Any] = {}
        self.seed(seed)

    def seed(self, seed: int) -> None:
        """Begin again from a seed."""
        before = self._read()
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        self._state = self._read()
        self._write(before)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Context in which the generators are the run's; behind it they are as before it."""
        before = self._read()
        self._write(self._state)
        try:
            yield
        finally:
            self._state = self._read()
            self._write(before)

    def state_dict(self) -> dict[str, Any]:
        """Return where they stand: tensors and plain Python."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError: it is none of these.
        """
        before = self._read()
        try:
            self._write(state)
            self._state = self._read()
        finally:
            self._write(before)

    def _read(self) -> dict[str, Any]:
        kind, keys, *rest = np.random.get_state(legacy=True)
        numbers = torch.from_numpy(np.asarray(keys).astype(np.int64))
        state: dict[str, Any] = {
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": (kind, numbers, *rest),
        }
        if self._device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self._device)
        return state

    def _write(self, state: dict[str, Any]) -> None:
        kind, keys, *rest = state["numpy"]
        torch.set_rng_state(state["torch"])
        random.setstate(state["python"])
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self._device)
