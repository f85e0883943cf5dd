"""The backends that the steps' tests run on: the reference, and the CPU kernel at each SIMD level of this processor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from simd import AVAILABLE, simd_level


@pytest.fixture(params=["reference", *AVAILABLE])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Yield the backend's name, with the SIMD level chosen for the time of the test."""
    if request.param == "reference":
        yield "reference"
        return
    with simd_level(request.param):
        yield "cpu"
