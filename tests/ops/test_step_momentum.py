"""The fused step with momentum: the formula, exact moments of both rules, and what float32 must not lose."""

from __future__ import annotations

import math

import heavy_ball
import pytest
import torch
from draws import DTYPES, normals, same_bits
from torch import Tensor

from svag_fast.ops import svag_step_
from svag_fast.ops.step import step_coefficients

# Around the vector widths and the block of 4096; empty and one-element tensors.
SHAPES = [(0,), (1,), (), (17, 5), (4097,)]


def draw(dtype: torch.dtype, seed: int) -> list[Tensor]:
    return normals(dtype, seed, SHAPES)


def buffers(dtype: torch.dtype) -> list[Tensor]:
    """v as the op wants it beside params of ``dtype``, not zero."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return draw(wide, 3)


@pytest.mark.parametrize(("rule", "l"), [("time", 1), ("time", 64), ("fixed", 1.5)])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_step_equals_the_formula_within_one_rounding(
    backend: str, dtypes: tuple[torch.dtype, torch.dtype], maximize: bool, rule: str, l: float
) -> None:
    params, grads1, grads2, velocities = draw(dtypes[0], 0), draw(dtypes[1], 1), draw(dtypes[1], 2), buffers(dtypes[0])
    mu, rate = (1 - 0.1 / l, 0.3 / l**2) if rule == "time" else (0.9, 0.3 / l)
    expected = []
    for x, g1, g2, v in zip(params, grads1, grads2, velocities, strict=True):
        g = heavy_ball.combine(l, g1.double(), g2.double())
        after = mu * v.double() + (-g if maximize else g) + 0.02 * x.double()
        expected.append((x.double() - rate * after, after))
    stats = svag_step_(
        params, grads1, grads2, lr=0.3, l=l, weight_decay=0.02, backend=backend,
        momentum_buffers=velocities, momentum=0.9, momentum_rule=rule, maximize=maximize,
    )  # fmt: skip
    scale = math.sqrt(2 * l)
    for x, v, (new_x, new_v) in zip(params, velocities, expected, strict=True):
        arithmetic = torch.finfo(v.dtype).eps
        assert ((v - new_v).abs() <= 8 * arithmetic * (new_v.abs() + scale * 5)).all()
        bound = new_x.abs() * torch.finfo(x.dtype).eps / 2 + 8 * arithmetic * (new_x.abs() + 5)
        assert ((x.double() - new_x).abs() <= bound).all()
    plain = svag_step_(draw(dtypes[0], 0), grads1, grads2, lr=0.3, l=l, backend=backend)
    assert torch.equal(stats.raw, plain.raw), "the statistics are the gradients', whatever is done with them"


@pytest.mark.parametrize(("rule", "l"), heavy_ball.KNOWN)
def test_the_path_has_the_exact_moments(rule: str, l: int) -> None:
    expected = heavy_ball.exact(l, rule)
    assert expected == pytest.approx(heavy_ball.KNOWN[rule, l], abs=6e-4)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-5))[: 1 if l == 64 else 2]:
        v: list[Tensor] = []

        def step(x: Tensor, g1: Tensor, g2: Tensor, v: list[Tensor] = v) -> None:
            if not v:
                v.append(torch.zeros_like(x))
            svag_step_(
                [x], [g1], [g2], lr=heavy_ball.LR, l=l,
                momentum_buffers=v, momentum=heavy_ball.MOMENTUM, momentum_rule=rule,
            )  # fmt: skip

        assert heavy_ball.by_steps(l, step, dtype) == pytest.approx(expected, abs=tolerance)


def test_what_the_rules_converge_to() -> None:
    """The time rule's distances from its limit halve as l doubles; the fixed rule's limit is SGD's at lr/(1 - mu)."""
    means = [heavy_ball.exact(l, "time")[0] for l in (8, 16, 32, 64)]
    ratios = [(a - b) / (b - c) for a, b, c in zip(means, means[1:], means[2:], strict=False)]
    assert ratios == pytest.approx([2, 2], rel=0.05)
    sgd = heavy_ball.exact(64, "fixed", momentum=0.0, lr=heavy_ball.LR / (1 - heavy_ball.MOMENTUM))
    assert heavy_ball.exact(64, "fixed") == pytest.approx(sgd, abs=1.5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_momentum_next_to_1_decays_the_buffer_at_its_own_rate(backend: str, dtype: torch.dtype) -> None:
    """At l = 65536, 1 - mu_l is 1.5e-6, of which rounding mu_l to float32 would take or add up to 2 %."""
    l, steps = 65536, 300
    v, x, zero = [torch.full((33,), 1.0)], [torch.zeros(33, dtype=dtype)], [torch.zeros(33, dtype=dtype)]
    noise = torch.empty(33, dtype=torch.float64)
    lost = torch.zeros(33, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        # Noise that brings v to another binary place each time: its roundings average out, as in training.
        noise.uniform_(-0.25, 0.25, generator=generator)
        before = v[0].double()
        g = [noise.to(dtype)]
        svag_step_(x, g, zero, lr=0.0, l=l, backend=backend, momentum_buffers=v, momentum=0.9)
        c1 = heavy_ball.combine(l, torch.ones(1, dtype=torch.float64), torch.zeros(1))
        lost += (before + float(c1) * g[0].double() - v[0].double()) / before
    rate = lost / steps
    assert float(rate.mean()) == pytest.approx((1 - float(torch.tensor(0.9))) / l, rel=0.01)


def test_coefficients_in_a_tensor_replace_the_arguments(backend: str) -> None:
    options = {"momentum": 0.9, "momentum_rule": "time", "maximize": True}
    results = []
    for coefficients in (None, step_coefficients(0.3, 5, 0.02, torch.device("cpu"), **options)):  # type: ignore[arg-type]
        params, grads1, grads2 = (draw(torch.float32, seed) for seed in range(3))
        velocities = buffers(torch.float32)
        arguments = {"lr": 0.3, "weight_decay": 0.02, **options} if coefficients is None else {"lr": 9.0}
        svag_step_(
            params, grads1, grads2, l=5, coefficients=coefficients, momentum_buffers=velocities, backend=backend,
            **arguments,
        )  # fmt: skip
        results.append([*params, *velocities])
    assert same_bits(*results)


@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[1], DTYPES[4]], ids=str)
def test_skip_nonfinite_leaves_the_buffers_too(backend: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    params, grads1, grads2, velocities = draw(dtypes[0], 0), draw(dtypes[1], 1), draw(dtypes[1], 2), buffers(dtypes[0])
    compensation = None if dtypes[0] == torch.float64 else [torch.full(s, 1e-6) for s in SHAPES]
    tensors = [*params, *velocities, *(compensation or [])]
    before = [t.clone() for t in tensors]
    good = grads2[4][5].clone()
    options = {"momentum_buffers": velocities, "momentum": 0.9, "compensation": compensation, "backend": backend}
    for value in (math.nan, good):
        grads2[4][5] = value
        stats = svag_step_(params, grads1, grads2, lr=0.1, l=4, skip_nonfinite=True, **options)
        same = [torch.equal(t, b) for t, b in zip(tensors, before, strict=True) if t.numel()]
        assert not any(same) if stats.finite else all(same)
    assert stats.finite


def test_channels_last_params_and_buffers(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    p, g1, g2, v = (torch.randn(4, 6, 3, 5, generator=generator) for _ in range(4))
    turned, turned_v = (t.to(memory_format=torch.channels_last) for t in (p, v))
    options = {"lr": 0.1, "l": 4, "momentum": 0.9, "backend": backend}
    svag_step_([turned], [g1], [g2], momentum_buffers=[turned_v], **options)
    svag_step_([p], [g1], [g2], momentum_buffers=[v], **options)
    assert torch.equal(turned, p)
    assert torch.equal(turned_v, v)
    assert turned_v.is_contiguous(memory_format=torch.channels_last)


def test_torch_compile_gives_the_eager_bits() -> None:
    def step(params: list[Tensor], grads1: list[Tensor], grads2: list[Tensor], v: list[Tensor]) -> Tensor:
        svag_step_(params, grads1, [g * 2 for g in grads2], lr=0.1, l=4, momentum_buffers=v, momentum=0.9)
        return v[1] + 1

    lists = [draw(torch.float32, i) for i in range(3)] + [buffers(torch.float32)]
    eager, compiled = ([[t.clone() for t in ts] for ts in lists] for _ in range(2))
    expected = step(*eager)
    assert torch.equal(torch.compile(step, backend="aot_eager", fullgraph=True)(*compiled), expected)
    for k in (0, 3):
        assert same_bits(eager[k], compiled[k])


ONES = torch.ones(3)
BAD_INPUT = {
    "negative": ({"momentum": -0.1}, ValueError, r"Invalid momentum value: -0.1"),
    "1": ({"momentum": 1.0}, ValueError, r"Invalid momentum value: 1.0"),
    "nan": ({"momentum": math.nan}, ValueError, r"Invalid momentum value: nan"),
    "rounds to 1": ({"l": 1e16}, ValueError, r"l must be smaller at momentum = 0\.9, which becomes 1 - \(1 -"),
    "rule": ({"momentum_rule": "slow"}, ValueError, r"momentum_rule must be 'time' or 'fixed', got 'slow'"),
    "no buffers": (
        {"momentum_buffers": None},
        ValueError,
        r"momentum_buffers must be .* where momentum is 0.9, got None",
    ),
    "buffers without momentum": (
        {"momentum": 0.0},
        ValueError,
        r"momentum_buffers must be None where momentum is 0.0, got buffers",
    ),
    "length": ({"momentum_buffers": []}, ValueError, "momentum_buffers must be 1 tensors, as params is, got 0"),
    "shape": ({"momentum_buffers": [torch.ones(4)]}, ValueError, r"momentum_buffers\[0\] must be of shape \[3\] to"),
    "dtype": (
        {"momentum_buffers": [ONES.half()], "params": [ONES.half()], "grads1": [ONES], "grads2": [ONES]},
        TypeError,
        r"momentum_buffers\[0\] must be torch\.float32, got torch\.float16",
    ),
    "dtype beside float64": (
        {"params": [ONES.double()]},
        TypeError,
        r"momentum_buffers\[0\] must be torch\.float64, got torch\.float32",
    ),
    "strides": ({"momentum_buffers": [torch.ones(6)[::2]]}, ValueError, r"momentum_buffers\[0\] must be of strides"),
    "shared with a param": (
        {"params": [ONES], "momentum_buffers": [ONES]},
        ValueError,
        r"momentum_buffers\[0\] must be in memory of its own, got some of params\[0\]'s",
    ),
    "shared with compensation": (
        {"compensation": [ONES], "momentum_buffers": [ONES]},
        ValueError,
        r"momentum_buffers\[0\] must be in memory of its own, got some of compensation\[0\]'s",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_is_refused_by_name_and_nothing_is_written(
    case: tuple[dict[str, object], type[Exception], str],
) -> None:
    changes, error, message = case
    lists = {name: [torch.ones(3)] for name in ("params", "grads1", "grads2", "momentum_buffers")}
    call: dict[str, object] = {**lists, "lr": 0.1, "l": 2, "momentum": 0.9, **changes}
    with pytest.raises(error, match=message):
        svag_step_(**call)  # type: ignore[arg-type]
    for tensors in call.values():
        assert not isinstance(tensors, list) or all((t == 1).all() for t in tensors)
