"""Reads the pickles that CIFAR is published as, without running anything that they say."""

from __future__ import annotations

import io
import math
import pickle
from typing import Any

import numpy as np


def loads(raw: bytes) -> Any:
    """Return what a pickle holds: dicts, lists, tuples, bytes, texts, numbers, and arrays of bytes (uint8).

    A pickle is a program that calls whatever it names. Here it can name only NumPy's three makers of arrays, and these
    are stand-ins that check what they are given.

    Raises:
        ValueError: it holds anything else, or is damaged.
    """
    try:
        return _plain(_Unpickler(io.BytesIO(raw), encoding="bytes").load())
    except _RefusedError:
        raise
    except Exception as error:  # whatever foreign bytes lead an unpickler to
        raise ValueError(
            f"it must be a pickle of plain values and arrays, got {error or type(error).__name__}"
        ) from error


class _RefusedError(ValueError):
    """What is refused in words of our own."""


class _Dtype:
    """In place of numpy.dtype."""

    def __init__(self, *arguments: object) -> None:
        if not arguments or arguments[0] not in ("u1", b"u1"):
            raise _RefusedError("its arrays must be of uint8")

    def __setstate__(self, state: object) -> None:
        pass  # byte order and the like, of which bytes have none


class _Array:
    """In place of numpy.ndarray, as NumPy's own `_reconstruct` would make it: empty, filled by its state."""

    def __init__(self, *_: object) -> None:
        self.values: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        whole = isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
        if not (whole and isinstance(dtype, _Dtype) and isinstance(raw, bytes) and len(raw) == math.prod(shape)):
            raise _RefusedError("its arrays must be of uint8, and whole")
        self.values = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")


def _encode(text: object, encoding: object = "latin1") -> bytes:
    """In place of _codecs.encode, by which Python 3 writes bytes into older pickles."""
    if not isinstance(text, str) or encoding != "latin1":
        raise _RefusedError("its bytes must be latin1")
    return text.encode("latin1")


_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): "ndarray",  # only ever handed to _reconstruct
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}
_STAND_INS |= {(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise _RefusedError(f"it names {module}.{name}, which is no part of plain values and arrays") from None


def _plain(value: Any) -> Any:
    """The value with real arrays in place of the stand-ins."""
    if isinstance(value, _Array) and value.values is not None:
        return value.values
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and not all(type(item) is int for item in value):
        return type(value)(_plain(item) for item in value)
    return value
