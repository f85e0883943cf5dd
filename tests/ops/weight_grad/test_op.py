"""weight_grad_and_sq_norms against a loop of single-sample backward passes."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from layer_cases import CONVOLUTION, LINEAR, forward, loop, make
from layer_strategies import convolutions
from torch import Tensor

from svag_fast.ops.backends import BackendError
from svag_fast.ops.weight_grad import op as module
from svag_fast.ops.weight_grad.op import weight_grad_and_sq_norms

BACKENDS = ["reference", "cpu"]


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
        ([8, 16, 256], [192, 256], {}),
        ([8, 1, 200], [100, 200], {}),
    ],
    ids=["16 channels", "3 channels", "wide and small", "linear", "linear, few rows", "linear, one row"],
)
def test_float32_error_is_within_twice_pytorchs(
    backend: str, input_shape: list[int], shape: list[int], options: dict[str, Any]
) -> None:
    """The gradient against PyTorch's own backward pass over the batch, the norms against single-sample passes."""
    ours = theirs = norms = their_norms = 0.0
    for seed in range(5):
        x, dy = make(input_shape, shape, seed=seed, dtype=torch.float32, **options)
        exact = loop(x.double(), dy.double(), shape, **options)
        same = loop(x, dy, shape, **options)
        weight = torch.zeros(shape, requires_grad=True)
        forward(x, weight, **options).backward(dy)
        assert weight.grad is not None
        result = weight_grad_and_sq_norms(x, dy, shape, backend=backend, **options)
        sq_norms = exact.flatten(1).square().sum(1)
        ours += float((result.grad - exact.sum(0)).square().mean())
        theirs += float((weight.grad - exact.sum(0)).square().mean())
        norms += float((result.sq_norms / sq_norms - 1).square().mean())
        their_norms += float((same.flatten(1).square().sum(1) / sq_norms - 1).square().mean())
    assert ours <= 4 * theirs
    assert norms <= 4 * their_norms


X, DY = torch.randn(3, 4, 6, 6), torch.randn(3, 8, 6, 6)
ROWS, ROW_GRADS = torch.randn(3, 5, 4), torch.randn(3, 5, 8)
BAD: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "inputs not a tensor": (TypeError, "inputs must be a tensor, got a list", {"inputs": [1.0]}),
    "integers": (TypeError, r"inputs must be one of torch\.float32, torch\.float64,", {"inputs": X.long()}),
    "dtypes differ": (TypeError, r"output_grads must be torch\.float32, as inputs", {"output_grads": DY.double()}),
    "sparse": (TypeError, r"inputs must be a dense \(strided\) tensor, got", {"inputs": X.to_sparse()}),
    "devices differ": (ValueError, "output_grads must be on cpu, as inputs is,", {"output_grads": DY.to("meta")}),
    "no channels": (ValueError, "weight_shape", {"weight_shape": [8, 0, 3, 3]}),
    "three-dimensional weight": (ValueError, "weight_shape", {"weight_shape": [8, 4, 3]}),
    "inputs of three dimensions": (ValueError, r"inputs .*\[B, C, H, W\]", {"inputs": X[0]}),
    "channels": (ValueError, r"inputs must be of 5 channels \(weight_shape \[8, 5,", {"weight_shape": [8, 5, 3, 3]}),
    "samples": (ValueError, r"output_grads must be of shape \[3, ", {"output_grads": DY[:2]}),
    "image": (ValueError, r"output_grads must be of shape \[3, ", {"padding": 0}),
    "kernel too large": (ValueError, "larger than the padded inputs", {"weight_shape": [8, 4, 9, 9]}),
    "groups don't divide": (ValueError, "groups must be a divisor of the 8 output channels in", {"groups": 3}),
    "groups zero": (ValueError, "groups must be a divisor of the 8 output channels in weight_shape,", {"groups": 0}),
    "stride zero": (ValueError, "stride must be an integer >= 1 or two of them, got 0", {"stride": 0}),
    "stride of three": (ValueError, "stride must be an integer >= 1 or two of them, got", {"stride": (1, 1, 1)}),
    "padding negative": (ValueError, "padding must be an integer >= 0 or two of them, got -1", {"padding": -1}),
    "padding unknown": (ValueError, "padding must be integers, 'valid' or 'same', got", {"padding": "reflect"}),
    "same with stride": (ValueError, "stride must be 1 for padding='same', got", {"padding": "same", "stride": 2}),
    "dilation zero": (ValueError, "dilation must be an integer >= 1 or two of them, got 0", {"dilation": 0}),
    "weights' shape": (ValueError, r"weights must be of shape \[3\], one a sample, got", {"weights": torch.ones(4)}),
    "weights' dtype": (TypeError, "weights must be", {"weights": torch.ones(3, dtype=torch.int64)}),
    "segments' length": (ValueError, r"segments must be of shape \[3\], one a sample, got", {"segments": [0, 1]}),
    "segments negative": (ValueError, "segments must be integers >= 0 and below 4096,", {"segments": [0, -1, 0]}),
    "segments' dtype": (TypeError, "segments must be integers in a dense tensor, got", {"segments": torch.zeros(3)}),
    "backend unknown": (BackendError, "backend must be one of auto, cuda, triton, cpu,", {"backend": "gpu"}),
    "backend for another device": (BackendError, "can't serve", {"backend": "cuda"}),
    "linear with stride": (
        ValueError,
        "belong to a convolution",
        {"inputs": ROWS, "output_grads": ROW_GRADS, "weight_shape": [8, 4], "padding": 0, "stride": 2},
    ),
    "linear inputs": (
        ValueError,
        r"inputs must be of shape \[B, \*, 5\], as weight_shape says, got \[3, 5, 4\]",
        {"inputs": ROWS, "output_grads": ROW_GRADS, "weight_shape": [8, 5], "padding": 0},
    ),
    "linear rows": (
        ValueError,
        r"output_grads must be of shape \[3, ",
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
