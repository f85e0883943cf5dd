"""Runs every Triton launch by its PTX, in the simulator, on CPU tensors."""

from __future__ import annotations

import contextlib
import itertools
import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any
from unittest import mock

import numpy as np
import torch
from ptx.driver import Launch, as_a_gpu
from ptx.machine import Machine
from ptx.memory import GlobalMemory, extent
from ptx.parser import Program, parse
from torch import Tensor

# Lanes that run as one vector: more pay the interpreter's time an instruction for more threads.
_LANES = 4096


class Simulator:
    """Runs launches, and counts them. ``change`` may make another program of a kernel's before it runs."""

    def __init__(self, seed: int = 0, change: Callable[[Launch, Program], Program] | None = None) -> None:
        self.launches: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self._random, self._change = random.Random(seed), change
        self._listed: list[Tensor] = []
        self._fresh: dict[int, tuple[Tensor, Any]] = {}

    def launch(self, launch: Launch) -> None:
        program = _parsed(launch.ptx)
        if self._change is not None:
            program = self._change(launch, program)
        blocks = list(itertools.product(*map(range, launch.grid)))
        self._random.shuffle(blocks)
        memory = GlobalMemory(len(blocks))
        values = []
        for name, value in launch.arguments.items():
            if isinstance(value, Tensor):
                self._add(memory, name, value)
            values.append(_bits(value))
        for tensor in self._listed:
            self._add(memory, "a listed tensor", tensor)
        # Triton's own parameters at the end: no scratch memory is asked for.
        values += [0] * (len(program.parameters) - len(values))
        clock, together = 0, max(1, _LANES // program.threads)
        for first in range(0, len(blocks), together):
            some = blocks[first : first + together]
            machine = Machine(program, values, launch.grid, some, first, memory, launch.shared, clock)
            machine.run()
            clock = machine.clock
            self.counts.update(machine.counts)
        self.launches[launch.kernel] += 1
        self.counts["instructions"] += clock

    def _add(self, memory: GlobalMemory, name: str, tensor: Tensor) -> None:
        written = self._fresh.get(tensor.untyped_storage().data_ptr(), (None, None))[1]
        if written is not None:
            written = written[tensor.storage_offset() * tensor.element_size() :][: extent(tensor)]
        memory.add(name, tensor, written)

    def empty(self, *arguments: Any, **options: Any) -> Tensor:
        """torch.empty, of which it is known that nothing wrote it."""
        tensor = _empty(*arguments, **options)
        storage = tensor.untyped_storage()
        self._fresh[storage.data_ptr()] = tensor, np.zeros(storage.nbytes(), bool)
        return tensor

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Take over Triton's launches, the allocations of the kernels' own module, and the lists of the steps."""
        from svag_fast.kernels import step, weight_grad

        table = step._table

        def listed(*tensors: Any, **options: Any) -> Any:
            self._listed = [t for some in tensors for t in some or []]
            return table(*tensors, **options)

        with as_a_gpu(self.launch), contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(step, "_table", listed))
            for module in (step, weight_grad):
                stack.enter_context(mock.patch.object(module, "torch", _Torch(self.empty)))
            yield


_empty = torch.empty


class _Torch:
    """torch, but for one function."""

    def __init__(self, empty: Callable[..., Tensor]) -> None:
        self.empty = empty

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@lru_cache(maxsize=64)
def _parsed(ptx: str) -> Program:
    return parse(ptx)


def _bits(value: Tensor | int | float) -> int:
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, float):
        return int(struct.unpack("<I", struct.pack("<f", value))[0])
    return int(value)
