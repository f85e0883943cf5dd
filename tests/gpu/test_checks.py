"""Each check of tests/support/gpu_checks.py, which `make gpu-report` runs without pytest, as a test."""

from __future__ import annotations

import gpu_checks
import pytest
import torch
from gpu_checks import Check
from kernel_coverage import all_kernels

CHECKS = {f"{c.op}-{c.backend}-{c.case}": c for c in gpu_checks.checks()}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "check",
    [pytest.param(c, id=i, marks=pytest.mark.kernels(*c.kernels, ran="gpu")) for i, c in CHECKS.items()],
)
def test_every_error_is_within_its_bound(device: torch.device, check: Check) -> None:
    if device.type == "cpu" and (check.backend == "cuda" or not check.dry):
        pytest.skip("needs a GPU, or minutes under the interpreter")
    row = gpu_checks.outcome(check, device, None)
    assert row["status"] == "ok", row["why"]


def test_every_kernel_is_checked_and_one_small_case_of_each_is_sanitized() -> None:
    assert {name for check in CHECKS.values() for name in check.kernels} == all_kernels()
    assert {name for check in CHECKS.values() if check.small for name in check.kernels} == all_kernels()
    assert len(CHECKS) == len(gpu_checks.checks())
