"""The fused step: every backend and SIMD level against the formula in float64, and everything it refuses."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from draws import DTYPES, clones, dot, normals, same_bits
from hypothesis import given
from hypothesis import strategies as st
from simd import AVAILABLE, simd_level, torch_threads
from torch import Tensor

import svag_fast
from svag_fast import _C, svag_coefficients
from svag_fast.ops import svag_step_
from svag_fast.ops.backends import BackendError
from svag_fast.ops.step import step_coefficients
from svag_fast.ops.step_stats import total

# Around the vector widths, the block of 4096 and the chunk of 65536; empty and one-element tensors.
SHAPES = [(0,), (1,), (), (3,), (17, 5), (4095,), (4097,), (31, 0, 2), (65537,), (8, 3, 3, 3)]


def draw(dtype: torch.dtype, seed: int, scale: float = 1.0) -> list[Tensor]:
    return normals(dtype, seed, SHAPES, scale)


def exact(
    params: list[Tensor], grads1: list[Tensor], grads2: list[Tensor] | None, lr: float, l: float, weight_decay: float
) -> list[Tensor]:
    c1, c2 = svag_coefficients(l)
    second = [torch.zeros_like(g) for g in grads1] if grads2 is None or l == 1 else grads2
    return [
        x.double() - lr / l * (c1 * a.double() + c2 * b.double() + weight_decay * x.double())
        for x, a, b in zip(params, grads1, second, strict=True)
    ]


LS = [1, 1.5, 2, 64, 65536, 1e12]


@pytest.mark.parametrize("l", LS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_the_reference_equals_the_formula_within_one_rounding(
    dtypes: tuple[torch.dtype, torch.dtype], l: float
) -> None:
    """The kernels' bits are the reference's, by the next test."""
    params, grads1, grads2 = draw(dtypes[0], 0), draw(dtypes[1], 1), draw(dtypes[1], 2)
    expected = exact(params, grads1, grads2, 0.3, l, 0.02)
    svag_step_(params, grads1, grads2, lr=0.3, l=l, weight_decay=0.02, backend="reference")
    for x, e in zip(params, expected, strict=True):
        # Half an ulp of the stored value, and a few float32 (float64) roundings of the decrement on the way.
        arithmetic = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
        bound = e.abs() * torch.finfo(x.dtype).eps / 2 + 4 * arithmetic * (e.abs() + 1)
        assert ((x.double() - e).abs() <= bound).all()


@pytest.mark.parametrize("level", AVAILABLE)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_every_level_gives_the_reference_bits(level: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Plain, compensated, with momentum and with both, at every l."""
    wide = torch.float64 if dtypes[0] == torch.float64 else torch.float32
    compensation = None if wide == torch.float64 else [torch.full(s, 1e-4) for s in SHAPES]
    grads = draw(dtypes[1], 1), draw(dtypes[1], 2)
    for l, e, v in itertools.product(LS, (None, compensation), (None, draw(wide, 3))):
        if l == LS[-1] and v is not None and wide != torch.float64:
            continue  # 1 - mu is below float32's half ulp: refused
        results = []
        for backend in ("cpu", "reference"):
            params, kept, velocities = draw(dtypes[0], 0), e and clones(e), v and clones(v)
            with simd_level(level):
                svag_step_(
                    params, *grads, lr=0.3, l=l, weight_decay=0.02, compensation=kept, backend=backend,
                    momentum_buffers=velocities, momentum=0 if v is None else 0.9,
                )  # fmt: skip
            results.append([*params, *(kept or []), *(velocities or [])])
        assert same_bits(*results), (l, e is not None, v is not None)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_statistics_equal_float64_sums(backend: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    params, grads1, grads2 = draw(dtypes[0], 0), draw(dtypes[1], 1), draw(dtypes[1], 2)
    expected = [dot(grads1, grads1), dot(grads2, grads2), dot(grads1, grads2), dot(params, params)]
    stats = svag_step_(params, grads1, grads2, lr=0.1, l=4, backend=backend)
    scale = math.sqrt(expected[0] * expected[1])
    # Rounding in float32 over blocks of 4096: a random walk of at most 1024 half-ulps a lane.
    tolerance = 1e-12 if dtypes[0] == torch.float64 else 4e-6
    for value, e in zip(stats.raw[:4].tolist(), expected, strict=True):
        assert abs(value - e) <= tolerance * max(scale, abs(e))
    assert stats.inner is not None
    assert stats.noise_trace is not None
    assert stats.nsr is not None
    noise = (expected[0] + expected[1] - 2 * expected[2]) / 2
    assert float(stats.noise_trace) == pytest.approx(noise, rel=1e-5)
    assert float(stats.nsr) == pytest.approx(noise / float(stats.inner), rel=1e-5)
    assert bool(stats.finite)
    assert all(t.dtype == torch.float64 and t.dim() == 0 for t in (stats.sq_norm1, stats.inner, stats.weight_sq_norm))


def test_finite_gradients_whose_squares_overflow_float32_have_finite_statistics(backend: str) -> None:
    params, grads1, grads2 = draw(torch.float32, 0), draw(torch.float32, 1, 1e25), draw(torch.float32, 2, 1e25)
    expected = dot(grads1, grads1), dot(grads2, grads2), dot(grads1, grads2)
    stats = svag_step_(params, grads1, grads2, lr=0.0, l=2, backend=backend)
    assert bool(stats.finite)
    assert stats.raw[:3].tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("which", "bad"), [(1, math.inf), (1, math.nan), (2, -math.inf), (2, math.nan)])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_finite_tells_huge_entries_from_bad_ones(
    backend: str, dtypes: tuple[torch.dtype, torch.dtype], which: int, bad: float
) -> None:
    """Entries whose squares overflow the sum's dtype are finite; one that isn't shows beside them."""
    huge = 0.9 * torch.finfo(dtypes[1]).max
    lists = [draw(dtypes[0], 0), draw(dtypes[1], 1), draw(dtypes[1], 2)]
    lists[which][5][4000:4094] = huge
    assert bool(svag_step_(*lists, lr=0.0, l=4, backend=backend).finite)
    lists[which][8][65536] = bad
    assert not bool(svag_step_(*lists, lr=0.0, l=4, backend=backend).finite)


