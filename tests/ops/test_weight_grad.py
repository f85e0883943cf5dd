"""weight_grad_and_sq_norms against a loop of single-sample backward passes."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from svag_fast.ops import weight_grad as module
from svag_fast.ops.backends import BackendError
from svag_fast.ops.weight_grad import weight_grad_and_sq_norms

BACKENDS = ["reference"]


def forward(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
    return F.linear(x, weight) if weight.dim() == 2 else F.conv2d(x, weight, **options)


def loop(inputs: Tensor, output_grads: Tensor, shape: list[int], **options: Any) -> Tensor:
    """[B, *shape] by one backward pass a sample, in the inputs' dtype."""
    grads = []
    for x, dy in zip(inputs, output_grads, strict=True):
        weight = torch.zeros(shape, dtype=x.dtype, requires_grad=True)
        if dy.numel():
            forward(x[None], weight, **options).backward(dy[None])
        grads.append(torch.zeros(shape, dtype=x.dtype) if weight.grad is None else weight.grad)
    return torch.stack(grads) if grads else torch.zeros(0, *shape, dtype=inputs.dtype)


def make(
    input_shape: list[int], shape: list[int], *, seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(input_shape, generator=generator, dtype=torch.float64)
    y = forward(x, torch.zeros(shape, dtype=torch.float64), **options)
    return x.to(dtype), torch.randn(y.shape, generator=generator, dtype=torch.float64).to(dtype)


def check(inputs: Tensor, output_grads: Tensor, shape: list[int], backend: str, **options: Any) -> None:
    """Everything that the op returns, within 1e-10 of the float64 loop's largest value."""
    B = inputs.shape[0]
    generator = torch.Generator().manual_seed(B)
    weights = torch.randn(B, generator=generator, dtype=torch.float64)
    segments = torch.randint(0, 3, (B,), generator=generator)
    g = loop(inputs, output_grads, shape, **options)
    sums = torch.stack([(weights * (segments == s)) @ g.flatten(1) for s in range(int(segments.max()) + 1)]) if B else g
    result = weight_grad_and_sq_norms(inputs, output_grads, shape, backend=backend, **options)
    close(result.grad, g.sum(0))
    close(result.sq_norms, g.flatten(1).square().sum(1))
    assert result.segment_gram is None
    result = weight_grad_and_sq_norms(
        inputs, output_grads, shape, weights=weights, segments=segments, backend=backend, **options
    )
    close(result.grad, torch.tensordot(weights, g, 1))
    close(result.sq_norms, g.flatten(1).square().sum(1))
    assert result.segment_gram is not None
    close(result.segment_gram, sums.flatten(1) @ sums.flatten(1).T)
    result = weight_grad_and_sq_norms(inputs, output_grads, shape, segments=segments, backend=backend, **options)
    close(result.grad, g.sum(0))


def close(ours: Tensor, exact: Tensor) -> None:
    assert ours.shape == exact.shape
    scale = float(exact.abs().max()) if exact.numel() else 0.0
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-10 * scale)


LINEAR = {
    "one row a sample": ([7, 5], [3, 5]),
    "rows": ([3, 11, 33], [17, 33]),
    "four dimensions": ([2, 3, 5, 8], [6, 8]),
    "one sample": ([1, 4, 5], [3, 5]),
    "no samples": ([0, 4, 5], [3, 5]),
    "no rows": ([3, 0, 5], [3, 5]),
    "no inputs": ([3, 2, 0], [4, 0]),
    "no outputs": ([3, 2, 5], [0, 5]),
    "wide": ([5, 3, 200], [130, 200]),
}

