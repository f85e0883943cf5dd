"""Global and shared memory that watch over who reads and writes each unit of bytes, and when.

Two threads that touch the same bytes, one of them writing, need an order: a barrier of the block between them, or of
the warp where they are of one; two blocks need a release by the one and an acquire by the other. Whatever order the
simulator runs them in, a missing one is a fault. But who reads global memory is not kept: a write over what another
thread has read there is not seen.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ptx.arithmetic import UNSIGNED
from torch import Tensor

Array = NDArray[Any]


class FaultError(AssertionError):
    """What the kernel must not do; the message begins with the kernel and its instruction."""


@dataclass
class Who:
    """The lanes of one access: block, thread in it, the time of its last barrier with its warp or block; the time now.

    Times are counts of instructions. A block's number is among those that run together for shared memory, else the
    grid's.
    """

    block: Array
    thread: Array
    warp_sync: Array
    block_sync: Array
    now: int

    def __getitem__(self, chosen: Array) -> Who:
        return Who(*(a[chosen] for a in (self.block, self.thread, self.warp_sync, self.block_sync)), self.now)

    def unordered(self, thread: Array, when: Array) -> Array:
        """Whether what threads of the same block did at those times had no barrier since; ``[lanes, units]``."""
        mine = self.thread[:, None]
        fresh: Array = when >= self.block_sync[:, None]
        if fresh.any():
            fresh &= (thread != mine) & ((_warp(thread) != mine >> 5) | (when >= self.warp_sync[:, None]))
        return fresh


# Of the threads that read something: one, several of warp w (-1 - w), or of several warps.
_MANY = -1000


def _warp(thread: Array) -> Array:
    return np.where(thread < 0, -1 - thread, thread >> 5)


@dataclass
class Span:
    """The bytes of a live tensor, and what this launch did to them. ``written``: None where all of it always was."""

    name: str
    start: int
    data: Array
    unit: int
    written: Array | None = None
    block: Array = field(init=False)
    thread: Array = field(init=False)
    when: Array = field(init=False)

    def __post_init__(self) -> None:
        self.end = self.start + self.data.nbytes
        self.unit = math.gcd(self.unit, self.start, self.data.nbytes)
        self.data = self.data.view(UNSIGNED[self.unit])
        self.block = np.full(0, -1, np.int32)

    def watch(self) -> None:
        if not self.block.size:
            size = len(self.data)
            self.block, self.thread = np.full(size, -1, np.int32), np.zeros(size, np.int32)
            self.when = np.zeros(size, int)

    def places(self, address: Array, size: int) -> Array:
        return ((address - self.start) // self.unit)[:, None] + np.arange(size // self.unit)

    def unwritten(self, places: Array) -> bool:
        return self.written is not None and not self.written.reshape(-1, self.unit)[:, 0][places].all()

    def mark_written(self, places: Array) -> None:
        if self.written is not None:
            self.written.reshape(-1, self.unit)[places] = True


def extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first to its last element."""
    if tensor.numel() == 0:
        return 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


