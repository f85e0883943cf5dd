"""The fused step of Adam and RMSprop: the formula in float64, torch's bits at l = 1, and everything it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from draws import clones, normals, same_bits
from hypothesis import given
from hypothesis import strategies as st
from simd import torch_threads
from torch import Tensor

from svag_fast import svag_coefficients
from svag_fast.ops import svag_adaptive_step_
from svag_fast.ops.backends import BackendError
from svag_fast.theory import square_root_scaling_rule

SHAPES = [(0,), (1,), (), (3,), (17, 5), (4097,), (31, 0, 2), (65537,), (8, 3, 3, 3)]
RATES: dict[str, Any] = {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-6}


def draw(seed: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> list[Tensor]:
    return normals(dtype, seed, SHAPES, scale)


def exact(x: Tensor, g1: Tensor, g2: Tensor, m: Tensor | None, v: Tensor, k: int, l: float, decay: float) -> Any:
    """One step by the docstring's formula, with the scaled rates written out."""
    c1, c2 = svag_coefficients(l)
    b1, b2 = 1 - (1 - RATES["beta1"]) / l, 1 - (1 - RATES["beta2"]) / l
    lr, eps = RATES["lr"] / math.sqrt(l), RATES["eps"] * math.sqrt(l)
    g = c1 * g1 + c2 * g2 + decay * x
    v = b2 * v + (1 - b2) * g * g
    if m is None:
        return x - lr * g / (v.sqrt() + eps), None, v
    m = b1 * m + (1 - b1) * g
    return x - lr * (m / (1 - b1**k)) / ((v / (1 - b2**k)).sqrt() + eps), m, v


