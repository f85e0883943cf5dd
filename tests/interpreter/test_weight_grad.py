"""The Triton weight gradient with per-sample norms, against a loop of single-sample products in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_cases import products, weight_grad_halves
from layer_cases import CONVOLUTION, LINEAR, bias_z, loop, make
from torch import Tensor

from svag_fast.kernels import weight_grad as kernel
from svag_fast.ops import weight_grad_and_sq_norms
from svag_fast.ops.backends import BackendError

CASES: dict[str, tuple[list[int], list[int], dict[str, Any]]] = {
    **{name: (*case, {}) for name, case in LINEAR.items()},
    **CONVOLUTION,
}
# Many tiles or groups: minutes under the interpreter, and no path that the others lack.
for name in ("wide and small", "depthwise", "depthwise, stride 2, dilation"):
    del CASES[name]


def assert_equals_the_loop(
    x: Tensor, dy: Tensor, shape: list[int], tolerance: float, segments: list[int] | None = None, **options: Any
) -> None:
    B = len(x)
    w = torch.linspace(-1.5, 2.0, B)
    result = weight_grad_and_sq_norms(x, dy, shape, weights=w, segments=segments, backend="triton", **options)
    each = loop(x.double(), dy.double(), shape, **options)
    weighted = w.double().view(-1, *[1] * len(shape)) * each
    grad, sq_norms = weighted.sum(0), each.flatten(1).square().sum(1)
    scale = float(weighted.flatten(1).norm(dim=1).sum()) + 1e-30 if each.numel() else 1.0
    assert result.grad.shape == torch.Size(shape)
    assert float((result.grad - grad).norm()) <= tolerance * scale
    torch.testing.assert_close(result.sq_norms, sq_norms, rtol=4 * tolerance, atol=1e-12)
    if segments is None:
        assert result.segment_gram is None
    else:
        sums = torch.stack(
            [weighted[[i for i in range(B) if segments[i] == s]].sum(0).flatten() for s in range(max(segments) + 1)]
        )
        assert result.segment_gram is not None
        assert float((result.segment_gram - sums @ sums.T).norm()) <= 4 * tolerance * scale**2


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_option_and_odd_size(case: tuple[list[int], list[int], dict[str, Any]]) -> None:
    x, dy = make(case[0], case[1], dtype=torch.float32, **case[2])
    assert_equals_the_loop(x, dy, case[1], 1e-6, **case[2])


@pytest.mark.parametrize("segments", [[0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [2, 0, 1, 2, 0]], ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_segments_and_channels_last(segments: list[int], last: bool) -> None:
    x, dy = make([5, 6, 5, 4], [7, 6, 3, 3], dtype=torch.float32, padding=1)
    if last:
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    assert_equals_the_loop(x, dy, [7, 6, 3, 3], 1e-6, segments, padding=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs_are_summed_in_float32(dtype: torch.dtype) -> None:
    x, dy = make([4, 6, 5, 4], [7, 6, 3, 3], dtype=dtype, padding=1)
    assert_equals_the_loop(x, dy, [7, 6, 3, 3], 1e-6, [0, 1, 0, 1], padding=1)


def test_one_chunk_and_several_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    x, dy = make([6, 5, 5, 4], [7, 5, 3, 3], dtype=torch.float32, padding=1)
    for warps in (4, 12, 1024):
        monkeypatch.setattr(kernel, "_WARPS", warps)
        assert_equals_the_loop(x, dy, [7, 5, 3, 3], 1e-6, [0, 1, 0, 1, 1, 0], padding=1)


def test_strided_inputs_need_no_copy() -> None:
    x, dy = make([4, 6, 10, 8], [7, 6, 3, 3], dtype=torch.float32, padding=1)
    assert_equals_the_loop(x[:, :, ::2, ::2], dy[:, :, 1::2, :4], [7, 6, 3, 3], 1e-6, padding=1)


def test_float64_is_refused_by_name() -> None:
    x, dy = make([2, 3, 4], [5, 4])
    with pytest.raises(BackendError, match=r"'triton' can't serve .* no float64"):
        weight_grad_and_sq_norms(x, dy, [5, 4], backend="triton")


@pytest.mark.parametrize(("input_shape", "shape"), [([16, 4, 6, 6], [8, 4, 3, 3]), ([16, 20, 12], [24, 12])], ids=str)
def test_tf32_rounds_to_nearest(input_shape: list[int], shape: list[int]) -> None:
    """Operands only cut off would leave every norm some 0.13 % low, a z of hundreds."""
    x, dy = make(input_shape, shape, dtype=torch.float32)
    with products("tf32"):
        found = weight_grad_and_sq_norms(x, dy, shape, backend="triton").sq_norms
    exact = weight_grad_and_sq_norms(x.double(), dy.double(), shape, backend="reference").sq_norms
    assert abs(bias_z(found, exact)) < 4
    assert not torch.allclose(found, exact, rtol=1e-6, atol=0)  # rounded it was


# What CUDA's arithmetic makes is 0x7fffffff; x86's is 0xffc00000.
@pytest.mark.parametrize(
    "bits", [0x7F800000, -0x800000, 0x7FFFFFFF, -1, -0x400000], ids=lambda bits: f"{bits & 0xFFFFFFFF:x}"
)
def test_tf32_keeps_inf_and_nan(bits: int) -> None:
    x, dy = make([3, 4, 5, 5], [8, 4, 3, 3], dtype=torch.float32)
    x.view(torch.int32)[1, 2] = bits
    with products("tf32"):
        norms = weight_grad_and_sq_norms(x, dy, [8, 4, 3, 3], backend="triton").sq_norms
    assert norms.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("warps", [4, 24, 1024])
@pytest.mark.parametrize("case", ["linear, rows", "odd channels", "groups", "no samples"])
def test_both_halves_of_a_batch_are_one_launch(case: str, warps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one chunk of samples and with several: none reaches into the other half."""
    monkeypatch.setattr(kernel, "_WARPS", warps)
    launches: list[object] = []
    real = kernel.product_tiles
    monkeypatch.setattr(kernel, "product_tiles", lambda *a, **k: launches.append(a) or real(*a, **k))
    shares = dict(weight_grad_halves(torch.device("cpu"), case))
    assert max(shares.values()) <= 1, shares
    assert len(launches) == 1
