"""The global random generators, and a task's, as one run's own: seeded for it, and put back for everybody else."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from svag_fast.experiments.own_generators import own_generators, put_back, seed_generators, state_of
from svag_fast.numeric import must_be


class OwnRandom:
    """torch's generators (of the CPU and the run's GPU), Python's and NumPy's, for what a task draws from them.

    Args:
        seed: of all of them.
        device: the run's.
        parts: what a task is made of; generators that it holds are the run's own like the global ones.
    """

    def __init__(self, seed: int, device: torch.device | str, *parts: Any) -> None:
        self._device = torch.device(device)
        self._parts, self._own = parts, own_generators(*parts)
        self._state: dict[str, Any] = {}
        self.seed(seed)

    def look_into(self, model: Any) -> None:
        """Let generators that a model holds be the run's own as well, from the next `seed` on."""
        self._own = own_generators(*self._parts, model)
        self._state["own"] = [state_of(generator) for generator in self._own]

    def seed(self, seed: int) -> None:
        """Begin again from a seed."""
        before = self._read()
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        seed_generators(self._own, seed)
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

    def stands_at(self, state: dict[str, Any]) -> bool:
        """Whether nothing was drawn since `state_dict` gave this."""
        return _same(self._state, state)

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
        state["own"] = [state_of(generator) for generator in self._own]
        return state

    def _write(self, state: dict[str, Any]) -> None:
        kind, keys, *rest = state["numpy"]
        own = state.get("own", [])
        if len(own) != len(self._own):
            raise ValueError(must_be("the task", f"one of {len(own)} generators of its own", f"{len(self._own)}"))
        torch.set_rng_state(state["torch"])
        random.setstate(state["python"])
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self._device)
        for generator, where in zip(self._own, own, strict=True):
            put_back(generator, where)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(part, other[name]) for name, part in one.items())
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)