@pytest.mark.parametrize("l", [1, 1.5, 8, 1024])
@pytest.mark.parametrize("adam", [True, False])
def test_step_is_the_formula_in_float64(backend: str, l: float, adam: bool) -> None:
    params, grads1, grads2 = draw(0), draw(1), draw(2)
    m = draw(3) if adam else None
    v = [t.square() for t in draw(4)]
    second = grads2 if l > 1 else [torch.zeros_like(g) for g in grads2]
    for k in (1, 2, 3):
        expected = [
            exact(x, a, b, None if m is None else m[i], v[i], k, l, 0.02)
            for i, (x, a, b) in enumerate(zip(params, grads1, second, strict=True))
        ]
        options = {**RATES, "l": l, "weight_decay": 0.02, "steps": [k] * len(params), "backend": backend}
        stats = svag_adaptive_step_(params, grads1, grads2, m, v, **options)
        for i, (x, mean, square) in enumerate(expected):
            torch.testing.assert_close(params[i], x, rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(v[i], square, rtol=1e-11, atol=1e-14)
            if m is not None:
                torch.testing.assert_close(m[i], mean, rtol=1e-11, atol=1e-13)
    assert float(stats.inner or 0) == pytest.approx(
        sum(float((a * b).sum()) for a, b in zip(grads1, grads2, strict=True)), rel=1e-9
    )


def test_float32_stays_within_twice_the_references_own_error(backend: str) -> None:
    """Against float64: a backend may err at most twice as much as plain PyTorch in float32."""
    results = {}
    precisions = {"exact": (torch.float64, "reference"), "plain": (torch.float32, "reference")}
    for name, (dtype, which) in {**precisions, "ours": (torch.float32, backend)}.items():
        lists = [[t.to(dtype) for t in draw(seed, torch.float32)] for seed in range(4)]
        v = [t.to(torch.float32).square().to(dtype) for t in draw(4, torch.float32)]
        steps = [5] * len(SHAPES)
        svag_adaptive_step_(*lists[:3], lists[3], v, **RATES, l=8, steps=steps, backend=which)
        results[name] = torch.cat([t.double().flatten() for t in lists[0]])
    ours, plain = ((results[name] - results["exact"]).abs() for name in ("ours", "plain"))
    assert ours.max() <= 2 * plain.max()
    assert ours.mean() <= 1.1 * plain.mean()


def test_l_1_keeps_an_inf_of_the_second_gradient_out(backend: str) -> None:
    states = []
    for bad in (0.0, math.inf):
        params, grads1, grads2, m, v = draw(0), draw(1), draw(2), draw(3), [t.square() for t in draw(4)]
        grads2[4][3, 2] = bad
        stats = svag_adaptive_step_(
            params, grads1, grads2, m, v, **RATES, l=1, steps=[1] * len(params), backend=backend
        )
        assert bool(stats.finite) == (bad == 0.0)
        states.append([*params, *m, *v])
    assert same_bits(*states)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_skip_nonfinite_leaves_everything(backend: str, bad: float) -> None:
    params, grads1, grads2, m, v = draw(0), draw(1), draw(2), draw(3), [t.square() for t in draw(4)]
    before = clones([*params, *m, *v])
    grads2[5][4000] = bad
    options: Any = {**RATES, "l": 4, "steps": [1] * len(params), "backend": backend, "skip_nonfinite": True}
    assert not bool(svag_adaptive_step_(params, grads1, grads2, m, v, **options).finite)
    assert same_bits([*params, *m, *v], before)
    grads2[5][4000] = 0.0
    assert bool(svag_adaptive_step_(params, grads1, grads2, m, v, **options).finite)
    assert not torch.equal(params[5], before[5])


def test_the_same_bits_come_out_for_any_thread_count() -> None:
    results = []
    for threads in (1, 2, 5):
        x, g1, g2, m, v = (torch.randn(300001, generator=torch.Generator().manual_seed(s)) for s in range(5))
        with torch_threads(threads):
            stats = svag_adaptive_step_([x], [g1], [g2], [m], [v.square()], **RATES, l=4, steps=[1], backend="cpu")
        results.append((x, m, stats.raw))
    assert same_bits(*results)


def test_other_memory_orders_are_served(backend: str) -> None:
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64).to(memory_format=torch.channels_last)
    plain = [x.contiguous().clone()]
    g1, g2, v = torch.randn(4, 3, 5, 5).double(), torch.randn(4, 3, 5, 5).double(), torch.rand(4, 3, 5, 5).double()
    like = torch.empty_like(x).copy_(v)
    svag_adaptive_step_([x], [g1], [g2], None, [like], **RATES, l=4, steps=[1], backend=backend)
    svag_adaptive_step_(plain, [g1], [g2], None, [v], **RATES, l=4, steps=[1], backend="reference")
    torch.testing.assert_close(x, plain[0], rtol=1e-12, atol=1e-14, check_stride=False)


@given(l=st.floats(1, 1e6), beta2=st.floats(0, 0.999), lr=st.floats(0, 1))
def test_rates_follow_the_square_root_rule_at_kappa_1_over_l(l: float, beta2: float, lr: float) -> None:
    """From v = 0, m = 0 one RMSprop step by hand from theory's rule."""
    rule = square_root_scaling_rule(1 / l, batch_size=1, lr=lr, beta2=beta2, eps=1e-3)
    c1, c2 = svag_coefficients(l)
    x, g1, g2, v = (torch.tensor([value], dtype=torch.float64) for value in (0.5, 0.3, -0.2, 0.0))
    svag_adaptive_step_([x], [g1], [g2], None, [v], lr=lr, l=l, beta2=beta2, eps=1e-3, steps=[1])
    g = c1 * 0.3 - c2 * 0.2
    assert float(v) == pytest.approx((1 - rule.beta2) * g * g, rel=1e-9, abs=1e-300)
    assert float(x) == pytest.approx(0.5 - rule.lr * g / (math.sqrt(float(v)) + rule.eps), rel=1e-9)


def test_no_params_is_no_step() -> None:
    stats = svag_adaptive_step_([], [], [], [], [], **RATES, l=4, steps=[])
    assert float(stats.weight_sq_norm) == 0
    assert bool(stats.finite)


