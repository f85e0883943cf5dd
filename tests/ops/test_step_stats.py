"""Statistics of a step say how far rounding may have put them off."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from svag_fast.ops import svag_step_
from svag_fast.ops.step_stats import StepStats


def gradients(kind: str, n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    value, offset = (1 + torch.rand(2, generator=generator)).tolist()
    d = torch.randn(n, generator=generator)
    if kind == "random":
        g = torch.randn(n, generator=generator)
        return g, g + 1e-4 * d
    constant = torch.full((n,), value)
    return constant, constant * (1 + 1e-4 * offset) if kind == "constant" else constant + 1e-3 * d


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", ["random", "constant", "constant and noise"])
def test_the_noise_is_within_its_rounding(kind: str, backend: str) -> None:
    for seed in range(20):
        for n in (1, 100, 4096, 9000):
            g1, g2 = gradients(kind, n, seed)
            stats = svag_step_([torch.zeros(n)], [g1], [g2], lr=0.0, l=2, backend=backend)
            exact = float((g1.double() - g2.double()).square().sum() / 2)
            assert abs(float(stats.noise_trace) - exact) <= float(stats.noise_trace_rounding)


def test_the_arithmetic_says_the_rounding() -> None:
    def of(*dtypes: torch.dtype) -> StepStats:
        params = [torch.ones(3, dtype=dtype) for dtype in dtypes]
        return svag_step_(params, [p.clone() for p in params], [p.clone() for p in params], lr=0.0, l=1)

    single = of(torch.float32)
    assert math.isclose(float(single.noise_trace_rounding), 6 * 256 * 2**-24)
    assert of(torch.bfloat16).rounding == of(torch.float64, torch.float32).rounding == single.rounding
    assert of(torch.float64).rounding == 256 * 2**-53
    assert svag_step_([torch.ones(3)], [torch.ones(3)], None, lr=0.0, l=1).noise_trace_rounding is None
