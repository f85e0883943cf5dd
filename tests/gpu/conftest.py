"""What the tests on the device share. They also run on a CPU, under the interpreter, but for what only a GPU has.

``SVAG_TEST_DEVICE=cpu TRITON_INTERPRET=1 python -m pytest tests/gpu`` is that: the tests themselves are tried where
there is no GPU, and nothing counts as run on one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from svag_fast.ops.backends import BACKENDS


@pytest.fixture
def device() -> torch.device:
    return torch.device(os.environ.get("SVAG_TEST_DEVICE", "cuda"))


STEP_KERNELS = {"cuda": ("step_kernel", "finish_kernel"), "triton": ("_step_kernel", "_finish_kernel")}


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


def _allow_tf32(allowed: list[bool]) -> list[bool]:
    """Set PyTorch's switches for matrix products and convolutions; return what they were."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    for switch, value in zip(switches, allowed, strict=True):
        switch.allow_tf32 = value
    return before


@pytest.fixture
def ieee() -> Iterator[None]:
    """Full float32 products, those of convolutions too."""
    before = _allow_tf32([False, False])
    yield
    _allow_tf32(before)


@pytest.fixture
def tf32() -> Iterator[None]:
    """Float32 products may be rounded to tf32."""
    before = _allow_tf32([True, True])
    yield
    _allow_tf32(before)
