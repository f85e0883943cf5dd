"""Runs every Triton launch by its PTX, in the simulator, on CPU tensors."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
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

Part = tuple[str, int, int, "np.ndarray[Any, Any] | None"]
"""Of global memory: a tensor's name, its address and bytes, and which of them are written; None: all."""


class Simulator:
    """Runs launches, and counts them. ``change`` may make another program of a kernel's before it runs.

    ``most``: instructions of a launch, beyond which it is said not to end.
    """

    def __init__(
        self, seed: int = 0, change: Callable[[Program], Program] = lambda program: program, most: float = math.inf
    ) -> None:
        self.launches: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.executed: set[tuple[str, int]] = set()  # kernels and places of their instructions
        self._random, self._change, self._most = random.Random(seed), change, most
        self._listed: list[Tensor] = []
        self._fresh: dict[int, tuple[Tensor, Any]] = {}

    def launch(self, launch: Launch) -> None:
        """Run a launch of Triton's."""
        program = _parsed(launch.ptx)
        named = [(n, v) for n, v in launch.arguments.items() if isinstance(v, Tensor)]
        spans = [self._span(name, t) for name, t in (*named, *(("a listed tensor", t) for t in self._listed))]
        # Triton's own parameters at the end: no scratch memory is asked for.
        values = list(map(_bits, launch.arguments.values()))
        values += [0] * (len(program.parameters) - len(values))
        parameters = [
            (v % 2**64).to_bytes(8, "little")[: p.size] for p, v in zip(program.parameters, values, strict=True)
        ]
        self.run(launch.kernel, program, launch.grid, parameters, spans, launch.shared)

    def run(
        self,
        kernel: str,
        program: Program,
        grid: tuple[int, int, int],
        parameters: Sequence[bytes],
        spans: Iterable[Part],
        shared: int = 0,
    ) -> None:
        """Run a grid, its blocks in an order of chance; ``spans``: what it may touch of global memory."""
        program = self._change(program)
        blocks = list(itertools.product(*map(range, grid)))
        self._random.shuffle(blocks)
        memory = GlobalMemory(len(blocks), program.unit("global"))
        for span in spans:
            memory.add(*span)
        clock, together = 0, max(1, _LANES // program.threads)
        for first in range(0, len(blocks), together):
            some = blocks[first : first + together]
            machine = Machine(program, parameters, grid, some, first, memory, shared, clock, self._most)
            machine.run()
            clock = machine.clock
            self.counts.update(machine.counts)
            self.executed |= {(program.name, place) for place in machine.executed}
        self.launches[kernel] += 1
        self.counts["instructions"] += clock

    def _span(self, name: str, tensor: Tensor) -> Part:
        written = self._fresh.get(tensor.untyped_storage().data_ptr(), (None, None))[1]
        if written is not None:
            written = written[tensor.storage_offset() * tensor.element_size() :][: extent(tensor)]
        return name, tensor.data_ptr(), extent(tensor), written

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
