"""The CPU kernels' SIMD levels and PyTorch's threads, chosen for the time of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from svag_fast import _C

LEVELS = ["portable", "avx2", "avx512"]
AVAILABLE = LEVELS[: LEVELS.index(_C.best_simd_level()) + 1]  # those that this processor runs


@contextmanager
def simd_level(name: str) -> Iterator[None]:
    before = _C.simd_level()
    assert _C.select_simd_level(name), f"this processor has no {name}"
    try:
        yield
    finally:
        _C.select_simd_level(before)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
