"""The GPU checks' cases, by the Triton kernels' real PTX in the simulator: values, races, bounds, unwritten memory."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("under the interpreter Triton compiles nothing", allow_module_level=True)

from gpu_cases import LAYERS, products
from gpu_checks import LAYER_KERNELS, STEP_KERNELS, Check, checks, outcome
from layer_cases import bias_z, make
from ptx.driver import Launch, as_a_gpu
from ptx.simulator import Simulator

from svag_fast.kernels import weight_grad as kernels
from svag_fast.ops import weight_grad_and_sq_norms

CHECKS = {f"{c.op} {c.case}": c for c in checks() if c.backend == "triton"}
SHORT = [
    *(name for name, check in CHECKS.items() if check.small and "many chunks" not in name),
    *(f"weight_grad_and_sq_norms {case}" for case in ("3x3, channels_last", "3x3, tf32", "stride 2, tf32")),
    "weight_grad_and_sq_norms 3x3, bfloat16",
    "weight_grad_and_sq_norms linear, rows, 3 segments",
]
# 9 million elements are for a GPU.
TOO_MANY = ("svag_step_ 9 million",)
# The one chunk of 512 channels takes minutes in all; fewer channels have one too where fewer warps are enough.
ONE_CHUNK = {"one chunk": ([4, 128, 4, 4], [128, 128, 3, 3], {"padding": 1})}


def run(check: Check, seed: int = 0) -> None:
    simulator = Simulator(seed)
    one = "one chunk" in check.case
    few = mock.patch.object(kernels, "_WARPS", 1 if one else kernels._WARPS)
    with simulator.running(), few, mock.patch.dict(LAYERS, ONE_CHUNK if one else {}):
        row = outcome(check, torch.device("cpu"), None)
    assert row["status"] == "ok", row["why"]
    assert simulator.launches.keys() <= set(check.kernels)


@pytest.mark.kernels(*STEP_KERNELS["triton"], *LAYER_KERNELS, ran="simulator")
@pytest.mark.parametrize("name", SHORT)
def test_a_check_by_the_real_ptx(name: str) -> None:
    run(CHECKS[name])


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name in CHECKS if name not in (*SHORT, *TOO_MANY)])
def test_every_check_by_the_real_ptx(name: str) -> None:
    run(CHECKS[name], seed=1)


@pytest.mark.parametrize("last", [False, True])
def test_tf32_products_are_not_biased(last: bool) -> None:
    """The tensor cores cut off 13 bits: unless operands are rounded first, every norm is some 0.13 % low."""
    x, dy = make([16, 8, 4, 8], [8, 8, 3, 3], dtype=torch.float32, padding=1)
    exact = weight_grad_and_sq_norms(x.double(), dy.double(), [8, 8, 3, 3], padding=1, backend="reference").sq_norms
    if last:
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    with Simulator().running(), products("tf32"):
        found = weight_grad_and_sq_norms(x, dy, [8, 8, 3, 3], padding=1, backend="triton").sq_norms
    assert abs(bias_z(found, exact)) < 4


# What CUDA's arithmetic makes is 0x7fffffff; x86's is 0xffc00000.
@pytest.mark.parametrize("bits", [0x7F800000, 0x7FFFFFFF, -1, -0x400000])
def test_rounding_keeps_inf_and_nan(bits: int) -> None:
    x, dy = make([3, 8, 4, 4], [8, 8, 3, 3], dtype=torch.float32, padding=1)
    x.view(torch.int32)[1, 2] = bits
    with Simulator().running(), products("tf32"):
        norms = weight_grad_and_sq_norms(x, dy, [8, 8, 3, 3], padding=1, backend="triton").sq_norms
    assert norms.isfinite().tolist() == [True, False, True]


def test_a_layer_is_compiled_once_for_all_batches() -> None:
    seen: list[Launch] = []
    input_shape, shape, options = LAYERS["3x3"]
    with as_a_gpu(seen.append):
        for size in (2, 3, 16, 33, 48, 64):
            x, dy = make([size, *input_shape[1:]], shape, dtype=torch.float32, **options)
            weight_grad_and_sq_norms(x, dy, shape, segments=[i % 2 for i in range(size)], backend="triton", **options)
    for kernel in LAYER_KERNELS:
        # One for a single chunk, one for several.
        assert len({launch.cubin for launch in seen if launch.kernel == kernel}) <= 2


def test_an_image_may_grow_taller_and_a_sequence_longer() -> None:
    seen: list[Launch] = []
    with as_a_gpu(seen.append):
        for length in (64, 96, 128, 160):
            x, dy = make([2, length, 16], [16, 16], dtype=torch.float32)
            weight_grad_and_sq_norms(x, dy, [16, 16], backend="triton")
            x, dy = make([2, 16, length, 32], [16, 16, 3, 3], dtype=torch.float32, padding=1)
            x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
            weight_grad_and_sq_norms(x, dy, [16, 16, 3, 3], padding=1, backend="triton")
    assert len({launch.cubin for launch in seen if launch.kernel == "_weight_grad_kernel"}) == 2
