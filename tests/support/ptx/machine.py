"""Runs PTX: several blocks at once, all their threads as one numpy vector.

Threads that branch apart become groups, and the group that is furthest behind runs first, until others meet it: so they
come together again where the code does. What needs all threads of a warp or a block waits for them; if they never come,
or come to another place, that is a fault. Blocks need no order among them; the vector's is one of many.
"""

from __future__ import annotations

import math
import re
import struct
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from ptx.arithmetic import TYPES, UNSIGNED, Array
from ptx.meanings import MEANING, Copy
from ptx.memory import FaultError, GlobalMemory, SharedMemory, Who
from ptx.parser import Instruction, Program, UnsupportedError

_ADDRESS = re.compile(r"\[\s*([%$\w.]+)\s*(?:\+\s*(-?\w+)\s*)?\]")


@cache
def _immediate(text: str, kind: str) -> Any:
    """A literal as a scalar of the type."""
    if text[:2] in ("0f", "0d"):
        form, whole = ("f", "I") if text[1] == "f" else ("d", "Q")
        value = struct.unpack(f"<{form}", struct.pack(f"<{whole}", int(text[2:], 16)))[0]
        exact = np.float32(value) if form == "f" else np.float64(value)
        return exact.view(TYPES[kind]) if TYPES[kind].itemsize == exact.itemsize else exact.astype(TYPES[kind])
    size = TYPES[kind].itemsize
    return UNSIGNED[size].type(int(text, 0) & (2 ** (8 * size) - 1)).view(TYPES[kind])


