"""norm_relu: every backend against PyTorch's own norms and ReLU, in both memory orders, and what it refuses."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from draws import same_bits
from simd import AVAILABLE, simd_level, torch_threads
from torch import Tensor

from svag_fast.ops import norm_relu
from svag_fast.ops.backends import BackendError
from svag_fast.ops.norm_relu import norm_relu_and_moments

BACKENDS = ["cpu", "reference"]
SHAPES = [(4, 6, 5, 7), (2, 40, 70), (6, 24), (2, 16, 8, 8), (2, 4, 3, 5, 6), (4, 3, 33, 31), (2, 1, 9), (64, 18, 1, 1)]
UNITS: list[dict[str, int]] = [{"groups": 1}, {"groups": 3}, {"segments": 1}, {"segments": 2}]


def channels_last(x: Tensor) -> Tensor:
    order = range(2, x.dim())
    return x.permute(0, *order, 1).contiguous().permute(0, -1, *range(1, x.dim() - 1))


def strided(x: Tensor) -> Tensor:
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, order: Callable[[Tensor], Tensor] = Tensor.clone):
    """x, weight, bias, residual, and the gradient of y."""
    generator = torch.Generator().manual_seed(len(shape))
    shapes = (shape, shape[1:2], shape[1:2], shape, shape)
    x, w, b, r, g = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    return [order(3 * x + 2).requires_grad_(), w.requires_grad_(), b.requires_grad_(), r.requires_grad_()], g


def by_torch(t: list[Tensor | None], units: dict[str, int], relu: bool) -> Tensor:
    x, w, b, r = t
    assert x is not None
    if "groups" in units:
        out = F.group_norm(x, units["groups"], w, b, 1e-5)
    else:
        parts = x.split(len(x) // units["segments"])
        out = torch.cat([F.batch_norm(part, None, None, w, b, True, 0.0, 1e-5) for part in parts])
    out = out if r is None else out + r
    return torch.relu(out) if relu else out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", [Tensor.clone, channels_last, strided])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("units", UNITS)
def test_equals_torchs_norm_and_relu(backend, order, shape, units) -> None:
    if shape[1] % units.get("groups", 1):
        pytest.skip("the channels don't divide")
    for affine, adds, relu in itertools.product([True, False], repeat=3):
        tensors, y_grad = make(shape, order=order)
        used = [tensors[0], *(tensors[1:3] if affine else [None, None]), tensors[3] if adds else None]
        inputs = [t for t in used if t is not None]
        expected = by_torch(used, units, relu)
        out = norm_relu(*used[:3], residual=used[3], relu=relu, backend=backend, **units)
        assert torch.allclose(out, expected, rtol=1e-10, atol=1e-10)
        grads = torch.autograd.grad(out, inputs, y_grad), torch.autograd.grad(expected, inputs, y_grad)
        for ours, theirs in zip(*grads, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", [Tensor.clone, channels_last])
@pytest.mark.parametrize("units", UNITS)
def test_float32_is_near_float64(order, units) -> None:
    for shape in [(6, 24, 9, 11), (2, 48, 70, 80)]:
        exact, y_grad = make(shape, order=order)
        single = [t.detach().float().requires_grad_() for t in exact]
        out = norm_relu(*single[:3], backend="cpu", **units)
        close = norm_relu(*exact[:3], backend="reference", **units)
        assert (out - close).abs().max() < 4e-6
        # Where rounding decides at the kink, neither gradient is the other's.
        y_grad = y_grad * ((close > 1e-5) | (close == 0)) * ((out == 0) == (close == 0))
        ours = torch.autograd.grad(out, single[:3], y_grad.float())
        for got, want in zip(ours, torch.autograd.grad(close, exact[:3], y_grad), strict=True):
            assert (got - want).abs().max() < 2e-6 * (1 + want.abs().max())


@pytest.mark.parametrize("order", [Tensor.clone, channels_last])
@pytest.mark.parametrize("units", [{"groups": 4}, {"segments": 2}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_depend_on_neither_threads_nor_simd_level(order, units, dtype) -> None:
    first: list[Tensor] | None = None
    for level, threads in itertools.product(AVAILABLE, [1, 3]):
        with simd_level(level), torch_threads(threads):
            t, y_grad = make((6, 20, 19, 23), dtype, order)
            out = norm_relu(*t[:3], residual=t[3], backend="cpu", **units)
            found = [out, *torch.autograd.grad(out, t, y_grad.to(dtype))]
        if first is None:
            first = found
        for one, other in zip(first, found, strict=True):
            assert same_bits(one, other)


def test_output_keeps_the_order_in_memory() -> None:
    for order, memory_format in ((Tensor.clone, torch.contiguous_format), (channels_last, torch.channels_last)):
        t, y_grad = make((2, 6, 5, 7), order=order)
        out = norm_relu(*t[:3], groups=2, backend="cpu")
        assert out.is_contiguous(memory_format=memory_format)
        assert torch.autograd.grad(out, t[0], y_grad)[0].is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("units", [{"groups": 2}, {"segments": 2}])
def test_first_and_second_derivatives(backend, units) -> None:
    t, _ = make((4, 4, 3))

    def call(*t: Tensor) -> Tensor:
        return norm_relu(*t[:3], residual=t[3], backend=backend, **units)

    assert torch.autograd.gradcheck(call, t)
    assert torch.autograd.gradgradcheck(call, t)


def test_only_the_wanted_gradients() -> None:
    for wanted in itertools.product([True, False], repeat=4):
        t, y_grad = make((2, 4, 5))
        for x, want in zip(t, wanted, strict=True):
            x.requires_grad_(want)
        out = norm_relu(*t[:3], residual=t[3], groups=2, backend="cpu")
        assert out.requires_grad == any(wanted)
        if any(wanted):
            out.backward(y_grad)
        assert [x.grad is not None for x in t] == list(wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_moments_are_of_each_unit(backend) -> None:
    x = make((4, 6, 5))[0][0]
    groups = norm_relu_and_moments(x, groups=2, backend=backend)
    assert torch.allclose(groups.mean, x.detach().reshape(4, 2, -1).mean(2))
    assert torch.allclose(groups.var, x.detach().reshape(4, 2, -1).var(2, unbiased=False))
    halves = norm_relu_and_moments(x, segments=2, backend=backend)
    assert torch.allclose(halves.var, x.detach().reshape(2, 2, 6, 5).var((1, 3), unbiased=False))
    assert not halves.mean.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("units", [{"groups": 3}, {"segments": 1}])
def test_equal_values_without_eps_give_zeros(backend, units) -> None:
    x = torch.full((2, 3, 5), 7.0, requires_grad=True)
    out = norm_relu(x, eps=0, backend=backend, **units)
    assert not out.any()
    assert not torch.autograd.grad(out.sum(), x)[0].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_inf_stay_visible(backend) -> None:
    for value in (float("nan"), float("inf")):
        x = torch.randn(2, 3, 40)
        x[0, 1, 2] = value
        out = norm_relu(x, groups=3, backend=backend)
        assert out[0, 1].isnan().all()
        assert out[:, [0, 2]].isfinite().all()


def test_empty_batch() -> None:
    x, w = torch.zeros(0, 4, 5, requires_grad=True), torch.ones(4, requires_grad=True)
    for units in ({"groups": 2}, {"segments": 2}):
        out = norm_relu(x, w, **units)
        assert out.shape == x.shape
        out.sum().backward()
        assert w.grad is not None
        assert not w.grad.any()
    with pytest.raises(BackendError, match="x has no elements"):
        norm_relu(x, groups=2, backend="cpu")


def test_half_precision_meta_and_transforms_go_to_the_reference() -> None:
    x = torch.randn(2, 4, 5)
    half = norm_relu(x.bfloat16(), groups=2)
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), norm_relu(x, groups=2), atol=0.05)
    assert norm_relu(x.to("meta"), groups=2).is_meta
    assert torch.allclose(torch.vmap(lambda y: norm_relu(y, groups=2))(x[None])[0], norm_relu(x, groups=2), atol=1e-6)
    with pytest.raises(BackendError, match="serves float32 and float64"):
        norm_relu(x.bfloat16(), groups=2, backend="cpu")


def test_a_changed_input_is_noticed() -> None:
    x = torch.randn(2, 4, 5, requires_grad=True)
    inner = x * 1
    out = norm_relu(inner, groups=2, backend="cpu")
    inner.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "either groups or segments"),
    ({"groups": 2, "segments": 1}, "either groups or segments"),
    ({"groups": 3}, "groups must be a divisor of C = 4"),
    ({"segments": 0}, "segments must be a divisor of B = 2"),
    ({"segments": 3}, "segments must be a divisor of B = 2"),
    ({"groups": 2, "eps": -1.0}, "eps"),
    ({"groups": 2, "weight": torch.ones(3)}, r"weight must be \[4\]"),
    ({"groups": 2, "bias": torch.ones(4).double()}, "bias must be torch.float32 as x"),
    ({"groups": 2, "residual": torch.ones(2, 4, 1)}, "residual must be"),
    ({"groups": 2, "residual": torch.ones(2, 4, 5, device="meta")}, "residual must be on cpu"),
    ({"groups": 2, "x": torch.ones(4)}, r"x must be \[B, C, ...\]"),
    ({"groups": 2, "x": torch.ones(2, 4, dtype=torch.int64)}, "of a floating dtype"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_refusals_name_what_is_wrong(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        norm_relu(**{"x": torch.ones(2, 4, 5), **arguments})