def test_at_l_1_the_step_is_sgd_and_the_second_gradient_may_be_missing(backend: str) -> None:
    params, grads1, grads2 = draw(torch.float32, 0), draw(torch.float32, 1), draw(torch.float32, 2)
    with_second = [p.clone() for p in params]
    sgd = [p.clone().requires_grad_() for p in params]
    for p, g in zip(sgd, grads1, strict=True):
        p.grad = g.clone()
    torch.optim.SGD(sgd, lr=0.1, weight_decay=0.5).step()
    stats = svag_step_(params, grads1, None, lr=0.1, l=1, weight_decay=0.5, backend=backend)
    svag_step_(with_second, grads1, grads2, lr=0.1, l=1, weight_decay=0.5, backend=backend)
    for a, b, c in zip(params, with_second, sgd, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c.detach(), rtol=3e-7, atol=3e-7)
    assert (stats.sq_norm2, stats.inner, stats.grad_sq_norm, stats.noise_trace, stats.nsr) == (None,) * 5
    assert float(stats.sq_norm1) == pytest.approx(dot(grads1, grads1), rel=1e-5)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_at_l_1_a_bad_second_gradient_never_reaches_the_params(backend: str, bad: float) -> None:
    params, grads1, grads2 = draw(torch.float32, 0), draw(torch.float32, 1), draw(torch.float32, 2)
    grads2[8][65530] = bad
    stats = svag_step_(params, grads1, grads2, lr=0.1, l=1, backend=backend)
    assert all(p.isfinite().all() for p in params)
    assert not bool(stats.finite)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("where", [(0, 1), (1, 8), (1, 5)])
