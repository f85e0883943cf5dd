"""What the tests on the device share. They also run on a CPU, under the interpreter, but for what only a GPU has.

``SVAG_TEST_DEVICE=cpu TRITON_INTERPRET=1 python -m pytest tests/gpu`` is that: the tests themselves are tried where
there is no GPU, and nothing counts as run on one.
"""

from __future__ import annotations

import os

import pytest
import torch
from gpu_checks import STEP_KERNELS

from svag_fast.ops.backends import BACKENDS


@pytest.fixture
def device() -> torch.device:
    return torch.device(os.environ.get("SVAG_TEST_DEVICE", "cuda"))


@pytest.fixture(
    params=[pytest.param(b, marks=pytest.mark.kernels(*names, ran="gpu")) for b, names in STEP_KERNELS.items()],
    ids=str,
)
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    """Each of the GPU's backends of the step; one that can't be used on a GPU is a failure, not a skip."""
    name = str(request.param)
    if device.type == "cpu" and name == "cuda":
        pytest.skip("the cuda backend needs a GPU")
    reason = BACKENDS[name].why_unavailable()
    assert reason is None, reason
    return name
