"""Runs PTX: several blocks at once, all their threads as one numpy vector.

Threads that branch apart become groups, and the group that is furthest behind runs first, until others meet it: so they
come together again where the code does. Blocks need no order among them; the vector's is one of many.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from ptx.arithmetic import (
    TYPES,
    UNSIGNED,
    Array,
    compare,
    convert,
    divide,
    extract_bits,
    fused_multiply_add,
    matrix_product,
    pack_halves,
    shift,
)
from ptx.memory import FaultError, GlobalMemory, SharedMemory, Who
from ptx.parser import Instruction, Program, UnsupportedError, split_operands

_ADDRESS = re.compile(r"\[\s*([%\w.]+)\s*(?:\+\s*(-?\w+)\s*)?\]")


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


@dataclass
class _Copy:
    """An asynchronous copy under way: its lanes, where to, what, and the group of each lane it belongs to."""

    lanes: Array
    address: Array
    data: Array
    group: Array


class Machine:
    """Runs ``program`` for some blocks of a grid; ``values``: the parameters' bits."""

    def __init__(
        self,
        program: Program,
        values: Sequence[int],
        grid: tuple[int, int, int],
        blocks: Sequence[tuple[int, int, int]],
        first: int,
        memory: GlobalMemory,
        shared: int,
        clock: int = 0,
    ) -> None:
        n = program.threads * len(blocks)
        self.program, self.values, self.memory, self.n, self.clock = program, values, memory, n, clock
        # Some bytes more: the kernels of one warp or two may ask for none.
        self.shared = SharedMemory(len(blocks), (max(shared, 16) + 15) // 16 * 16)
        self.registers: dict[str, Array] = {}
        thread = np.tile(np.arange(program.threads, dtype=np.uint32), len(blocks))
        self.block = np.repeat(np.arange(len(blocks)), program.threads)
        self.first = first
        self.warp, self.lane = (thread // 32).astype(np.int8), (thread % 32).astype(int)
        self.wave = np.arange(n) // 32 * 32  # the first lane of a lane's warp
        self.special: dict[str, Array] = {"%tid.x": thread}
        for axis, letter in enumerate("xyz"):
            of_block = np.array([b[axis] for b in blocks], np.uint32)
            self.special[f"%ctaid.{letter}"] = np.repeat(of_block, program.threads)
            self.special[f"%nctaid.{letter}"] = np.full(n, grid[axis], np.uint32)
        self.special["%ntid.x"] = np.full(n, program.threads, np.uint32)
        self.epoch = np.zeros(len(blocks), np.int32)
        self.live = np.ones(n, bool)
        self.groups: dict[int, Array] = {0: self.live.copy()}
        self.waiting, self.resume = np.zeros(n, bool), np.zeros(n, int)
        self.commits = np.zeros(n, int)
        self.copies: list[_Copy] = []
        self.counts: Counter[str] = Counter()
        self.place = 0

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
        if self.waiting.any():
            raise FaultError(f"{self.at}: a barrier that some threads of a block never reach")
        if self.copies:
            raise FaultError(f"{self.at}: asynchronous copies still under way at the end")

    def _join(self, place: int, lanes: Array) -> None:
        if lanes.any():
            self.groups[place] = self.groups[place] | lanes if place in self.groups else lanes

    def _straight(self, place: int, on: Array) -> None:
        """Run a group until it branches, meets another, or ends."""
        code = self.program.code
        while True:
            if place in self.groups:
                on = on | self.groups.pop(place)
            if place == len(code):
                raise FaultError(f"{self.at}: the kernel runs past its end")
            instruction = code[place]
            guard = instruction.guard
            chosen = on if guard is None else on & (self.register(guard) ^ instruction.negated)
            self.clock += 1
            parts = instruction.parts
            self.place = place
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
                self._release()
                return
            if parts[0] in ("bar", "barrier") and parts[1] != "warp":
                if guard is not None:
                    raise UnsupportedError(f"{self.at}: a barrier under a guard")
                self.waiting |= on
                self.resume[on] = place + 1
                self._release()
                return
            if chosen.any():
                if parts[0] not in _MEANING:
                    raise UnsupportedError(self.at)
                _MEANING[parts[0]](self, instruction, parts, chosen)
            place += 1

    def _by_table(self, instruction: Instruction, chosen: Array) -> None:
        """Send each lane to the label that its number says."""
        index, table = self.register(instruction.operands[0]), self.program.tables[instruction.operands[1]]
        for i in np.unique(index[chosen]):
            if i >= len(table):
                raise FaultError(f"{self.at}: index {i} of {len(table)} labels")
            self._join(self.program.labels[table[i]], chosen & (index == i))

    def _release(self) -> None:
        """Let those blocks continue of which every thread that lives waits at a barrier."""
        if not self.waiting.any():
            return
        missing = (self.live & ~self.waiting).reshape(len(self.epoch), -1).any(1)
        ready = self.waiting.reshape(len(self.epoch), -1).any(1) & ~missing
        self.epoch[ready] += 1
        self.memory.barrier[self.first + np.flatnonzero(ready)] = self.clock
        released = self.waiting & ready[self.block]
        self.waiting &= ~released
        for where in np.unique(self.resume[released]):
            self._join(int(where), released & (self.resume == where))

    # -- operands

    def register(self, name: str) -> Array:
        if name not in self.registers:
            raise FaultError(f"{self.at}: {name} is read before it is written")
        return self.registers[name]

    def get(self, name: str, kind: str) -> Any:
        """The operand as numbers of the type: a vector, or a scalar for a literal."""
        if not name.startswith("%"):
            return TYPES[kind].type(0) if name == "global_smem" else _immediate(name, kind)
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
        if chosen.all():
            self.registers[name] = value
        else:
            self.registers[name] = np.where(chosen, value, self.registers.get(name, np.zeros_like(value)))

    def address(self, text: str, wide: bool) -> Array:
        found = _ADDRESS.fullmatch(text)
        if found is None:
            raise UnsupportedError(f"{self.at}: address {text}")
        base = self.get(found[1], "s64" if wide else "u32")
        return np.broadcast_to(np.asarray(base).astype(np.int64), self.n) + int(found[2] or "0", 0)

    def who(self, lanes: Array, everywhere: bool = False) -> Who:
        """``everywhere``: by the number of the block in the grid, not among those that run together."""
        block = self.block[lanes]
        return Who(block + self.first if everywhere else block, self.warp[lanes], self.epoch[block])


Meaning = Callable[[Machine, Instruction, tuple[str, ...], Array], None]
_MEANING: dict[str, Meaning] = {}


def _means(*names: str) -> Callable[[Meaning], Meaning]:
    def decorate(function: Meaning) -> Meaning:
        _MEANING.update(dict.fromkeys(names, function))
        return function

    return decorate


def _registers(operand: str) -> tuple[str, ...]:
    return split_operands(operand.strip("{} ")) if operand.startswith("{") else (operand,)


@_means("ld", "st")
def _move_memory(m: Machine, i: Instruction, parts: tuple[str, ...], chosen: Array) -> None:
    kind, load = parts[-1], parts[0] == "ld"
    place, value = (i.operands[1], i.operands[0]) if load else i.operands
    if "param" in parts:
        bits = m.values[int(place.strip("[] ").rpartition("_")[2])]
        m.put(value, UNSIGNED[TYPES[kind].itemsize].type(bits & (2 ** (8 * TYPES[kind].itemsize) - 1)), chosen)
        return
    if not {"global", "shared"} & set(parts):
        raise UnsupportedError(m.at)
    shared, names = "shared" in parts, _registers(value)
    size, lanes = TYPES[kind].itemsize, np.flatnonzero(chosen)
    address = m.address(place, wide=not shared)[lanes]
    where = "shared" if shared else "global"
    m.counts[f"{where} bytes {'read' if load else 'written'}"] += len(lanes) * size * len(names)
    if load:
        read = m.shared.read if shared else m.memory.read
        raw = read(address, size * len(names), m.who(lanes, not shared), m.at)
        for k, name in enumerate(names):
            whole = np.zeros(m.n, TYPES[kind])
            whole[lanes] = np.ascontiguousarray(raw[:, k * size : (k + 1) * size]).view(TYPES[kind])[:, 0]
            m.put(name, whole, chosen)
        return
    columns = [np.broadcast_to(m.get(name, kind), m.n)[lanes] for name in names]
    data = np.ascontiguousarray(np.stack(columns, 1)).view(np.uint8).reshape(len(lanes), -1)
    if shared:
        m.shared.write(address, data, m.who(lanes), m.at)
    else:
        m.memory.write(address, data, m.who(lanes, True), m.clock, m.at)


@_means("cp")
def _copy(m: Machine, i: Instruction, parts: tuple[str, ...], chosen: Array) -> None:
    if parts[1] != "async" or "bulk" in parts:
        raise UnsupportedError(m.at)
    if parts[2] == "commit_group":
        m.commits[chosen] += 1
    elif parts[2] in ("wait_group", "wait_all"):
        allowed = int(i.operands[0], 0) if parts[2] == "wait_group" else 0
        for copy in m.copies:
            done = chosen[copy.lanes] & (copy.group < m.commits[copy.lanes] - allowed)
            if done.any():
                m.shared.end_copy(copy.address[done], copy.data[done], m.who(copy.lanes[done]), m.at)
                copy.lanes, copy.address = copy.lanes[~done], copy.address[~done]
                copy.data, copy.group = copy.data[~done], copy.group[~done]
        m.copies = [copy for copy in m.copies if len(copy.lanes)]
    else:
        size, lanes = int(i.operands[2], 0), np.flatnonzero(chosen)
        target, source = m.address(i.operands[0], False)[lanes], m.address(i.operands[1], True)[lanes]
        real = np.broadcast_to(m.get(i.operands[3], "u32") if len(i.operands) > 3 else np.uint32(size), m.n)[lanes]
        if not np.isin(real, (0, size)).all():
            raise UnsupportedError(f"{m.at}: a copy of a part")
        data = np.zeros((len(lanes), size), np.uint8)
        use = real > 0
        data[use] = m.memory.read(source[use], size, m.who(lanes[use], True), m.at)
        m.counts["global bytes read"] += int(use.sum()) * size
        m.shared.begin_copy(target, size, m.who(lanes), m.at)
        m.copies.append(_Copy(lanes, target, data, m.commits[lanes].copy()))


@_means("ldmatrix")
def _load_matrices(m: Machine, i: Instruction, parts: tuple[str, ...], chosen: Array) -> None:
    names = _registers(i.operands[0])
    if not chosen.reshape(-1, 32).all(1)[chosen.reshape(-1, 32).any(1)].all():
        raise FaultError(f"{m.at}: not by whole warps")
    lanes = np.flatnonzero(chosen & (m.lane // 8 < len(names)))
    rows = np.zeros((m.n, 16), np.uint8)
    rows[lanes] = m.shared.read(m.address(i.operands[1], False)[lanes], 16, m.who(lanes), m.at)
    by_warp = rows.reshape(-1, 32, 16)
    for k, name in enumerate(names):
        matrix = np.ascontiguousarray(by_warp[:, 8 * k : 8 * k + 8]).view(np.uint16)
        matrix = matrix.transpose(0, 2, 1) if "trans" in parts else matrix
        pairs = np.ascontiguousarray(matrix).view(np.uint32)  # [warps, 8 rows, 4 pairs]
        m.put(name, pairs.reshape(-1), chosen)


@_means("mma")
def _multiply_matrices(m: Machine, i: Instruction, parts: tuple[str, ...], chosen: Array) -> None:
    kind, shape = parts[-2], next(p for p in parts if re.fullmatch(r"m\d+n\d+k\d+", p))
    if (shape, kind) not in (("m16n8k8", "tf32"), ("m16n8k16", "bf16"), ("m16n8k16", "f16")):
        raise UnsupportedError(m.at)
    d, *abc = (_registers(operand) for operand in i.operands)
    a, b, c = ([np.broadcast_to(m.get(n, "u32"), m.n).reshape(-1, 32) for n in names] for names in abc)
    for name, value in zip(d, matrix_product(a, b, c, kind), strict=True):
        m.put(name, value.reshape(-1), chosen)


@_means("shfl")
def _shuffle(m: Machine, i: Instruction, parts: tuple[str, ...], chosen: Array) -> None:
    by = np.broadcast_to(m.get(i.operands[2], "u32"), m.n).astype(int)
    clamp = int(i.operands[3], 0)
    low = m.lane & ~31 | (m.lane & (clamp >> 8))
    if "bfly" in parts:
        source = m.lane ^ by
    elif "idx" in parts:
        source = low | (by & ~(clamp >> 8) & 31)
    elif "down" in parts:
        source = np.where(m.lane + by <= (low | (clamp & ~(clamp >> 8) & 31)), m.lane + by, m.lane)
    else:
        raise UnsupportedError(m.at)
    place = m.wave + source
    if not chosen[place[chosen]].all():
        raise FaultError(f"{m.at}: from a thread that is not there")
    m.put(i.operands[0].partition("|")[0], np.broadcast_to(m.get(i.operands[1], "u32"), m.n)[place], chosen)


@_means("atom")
def _atomic(m: Machine, i: Instruction, parts: tuple[str, ...], chosen: Array) -> None:
    """One lane after the other; an order between blocks where the instruction asks for one."""
    kind = parts[-1]
    action = {"add": lambda old, new: old + new, "exch": lambda old, new: new}.get(
        next((p for p in parts if p in ("add", "exch")), "")
    )
    if "global" not in parts or action is None:
        raise UnsupportedError(m.at)
    address, value = m.address(i.operands[1], True), np.broadcast_to(m.get(i.operands[2], kind), m.n)
    result = np.zeros(m.n, TYPES[kind])
    order = "acq_rel" in parts or "release" in parts, "acq_rel" in parts or "acquire" in parts
    for lane in np.flatnonzero(chosen):
        block = int(m.block[lane]) + m.first
        m.memory.synchronise(block, m.clock, *order)
        result[lane] = m.memory.update(
            int(address[lane]), lambda old, new=value[lane]: action(old, new), TYPES[kind], m.at
        )
        m.clock += 1
    m.put(i.operands[0], result, chosen)


@_means("membar", "fence")
def _nothing(m: Machine, i: Instruction, parts: tuple[str, ...], chosen: Array) -> None:
    """An order that an atomic's own says already."""


@_means("bar")
def _warp_barrier(m: Machine, i: Instruction, parts: tuple[str, ...], chosen: Array) -> None:
    """A warp's threads run together here."""


@_means("mov")
def _move(m: Machine, i: Instruction, parts: tuple[str, ...], chosen: Array) -> None:
    kind, (target, source) = parts[-1], i.operands
    half = {"b64": "b32", "b32": "b16"}.get(kind, "")
    if source.startswith("{"):
        low, high = (m.get(name, half) for name in _registers(source))
        bits = TYPES[half].itemsize * 8
        wide = TYPES[kind].type
        m.put(target, np.asarray(low).astype(wide) | np.asarray(high).astype(wide) << wide(bits), chosen)
    elif target.startswith("{"):
        bits = TYPES[half].itemsize * 8
        value = m.get(source, kind)
        low, high = _registers(target)
        m.put(low, value.astype(TYPES[half]), chosen)
        m.put(high, (value >> TYPES[kind].type(bits)).astype(TYPES[half]), chosen)
    elif kind == "pred":
        m.put(target, m.get(source, "b32") if source.startswith("%") else np.bool_(int(source, 0) != 0), chosen)
    else:
        m.put(target, m.get(source, kind), chosen)


@_means("setp")
def _set_predicate(m: Machine, i: Instruction, parts: tuple[str, ...], chosen: Array) -> None:
    if len(parts) != 3 or len(i.operands) != 3:
        raise UnsupportedError(m.at)
    x, y = (m.get(name, parts[2]) for name in i.operands[1:])
    m.put(i.operands[0], compare(x, y, parts[1], parts[2]), chosen)


@_means("selp")
def _select(m: Machine, i: Instruction, parts: tuple[str, ...], chosen: Array) -> None:
    x, y = (m.get(name, parts[1]) for name in i.operands[1:3])
    m.put(i.operands[0], np.where(m.register(i.operands[3]), x, y), chosen)


@_means("cvt")
def _convert(m: Machine, i: Instruction, parts: tuple[str, ...], chosen: Array) -> None:
    *modes, target, source = parts[1:]
    x = np.asarray(m.get(i.operands[1], source))
    if target in ("f16x2", "bf16x2"):
        m.put(i.operands[0], pack_halves(x, np.asarray(m.get(i.operands[2], source)), target), chosen)
    else:
        m.put(i.operands[0], convert(x, source, target, tuple(modes)), chosen)


_TWO: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "mul": np.multiply, "min": np.minimum, "max": np.maximum,
    "shl": lambda x, by: shift(x, by, left=True), "shr": lambda x, by: shift(x, by, left=False),
    "div": lambda x, y: divide(x, y, remainder=False), "rem": lambda x, y: divide(x, y, remainder=True),
}  # fmt: skip
_WIDE = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


@_means(*_TWO)
def _of_two(m: Machine, i: Instruction, parts: tuple[str, ...], chosen: Array) -> None:
    name, kind = parts[0], parts[-1]
    target, first, second = i.operands
    if kind == "pred":
        m.put(target, _TWO[name](m.register(first), m.register(second)), chosen)
        return
    x, y = np.asarray(m.get(first, kind)), np.asarray(m.get(second, "u32" if name in ("shl", "shr") else kind))
    if name == "mul" and {"wide", "hi"} & set(parts):
        wide = TYPES[_WIDE[kind]].type
        value = x.astype(wide) * y.astype(wide)
        m.put(target, value if "wide" in parts else (value >> wide(8 * x.dtype.itemsize)).astype(x.dtype), chosen)
    elif name in ("min", "max") and x.dtype.kind == "f":
        m.put(target, (np.fmin if name == "min" else np.fmax)(x, y), chosen)
    elif name == "rem" or (name == "div" and x.dtype.kind != "f"):
        m.put(target, _TWO[name](x, np.where(chosen, y, np.ones_like(y))), chosen)
    else:
        m.put(target, _TWO[name](x, y), chosen)


@_means("mad", "fma")
def _multiply_and_add(m: Machine, i: Instruction, parts: tuple[str, ...], chosen: Array) -> None:
    kind = parts[-1]
    x, y = (np.asarray(m.get(name, kind)) for name in i.operands[1:3])
    if parts[0] == "fma":
        if kind not in ("f32", "f64"):
            raise UnsupportedError(m.at)
        m.put(i.operands[0], fused_multiply_add(x, y, np.asarray(m.get(i.operands[3], kind))), chosen)
    elif "wide" in parts:
        wide = TYPES[_WIDE[kind]].type
        m.put(i.operands[0], x.astype(wide) * y.astype(wide) + m.get(i.operands[3], _WIDE[kind]), chosen)
    elif "lo" in parts:
        m.put(i.operands[0], x * y + m.get(i.operands[3], kind), chosen)
    else:
        raise UnsupportedError(m.at)


@_means("bfe")
def _extract(m: Machine, i: Instruction, parts: tuple[str, ...], chosen: Array) -> None:
    first, count = (int(operand, 0) for operand in i.operands[2:])
    m.put(i.operands[0], extract_bits(np.asarray(m.get(i.operands[1], parts[-1])), first, count), chosen)


_ONE: dict[str, Callable[[Array], Array]] = {
    "neg": np.negative, "abs": np.abs, "not": np.invert, "sqrt": np.sqrt, "rcp": np.reciprocal,
}  # fmt: skip


@_means(*_ONE)
def _of_one(m: Machine, i: Instruction, parts: tuple[str, ...], chosen: Array) -> None:
    target, source = i.operands
    x = m.register(source) if parts[-1] == "pred" else m.get(source, parts[-1])
    m.put(target, _ONE[parts[0]](np.asarray(x)), chosen)
