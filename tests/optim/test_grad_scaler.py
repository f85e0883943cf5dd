"""A GradScaler's step is unscale_ and a step, to the bit, and an inf anywhere skips all of it.

The same by the kernels that read the scaler themselves: tests/interpreter/test_step.py, tests/csrc/test_cuda_step.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from scaler_cases import CHECKS


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_under_a_scaler(check: Callable[[str], None], backend: str) -> None:
    check(backend)