def test_skip_nonfinite_leaves_everything_untouched(
    backend: str, dtypes: tuple[torch.dtype, torch.dtype], where: tuple[int, int]
) -> None:
    params = draw(dtypes[0], 0)
    grads = [draw(dtypes[1], 1), draw(dtypes[1], 2)]
    compensation = [] if dtypes[0] == torch.float64 else [torch.full(s, 1e-6) for s in SHAPES]
    good = [[g.clone() for g in gs] for gs in grads]
    grads[where[0]][where[1]].view(-1)[-1] = math.inf
    before = [p.clone() for p in params]
    stats = svag_step_(
        params, *grads, lr=0.1, l=4, compensation=compensation or None, skip_nonfinite=True, backend=backend
    )
    assert not bool(stats.finite)
    assert same_bits(params, before)
    assert all((e == 1e-6).all() for e in compensation)

    skipping, plain = [b.clone() for b in before], [b.clone() for b in before]
    svag_step_(skipping, *good, lr=0.1, l=4, skip_nonfinite=True, backend=backend)
    svag_step_(plain, *good, lr=0.1, l=4, backend=backend)
    assert same_bits(skipping, plain)


@pytest.mark.parametrize(("dtype", "l"), [(torch.float32, 2.0**21), (torch.bfloat16, 2.0**16)], ids=str)
def test_compensated_params_follow_float64_through_many_steps_of_pure_decay(dtype: torch.dtype, l: float) -> None:
    steps, decay = 10**5, 0.1 / l * 0.5
    start = torch.tensor([1.0, -0.37, 3e-3, 0.0, 117.0]).to(dtype)
    x, e, zero = start.clone(), torch.zeros(5), torch.zeros(5, dtype=dtype)
    codes = [{torch.float32: 0, torch.bfloat16: 2}[dtype]]
    places = ([t.data_ptr()] for t in (x, zero, zero, e))
    tensors = _C.StepTensors(*places, [], [5], codes, codes)
    raw = torch.empty(5, dtype=torch.float64)
    for _ in range(steps):
        tensors.step(0.1 / l, *svag_coefficients(l), 0.5, 0.0, 0.0, False, 1, raw.data_ptr())
    # Each decrement carries float32's relative error of 2^-24 twice or so; the sum keeps them all.
    torch.testing.assert_close(x.double() + e.double(), start.double() * (1 - decay) ** steps, rtol=3e-8, atol=0)
    plain = start.clone()
    svag_step_([plain], [zero], [zero.clone()], lr=0.1, l=l, weight_decay=0.5)
    assert torch.equal(plain, start), "each decrement is below half an ulp, so the plain step never moves"


def test_compensated_step_equals_the_reference_over_many_random_steps(backend: str) -> None:
    params, exact_params = draw(torch.bfloat16, 0), [p.double() for p in draw(torch.bfloat16, 0)]
    compensation = [torch.zeros(s) for s in SHAPES]
    for k in range(20):
        grads1, grads2 = draw(torch.bfloat16, 2 * k + 1), draw(torch.bfloat16, 2 * k + 2)
        exact_params = exact(exact_params, grads1, grads2, 1e-3, 64, 0.1)
        svag_step_(params, grads1, grads2, lr=1e-3, l=64, weight_decay=0.1, compensation=compensation, backend=backend)
    for p, e, x in zip(params, compensation, exact_params, strict=True):
        torch.testing.assert_close(p.double() + e.double(), x, rtol=0, atol=20 * 2**-24 * 8)


@pytest.mark.parametrize("level", AVAILABLE)
def test_the_same_bits_for_any_number_of_threads(level: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(300001,), (7,), (65536,), (12345,)] + [(64,)] * 50
    lists = [[torch.randn(s, generator=generator) for s in shapes] for _ in range(3)]
    results = []
    for threads in (1, 2, 3, 8):
        params = clones(lists[0])
        with simd_level(level), torch_threads(threads):
            stats = svag_step_(params, lists[1], lists[2], lr=0.1, l=8, weight_decay=0.1, backend="cpu")
        results.append([stats.raw, *params])
    assert same_bits(*results)