def test_it_compiles_and_matches_eager() -> None:
    torch._dynamo.reset()
    lists = [draw(s) for s in range(4)]
    v = [t.square() for t in draw(4)]
    eager = [clones(t) for t in lists], clones(v)
    options: Any = {**RATES, "l": 4, "steps": [1] * len(SHAPES)}

    def step(x: Any, a: Any, b: Any, m: Any, v: Any) -> Tensor:
        return svag_adaptive_step_(x, a, b, m, v, **options).raw

    torch.compile(step, backend="aot_eager", fullgraph=True)(*lists, v)
    step(*eager[0], eager[1])
    assert same_bits(lists[0], eager[0][0])


def x3(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.ones(3, dtype=dtype)]


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"l": 1e18}, ValueError, "rounds to 1"),
    ({"beta1": 1.0}, ValueError, "beta1"),
    ({"beta2": -0.1}, ValueError, "beta2"),
    ({"beta2": math.nan}, ValueError, "beta2"),
    ({"eps": -1e-8}, ValueError, "epsilon"),
    ({"grads2": None}, ValueError, "grads2 must be .* got None"),
    ({"grads1": []}, ValueError, "grads1 must be 1 tensors, as params is, got 0"),
    ({"grads1": [torch.ones(4)]}, ValueError, r"grads1\[0\] must be of shape \[3\] to fit params\[0\], got \[4\]"),
    ({"grads2": x3(torch.float64)}, TypeError, r"grads2\[0\] must be torch\.float32, got torch\.float64"),
    ({"exp_avgs": x3(torch.float64)}, TypeError, r"exp_avgs\[0\] must be torch\.float32, got torch\.float64"),
    ({"exp_avg_sqs": [torch.ones(6)[::2]]}, ValueError, r"exp_avg_sqs\[0\] must be of strides \[1\], as params\[0\]"),
    ({"exp_avg_sqs": []}, ValueError, "exp_avg_sqs must be 1 tensors, as params is, got 0"),
    ({"steps": [0]}, ValueError, r"steps\[0\] must be >= 1, got 0"),
    ({"steps": [1, 2]}, ValueError, "steps must be .* params, got 2"),
    ({"params": [torch.ones(3, dtype=torch.int32)]}, TypeError, r"params\[0\] must be one of torch\.float32,"),
    ({"backend": "nonesuch"}, BackendError, "backend must be one of auto, cuda, triton, cpu, reference, got"),
    ({"backend": "cuda"}, BackendError, "can't serve"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_is_refused_and_nothing_written(change: Any, error: type[Exception], message: str) -> None:
    call: dict[str, Any] = {"params": x3(), "grads1": x3(), "grads2": x3(), "exp_avgs": x3(), "exp_avg_sqs": x3()}
    call |= {**RATES, "l": 4, "steps": [1], **change}
    lists = [call.pop(name) for name in ("params", "grads1", "grads2", "exp_avgs", "exp_avg_sqs")]
    with pytest.raises(error, match=message):
        svag_adaptive_step_(*lists, **call)
    assert all(torch.equal(t, torch.ones_like(t)) for tensors in lists if tensors for t in tensors)


def test_moments_that_share_memory_are_refused() -> None:
    x, v = x3(), x3()
    with pytest.raises(ValueError, match=r"exp_avg_sqs\[0\] must be in memory of its own, got some of"):
        svag_adaptive_step_(x, x3(), x3(), v, v, **RATES, l=4, steps=[1])


def test_cpu_says_why_it_can_not_serve_half_precision() -> None:
    lists = [x3(torch.bfloat16) for _ in range(5)]
    with pytest.raises(BackendError, match=r"params\[0\] is torch.bfloat16, and it serves float32 and float64"):
        svag_adaptive_step_(*lists, **RATES, l=4, steps=[1], backend="cpu")
    svag_adaptive_step_(*lists, **RATES, l=4, steps=[1])  # auto: the reference
    assert lists[0][0].dtype == torch.bfloat16
    assert not torch.equal(lists[0][0], x3(torch.bfloat16)[0])
