"""Faults planted in the kernels' PTX and source: each is seen by the simulator, or it is said why it is none.

| planted and not seen                                 | why it is no fault                                           |
| ---------------------------------------------------- | ------------------------------------------------------------ |
| a barrier with a twin, nothing accessed between them | the twin does its work                                       |
| a barrier with reads alone on both sides             | reads need no order; Triton does not look across the loop    |
| a wait for as many copies as its neighbour's         | no copy was begun in between                                 |
| OWN_BYTES below                                      | what is written after it the same warp alone read before it  |
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("under the interpreter Triton compiles nothing", allow_module_level=True)

import triton
from gpu_cases import products, weight_grad
from layer_cases import bias_z, make
from ptx.driver import Launch, as_a_gpu
from ptx.faults import Trial, planted, why_harmless
from ptx.simulator import Simulator

import svag_fast.kernels
from svag_fast.kernels import weight_grad as kernels
from svag_fast.ops import weight_grad_and_sq_norms

EXPLAINED = "3.9.0"  # the version of Triton whose barriers were looked at; another puts others
# Barriers that it puts before a conversion between layouts, whichever warps read what it writes over.
OWN_BYTES = {"_finish_layer_kernel": 1}


def unseen(dtype: torch.dtype, precision: str, last: bool) -> tuple[list[str], int]:
    """Plant every fault of order in the launches of one layer; return those that show nowhere, and how many in all."""
    if triton.__version__ != EXPLAINED:
        pytest.skip(f"Triton {EXPLAINED}'s barriers are explained, not {triton.__version__}'s")
    missed: list[str] = []
    allowed = Counter(OWN_BYTES)
    count = 0

    def launched(launch: Launch) -> None:
        nonlocal count
        trial = Trial(launch)
        for fault in planted(trial.program, ("barrier", "wait", "order")):
            count += 1
            if trial.verdict(fault) or why_harmless(trial.program, fault.place):
                continue
            allowed[launch.kernel] -= 1
            if allowed[launch.kernel] < 0:
                missed.append(f"{fault}: {trial.program.code[fault.place]}")
        trial.restore()

    x, dy = make([4, 16, 8, 12], [16, 16, 3, 3], dtype=dtype, padding=1)
    if last:
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    # Two samples a program, so that one follows the other in the same shared memory.
    warps = 24 if dtype == torch.float32 and precision == "ieee" else 4
    with as_a_gpu(launched), mock.patch.object(kernels, "_WARPS", warps), products(precision):
        weight_grad_and_sq_norms(x, dy, [16, 16, 3, 3], segments=[0, 1, 0, 1], padding=1, backend="triton")
    return missed, count


def test_every_barrier_and_wait_of_the_tf32_kernel_is_needed_or_explained() -> None:
    missed, count = unseen(torch.float32, "tf32", last=True)
    assert not missed
    assert count >= 30


@pytest.mark.nightly
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float32, "tf32"), (torch.float32, "ieee"), (torch.bfloat16, "ieee"), (torch.float16, "ieee")],
    ids=str,
)
def test_every_barrier_and_wait_is_needed_or_explained(dtype: torch.dtype, precision: str, last: bool) -> None:
    missed, count = unseen(dtype, precision, last)
    assert not missed
    assert count >= 20


# Each breaks a mask, a bound or an order of kernels/weight_grad.py.
MUTANTS = {
    "a channel too many": ("b_seen = (m < M)", "b_seen = (m <= M)"),
    "a column of the product too many": ("a_seen = (n < N)", "a_seen = (n <= N)"),
    "a row below the image": ("bitcast=True) < H.to(tl.uint32)", "bitcast=True) <= H.to(tl.uint32)"),
    "a column right of the image": ("bitcast=True) < W", "bitcast=True) <= W"),
    "a row of positions too many": ("row + down < OUT_H", "row + down <= OUT_H"),
    "an input row too many": ("row + down < height", "row + down <= height"),
    "a gradient's row too many": (
        "bitcast=True)[None, :] < OUT_H.to(tl.uint32)", "bitcast=True)[None, :] <= OUT_H.to(tl.uint32)"
    ),
    "another row of taps": ("b_offsets - k * B_ROW", "b_offsets + k * B_ROW"),
    "a column of positions too many": ("column + right < OUT_W", "column + right <= OUT_W"),
    "a channel stored too many": ("inside = (m < M)", "inside = (m <= M)"),
    "a column stored too many": ("& (n < N)[None, :]\n        for", "& (n <= N)[None, :]\n        for"),
    "an element added too many": ("inside = offsets < size", "inside = offsets <= size"),
    "a tile's norm too many": ("(first + t < tiles)", "(first + t <= tiles)"),
    "a sample's norm too many": ("mask=i < B)", "mask=i <= B)"),
    "statistics of a program too many": ("(first + lanes < programs)", "(first + lanes <= programs)"),
    "the last but one program ends": ("== ends - 1", "== ends - 2"),
    "the count of programs is not begun at 0": ("tl.store(partials + 5 * programs, 0.0", "tl.store(partials, 0.0"),
    "the chunk's last sample is left out": ("tl.minimum(CHUNK, end - i).to", "(tl.minimum(CHUNK, end - i) - 1).to"),
}  # fmt: skip


@pytest.fixture
def mutated(tmp_path: Path) -> Iterator[Callable[[str, str], None]]:
    """Put another source in the kernels' place."""
    patches = []

    def put(old: str, new: str) -> None:
        text = Path(str(kernels.__file__)).read_text()
        assert old in text, "the mutant's text is not in the source any more"
        path = tmp_path / "weight_grad.py"
        path.write_text(text.replace(old, new))
        spec = importlib.util.spec_from_file_location("svag_fast.kernels.weight_grad", path)
        assert spec is not None
        assert spec.loader is not None
        module: ModuleType = importlib.util.module_from_spec(spec)
        patches.append(mock.patch.dict(sys.modules, {"svag_fast.kernels.weight_grad": module}))
        patches.append(mock.patch.object(svag_fast.kernels, "weight_grad", module))
        for patch in patches:
            patch.start()
        spec.loader.exec_module(module)
        module._WARPS = 16  # type: ignore[attr-defined]  # two chunks of several samples, or one

    yield put
    for patch in reversed(patches):
        patch.stop()


