"""Lemmas 4.6 and 4.7: the moments of one step of the SDE and of SVAG."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from svag_fast.sde import (
    AffineProblem,
    Draws,
    Gamma,
    SVAGProcess,
    mean_and_error,
    multiplicative_quadratic,
    sde_moments,
    simulate,
)
from svag_fast.sde.moments import noise_moments
from svag_fast.verify.check import Check, Outcome, SuiteSettings, z_check

LR, START = 0.5, 1.3
PROBLEM = AffineProblem(1.1, 0.3, 0.4, -0.9, Gamma())
LS = (1.0, 2.5, 8.0, 64.0)


def lemma_4_7(settings: SuiteSettings) -> Outcome:
    """EΔ, EΔ², EΔ³, EΔ⁴ of one SVAG step with skewed noise, simulated, against the lemma's formulas."""
    outcome = Outcome()
    n = settings.choose(100_000, 1_000_000)
    for l in LS:
        process = SVAGProcess(LR, l=l)
        start = torch.tensor(START, dtype=torch.float64, device="cpu")
        step = simulate(process, PROBLEM, start, process.step_size, trajectories=n, seed=settings.seed) - start
        for power, expected in enumerate(_lemma_4_7(l), start=1):
            mean, error = mean_and_error(step**power)
            part = ("i", "ii", "iii", "iv")[power - 1]
            outcome.checks.append(
                z_check(f"Lemma 4.7 ({part})", f"one SVAG step, l = {l:g}: E Δ^{power}", mean, error, expected)
            )
    return outcome


def _lemma_4_7(l: float) -> tuple[float, float, float, float]:
    """The lemma's right sides with the sign and the power of l put right; (iv) written out, which it bounds by l^-2."""
    grad = PROBLEM.curvature * START - PROBLEM.offset
    spread = PROBLEM.noise_slope * START + PROBLEM.noise_offset
    sigma, third = spread**2, spread**3 * PROBLEM.law.third_cumulant
    _, _, second, noise_3, noise_4 = noise_moments(PROBLEM, SVAGProcess(LR, l=l).estimates[0])
    return (
        -LR / l * grad,
        LR**2 / l * sigma + LR**2 / l**2 * grad**2,
        -(LR**3 / l**2 * (3 - 1 / l) / 2 * third + LR**3 / l**2 * 3 * grad * sigma + LR**3 / l**3 * grad**3),
        (LR / l) ** 4
        * (spread**4 * noise_4 + 4 * grad * spread**3 * noise_3 + 6 * grad**2 * spread**2 * second + grad**4),
    )


def lemma_4_6(settings: SuiteSettings) -> Outcome:
    """The SDE over time lr/l: mean and second moment to O(l^-2), third and fourth O(l^-2); and simulated exactly."""
    outcome = Outcome()
    grad = PROBLEM.curvature * START - PROBLEM.offset
    sigma = (PROBLEM.noise_slope * START + PROBLEM.noise_offset) ** 2
    remainders = []
    # Two of them: l² times a remainder of order l^-2 is one constant, and of a lower order it would double.
    for l in (4096.0, 8192.0):
        moments = _increments(PROBLEM, LR / l)
        leading = np.array([-LR / l * grad, LR**2 / l * sigma, 0.0, 0.0])
        remainders.append((moments - leading) * l**2)
    for power in range(4):
        coarse, fine = remainders[0][power], remainders[1][power]
        outcome.checks.append(
            Check(
                f"Lemma 4.6 ({('i', 'ii', 'iii', 'iv')[power]})",
                f"SDE over lr/l: l² times what is left of E Δ^{power + 1}, l = 4096 and 8192",
                f"{coarse:.5g}, {fine:.5g}",
                "one constant",
                math.isfinite(fine) and abs(fine - coarse) < 0.01 * abs(coarse),
            )
        )
    problem, n, l = multiplicative_quadratic(1.0, 1.0), settings.choose(100_000, 1_000_000), 4.0
    steps = _geometric_step(settings, n, l)
    for power, expected in enumerate(_increments(problem, LR / l), start=1):
        mean, error = mean_and_error(steps**power)
        outcome.checks.append(
            z_check("Lemma 4.6", f"geometric Brownian step, l = 4: E Δ^{power}", mean, error, expected)
        )
    return outcome


def _increments(problem: AffineProblem, time: float) -> np.ndarray:
    """Exact E (X_t - x0)^p, p = 1..4, from a start moved to the origin (no cancellation)."""
    # From the origin: E (X - x0)^4 as a difference of moments of X would lose all its digits to cancellation.
    moved = AffineProblem(
        problem.curvature,
        problem.offset - problem.curvature * START,
        problem.noise_slope,
        problem.noise_offset + problem.noise_slope * START,
    )
    return sde_moments(moved, 0.0, [time], lr=LR)[0, 1:]


def _geometric_step(settings: SuiteSettings, n: int, l: float) -> Tensor:
    """X_{lr/l} - x0 of ``dX = -X dt + lr^(1/2) X dW``, drawn from its log-normal law."""
    normals = Draws(settings.seed, 1).normal_(torch.empty(n, dtype=torch.float64, device="cpu"))
    time = LR / l
    return START * torch.expm1(-(1 + LR / 2) * time + math.sqrt(LR * time) * normals)
