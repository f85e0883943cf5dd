"""Every Triton kernel, compiled for GPUs: no spills, wide loads, and no more registers than before."""

from __future__ import annotations

import os
from typing import Any

import pytest
from gpu_binary import ARCHITECTURES, Report, check_golden, report

triton = pytest.importorskip("triton", reason="triton is not installed")

PROGRAMS = {"programs": "i32", "segment": "i32"}
STEP = {"table": "*i64", "owners": "*i64", "coefficients": "*fp64", "partials": "*fp64", "stats": "*fp64"}
STEP |= {"scale": "*fp32", **PROGRAMS}
STEP_OPTIONS = {
    "UPDATE": True,
    "GATED": False,
    "SCALED": False,
    "ALIGNED": True,
    "BLOCK": 1024,
    "ROUNDS": 8,
    "GRAD2": True,
    "MOMENTUM": False,
    "REPLICAS": False,
}
SIZES = dict.fromkeys(["B", "CHUNK", "programs", "H", "OUT_H", "a_sample", "b_sample"], "i32")
# A 3x3 convolution of 64 to 64 channels on 32x32 in channels_last.
CONVOLUTION = {
    "M": 64, "CHANNELS": 64, "W": 32, "OUT_W": 32, "A_CHANNEL": 1, "A_ROW": 2048, "A_COLUMN": 64,
    "B_CHANNEL": 1, "B_ROW": 2048, "B_COLUMN": 64,
    "K_W": 3, "TAPS": 9, "STRIDE_H": 1, "STRIDE_W": 1, "PAD_H": 1, "PAD_W": 1, "DILATION_H": 1, "DILATION_W": 1,
    "CHANNELS_FASTEST": True, "SEGMENTS": 2, "PARTS": 1, "INTERPRETED": False,
}  # fmt: skip


def tile_of_case(exact: bool) -> Any:
    from svag_fast.kernels.weight_grad import Convolution, tile_of

    return tile_of((64, 64, 3, 3), (32, 32, 32), Convolution(padding=(1, 1)), exact=exact)


def weight_grad(a: str, target: str, **options: Any) -> tuple[str, dict[str, str], dict[str, Any]]:
    """With the tile that the launch takes for such products."""
    pointers = {
        "a": a, "b": a, "weights": "*fp32", "segments": "*i64", "target": target, "target2": target,
        "coefficients": "*fp64", "sums": "*fp32", "sq_norms": "*fp32", "partials": "*fp64",
    }  # fmt: skip
    tile = tile_of_case(a == "*fp32" and options["PRECISION"] == "ieee")
    return "_weight_grad_kernel", {**pointers, **SIZES}, {**CONVOLUTION, **tile.constants, **options}


FINISH = {
    "sums": "*fp32", "target": "*fp32", "target2": "*fp32", "coefficients": "*fp64", "partials": "*fp64",
    "stats": "*fp64", "shares": "*fp32", "sq_norms": "*fp64",
    **dict.fromkeys(["size", "chunks", "programs", "ends", "B", "tiles"], "i32"),
}  # fmt: skip
FINISH_OPTIONS = {"SEGMENTS": 2, "PARTS": 1, "BLOCK": 1024, "FINISH": 256, "SAMPLES": 16, "TILES": 64}


