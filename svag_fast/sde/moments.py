r"""Exact moments E x, ..., E x^4 on an affine problem: of discrete processes by recursion, of the SDEs by exponential.

With ``m = (1, E x, E x^2, E x^3, E x^4)`` each step is ``m <- T m`` and each SDE is ``dm/dt = A m``, T and A lower
triangular: row p of T are the coefficients of the polynomial ``E[x_next^p | x]``, row p of A those of the generator
applied to x^p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import scipy.linalg
from numpy.polynomial import Polynomial
from numpy.typing import NDArray

from svag_fast.numeric import number
from svag_fast.sde.problems.affine import AffineProblem
from svag_fast.sde.processes import GradientEstimate, GradientFlow, Process

ORDER = 4

Vector = NDArray[np.float64]


def process_moments(process: Process, problem: AffineProblem, x0: float, times: Sequence[float]) -> Vector:
    """Exact ``E x^p``, p = 0..4, of a discrete process started at `x0`: float64 [len(times), 5].

    Each time must be a whole number of steps. All processes but `GradientFlow` (use :func:`sde_moments` with
    ``noise=False``: it has no error of its own).
    """
    # Its Runge-Kutta step is a polynomial of degree four in h, and not of the form below.
    if isinstance(process, GradientFlow):
        raise ValueError("process must be affine in its step, got GradientFlow: use sde_moments(noise=False)")
    x0 = number("x0", x0)
    matrix = step_matrix(process, problem)
    start = x0 ** np.arange(ORDER + 1)
    # A power of a 5x5 matrix: a million steps cost twenty products.
    return np.stack([np.linalg.matrix_power(matrix, process.steps(time)) @ start for time in times])


def sde_moments(
    problem: AffineProblem,
    x0: float,
    times: Sequence[float],
    *,
    lr: float,
    weight_decay: float = 0.0,
    order: int = 1,
    noise: bool = True,
) -> Vector:
    """Exact ``E X_t^p``, p = 0..4, of the SDE (2) or (6): float64 [len(times), 5].

    Args:
        problem: its noise's law doesn't matter, only the covariance.
        x0: the start, a number.
        times: continuous times; one SGD step is lr.
        lr: the learning rate in the diffusion ``(lr Sigma)^(1/2)``.
        weight_decay: lambda of (6).
        order: 1 for the SDE, 2 for the order-2 SDE of Thm E.4.
        noise: False for gradient flow.
    """
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order}")
    x0 = number("x0", x0)
    lr = number("lr", lr, above=0)
    weight_decay = number("weight_decay", weight_decay, least=0)
    times = [number("times", time, least=0) for time in times]
    x = Polynomial([0.0, 1.0])
    hessian = problem.curvature + weight_decay
    drift = -(hessian * x - problem.offset) * (1 + (lr / 2 * hessian if order == 2 else 0.0))
    variance = lr * (problem.noise_slope * x + problem.noise_offset) ** 2 * float(noise)
    generator = np.zeros((ORDER + 1, ORDER + 1))
    for p in range(1, ORDER + 1):
        row = p * x ** (p - 1) * drift
        if p > 1:
            row = row + p * (p - 1) / 2 * x ** (p - 2) * variance
        generator[p] = _coefficients(row)
    start = x0 ** np.arange(ORDER + 1)
    return np.stack([scipy.linalg.expm(generator * time) @ start for time in times])


def step_matrix(process: Process, problem: AffineProblem) -> Vector:
    """T of one step, float64 [5, 5]."""
    h, x = process.step_size, Polynomial([0.0, 1.0])
    matrix = np.zeros((ORDER + 1, ORDER + 1))
    spread = problem.noise_slope * x + problem.noise_offset
    for estimate in process.estimates:
        # SVAG's weights add to 1; an estimate with other weights scales the mean gradient as well.
        mean_weight = sum(estimate.weights) if estimate.weights else 1.0
        grad_f = mean_weight * (problem.curvature * x - problem.offset) + process.weight_decay * x
        boost = 1 + process.hessian_weight * (problem.curvature + process.weight_decay)
        mean = x - h * boost * grad_f
        moments = noise_moments(problem, estimate)
        for p in range(ORDER + 1):
            row = sum(
                (math.comb(p, j) * moments[j] * mean ** (p - j) * (-h * spread) ** j for j in range(p + 1)),
                Polynomial([0.0]),
            )
            matrix[p] += estimate.probability * _coefficients(row)
    return matrix


def noise_moments(problem: AffineProblem, estimate: GradientEstimate) -> tuple[float, float, float, float, float]:
    """E of the powers 0..4 of the estimate's standardised noise: cumulants of a weighted sum add as ``sum_j w_j^p``."""
    if not estimate.weights:
        variance = estimate.noise_scale**2
        return 1.0, 0.0, variance, 0.0, 3 * variance**2
    second, third, fourth = (sum(w**p for w in estimate.weights) for p in (2, 3, 4))
    return (
        1.0,
        0.0,
        second,
        problem.law.third_cumulant * third,
        problem.law.fourth_cumulant * fourth + 3 * second**2,
    )


def _coefficients(polynomial: Polynomial) -> Vector:
    padded = np.zeros(ORDER + 1)
    padded[: len(polynomial.coef)] = polynomial.coef[: ORDER + 1]
    return padded
