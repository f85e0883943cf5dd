"""Global and shared memory that watch over who reads and writes each byte, and when.

Two warps of a block that touch the same byte, one of them writing, need a barrier between; two blocks need a release by
the one and an acquire by the other. Whatever order the simulator runs them in, a missing one is a fault.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]


class FaultError(AssertionError):
    """What the kernel must not do; the message begins with the kernel and its instruction."""


@dataclass
class Who:
    """The lanes of one access: their block, their warp in it, and their block's barrier count."""

    block: Array
    warp: Array
    epoch: Array


@dataclass
class Span:
    """The bytes of a live tensor, and what this launch did to them. ``written``: None where all of it always was."""

    name: str
    start: int
    data: Array
    written: Array | None = None
    block: Array = field(init=False)
    warp: Array = field(init=False)
    when: Array = field(init=False)

    def __post_init__(self) -> None:
        self.block = np.full(0, -1, np.int32)

    def watch(self) -> None:
        if not self.block.size:
            size = len(self.data)
            self.block, self.warp, self.when = np.full(size, -1, np.int32), np.zeros(size, np.int8), np.zeros(size, int)


def extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first to its last element."""
    if tensor.numel() == 0:
        return 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


class GlobalMemory:
    """The live tensors of one launch. ``released[b]``, ``acquired[b]``: until when others see b's writes, b others'."""

    def __init__(self, blocks: int) -> None:
        self.spans: list[Span] = []
        self.barrier = np.zeros(blocks, int)  # when each block's last barrier was
        self.released = np.full(blocks, -1)
        self.release_time = np.full(blocks, -1)
        self.acquired = np.full(blocks, -1)

    def add(self, name: str, tensor: Tensor, written: Array | None = None) -> None:
        size, start = extent(tensor), tensor.data_ptr()
        if size and not any(s.start <= start and start + size <= s.start + len(s.data) for s in self.spans):
            data = np.frombuffer((ctypes.c_ubyte * size).from_address(start), np.uint8)
            self.spans.append(Span(name, start, data, written))

    def _parts(self, address: Array, size: int, at: str) -> list[tuple[Span, Array]]:
        """Return for each span that is met which of the lanes meet it."""
        if (address % size).any():
            raise FaultError(f"{at}: global access of {size} bytes that is not aligned")
        left, found = np.ones(len(address), bool), []
        if not left.size:
            return found
        for span in self.spans:
            inside = left & (address >= span.start) & (address + size <= span.start + len(span.data))
            if inside.any():
                found.append((span, inside))
                left &= ~inside
                if not left.any():
                    return found
        lane = int(address[left][0])
        near = min(self.spans, key=lambda s: max(s.start - lane, lane - s.start - len(s.data)), default=None)
        where = f", {lane - near.start} of {len(near.data)} bytes of {near.name}" if near else ""
        raise FaultError(f"{at}: outside every live tensor{where}")

    def _raced(self, span: Span, places: Array, who: Who, chosen: Array, kind: str, at: str) -> None:
        if not span.block.size:
            return
        block, when = span.block[places], span.when[places]
        mine = who.block[chosen][:, None]
        same = (block == mine) & ((span.warp[places] == who.warp[chosen][:, None]) | (when < self.barrier[mine]))
        seen = (when < self.released[block]) & (self.release_time[block] <= self.acquired[mine])
        if ((block >= 0) & ~same & ~seen).any():
            raise FaultError(f"{at}: {kind} of {span.name} that another warp or block wrote in this launch, unordered")

    def read(self, address: Array, size: int, who: Who, at: str) -> Array:
        out = np.empty((len(address), size), np.uint8)
        for span, chosen in self._parts(address, size, at):
            places = (address[chosen] - span.start)[:, None] + np.arange(size)
            if span.written is not None and not span.written[places].all():
                raise FaultError(f"{at}: {span.name} is read where nothing wrote it")
            self._raced(span, places, who, chosen, "read", at)
            out[chosen] = span.data[places]
        return out

    def write(self, address: Array, data: Array, who: Who, now: int, at: str) -> None:
        size = data.shape[1]
        for span, chosen in self._parts(address, size, at):
            places = (address[chosen] - span.start)[:, None] + np.arange(size)
            span.watch()
            self._raced(span, places, who, chosen, "write", at)
            span.data[places], span.when[places] = data[chosen], now
            span.block[places], span.warp[places] = who.block[chosen][:, None], who.warp[chosen][:, None]
            if (span.block[places] != who.block[chosen][:, None]).any():
                raise FaultError(f"{at}: two blocks write the same byte of {span.name}")
            if span.written is not None:
                span.written[places] = True

    def update(self, address: int, change: Callable[[Any], Any], kind: np.dtype[Any], at: str) -> Any:
        """Atomically; atomics race with nothing."""
        ((span, _),) = self._parts(np.array([address]), kind.itemsize, at)
        place = slice(address - span.start, address - span.start + kind.itemsize)
        if span.written is not None and not span.written[place].all():
            raise FaultError(f"{at}: {span.name} is read where nothing wrote it")
        old = span.data[place].view(kind)[0]
        span.data[place] = np.frombuffer(kind.type(change(old)).tobytes(), np.uint8)
        return old

    def synchronise(self, block: int, now: int, release: bool, acquire: bool) -> None:
        """An atomic of the block: what it wrote before its last barrier is seen by whoever acquires from now on."""
        if release:
            self.released[block], self.release_time[block] = self.barrier[block], now
        if acquire:
            self.acquired[block] = now


class SharedMemory:
    """The shared memory of several blocks, one behind the other."""

    def __init__(self, blocks: int, size: int) -> None:
        self.size = size
        total = blocks * size
        self.data = np.zeros(total, np.uint8)
        self.written = np.zeros(total, bool)
        self.pending = np.zeros(total, np.int16)  # asynchronous copies under way to a byte
        self.write_epoch, self.write_warp = np.full(total, -1, np.int32), np.zeros(total, np.int8)
        self.read_epoch, self.read_warps = np.full(total, -1, np.int32), np.zeros(total, np.uint32)

    def _places(self, address: Array, size: int, who: Who, at: str) -> Array:
        if (address < 0).any() or (address + size > self.size).any():
            raise FaultError(f"{at}: outside the {self.size} bytes of shared memory")
        if (address % size).any():
            raise FaultError(f"{at}: shared access of {size} bytes that is not aligned")
        places: Array = (who.block * self.size + address)[:, None] + np.arange(size)
        return places

    def _read_by_others(self, places: Array, who: Who) -> bool:
        others = self.read_warps[places] & ~(np.uint32(1) << who.warp.astype(np.uint32))[:, None]
        return bool(((self.read_epoch[places] == who.epoch[:, None]) & (others != 0)).any())

    def read(self, address: Array, size: int, who: Who, at: str) -> Array:
        places, epoch = self._places(address, size, who, at), who.epoch[:, None]
        if self.pending[places].any():
            raise FaultError(f"{at}: shared memory read while a copy to it is under way")
        if not self.written[places].all():
            raise FaultError(f"{at}: shared memory read where nothing wrote it")
        if ((self.write_epoch[places] == epoch) & (self.write_warp[places] != who.warp[:, None])).any():
            raise FaultError(f"{at}: race: read of what another warp wrote, without a barrier")
        stale = places[self.read_epoch[places] != epoch]
        self.read_warps[stale] = 0
        self.read_epoch[places] = epoch
        for warp in np.unique(who.warp):
            self.read_warps[places[who.warp == warp]] |= np.uint32(1 << int(warp))
        return self.data[places]

    def write(self, address: Array, data: Array, who: Who, at: str) -> None:
        places = self._places(address, data.shape[1], who, at)
        if self.pending[places].any():
            raise FaultError(f"{at}: shared memory written while a copy to it is under way")
        self._put(places, data, who, at)

    def _put(self, places: Array, data: Array, who: Who, at: str) -> None:
        warp = who.warp[:, None]
        same = self.write_epoch[places] == who.epoch[:, None]
        if (same & (self.write_warp[places] != warp)).any():
            raise FaultError(f"{at}: race: write over what another warp wrote, without a barrier")
        if self._read_by_others(places, who):
            raise FaultError(f"{at}: race: write over what another warp reads, without a barrier")
        self.data[places], self.written[places] = data, True
        self.write_epoch[places], self.write_warp[places] = who.epoch[:, None], warp
        if (self.write_warp[places] != warp).any() and (self.data[places] != data).any():
            raise FaultError(f"{at}: race: two warps write different values at once")

    def begin_copy(self, address: Array, size: int, who: Who, at: str) -> None:
        """The copy may land at any moment from now on."""
        places = self._places(address, size, who, at)
        if self._read_by_others(places, who):
            raise FaultError(f"{at}: race: copy over what another warp reads, without a barrier")
        self.pending[places] += 1

    def end_copy(self, address: Array, data: Array, who: Who, at: str) -> None:
        places = self._places(address, data.shape[1], who, at)
        self.pending[places] -= 1
        self._put(places, data, who, at)
