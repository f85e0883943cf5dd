"""The step in the Triton weight gradient's epilogue, against the products and the step in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_cases import CONVOLUTION, LINEAR, STEP, make, step_by_two_ops
from torch import Tensor

from svag_fast.kernels import weight_grad as kernel
from svag_fast.ops import StepStats, svag_weight_step_
from svag_fast.ops.backends import BackendError

# Every geometry is in test_weight_grad.py, through the same products. These end in tiles of different shapes.
CASES: dict[str, tuple[list[int], list[int], dict[str, Any]]] = {
    **{name: (*case, {}) for name, case in LINEAR.items() if name != "wide"},
    **{name: CONVOLUTION[name] for name in ("3x3", "odd channels", "stride 2", "groups", "one pixel", "no samples")},
}


def assert_equals_two_ops(
    weight: Tensor, x: Tensor, dy: Tensor, *, l: float, segments: Tensor | None = None, **options: Any
) -> StepStats:
    """Step by Triton; every result is float64's to float32's rounding of the terms that enter it."""
    segments = torch.arange(len(x)) % 2 if segments is None else segments
    exact, before = weight.double(), weight.double()
    norms, stats = step_by_two_ops(exact, x.double(), dy.double(), segments, l=l, **options)
    ours, our_stats = svag_weight_step_(weight, x, dy, segments=segments, l=l, backend="triton", **STEP, **options)
    torch.testing.assert_close(ours, norms, rtol=4e-6, atol=1e-12)
    scale = float(stats.raw[:4].max())
    torch.testing.assert_close(our_stats.raw, stats.raw, rtol=0, atol=4e-6 * scale)
    # The batches' part of the step is about sqrt(l) times one gradient, taken at rate lr / l.
    step = STEP["lr"] / l * (2 * l) ** 0.5 * float(stats.raw[:2].max()) ** 0.5
    bound = 2e-6 * step + 2**-23 * float(before.abs().max() if before.numel() else 0)
    torch.testing.assert_close(weight.double(), exact, rtol=0, atol=bound)
    if weight.numel() and l < 1e6:
        assert not torch.equal(weight.double(), before)
    return our_stats


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case[0][0] >= 2])
def test_every_option_and_odd_size(case: str) -> None:
    input_shape, shape, options = CASES[case]
    x, dy = make(input_shape, shape, dtype=torch.float32, **options)
    assert_equals_two_ops(torch.randn(shape, generator=torch.Generator().manual_seed(1)), x, dy, l=4, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("l", [1, 1.5, 1e12])
def test_every_dtype_from_l_1_to_a_huge_one(l: float, dtype: torch.dtype) -> None:
    x, dy = make([4, 6, 5, 4], [7, 6, 3, 3], dtype=dtype, padding=1)
    assert_equals_two_ops(torch.randn([7, 6, 3, 3], generator=torch.Generator().manual_seed(1)), x, dy, l=l, padding=1)


@pytest.mark.parametrize("warps", [4, 12, 1024])
def test_a_tile_ends_in_one_chunk_or_in_the_launch_that_adds_them(monkeypatch: pytest.MonkeyPatch, warps: int) -> None:
    monkeypatch.setattr(kernel, "_WARPS", warps)
    x, dy = make([6, 5, 5, 4], [7, 5, 3, 3], dtype=torch.float32, padding=1)
    assert_equals_two_ops(torch.randn([7, 5, 3, 3], generator=torch.Generator().manual_seed(1)), x, dy, l=4, padding=1)


def test_any_memory_order_of_the_weight() -> None:
    x, dy = make([4, 6, 5, 4], [7, 6, 3, 3], dtype=torch.float32, padding=1)
    start = torch.randn([7, 6, 3, 3], generator=torch.Generator().manual_seed(1))
    reversed_order = start.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    for weight in (start.contiguous(memory_format=torch.channels_last), reversed_order):
        assert not weight.is_contiguous()
        assert_equals_two_ops(weight, x, dy, l=4, padding=1)
    x, dy = make([4, 3, 6], [5, 6], dtype=torch.float32)
    assert_equals_two_ops(torch.randn([6, 5], generator=torch.Generator().manual_seed(1)).T, x, dy, l=4)


def test_one_element_and_none() -> None:
    x, dy = make([2, 1], [1, 1], dtype=torch.float32)
    assert_equals_two_ops(torch.ones(1, 1), x, dy, l=4)
    x, dy = make([3, 2, 0], [4, 0], dtype=torch.float32)
    norms, stats = svag_weight_step_(torch.empty(4, 0), x, dy, segments=[0, 1, 1], l=4, backend="triton", **STEP)
    assert norms.tolist() == [0, 0, 0]
    assert stats.raw.tolist() == [0, 0, 0, 0, 1]


def test_one_batch_is_sgd() -> None:
    x, dy = make([5, 3, 5, 5], [9, 3, 3, 3], dtype=torch.float32, padding=1)
    weight = torch.randn([9, 3, 3, 3], generator=torch.Generator().manual_seed(1))
    stats = assert_equals_two_ops(weight, x, dy, l=1, segments=torch.zeros(5, dtype=torch.int64), padding=1)
    assert stats.inner is None


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_at_l_1_a_bad_second_batch_never_reaches_the_weight(bad: float) -> None:
    x, dy = make([4, 5, 7, 7], [9, 5, 3, 3], dtype=torch.float32, padding=1)
    start = torch.randn([9, 5, 3, 3], generator=torch.Generator().manual_seed(1))
    good, weight = start.clone(), start.clone()
    options: dict[str, Any] = {"segments": [0, 0, 1, 1], "l": 1, "padding": 1, "backend": "triton", **STEP}
    svag_weight_step_(good, x, dy, **options)
    dy[3, 2, 2, 2] = bad
    _, stats = svag_weight_step_(weight, x, dy, **options)
    assert torch.equal(weight, good)
    assert not bool(stats.finite)


def test_float64_is_refused_by_name() -> None:
    x, dy = make([2, 3, 4], [5, 4])
    weight = torch.randn(5, 4, dtype=torch.float64)
    with pytest.raises(BackendError, match=r"'triton' can't serve svag_weight_step_: it has no float64 products"):
        svag_weight_step_(weight, x, dy, segments=[0, 1], l=2, backend="triton", **STEP)