class Machine:
    """Runs ``program`` for some blocks of a grid.

    ``parameters``: the bytes of each; ``shared``: bytes that the launch asks for; ``last``: when it must have ended.
    """

    def __init__(
        self,
        program: Program,
        parameters: Sequence[bytes],
        grid: tuple[int, int, int],
        blocks: Sequence[tuple[int, int, int]],
        first: int,
        memory: GlobalMemory,
        shared: int,
        clock: int = 0,
        last: float = math.inf,
    ) -> None:
        n = program.threads * len(blocks)
        self.program, self.memory, self.n, self.clock = program, memory, n, clock
        self._last = last
        self._parameters = parameters
        # Triton asks for its own at the launch, and a kernel of one warp or two may ask for none.
        size = max((v.address + v.size for v in program.shared), default=(max(shared, 16) + 15) // 16 * 16)
        self.shared = SharedMemory(len(blocks), size, program.unit("shared"))
        self.symbols = {"global_smem": 0} | {v.name: v.address for v in (*program.parameters, *program.shared)}
        self.registers: dict[str, Array] = {}
        thread = np.tile(np.arange(program.threads, dtype=np.uint32), len(blocks))
        self.block = np.repeat(np.arange(len(blocks)), program.threads)
        self.first = first
        self.thread, self.lane = thread.astype(np.int32), (thread % 32).astype(int)
        self.every_lane = np.arange(n)
        self.first_lane = self.every_lane // 32 * 32  # of a lane's warp
        self.special: dict[str, Array] = {"%tid.x": thread}
        for axis, letter in enumerate("xyz"):
            of_block = np.array([b[axis] for b in blocks], np.uint32)
            self.special[f"%ctaid.{letter}"] = np.repeat(of_block, program.threads)
            self.special[f"%nctaid.{letter}"] = np.full(n, grid[axis], np.uint32)
        self.special["%ntid.x"] = np.full(n, program.threads, np.uint32)
        # When each lane last met its warp or its block at a barrier, and its block alone.
        self.warp_sync, self.block_sync = np.zeros(n, int), np.zeros(n, int)
        self.live = np.ones(n, bool)
        self.groups: dict[int, Array] = {0: self.live.copy()}
        self.waiting, self.resume = np.zeros(n, bool), np.zeros(n, int)
        self.parked: dict[int, Array] = {}  # lanes that wait for others of their warps, by their place
        self.commits = np.zeros(n, int)
        self.copies: list[Copy] = []
        self.counts: Counter[str] = Counter()
        self.executed: set[int] = set()  # places
        self.place = 0
        self.whole = True  # whether all lanes execute the current instruction

    @property
    def at(self) -> str:
        """Where it is, in words."""
        return f"{self.program.name}, instruction {self.place}: {self.program.code[self.place]}"

    # -- what runs next

    def run(self) -> None:
        with np.errstate(all="ignore"):
            while self.groups:
                start = min(self.groups)
                self._straight(start, self.groups.pop(start))
        if self.parked:
            self.place, lanes = next(iter(self.parked.items()))
            raise FaultError(f"{self.at}: threads {self._names(lanes)} wait for others of their warp that never come")
        if self.waiting.any():
            self.place = int(self.resume[self.waiting][0]) - 1
            raise FaultError(f"{self.at}: a barrier that only threads {self._names(self.waiting)} of a block reach")
        if self.copies:
            raise FaultError(f"{self.at}: asynchronous copies still under way at the end")

    def _names(self, lanes: Array) -> str:
        """The first and the last of some lanes' threads, in the first of their blocks."""
        threads = self.thread[lanes & (self.block == self.block[lanes][0])]
        return f"{threads[0]} to {threads[-1]}"

    def _join(self, place: int, lanes: Array) -> None:
        if lanes.any():
            self.groups[place] = self.groups[place] | lanes if place in self.groups else lanes

    def _straight(self, place: int, on: Array) -> None:
        """Run a group until it branches, meets another, or ends."""
        code, whole = self.program.code, bool(on.all())
        while True:
            if place in self.groups:
                on = on | self.groups.pop(place)
                whole = bool(on.all())
            if place == len(code):
                raise FaultError(f"{self.at}: the kernel runs past its end")
            instruction = code[place]
            guard, parts = instruction.guard, instruction.parts
            chosen = on if guard is None else on & (self.register(guard) ^ instruction.negated)
            self.clock += 1
            self.executed.add(place)
            if self.clock > self._last:
                raise FaultError(f"{self.at}: it does not end: {self.clock} instructions")
            self.place, self.whole = place, whole and guard is None
            if parts[0] == "bra":
                self._join(self.program.labels[instruction.operands[0]], chosen)
                self._join(place + 1, on & ~chosen)
                return
            if parts[0] == "brx":
                self._by_table(instruction, chosen)
                self._join(place + 1, on & ~chosen)
                return
            if parts[0] in ("ret", "exit"):
                self.live = self.live & ~chosen
                self._join(place + 1, on & ~chosen)
                return
            if parts[0] in ("bar", "barrier") and parts[1] != "warp":
                if guard is not None:
                    raise UnsupportedError(f"{self.at}: a barrier under a guard")
                self.waiting |= on
                self.resume[on] = place + 1
                self._release()
                return
            if instruction.by_warps and not self.whole:
                chosen = on = self._of_whole_warps(place, instruction, on)
                self.whole = whole = bool(on.all())
                if not on.any():
                    return
            if guard is None or chosen.any():
                if parts[0] not in MEANING:
                    raise UnsupportedError(self.at)
                MEANING[parts[0]](self, instruction, parts, chosen)
            place += 1

    def _of_whole_warps(self, place: int, instruction: Instruction, on: Array) -> Array:
        """Park the lanes that wait for others of their mask; return those that continue, some parked before."""
        if instruction.guard is not None:
            raise UnsupportedError(f"{self.at}: under a guard")
        here = on | self.parked.pop(place, np.zeros(self.n, bool))
        at = {"shfl": 4, "bar": 0, "barrier": 0}.get(instruction.parts[0])
        mask = np.uint32(0xFFFFFFFF) if at is None else self.get(instruction.operands[at], "u32")
        named = (np.broadcast_to(mask, self.n)[:, None] >> np.arange(32, dtype=np.uint32) & 1).astype(bool)
        if not named[self.every_lane, self.lane][here].all():
            raise FaultError(f"{self.at}: a thread that is not in its own mask")
        warps = here.reshape(-1, 32)
        wanted = (named & here[:, None]).reshape(-1, 32, 32).any(1)
        complete = here & np.repeat(~(wanted & self.live.reshape(-1, 32) & ~warps).any(1), 32)
        if (here & ~complete).any():
            self.parked[place] = here & ~complete
        return complete

    def _by_table(self, instruction: Instruction, chosen: Array) -> None:
        """Send each lane to the label that its number says."""
        index, table = self.register(instruction.operands[0]), self.program.tables[instruction.operands[1]]
        for i in np.unique(index[chosen]):
            if i >= len(table):
                raise FaultError(f"{self.at}: index {i} of {len(table)} labels")
            self._join(self.program.labels[table[i]], chosen & (index == i))

    def _release(self) -> None:
        """Let those blocks continue of which every thread waits at the same barrier."""
        by_block = self.waiting.reshape(-1, self.program.threads)
        ready = by_block.all(1)
        if not ready.any():
            return
        resume = self.resume.reshape(by_block.shape)
        if (resume[ready] != resume[ready][:, :1]).any():
            raise FaultError(f"{self.at}: threads of a block wait at different barriers")
        self.memory.barrier[self.first + np.flatnonzero(ready)] = self.clock
        released = ready[self.block]
        self.waiting &= ~released
        self.block_sync[released] = self.warp_sync[released] = self.clock
        for where in np.unique(resume[ready][:, 0]):
            self._join(int(where), released & (self.resume == where))

    # -- operands

    def register(self, name: str) -> Array:
        if name not in self.registers:
            raise FaultError(f"{self.at}: {name} is read before it is written")
        return self.registers[name]

    def get(self, name: str, kind: str) -> Any:
        """The operand as numbers of the type: a vector, or a scalar for a literal."""
        if not name.startswith("%"):
            return TYPES[kind].type(self.symbols[name]) if name in self.symbols else _immediate(name, kind)
        bits = self.special[name] if name in self.special else self.register(name)
        if bits.dtype == bool:
            return bits
        size = TYPES[kind].itemsize
        return (bits if bits.dtype.itemsize == size else bits.astype(UNSIGNED[size])).view(TYPES[kind])

    def put(self, name: str, value: Any, chosen: Array) -> None:
        if name == "_":
            return
        if np.ndim(value) == 0:
            value = np.full(self.n, value)
        if value.dtype != bool:
            value = value.view(UNSIGNED[value.dtype.itemsize])
        if self.whole:
            self.registers[name] = value
        else:
            self.registers[name] = np.where(chosen, value, self.registers.get(name, np.zeros_like(value)))

    def address(self, text: str, wide: bool) -> Array:
        found = _ADDRESS.fullmatch(text)
        if found is None:
            raise UnsupportedError(f"{self.at}: address {text}")
        base = self.get(found[1], "s64" if wide else "u32")
        return np.broadcast_to(np.asarray(base).astype(np.int64), self.n) + int(found[2] or "0", 0)

    def lanes(self, chosen: Array) -> Array:
        return self.every_lane if self.whole else np.flatnonzero(chosen)

    def parameters(self, address: Array, size: int) -> Array:
        """Read bytes of the parameters' own space, each access within one of them."""
        out = np.zeros((len(address), size), np.uint8)
        found = np.zeros(len(address), bool)
        for variable, data in zip(self.program.parameters, self._parameters, strict=True):
            inside = (address >= variable.address) & (address + size <= variable.address + variable.size)
            if inside.any():
                found |= inside
                places = (address[inside] - variable.address)[:, None] + np.arange(size)
                out[inside] = np.frombuffer(data, np.uint8)[places]
        if not found.all() or (address % size).any():
            raise FaultError(f"{self.at}: {size} bytes that are not within one parameter, or not aligned")
        return out

    def who(self, lanes: Array, everywhere: bool = False) -> Who:
        """``everywhere``: by the number of the block in the grid, not among those that run together."""
        who = Who(self.block, self.thread, self.warp_sync, self.block_sync, self.clock)
        who = who if lanes is self.every_lane else who[lanes]
        who.block = who.block + self.first if everywhere else who.block
        return who