class GlobalMemory:
    """The live tensors of one launch. ``released[b]``, ``acquired[b]``: until when others see b's writes, b others'.

    ``unit``: bytes, no more than any access has.
    """

    def __init__(self, blocks: int, unit: int = 1) -> None:
        self.spans: list[Span] = []
        self.unit = unit
        self.barrier = np.zeros(blocks, int)  # when each block's last barrier was
        self.released = np.full(blocks, -1)
        self.release_time = np.full(blocks, -1)
        self.acquired = np.full(blocks, -1)

    def add(self, name: str, start: int, size: int, written: Array | None = None) -> None:
        if size and not any(s.start <= start and start + size <= s.end for s in self.spans):
            data = np.frombuffer((ctypes.c_ubyte * size).from_address(start), np.uint8)
            self.spans.append(Span(name, start, data, self.unit, written))

    def _parts(self, address: Array, size: int, at: str) -> list[tuple[Span, Array]]:
        """Return for each span that is met which of the lanes meet it."""
        if (address % size).any():
            raise FaultError(f"{at}: global access of {size} bytes that is not aligned")
        left, found = np.ones(len(address), bool), []
        if not left.size:
            return found
        for span in self.spans:
            inside = left & (address >= span.start) & (address + size <= span.end)
            if inside.any():
                found.append((span, inside))
                left &= ~inside
                if not left.any():
                    return found
        lane = int(address[left][0])
        near = min(self.spans, key=lambda s: max(s.start - lane, lane - s.end), default=None)
        where = f", {lane - near.start} of {near.end - near.start} bytes of {near.name}" if near else ""
        raise FaultError(f"{at}: outside every live tensor{where}")

    def _raced(self, span: Span, places: Array, who: Who, kind: str, at: str) -> None:
        if not span.block.size:
            return
        block = span.block[places]
        if (block < 0).all():
            return
        when, mine = span.when[places], who.block[:, None]
        other = (block != mine) | who.unordered(span.thread[places], when)
        seen = (when < self.released[block]) & (self.release_time[block] <= self.acquired[mine])
        if ((block >= 0) & other & ~seen).any():
            raise FaultError(f"{at}: {kind} of {span.name} that another thread wrote in this launch, unordered")

    def read(self, address: Array, size: int, who: Who, at: str) -> Array:
        out = np.empty((len(address), size), np.uint8)
        for span, chosen in self._parts(address, size, at):
            places = span.places(address[chosen], size)
            if span.unwritten(places):
                raise FaultError(f"{at}: {span.name} is read where nothing wrote it")
            self._raced(span, places, who[chosen], "read", at)
            out[chosen] = span.data[places].view(np.uint8)
        return out

    def write(self, address: Array, data: Array, who: Who, at: str) -> None:
        for span, chosen in self._parts(address, data.shape[1], at):
            some, places = who[chosen], span.places(address[chosen], data.shape[1])
            span.watch()
            self._raced(span, places, some, "write", at)
            values = data[chosen].view(span.data.dtype)
            span.data[places], span.when[places] = values, who.now
            span.block[places], span.thread[places] = some.block[:, None], some.thread[:, None]
            if (span.block[places] != some.block[:, None]).any():
                raise FaultError(f"{at}: two blocks write the same byte of {span.name}")
            if (span.data[places] != values).any():
                raise FaultError(f"{at}: two threads write different values to {span.name} at once")
            span.mark_written(places)

    def update(self, address: int, change: Callable[[Any], Any], kind: np.dtype[Any], at: str) -> Any:
        """Atomically; atomics race with nothing."""
        ((span, _),) = self._parts(np.array([address]), kind.itemsize, at)
        places = span.places(np.array([address]), kind.itemsize)[0]
        if span.unwritten(places):
            raise FaultError(f"{at}: {span.name} is read where nothing wrote it")
        old = span.data[places].view(kind)[0]
        span.data[places] = np.frombuffer(kind.type(change(old)).tobytes(), span.data.dtype)
        return old

    def synchronise(self, block: int, now: int, release: bool, acquire: bool) -> None:
        """An atomic of the block: what it wrote before its last barrier is seen by whoever acquires from now on."""
        if release:
            self.released[block], self.release_time[block] = self.barrier[block], now
        if acquire:
            self.acquired[block] = now


