"""Every Triton kernel, compiled for four architectures: no spills, wide loads, and no more registers than before."""

from __future__ import annotations

import os
from typing import Any

import pytest
from gpu_binary import ARCHITECTURES, Report, held_to_golden, report

triton = pytest.importorskip("triton", reason="triton is not installed")

STEP = {"table": "*i64", "owners": "*i64", "coefficients": "*fp64", "partials": "*fp64", "stats": "*fp64"}
STEP_OPTIONS = {
    "UPDATE": True,
    "GATED": False,
    "ALIGNED": True,
    "BLOCK": 1024,
    "ROUNDS": 8,
    "GRAD2": True,
    "MOMENTUM": False,
}
SIZES = dict.fromkeys(["B", "M", "N", "T", "OUT_W", "H", "W", "CHANNELS"], "i32")
STRIDES = dict.fromkeys([f"{t}_{d}" for t in "ab" for d in ("sample", "channel", "row", "column")], "i32")
CONVOLUTION = {
    "K_W": 3, "TAPS": 9, "STRIDE_H": 1, "STRIDE_W": 1, "PAD_H": 1, "PAD_W": 1, "DILATION_H": 1, "DILATION_W": 1,
    "CHANNELS_FASTEST": True, "SEGMENTS": 2, "CHUNK": 16, "WIDEN": False, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_T": 32,
}  # fmt: skip

EXACT = {"BLOCK_M": 32, "BLOCK_T": 16}  # kernels/weight_grad.py's tile for full float32 products


def weight_grad(a: str, target: str, **options: Any) -> tuple[str, dict[str, str], dict[str, Any]]:
    pointers = {
        "a": a, "b": a, "weights": "*fp32", "segments": "*i64", "target": target, "coefficients": "*fp64",
        "sums": "*fp32", "sq_norms": "*fp32", "partials": "*fp64",
    }  # fmt: skip
    return "_weight_grad_kernel", {**pointers, **SIZES, **STRIDES}, {**CONVOLUTION, **options}


# name: kernel, types of what is passed when it runs, constants. Bit 4p + g of PAIRS: param dtype p, gradient dtype g.
KERNELS: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "step, float32": ("_step_kernel", {**STEP, "programs": "i32"}, {**STEP_OPTIONS, "PAIRS": 1, "COMPENSATED": False}),
    "step, bfloat16 compensated": (
        "_step_kernel",
        {**STEP, "programs": "i32"},
        {**STEP_OPTIONS, "PAIRS": 1 << 10, "COMPENSATED": True},
    ),
    "step, float32 with momentum": (
        "_step_kernel",
        {**STEP, "programs": "i32"},
        {**STEP_OPTIONS, "PAIRS": 1, "COMPENSATED": False, "MOMENTUM": True},
    ),
    "finish": ("_finish_kernel", {"partials": "*fp64", "stats": "*fp64", "programs": "i32"}, {"FINISH": 512}),
    "weight_grad, float32": weight_grad("*fp32", "*fp32", ONE_CHUNK=False, STEP=False, PRECISION="ieee", **EXACT),
    "weight_grad, tf32": weight_grad("*fp32", "*fp32", ONE_CHUNK=False, STEP=False, PRECISION="tf32"),
    "weight_grad, bfloat16, step": weight_grad("*bf16", "*bf16", ONE_CHUNK=True, STEP=True, PRECISION="ieee"),
    "add_chunks": (
        "_add_chunks_kernel",
        {
            "sums": "*fp32",
            "target": "*fp32",
            "coefficients": "*fp64",
            "partials": "*fp64",
            "size": "i32",
            "chunks": "i32",
        },
        {"SEGMENTS": 2, "STEP": True, "BLOCK": 1024},
    ),
    "add_norms": (
        "_add_norms_kernel",
        {"sq_norms": "*fp32", "out": "*fp64", "B": "i32", "tiles": "i32"},
        {"BLOCK": 128},
    ),
}  # fmt: skip


def compiled(name: str, architecture: int) -> Report:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from svag_fast.kernels import step, weight_grad

    kernel, types, constants = KERNELS[name]
    function = getattr(step, kernel, None) or getattr(weight_grad, kernel)
    pointers = [i for i, argument in enumerate(types.values()) if argument.startswith("*")]
    source = ASTSource(
        function,
        {**types, **dict.fromkeys(constants, "constexpr")},
        constants,
        {(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    options: dict[str, Any] = {"enable_fp_fusion": kernel != "_step_kernel"}
    if kernel == "_weight_grad_kernel":
        exact = EXACT.items() <= constants.items()
        stages = weight_grad.EXACT_STAGES if exact else weight_grad.STAGES
        options |= {"num_warps": weight_grad.WARPS, "num_stages": stages}
    binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return report(binary.asm["cubin"], binary.metadata.shared)


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    return {f"{name}, sm_{a}": compiled(name, a) for name in KERNELS for a in ARCHITECTURES}


pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="under the interpreter Triton compiles nothing"
)


# K @pytest.mark.kernels(*sorted({kernel for kernel, _, _ in KERNELS.values()}), ran="compile")
def test_nothing_spills_and_nothing_lies_on_the_stack(reports: dict[str, Report]) -> None:
    bad = {name: line for name, line in reports.items() if line["spills"] or line["stack"]}
    assert not bad


def test_aligned_float32_steps_load_and_store_128_bits(reports: dict[str, Report]) -> None:
    for a in ARCHITECTURES:
        # Three streams read and one written, 8 elements a thread; with momentum one more of each.
        for name, loads, stores in (("", 6, 2), (" with momentum", 8, 4)):
            line = reports[f"step, float32{name}, sm_{a}"]
            assert line["wide loads"] >= loads
            assert line["wide stores"] >= stores


def test_no_kernel_needs_more_than_before(reports: dict[str, Report]) -> None:
    held_to_golden(reports, triton.__version__, regenerate=os.environ.get("SVAG_REGENERATE_GOLDEN") == "1")
