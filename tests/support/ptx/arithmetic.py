"""What a GPU's arithmetic makes of numbers: types, conversions, and the tensor cores' products."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_NAMES = {
    np.uint8: "b8 u8", np.int8: "s8", np.uint16: "b16 u16 bf16", np.int16: "s16", np.float16: "f16",
    np.uint32: "b32 u32 f16x2 bf16x2", np.int32: "s32", np.float32: "f32", np.uint64: "b64 u64", np.int64: "s64",
    np.float64: "f64",
}  # fmt: skip
TYPES: dict[str, np.dtype[Any]] = {name: np.dtype(kind) for kind, names in _NAMES.items() for name in names.split()}
UNSIGNED = {size: np.dtype(f"uint{8 * size}") for size in (1, 2, 4, 8)}


def bfloat16_bits(x: Array) -> Array:
    """Round float32 to the nearest bfloat16, ties to even; nan stays nan."""
    bits = x.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def from_bfloat16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _to_integer(x: Array, target: np.dtype[Any]) -> Array:
    """Round towards 0; beyond the range its end, and nan is 0."""
    limits = np.iinfo(target)
    whole = np.nan_to_num(np.trunc(x.astype(np.float64)), nan=0.0, posinf=np.inf, neginf=-np.inf)
    small = np.clip(whole, float(limits.min), float(limits.max) - (1 if target.itemsize < 8 else 1024))
    return np.where(whole >= float(limits.max), np.array(limits.max, target), small.astype(target))


def convert(x: Array, source: str, target: str, modes: tuple[str, ...]) -> Array:
    """cvt: the value ``x`` of type ``source`` as ``target``'s bits."""
    if source == "bf16":
        x, source = from_bfloat16(x), "f32"
    if target == "bf16":
        return bfloat16_bits(x.astype(np.float32))
    if source.startswith("f") and target[0] in "su":
        if not {"rzi"} & set(modes):
            raise ValueError("only rounding to integers towards 0")
        return _to_integer(x, TYPES[target])
    return x.astype(TYPES[target])


def pack_halves(high: Array, low: Array, kind: str) -> Array:
    half = bfloat16_bits if kind == "bf16x2" else lambda v: v.astype(np.float16).view(np.uint16)
    return half(low).astype(np.uint32) | half(high).astype(np.uint32) << np.uint32(16)


_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge, "eq": operator.eq, "ne": operator.ne,
    "lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge,
}  # fmt: skip


def compare(x: Array, y: Array, how: str, kind: str) -> Array:
    """setp: ordered comparisons are false of nan, those that end in u are true of it."""
    if not kind.startswith(("f", "bf")):
        return _COMPARE[how](x, y)
    unordered = np.isnan(x) | np.isnan(y)
    if how in ("nan", "num"):
        return unordered if how == "nan" else ~unordered
    if how.endswith("u"):
        return _COMPARE[how[:-1]](x, y) | unordered
    return _COMPARE[how](x, y) & ~unordered


def shift(x: Array, by: Array, left: bool) -> Array:
    """Shift; by a type's width or more all bits are gone, or the sign's."""
    bits = 8 * x.dtype.itemsize
    amount = np.minimum(by.astype(np.int64), bits - 1).astype(x.dtype)
    if left:
        return np.where(by >= bits, x.dtype.type(0), np.left_shift(x, amount))
    moved = np.right_shift(x, amount)
    return np.where(by >= bits, x.dtype.type(0), moved) if x.dtype.kind == "u" else moved


def divide(x: Array, y: Array, remainder: bool) -> Array:
    """Integers towards 0; floats as IEEE says."""
    if x.dtype.kind == "f":
        return x / y
    if not np.all(y):
        raise ZeroDivisionError
    quotient = x // y
    if x.dtype.kind == "i":
        quotient = quotient + ((quotient < 0) & (quotient * y != x)).astype(x.dtype)
    return x - quotient * y if remainder else quotient


def fused_multiply_add(x: Array, y: Array, z: Array) -> Array:
    """One rounding: a product of float32 is exact in float64. Of float64, as near as long double comes."""
    wide = np.float64 if x.dtype == np.float32 else np.longdouble
    return (x.astype(wide) * y.astype(wide) + z.astype(wide)).astype(x.dtype)


def extract_bits(x: Array, first: int, count: int) -> Array:
    """bfe: ``count`` bits from ``first`` on, with the sign of the last of them for a signed type."""
    bits = 8 * x.dtype.itemsize
    if count == 0:
        return np.zeros_like(x)
    up = max(bits - first - count, 0)
    return np.right_shift(np.left_shift(x, x.dtype.type(up)), x.dtype.type(min(up + first, bits - 1)))


_G, _T = np.arange(32) // 4, np.arange(32) % 4  # a lane's group of four, and its place there


def matrix_product(a: list[Array], b: list[Array], c: list[Array], kind: str) -> list[Array]:
    """mma.m16n8k8 of tf32 or m16n8k16 of a half type; registers [warps, 32].

    The tensor core reads 19 bits of a tf32 operand. Its own accumulation is not specified: here the sum of a product is
    exact and then cut off, which is worse than what is known of the hardware.
    """
    warps = len(a[0])
    depth = 8 if kind == "tf32" else 16
    left, right, sums = (np.zeros((warps, *shape)) for shape in ((16, depth), (depth, 8), (16, 8)))
    if kind == "tf32":
        for k, (down, along) in enumerate(((0, 0), (8, 0), (0, 4), (8, 4))):
            left[:, _G + down, _T + along] = (a[k] & np.uint32(0xFFFFE000)).view(np.float32)
        for k in range(2):
            right[:, _T + 4 * k, _G] = (b[k] & np.uint32(0xFFFFE000)).view(np.float32)
    else:
        for half, bits in enumerate((np.uint32(0), np.uint32(16))):

            def value(register: Array, bits: np.uint32 = bits) -> Array:
                part = np.ascontiguousarray((register >> bits).astype(np.uint16))
                return from_bfloat16(part) if kind == "bf16" else part.view(np.float16)

            for k, (down, along) in enumerate(((0, 0), (8, 0), (0, 8), (8, 8))):
                left[:, _G + down, 2 * _T + along + half] = value(a[k])
            for k in range(2):
                right[:, 2 * _T + 8 * k + half, _G] = value(b[k])
    places = ((0, 0), (0, 1), (8, 0), (8, 1))
    for k, (down, along) in enumerate(places):
        sums[:, _G + down, 2 * _T + along] = c[k].view(np.float32)
    exact = left @ right + sums
    cut = exact.astype(np.float32)
    above = np.abs(cut.astype(np.float64)) > np.abs(exact)
    cut = np.where(above & np.isfinite(cut), np.nextafter(cut, np.float32(0)), cut)
    return [np.ascontiguousarray(cut[:, _G + down, 2 * _T + along]) for down, along in places]
