"""What each PTX instruction does to the registers and the memory of the lanes that execute it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from ptx.arithmetic import (
    TYPES,
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
from ptx.memory import FaultError
from ptx.parser import Instruction, UnsupportedError, split_operands

if TYPE_CHECKING:
    from ptx.machine import Machine

Meaning = Callable[["Machine", Instruction, tuple[str, ...], Array], None]
MEANING: dict[str, Meaning] = {}


@dataclass
class Copy:
    """An asynchronous copy under way: its lanes, where to, what, and the group of each lane it belongs to."""

    lanes: Array
    address: Array
    data: Array
    group: Array


def _means(*names: str) -> Callable[[Meaning], Meaning]:
    def decorate(function: Meaning) -> Meaning:
        MEANING.update(dict.fromkeys(names, function))
        return function

    return decorate


def _registers(operand: str) -> tuple[str, ...]:
    return split_operands(operand.strip("{} ")) if operand.startswith("{") else (operand,)


@_means("ld", "st")
def _move_memory(m: Machine, i: Instruction, parts: tuple[str, ...], chosen: Array) -> None:
    kind, load = parts[-1], parts[0] == "ld"
    place, value = (i.operands[1], i.operands[0]) if load else i.operands
    where = next((space for space in ("global", "shared", "param") if space in parts), "")
    if not where or (where == "param" and not load):
        raise UnsupportedError(m.at)
    names, size, lanes = _registers(value), TYPES[kind].itemsize, m.lanes(chosen)
    address = m.address(place, wide=where != "shared")[lanes]
    m.counts[f"{where} bytes {'read' if load else 'written'}"] += len(lanes) * size * len(names)
    if load:
        if where == "param":
            raw = m.parameters(address, size * len(names))
        else:
            read = m.shared.read if where == "shared" else m.memory.read
            raw = read(address, size * len(names), m.who(lanes, where == "global"), m.at)
        columns = raw.view(TYPES[kind])
        for k, name in enumerate(names):
            whole = np.zeros(m.n, TYPES[kind])
            whole[lanes] = columns[:, k]
            m.put(name, whole, chosen)
        return
    columns = np.stack([np.broadcast_to(m.get(name, kind), m.n)[lanes] for name in names], 1)
    write = m.shared.write if where == "shared" else m.memory.write
    write(address, columns.view(np.uint8), m.who(lanes, where == "global"), m.at)


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
        size, lanes = int(i.operands[2], 0), m.lanes(chosen)
        target, source = m.address(i.operands[0], False)[lanes], m.address(i.operands[1], True)[lanes]
        real = np.broadcast_to(m.get(i.operands[3], "u32") if len(i.operands) > 3 else np.uint32(size), m.n)[lanes]
        if not np.isin(real, (0, size)).all():
            raise UnsupportedError(f"{m.at}: a copy of a part")
        data = np.zeros((len(lanes), size), np.uint8)
        use = real > 0
        data[use] = m.memory.read(source[use], size, m.who(lanes[use], True), m.at)
        m.counts["global bytes read"] += int(use.sum()) * size
        m.shared.begin_copy(target, size, m.who(lanes), m.at)
        m.copies.append(Copy(lanes, target, data, m.commits[lanes].copy()))


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
    by, clamp = (np.broadcast_to(m.get(name, "u32"), m.n).astype(int) & 0x1FFF for name in i.operands[2:4])
    by, segment = by & 31, clamp >> 8
    low = m.lane & segment
    sources = {"bfly": m.lane ^ by, "idx": low | (by & ~segment), "down": m.lane + by}
    if parts[2] not in sources:
        raise UnsupportedError(m.at)
    source = sources[parts[2]]
    source = np.where(source > (low | (clamp & ~segment & 31)), m.lane, source)
    place = m.first_lane + source
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


@_means("bar", "barrier")
def _warp_barrier(m: Machine, i: Instruction, parts: tuple[str, ...], chosen: Array) -> None:
    """All of a warp's threads are here: what each of them did is seen by the others."""
    if (np.broadcast_to(m.get(i.operands[0], "u32"), m.n)[chosen] != 0xFFFFFFFF).any():
        raise UnsupportedError(f"{m.at}: a barrier of a part of a warp")
    m.warp_sync[chosen] = m.clock


@_means("mov", "cvta")
def _move(m: Machine, i: Instruction, parts: tuple[str, ...], chosen: Array) -> None:
    if parts[0] == "cvta" and "global" not in parts:
        raise UnsupportedError(m.at)
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
