"""What nvcc makes of every CUDA kernel for every architecture: nothing spilled, 16-byte accesses, no growth."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import cuda_report
import pytest

KERNELS = sorted(json.loads(cuda_report.GOLDEN.read_text())["kernels"])
ARCHS = cuda_report.ARCHS

pytestmark = pytest.mark.skipif(
    cuda_report.why_unavailable() is not None, reason=f"{cuda_report.why_unavailable()}: CUDA kernels not compiled"
)


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, Any]]:
    return cuda_report.read_extension()


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    value: dict[str, Any] = json.loads(cuda_report.GOLDEN.read_text())
    return value


def of(reports: dict[str, Any], kernel: str, arch: str) -> dict[str, Any]:
    """Return a kernel's report; skip where nvcc did not know the architecture, or was not asked for it."""
    if arch not in reports[kernel]:
        pytest.skip(f"this build has {', '.join(reports[kernel])}, and not {arch}")
    return dict(reports[kernel][arch])


def grown(report: dict[str, Any], recorded: dict[str, int]) -> list[str]:
    return [f"{key} {recorded[key]} -> {report[key]}" for key in recorded if report[key] > recorded[key]]


@pytest.mark.kernels(
    "step_kernel", "scaled_step_kernel", "finish_kernel", "per_sample_step_kernel", "finish_norms_kernel",
    "replicas_step_kernel", "replicas_finish_kernel", ran="compile",
)  # fmt: skip
def test_the_golden_file_names_every_kernel(reports: dict[str, Any], golden: dict[str, Any]) -> None:
    assert sorted(reports) == sorted(golden["kernels"]), f"write it again: {cuda_report.WRITE}"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_register_is_spilled_and_no_stack_used(reports: dict[str, Any], kernel: str, arch: str) -> None:
    report = of(reports, kernel, arch)
    assert (report["stack"], report["local"]) == (0, 0)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_registers_and_shared_memory_have_not_grown(
    reports: dict[str, Any], golden: dict[str, Any], kernel: str, arch: str
) -> None:
    if golden["nvcc"] != cuda_report.nvcc_version():
        pytest.skip(f"tests/golden/cuda.json is nvcc {golden['nvcc']}'s, this is {cuda_report.nvcc_version()}")
    growth = grown(of(reports, kernel, arch), golden["kernels"][kernel][arch])
    assert not growth, f"{kernel} on {arch} grew: {', '.join(growth)}. If that is meant: {cuda_report.WRITE}"


def test_growth_of_one_register_is_seen() -> None:
    assert grown({"registers": 61, "shared": 8}, {"registers": 60, "shared": 8}) == ["registers 60 -> 61"]
    assert grown({"registers": 60, "shared": 8}, {"registers": 60, "shared": 8}) == []


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", [name for name in KERNELS if "step_kernel<" in name and "per_sample" not in name])
def test_the_float32_loop_moves_16_bytes_an_access(reports: dict[str, Any], kernel: str, arch: str) -> None:
    """Params, gradients, compensation and momentum are read, all but the gradients written, all by 128 bits.

    No other dtype's loop has 5 wide loads: float64 has 2 or 4, the 16-bit ones 4 or 7.
    """
    mixes = map(cuda_report.instruction_mix, of(reports, kernel, arch)["loops"])
    packed = [mix for mix in mixes if mix.get("128-bit load") == 5]
    assert packed
    for mix in packed:
        assert mix["128-bit store"] == (4 if kernel.startswith("scaled") else 3)  # the gradient that the user sees too
        assert "float64" not in mix
        assert "other load" not in mix
        assert "other store" not in mix


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("capacity", [64, 540])
def test_the_replicas_loops_fuse_multiplies_and_adds_as_the_plain_steps(
    reports: dict[str, Any], capacity: int, arch: str
) -> None:
    """Whatever is fused is one fused instruction more, and one addition less: else a replica's bits weren't its own."""
    plain, replicas = (fused_and_added(of(reports, f"{k}_kernel<{capacity}>", arch)) for k in ("step", "replicas_step"))
    assert replicas[0] == plain[0], "the loops of 16-byte accesses"
    assert replicas[1].keys() <= plain[1].keys(), "those of one element at a time"


def fused_and_added(report: dict[str, Any]) -> tuple[Counter[Any], Counter[Any]]:
    """Count the loops by their fused and added operations: those with accesses of 16 bytes, and the others."""
    wide, others = Counter[Any](), Counter[Any]()
    for loop in report["loops"]:
        sums = Counter[str]()
        for opcode, count in loop.items():
            if found := re.match(r"[FD](FMA|ADD)", opcode):
                sums[found[0]] += count
        kind = wide if any(re.match(r"LDG.*\.128", opcode) for opcode in loop) else others
        kind[tuple(sorted(sums.items()))] += 1
    assert wide.total() >= 7, "one for each pair of dtypes"
    return wide, others
