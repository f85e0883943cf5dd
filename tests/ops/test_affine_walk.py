"""Affine random walks in one pass: the formula's steps on every backend, whatever the threads, and what is refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simd import AVAILABLE, simd_level

from svag_fast.ops import AffineStep, affine_walk_, philox_normal_

KEY = (7, 8)
STEP = AffineStep(0.9, 0.05, -0.2, 0.3, (1.5, -0.5))


def start(n, dtype):
    return torch.linspace(-2, 3, n, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [0, 1, 31, 64, 65, 2048, 5003])
def test_every_backend_takes_the_formulas_steps(backend, n, dtype):
    x = affine_walk_(start(n, dtype), STEP, 6, key=KEY, draw=2**33, backend=backend)
    expected = start(n, torch.float64)
    for k in range(6):
        e = sum(
            w * philox_normal_(torch.empty(n, dtype=dtype), key=KEY, draw=2**33 + 2 * k + j, backend="reference")
            for j, w in enumerate(STEP.weights)
        )
        expected = 0.9 * expected + 0.05 + (-0.2 * expected + 0.3) * e.double()
    torch.testing.assert_close(x.double(), expected, rtol=0, atol=200 * torch.finfo(dtype).eps)


@given(
    keep=st.floats(-1.5, 1.5),
    shift=st.floats(-2, 2),
    slope=st.floats(-1, 1),
    spread=st.floats(-2, 2),
    weights=st.lists(st.floats(-3, 3), min_size=1, max_size=4),
    n=st.integers(0, 200),
    steps=st.integers(0, 3),
)
@settings(max_examples=40, deadline=None)
def test_kernel_and_reference_agree_on_any_step(keep, shift, slope, spread, weights, n, steps):
    step = AffineStep(keep, shift, slope, spread, tuple(weights))
    x, y = (
        affine_walk_(start(n, torch.float64), step, steps, key=KEY, backend=backend) for backend in ("cpu", "reference")
    )
    torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_bits_depend_on_neither_threads_nor_level():
    found = [affine_walk_(start(10_001, torch.float32), STEP, 9, key=KEY, threads=t) for t in (1, 2, 5)]
    for level in AVAILABLE:
        with simd_level(level):
            found.append(affine_walk_(start(10_001, torch.float32), STEP, 9, key=KEY))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_walk_continues_from_where_another_stopped():
    whole = affine_walk_(start(100, torch.float64), STEP, 7, key=KEY)
    parts = affine_walk_(start(100, torch.float64), STEP, 3, key=KEY)
    assert torch.equal(affine_walk_(parts, STEP, 4, key=KEY, draw=3 * len(STEP.weights)), whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": -1}, "steps must be"),
        ({"draw": 2**64 - 1}, "steps must be"),
        ({"draw": -1}, "draw must be"),
        ({"key": (0, 2**40)}, "key must be"),
        ({"threads": 0}, "threads must be"),
        ({"x": torch.zeros(4, 4).T}, r"x must be contiguous, got strides \[1, 4\]"),
    ],
)
def test_bad_arguments_are_refused_untouched(change, message):
    arguments = {"x": torch.zeros(8), "step": STEP, "steps": 1, "key": KEY, **change}
    with pytest.raises(ValueError, match=message):
        affine_walk_(**arguments)
    assert not arguments["x"].any()


def test_other_dtypes_and_steps_that_are_not_finite_are_refused():
    with pytest.raises(TypeError, match=r"x must be torch\.float32 or torch\.float64, got torch\.int64"):
        affine_walk_(torch.zeros(3, dtype=torch.int64), STEP, 1, key=KEY)
    for bad in ({"keep": math.nan}, {"spread": math.inf}, {"weights": ()}, {"weights": (math.nan,)}):
        (name,) = bad
        with pytest.raises(ValueError, match=rf"^{name}(\[0\])? must be"):
            AffineStep(**{"keep": 1.0, "shift": 0.0, "slope": 0.0, "spread": 1.0, **bad})