class SharedMemory:
    """The shared memory of several blocks, one behind the other; ``unit``: bytes, no more than any access has."""

    def __init__(self, blocks: int, size: int, unit: int = 1) -> None:
        unit = math.gcd(unit, size)
        self.size, self.unit = size, unit
        total = blocks * size // unit
        self.data = np.zeros(total, UNSIGNED[unit])
        self.written = np.zeros(total, bool)
        self.pending = np.zeros(total, np.int16)  # asynchronous copies under way to a unit
        self.write_thread, self.write_when = np.zeros(total, np.int32), np.full(total, -1)
        self.read_threads, self.read_when = np.zeros(total, np.int32), np.full(total, -1)

    def _places(self, address: Array, size: int, who: Who, at: str) -> Array:
        if (address < 0).any() or (address + size > self.size).any():
            raise FaultError(f"{at}: outside the {self.size} bytes of shared memory")
        if (address % size).any():
            raise FaultError(f"{at}: shared access of {size} bytes that is not aligned")
        places: Array = ((who.block * self.size + address) // self.unit)[:, None] + np.arange(size // self.unit)
        return places

    def _read_by_others(self, places: Array, who: Who) -> bool:
        return bool(who.unordered(self.read_threads[places], self.read_when[places]).any())

    def read(self, address: Array, size: int, who: Who, at: str) -> Array:
        places = self._places(address, size, who, at)
        if self.pending[places].any():
            raise FaultError(f"{at}: shared memory read while a copy to it is under way")
        if not self.written[places].all():
            raise FaultError(f"{at}: shared memory read where nothing wrote it")
        if who.unordered(self.write_thread[places], self.write_when[places]).any():
            raise FaultError(f"{at}: race: read of what another thread wrote, without a barrier")
        self._note_readers(places, who)
        return self.data[places].view(np.uint8)

    def _note_readers(self, places: Array, who: Who) -> None:
        """Keep of each unit's readers since the block's last barrier whether they are one thread, one warp or many."""
        mine = np.broadcast_to(who.thread[:, None], places.shape)
        before, when = self.read_threads[places], self.read_when[places]
        fresh = (when >= who.block_sync[:, None]) & (before != mine)
        new = mine
        if fresh.any():
            alone = (_warp(before) == mine >> 5) & (when < who.warp_sync[:, None])
            new = np.where(fresh & ~alone, self._both(before, mine), mine)
        self.read_threads[places], self.read_when[places] = new, who.now
        last = self.read_threads[places]
        # Readers at once: those of one warp first, so that many is what stays where both are said.
        if (last != new).any():
            both = np.where(last != new, self._both(last, new), new)
            for many in (False, True):
                chosen = (last != new) & ((both == _MANY) == many)
                self.read_threads[places[chosen]] = both[chosen]

    @staticmethod
    def _both(one: Array, other: Array) -> Array:
        return np.where(_warp(one) == _warp(other), -1 - _warp(one), _MANY)

    def write(self, address: Array, data: Array, who: Who, at: str) -> None:
        places = self._places(address, data.shape[1], who, at)
        if self.pending[places].any():
            raise FaultError(f"{at}: shared memory written while a copy to it is under way")
        self._put(places, data, who, at)

    def _put(self, places: Array, data: Array, who: Who, at: str) -> None:
        if who.unordered(self.write_thread[places], self.write_when[places]).any():
            raise FaultError(f"{at}: race: write over what another thread wrote, without a barrier")
        if self._read_by_others(places, who):
            raise FaultError(f"{at}: race: write over what another thread reads, without a barrier")
        values = np.ascontiguousarray(data).view(self.data.dtype)
        self.data[places], self.written[places] = values, True
        self.write_thread[places], self.write_when[places] = who.thread[:, None], who.now
        if (self.data[places] != values).any():
            raise FaultError(f"{at}: race: two threads write different values at once")

    def begin_copy(self, address: Array, size: int, who: Who, at: str) -> None:
        """The copy may land at any moment from now on."""
        places = self._places(address, size, who, at)
        if self._read_by_others(places, who):
            raise FaultError(f"{at}: race: copy over what another thread reads, without a barrier")
        self.pending[places] += 1

    def end_copy(self, address: Array, data: Array, who: Who, at: str) -> None:
        places = self._places(address, data.shape[1], who, at)
        self.pending[places] -= 1
        self._put(places, data, who, at)
