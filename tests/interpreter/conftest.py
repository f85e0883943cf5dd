"""These tests need TRITON_INTERPRET=1 from the start: tests/kernels/test_triton_interpreter.py runs them so."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from gpu_cases import products

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    """A convolution's products may be rounded to tf32 by default: a test of that asks for it."""
    with products("ieee"):
        yield