def seen(case: str, precision: str) -> bool:
    """Whether one of the checks' bounds, or the simulator, sees a fault."""
    try:
        with Simulator().running():
            return any(not value <= 1 for _, value in weight_grad(torch.device("cpu"), case, precision=precision))
    except AssertionError:
        return True


# A kernel's rows are tiles of their own in tf32 alone.
CASES = (
    ("odd channels", "ieee"),
    ("rows of taps, odd sizes", "ieee"),
    ("rows of taps, odd sizes", "tf32"),
    ("3x3", "ieee"),
)
SHORT = ("a column right of the image", "the last but one program ends")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in SHORT else pytest.mark.nightly) for n in MUTANTS])
def test_a_wrong_mask_is_seen(mutated: Callable[[str, str], None], name: str) -> None:
    mutated(*MUTANTS[name])
    assert any(seen(*case) for case in CASES)


@pytest.mark.nightly
def test_without_mutants_the_same_cases_are_right(mutated: Callable[[str, str], None]) -> None:
    mutated("b_seen", "b_seen")
    assert not any(seen(*case) for case in CASES)


def test_operands_that_are_only_cut_off_are_seen(mutated: Callable[[str, str], None]) -> None:
    mutated("@%none add.u32", "@%none or.b32")
    x, dy = make([16, 8, 4, 8], [8, 8, 3, 3], dtype=torch.float32, padding=1)
    with Simulator().running(), products("tf32"):
        found = weight_grad_and_sq_norms(x, dy, [8, 8, 3, 3], padding=1, backend="triton").sq_norms
    exact = weight_grad_and_sq_norms(x.double(), dy.double(), [8, 8, 3, 3], padding=1, backend="reference").sq_norms
    assert abs(bias_z(found, exact)) > 20