@pytest.mark.parametrize("level", AVAILABLE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value_converts_as_torch_does(level: str, dtype: torch.dtype) -> None:
    with simd_level(level):
        # With lr = 0 the step is a round trip through float32.
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        x = every.clone()
        svag_step_([x], [torch.zeros_like(x)], None, lr=0.0, l=1)
        kept = ~every.isinf() & ~every.isnan()
        assert torch.equal(x[kept], every[kept])
        assert torch.equal(x.isnan(), every.isnan() | every.isinf())  # 0 * inf in the decay
        # x = 0, lr = 1: float32 gradients over all exponents and ties, rounded once.
        generator = torch.Generator().manual_seed(0)
        bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator, dtype=torch.int64).to(torch.int32)
        halfway = every.float()
        g = torch.cat([bits.view(torch.float32), halfway * (1 + 2.0**-11), halfway * (1 + 2.0**-12)])
        x = torch.zeros_like(g, dtype=dtype)
        svag_step_([x], [g], None, lr=1.0, l=1)
        torch.testing.assert_close(x, (-g).to(dtype), rtol=0, atol=0, equal_nan=True)


def test_channels_last_params_and_gradients_in_other_memory_orders(backend: str) -> None:
    p, g1, g2 = (torch.randn(4, 6, 3, 5, generator=torch.Generator().manual_seed(i)) for i in range(3))
    expected = exact([p], [g1], [g2], 0.1, 4, 0.1)[0]
    param = p.to(memory_format=torch.channels_last)
    expanded = torch.ones(1, 1, 1, 1).expand(4, 6, 3, 5)
    svag_step_([param], [g1], [g2.transpose(0, 3).contiguous().transpose(0, 3)], lr=0.1, l=4, weight_decay=0.1)
    torch.testing.assert_close(param.double(), expected, rtol=1e-6, atol=1e-6)
    svag_step_([param], [expanded], [expanded.clone()], lr=1.0, l=1)
    torch.testing.assert_close(param.double(), expected - 1, rtol=1e-6, atol=1e-6)
    assert param.is_contiguous(memory_format=torch.channels_last)


def test_a_leaf_that_requires_grad_is_updated_and_nothing_is_recorded(backend: str) -> None:
    p = torch.nn.Parameter(torch.ones(5))
    g = torch.ones(5)
    version = p._version
    svag_step_([p], [g], [g.clone()], lr=0.1, l=2, backend=backend)
    torch.testing.assert_close(p.detach(), torch.full((5,), 0.95))
    assert p.requires_grad
    assert p.is_leaf
    assert p._version > version