# name: kernel, types of what is passed when it runs, constants. Bit 4p + g of PAIRS: param dtype p, gradient dtype g.
KERNELS: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "step, float32": ("_step_kernel", STEP, {**STEP_OPTIONS, "PAIRS": 1, "COMPENSATED": False}),
    "step, float32 under a scaler": (
        "_step_kernel",
        STEP,
        {**STEP_OPTIONS, "PAIRS": 1, "COMPENSATED": False, "GATED": True, "SCALED": True},
    ),
    "step, bfloat16 compensated": (
        "_step_kernel",
        STEP,
        {**STEP_OPTIONS, "PAIRS": 1 << 10, "COMPENSATED": True},
    ),
    "step, float32 with momentum": (
        "_step_kernel",
        STEP,
        {**STEP_OPTIONS, "PAIRS": 1, "COMPENSATED": False, "MOMENTUM": True},
    ),
    "step, float32 of replicas": (
        "_step_kernel",
        STEP,
        {**STEP_OPTIONS, "PAIRS": 1, "COMPENSATED": False, "REPLICAS": True},
    ),
    "finish": (
        "_finish_kernel",
        {"partials": "*fp64", "stats": "*fp64", "found_inf": "*fp32", **PROGRAMS},
        {"FOUND_INF": True, "FINISH": 512},
    ),
    "weight_grad, float32": weight_grad("*fp32", "*fp32", ONE_CHUNK=False, STEP=False, PRECISION="ieee"),
    "weight_grad, tf32": weight_grad("*fp32", "*fp32", ONE_CHUNK=False, STEP=False, PRECISION="tf32"),
    "weight_grad, tf32, two halves": weight_grad(
        "*fp32", "*fp32", SEGMENTS=1, PARTS=2, ONE_CHUNK=False, STEP=False, PRECISION="tf32"
    ),
    "weight_grad, bfloat16, step": weight_grad("*bf16", "*bf16", ONE_CHUNK=True, STEP=True, PRECISION="ieee"),
    "finish_layer, many chunks, step": (
        "_finish_layer_kernel", FINISH, {**FINISH_OPTIONS, "ONE_CHUNK": False, "STEP": True}
    ),
    "finish_layer, many chunks, two halves": (
        "_finish_layer_kernel",
        FINISH,
        {**FINISH_OPTIONS, "SEGMENTS": 1, "PARTS": 2, "ONE_CHUNK": False, "STEP": False},
    ),
    "finish_layer, one chunk": ("_finish_layer_kernel", FINISH, {**FINISH_OPTIONS, "ONE_CHUNK": True, "STEP": False}),
}  # fmt: skip


def compiled(name: str, architecture: int) -> Report:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from svag_fast.kernels import step, weight_grad

    kernel, types, constants = KERNELS[name]
    function = getattr(step, kernel, None) or getattr(weight_grad, kernel)
    # As the launch finds them: a layer of whole 16 elements a sample. Without that each copy is of 4 bytes.
    aligned = [i for i, (n, kind) in enumerate(types.items()) if kind.startswith("*") or n in ("a_sample", "b_sample")]
    source = ASTSource(
        function,
        {**types, **dict.fromkeys(constants, "constexpr")},
        constants,
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options: dict[str, Any] = {"enable_fp_fusion": kernel != "_step_kernel"}
    if kernel == "_weight_grad_kernel":
        tile = tile_of_case(types["a"] == "*fp32" and constants["PRECISION"] == "ieee")
        options |= {"num_warps": tile.warps, "num_stages": tile.stages}
    binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return report(binary.asm["cubin"], binary.metadata.shared)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def reports(architecture: int) -> dict[str, Report]:
    return {f"{name}, sm_{architecture}": compiled(name, architecture) for name in KERNELS}


pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="under the interpreter Triton compiles nothing"
)


@pytest.mark.kernels(*sorted({kernel for kernel, _, _ in KERNELS.values()}), ran="compile")
def test_nothing_spills_and_nothing_is_on_the_stack(reports: dict[str, Report]) -> None:
    bad = {name: line for name, line in reports.items() if line["spills"] or line["stack"]}
    assert not bad


def test_aligned_float32_steps_load_and_store_128_bits(reports: dict[str, Report], architecture: int) -> None:
    # Three streams read and one written, 8 elements a thread; with momentum one more of each, under a scaler the
    # second gradient written too.
    for name, loads, stores in (
        ("", 6, 2),
        (" with momentum", 8, 4),
        (" under a scaler", 6, 4),
        (" of replicas", 6, 2),
    ):
        line = reports[f"step, float32{name}, sm_{architecture}"]
        assert line["wide loads"] >= loads
        assert line["wide stores"] >= stores


def test_no_kernel_needs_more_than_before(reports: dict[str, Report]) -> None:
    check_golden(reports, triton.__version__, regenerate=os.environ.get("SVAG_REGENERATE_GOLDEN") == "1")