CONVOLUTION: dict[str, tuple[list[int], list[int], dict[str, Any]]] = {
    "3x3": ([4, 16, 8, 8], [16, 16, 3, 3], {"padding": 1}),
    "odd channels": ([3, 5, 7, 9], [11, 5, 3, 3], {"padding": 1}),
    "one channel": ([3, 1, 8, 8], [16, 1, 3, 3], {"padding": 1}),
    "three channels": ([3, 3, 9, 9], [16, 3, 3, 3], {"padding": 1}),
    "stride 2": ([3, 16, 9, 8], [32, 16, 3, 3], {"padding": 1, "stride": 2}),
    "1x1 stride 2": ([3, 16, 8, 8], [32, 16, 1, 1], {"stride": 2}),
    "strides and kernel differ": ([2, 4, 11, 10], [6, 4, 3, 2], {"padding": (2, 1), "stride": (3, 2)}),
    "dilation": ([2, 6, 12, 11], [5, 6, 3, 3], {"padding": 2, "dilation": (2, 3)}),
    "groups": ([3, 8, 6, 6], [12, 2, 3, 3], {"padding": 1, "groups": 4}),
    "depthwise": ([3, 20, 7, 7], [20, 1, 3, 3], {"padding": 1, "groups": 20}),
    "depthwise with multiplier": ([3, 6, 7, 7], [18, 1, 3, 5], {"padding": 2, "groups": 6}),
    "depthwise, stride 2, dilation": ([2, 17, 9, 9], [17, 1, 3, 3], {"stride": 2, "dilation": 2, "groups": 17}),
    "kernel larger than the image": ([2, 3, 2, 2], [4, 3, 5, 5], {"padding": 2}),
    "a tap that never meets the image": ([2, 3, 1, 1], [4, 3, 3, 3], {"padding": 1}),
    "padding beyond the kernel": ([2, 3, 3, 3], [4, 3, 2, 2], {"padding": 3, "stride": 2}),
    "same, even kernel, even dilation": ([2, 3, 9, 9], [4, 3, 4, 2], {"padding": "same", "dilation": 2}),
    "same, even kernel": ([2, 3, 5, 5], [4, 3, 4, 2], {"padding": "same"}),
    "same, dilated": ([2, 3, 7, 7], [4, 3, 3, 3], {"padding": "same", "dilation": 2}),
    "valid": ([2, 3, 5, 5], [4, 3, 2, 2], {"padding": "valid"}),
    "wide and small": ([9, 70, 4, 4], [75, 70, 3, 3], {"padding": 1}),
    "one pixel": ([5, 33, 1, 1], [40, 33, 1, 1], {}),
    "no samples": ([0, 3, 5, 5], [4, 3, 3, 3], {}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", LINEAR)
def test_linear_matches_single_sample_passes(case: str, backend: str) -> None:
    input_shape, shape = LINEAR[case]
    check(*make(input_shape, shape), shape, backend)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CONVOLUTION)
def test_convolution_matches_single_sample_passes(case: str, backend: str, channels_last: bool) -> None:
    input_shape, shape, options = CONVOLUTION[case]
    x, dy = make(input_shape, shape, **options)
    if channels_last:
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    check(x, dy, shape, backend, **options)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[list[int], list[int], dict[str, Any]]:
    size = st.integers(1, 9)
    groups = draw(st.integers(1, 4))
    kernel = [draw(st.integers(1, 4)), draw(st.integers(1, 4))]
    padding = (draw(st.integers(0, 3)), draw(st.integers(0, 3)))
    dilation = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    image = [max(draw(size), d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    stride = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    channels, outputs = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return [draw(st.integers(0, 5)), channels * groups, *image], [outputs * groups, channels, *kernel], options


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(case=convolutions(), channels_last=st.booleans())
def test_random_convolutions(
    backend: str, case: tuple[list[int], list[int], dict[str, Any]], channels_last: bool
) -> None:
    input_shape, shape, options = case
    x, dy = make(input_shape, shape, **options)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    check(x, dy, shape, backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(B=st.integers(0, 5), T=st.integers(0, 40), p=st.integers(1, 70), d=st.integers(1, 70))
def test_random_linear(backend: str, B: int, T: int, p: int, d: int) -> None:
    check(*make([B, T, p], [d, p]), [d, p], backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_are_read_by_their_strides(backend: str) -> None:
    x, dy = make([3, 6, 8, 8], [4, 6, 3, 3])
    expanded = dy[:1].expand(3, -1, -1, -1)
    check(x.transpose(2, 3), dy.transpose(2, 3), [4, 6, 3, 3], backend)
    check(x[:, ::2], dy, [4, 3, 3, 3], backend)
    check(x, expanded, [4, 6, 3, 3], backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_follows_the_inputs_memory_format(backend: str) -> None:
    x, dy = make([3, 6, 8, 8], [4, 6, 3, 3])
    assert weight_grad_and_sq_norms(x, dy, [4, 6, 3, 3], backend=backend).grad.is_contiguous()
    x = x.contiguous(memory_format=torch.channels_last)
    grad = weight_grad_and_sq_norms(x, dy, [4, 6, 3, 3], backend=backend).grad
    assert grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(backend: str, dtype: torch.dtype) -> None:
    x, dy = make([4, 6, 8, 8], [5, 6, 3, 3], dtype=dtype)
    result = weight_grad_and_sq_norms(x, dy, [5, 6, 3, 3], backend=backend)
    exact = weight_grad_and_sq_norms(x.double(), dy.double(), [5, 6, 3, 3], backend="reference")
    assert result.grad.dtype == torch.float32
    torch.testing.assert_close(result.grad.double(), exact.grad, rtol=0, atol=1e-6 * float(exact.grad.abs().max()))
    torch.testing.assert_close(result.sq_norms, exact.sq_norms, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("input_shape", "shape", "options"),
    [
        ([8, 16, 16, 16], [16, 16, 3, 3], {"padding": 1}),
        ([8, 3, 16, 16], [16, 3, 3, 3], {"padding": 1}),
        ([8, 64, 4, 4], [64, 64, 3, 3], {"padding": 1}),
        ([8, 64, 96], [48, 96], {}),
    ],
    ids=["16 channels", "3 channels", "wide and small", "linear"],
)
def test_float32_error_is_within_twice_pytorchs(
    backend: str, input_shape: list[int], shape: list[int], options: dict[str, Any]
) -> None:
    ours = theirs = norms = their_norms = 0.0
    for seed in range(5):
        x, dy = make(input_shape, shape, seed=seed, dtype=torch.float32, **options)
        exact = loop(x.double(), dy.double(), shape, **options)
        same = loop(x, dy, shape, **options)
        result = weight_grad_and_sq_norms(x, dy, shape, backend=backend, **options)
        sq_norms = exact.flatten(1).square().sum(1)
        ours += float((result.grad - exact.sum(0)).square().mean())
        theirs += float((same.sum(0) - exact.sum(0)).square().mean())
        norms += float((result.sq_norms / sq_norms - 1).square().mean())
        their_norms += float((same.flatten(1).square().sum(1) / sq_norms - 1).square().mean())
    assert ours <= 4 * theirs
    assert norms <= 4 * their_norms


X, DY = torch.randn(3, 4, 6, 6), torch.randn(3, 8, 6, 6)
ROWS, ROW_GRADS = torch.randn(3, 5, 4), torch.randn(3, 5, 8)
BAD: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "inputs not a tensor": (TypeError, "inputs is a list", {"inputs": [1.0]}),
    "integers": (TypeError, "inputs is torch.int64", {"inputs": X.long()}),
    "dtypes differ": (TypeError, "output_grads is torch.float64", {"output_grads": DY.double()}),
    "sparse": (TypeError, "inputs is torch.sparse_coo", {"inputs": X.to_sparse()}),
    "devices differ": (ValueError, "output_grads is on meta", {"output_grads": DY.to("meta")}),
    "no channels": (ValueError, "weight_shape", {"weight_shape": [8, 0, 3, 3]}),
    "three-dimensional weight": (ValueError, "weight_shape", {"weight_shape": [8, 4, 3]}),
    "inputs of three dimensions": (ValueError, r"inputs .*\[B, C, H, W\]", {"inputs": X[0]}),
    "channels": (ValueError, "inputs has 4 channels: expected 5", {"weight_shape": [8, 5, 3, 3]}),
    "samples": (ValueError, "output_grads has shape", {"output_grads": DY[:2]}),
    "image": (ValueError, "output_grads has shape", {"padding": 0}),
    "kernel too large": (ValueError, "larger than the padded inputs", {"weight_shape": [8, 4, 9, 9]}),
    "groups don't divide": (ValueError, "groups is 3", {"groups": 3}),
    "groups zero": (ValueError, "groups is 0", {"groups": 0}),
    "stride zero": (ValueError, "stride is 0", {"stride": 0}),
    "stride of three": (ValueError, "stride is", {"stride": (1, 1, 1)}),
    "padding negative": (ValueError, "padding is -1", {"padding": -1}),
    "padding unknown": (ValueError, "padding is 'reflect'", {"padding": "reflect"}),
    "same with stride": (ValueError, "padding='same' needs stride 1", {"padding": "same", "stride": 2}),
    "dilation zero": (ValueError, "dilation is 0", {"dilation": 0}),
    "weights' shape": (ValueError, "weights has shape", {"weights": torch.ones(4)}),
    "weights' dtype": (TypeError, "weights must be", {"weights": torch.ones(3, dtype=torch.int64)}),
    "segments' length": (ValueError, "segments has shape", {"segments": [0, 1]}),
    "segments negative": (ValueError, "segments holds -1", {"segments": [0, -1, 0]}),
    "segments' dtype": (TypeError, "segments is torch.float32", {"segments": torch.zeros(3)}),
    "backend unknown": (BackendError, "unknown backend 'gpu'", {"backend": "gpu"}),
    "backend for another device": (BackendError, "can't serve", {"backend": "cuda"}),
    "linear with stride": (
        ValueError,
        "belong to a convolution",
        {"inputs": ROWS, "output_grads": ROW_GRADS, "weight_shape": [8, 4], "padding": 0, "stride": 2},
    ),
    "linear inputs": (
        ValueError,
        "inputs has shape",
        {"inputs": ROWS, "output_grads": ROW_GRADS, "weight_shape": [8, 5], "padding": 0},
    ),
    "linear rows": (
        ValueError,
        "output_grads has shape",
        {"inputs": ROWS, "output_grads": ROW_GRADS[:, :4], "weight_shape": [8, 4], "padding": 0},
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_its_name(case: str) -> None:
    error, message, change = BAD[case]
    arguments = {"inputs": X, "output_grads": DY, "weight_shape": [8, 4, 3, 3], "padding": 1, **change}
    with pytest.raises(error, match=message):
        weight_grad_and_sq_norms(**arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    x, dy = make([3, 6, 8, 8], [4, 6, 3, 3])
    for inputs in (x, x.contiguous(memory_format=torch.channels_last)):
        for weights, segments, count in ((None, None, 0), (torch.ones(3), torch.tensor([0, 1, 1]), 2)):
            arguments = (inputs, dy, [4, 6, 3, 3], weights, segments, count, [1, 1], [0, 0], [1, 1], 1, backend)
            torch.library.opcheck(module._op, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_compile_takes_it_whole(backend: str) -> None:
    x, dy = make([3, 6, 8, 8], [4, 6, 3, 3])

    def noise(x: Tensor, dy: Tensor) -> Tensor:
        return weight_grad_and_sq_norms(x, dy, [4, 6, 3, 3], segments=[0, 1, 1], backend=backend).sq_norms * 2

    torch.testing.assert_close(torch.compile(noise, fullgraph=True, backend="aot_eager")(x, dy), noise(x, dy))
