"""The backends that the steps' tests run on: the reference, and the CPU kernel at each SIMD level of this processor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from svag_fast import _C


@pytest.fixture(params=["reference", "portable", "avx2", "avx512"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Yield the backend's name, with the SIMD level chosen for the time of the test."""
    if request.param == "reference":
        yield "reference"
        return
    before = _C.simd_level()
    if not _C.select_simd_level(request.param):
        pytest.skip(f"this processor has no {request.param}")
    yield "cpu"
    _C.select_simd_level(before)