def test_a_param_saved_for_backward_is_known_to_be_overwritten() -> None:
    p = torch.nn.Parameter(torch.ones(5))
    loss = (p * p).sum()
    svag_step_([p], [torch.ones(5)], None, lr=0.1, l=1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_empty_lists_are_fine() -> None:
    stats = svag_step_([], [], [], lr=0.1, l=2)
    assert stats.raw.tolist() == [0, 0, 0, 0, 1]


def test_statistics_of_groups_add_up() -> None:
    params, grads1, grads2 = draw(torch.float64, 0), draw(torch.float64, 1), draw(torch.float64, 2)
    whole = svag_step_([p.clone() for p in params], grads1, grads2, lr=0.1, l=2)
    parts = [
        svag_step_(params[:4], grads1[:4], grads2[:4], lr=0.1, l=2),
        svag_step_(params[4:], grads1[4:], grads2[4:], lr=0.1, l=2),
    ]
    torch.testing.assert_close(total([part.raw for part in parts]), whole.raw, rtol=1e-12, atol=1e-12)
    grads1[5][0] = math.nan
    bad = svag_step_(params[4:], grads1[4:], grads2[4:], lr=0.1, l=2)
    assert total([parts[0].raw, bad.raw])[-1] == 0


@pytest.mark.parametrize(("compensated", "momentum"), [(False, 0.0), (True, 0.0), (False, 0.9)])
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(backend: str, compensated: bool, momentum: float, second: bool) -> None:
    params, grads = [torch.randn(3), torch.randn(4, 5)], [torch.randn(3), torch.randn(4, 5)]
    compensation = [torch.zeros(3), torch.zeros(4, 5)] if compensated else []
    l = 4.0 if second else 1.0
    coefficients = step_coefficients(0.1, l, 0.1, torch.device("cpu")) if compensated else None
    args = (params, grads, grads if second else None, compensation, 0.1, l, 0.1, False, coefficients, backend)
    buffers = [torch.zeros(3), torch.zeros(4, 5)] if momentum else None
    torch.library.opcheck(torch.ops.svag_fast.svag_step_.default, (*args, buffers, momentum, "time", True))


def test_coefficients_in_a_tensor_replace_the_arguments(backend: str) -> None:
    results = []
    for coefficients in (None, step_coefficients(0.3, 5, 0.02, torch.device("cpu"))):
        params, grads1, grads2 = (draw(torch.float32, seed) for seed in range(3))
        lr, l, weight_decay = (0.3, 5, 0.02) if coefficients is None else (9.0, 2, 9.0)
        svag_step_(
            params,
            grads1,
            grads2,
            lr=lr,
            l=l,
            weight_decay=weight_decay,
            coefficients=coefficients,
            backend=backend,
        )
        results.append(params)
    assert same_bits(*results)


@pytest.mark.parametrize("wrong", [torch.ones(4, dtype=torch.float64), torch.ones(5)], ids=["length", "dtype"])
def test_coefficients_of_the_wrong_form_are_refused(backend: str, wrong: Tensor) -> None:
    x = torch.ones(3)
    with pytest.raises(ValueError, match="coefficients must be"):
        svag_step_([x], [x.clone()], None, lr=0.1, l=1, coefficients=wrong, backend=backend)
    assert x.tolist() == [1, 1, 1]


def test_torch_compile_gives_the_eager_bits() -> None:
    def step(params: list[Tensor], grads1: list[Tensor], grads2: list[Tensor]) -> Tensor:
        doubled = [g * 2 for g in grads1]
        stats = svag_step_(params, doubled, grads2, lr=0.1, l=4, weight_decay=0.1)
        assert stats.noise_trace is not None
        return stats.noise_trace + params[1].sum()

    lists = [draw(torch.float32, i) for i in range(3)]
    eager, compiled = [p.clone() for p in lists[0]], [p.clone() for p in lists[0]]
    expected = step(eager, lists[1], lists[2])
    result = torch.compile(step, backend="aot_eager", fullgraph=True)(compiled, lists[1], lists[2])
    assert torch.equal(result, expected)
    assert same_bits(eager, compiled)


@given(st.floats(min_value=1, max_value=1e12))
def test_coefficients_sum_to_1_and_their_squares_to_l(l: float) -> None:
    c1, c2 = svag_coefficients(l)
    assert c1 + c2 == pytest.approx(1, abs=1e-9 * math.sqrt(l))
    assert c1**2 + c2**2 == pytest.approx(l, rel=1e-12)
    assert c1 * c2 == pytest.approx((1 - l) / 2, rel=1e-9, abs=1e-9)


def good_call() -> dict[str, object]:
    return {
        "params": [torch.ones(3), torch.ones(2, 2)],
        "grads1": [torch.ones(3), torch.ones(2, 2)],
        "grads2": [torch.ones(3), torch.ones(2, 2)],
        "lr": 0.1,
        "l": 2,
        "weight_decay": 0.1,
    }


overlapping = torch.ones(8)
BAD_INPUT = {
    "second gradient missing": (
        {"grads2": None},
        ValueError,
        r"grads2 must be the second batch's gradients at l = 2, got None",
    ),
    "lists of different length": ({"grads2": [torch.ones(3)]}, ValueError, "grads2 must be 2 tensors, as params"),
    "shape": ({"grads1": [torch.ones(3), torch.ones(4)]}, ValueError, r"grads1\[1\] must be of shape \[2, 2\] to"),
    "dtype of a gradient": (
        {"grads1": [torch.ones(3).double(), torch.ones(2, 2)]},
        TypeError,
        r"grads1\[0\] must be torch\.float32, got torch\.float64",
    ),
    "dtypes of the two gradients": (
        {
            "params": [torch.ones(3).half(), torch.ones(2, 2)],
            "grads1": [torch.ones(3).half(), torch.ones(2, 2)],
        },
        TypeError,
        r"grads2\[0\] must be torch.float16, as grads1\[0\] is, got torch.float32",
    ),
    "device": ({"grads2": [torch.ones(3), torch.ones(2, 2, device="meta")]}, ValueError, r"grads2\[1\] must be on"),
    "integer params": ({"params": [torch.ones(3).int(), torch.ones(2, 2)]}, TypeError, r"params\[0\] must be one of"),
    "sparse gradient": (
        {"grads1": [torch.ones(3).to_sparse(), torch.ones(2, 2)]},
        TypeError,
        r"grads1\[0\] must be a dense \(strided\) tensor, got torch\.sparse_coo",
    ),
    "param with gaps": (
        {"params": [torch.ones(6)[::2], torch.ones(2, 2)]},
        ValueError,
        r"params\[0\] must be dense in memory in some order of its dimensions, got gaps or repeated",
    ),
    "param with repeated elements": (
        {"params": [torch.ones(1).expand(3), torch.ones(2, 2)]},
        ValueError,
        r"params\[0\].* repeated elements",
    ),
    "overlapping params": (
        {"params": [overlapping[:3], overlapping[2:6].view(2, 2)]},
        ValueError,
        r"params\[1\] must be in memory of its own, got some of params\[0\]'s",
    ),
    "compensation's length": ({"compensation": []}, ValueError, "compensation must be 2 tensors, as params is, got"),
    "compensation's dtype": (
        {"compensation": [torch.zeros(3), torch.zeros(2, 2).half()]},
        TypeError,
        r"compensation\[1\] must be torch\.float32, got torch\.float16",
    ),
    "compensation's memory order": (
        {"compensation": [torch.zeros(3), torch.zeros(2, 2).T]},
        ValueError,
        r"compensation\[1\] must be of strides \[2, 1\], as params\[1\] is, got \[1, 2\]",
    ),
    "compensation for float64": (
        {k: [torch.ones(3).double(), torch.ones(2, 2)] for k in ("params", "grads1", "grads2")}
        | {"compensation": [torch.zeros(3), torch.zeros(2, 2)]},
        TypeError,
        r"params\[0\] must be float32, bfloat16 or float16 for compensation, got torch\.float64",
    ),
    "unknown backend": ({"backend": "gpu"}, BackendError, "backend must be one of auto, cuda, triton, cpu,"),
    "backend that can't serve": ({"backend": "cuda"}, BackendError, r"'cuda' can't serve svag_step_: it serves cuda"),
}


@pytest.mark.parametrize("case", BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_is_refused_by_name_and_nothing_is_written(
    case: tuple[dict[str, object], type[Exception], str],
) -> None:
    changes, error, message = case
    call = {**good_call(), **changes}
    tensors = [t for v in call.values() if isinstance(v, list) for t in v if t.device.type == "cpu"]
    before = [t.clone() for t in tensors]
    with pytest.raises(error, match=message):
        svag_step_(**call)  # type: ignore[arg-type]
    for t, b in itertools.zip_longest(tensors, before):
        assert torch.equal(t.to_dense(), b.to_dense())


def test_the_good_call_of_the_table_is_good() -> None:
    assert bool(svag_step_(**good_call()).finite)  # type: ignore[arg-type]


def test_backend_context_and_variable_replace_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    with svag_fast.use_backend("cuda"), pytest.raises(BackendError, match="'cuda' can't serve"):
        svag_step_(**good_call())  # type: ignore[arg-type]
    monkeypatch.setenv("SVAG_FAST_BACKEND", "triton")
    with pytest.raises(BackendError, match=r"'triton' \(of SVAG_FAST_BACKEND\) can't serve"):
        svag_step_(**good_call())  # type: ignore[arg-type]
    with svag_fast.use_backend("reference"):
        svag_step_(**good_call())  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="backend must be one of auto, cuda,"), svag_fast.use_backend("gpu"):
        pass
