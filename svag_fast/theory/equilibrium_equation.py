"""The equation that R, G and N obey at a scale-invariant loss's equilibrium: SGD's (11), SVAG's and the SDE's (12).

Source: Li, Malladi, Arora, NeurIPS 2021, section 5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from svag_fast.numeric import number
from svag_fast.stats.estimate import Estimate, Number, as_estimate, delta_method

T = TypeVar("T", float, NDArray[np.float64])


@dataclass(frozen=True)
class EquilibriumResidual:
    """Both sides of an equilibrium equation; ``ratio`` = left/right is 1 at equilibrium, ``residual`` = ratio - 1."""

    left: Estimate
    right: Estimate
    ratio: Estimate

    @property
    def residual(self) -> Estimate:
        """Relative difference of the two sides, (left - right)/right."""
        return self.ratio.affine(1.0, -1.0)


def equilibrium_residual(
    weight_sq_norm: Number,
    grad_sq_norm: Number,
    noise_trace: Number,
    *,
    lr: float,
    weight_decay: float,
    l: float = 1,
    covariance: Sequence[Sequence[float]] | None = None,
) -> EquilibriumResidual:
    """Compare the sides of (2 - ηλ/l) λ R = (η/l) G + η N, which a scale-invariant loss obeys at equilibrium.

    ``l`` = 1 is SGD's equation (11). A finite ``l`` is SVAG's: in it η becomes η/l and N becomes l N. ``l`` =
    ``math.inf`` is the SDE's (12), 2λR̄ = N̄ with N̄ = ηN. ``noise_trace`` is Tr Σ of one batch of SGD's size in all
    three.
    ``covariance`` is the 3x3 one of the estimates of R, G and N, in this order, in place of their standard errors.

    >>> equilibrium_residual(19.0, 1.0, 4.0, lr=0.1, weight_decay=0.5 / 39).ratio
    Estimate(value=0.9737..., standard_error=0.0)
    >>> equilibrium_residual(1.0, 5.0, 4.0, lr=0.5, weight_decay=1.0, l=math.inf).ratio.value
    1.0
    """
    R = as_estimate("weight_sq_norm", weight_sq_norm)
    number("weight_sq_norm", R.value, least=0)
    G, N = (as_estimate("grad_sq_norm", grad_sq_norm), as_estimate("noise_trace", noise_trace))
    number("grad_sq_norm", G.value, least=0)
    number("noise_trace", N.value, least=0)
    lr = number("lr", lr, above=0)
    weight_decay = number("weight_decay", weight_decay, above=0)
    if not l >= 1:
        raise ValueError(f"l must be at least 1, got {l}")
    if lr * weight_decay / l >= 2:
        raise ValueError(
            f"lr * weight_decay / l must be below 2 (no equilibrium otherwise), got {lr * weight_decay / l}"
        )
    if G.value / l + N.value == 0:
        raise ValueError(
            "grad_sq_norm and noise_trace must be above 0 at least one, got 0 twice: the equation's right side is "
            "then 0"
        )
    cov = _covariance_3(R, G, N, covariance)
    by_R, by_G, by_N = _equilibrium_factors(lr, weight_decay, l)
    all_three = (R, G, N)
    left = delta_method(by_R * R.value, (by_R, 0, 0), cov, all_three)
    right = delta_method(by_G * G.value + by_N * N.value, (0, by_G, by_N), cov, all_three)
    ratio = left.value / right.value
    slopes = (by_R / right.value, -ratio * by_G / right.value, -ratio * by_N / right.value)
    return EquilibriumResidual(left, right, delta_method(ratio, slopes, cov, all_three))


def equilibrium_sides(
    weight_sq_norm: T, grad_sq_norm: T, noise_trace: T, *, lr: float, weight_decay: float, l: float = 1
) -> tuple[T, T]:
    """Return both sides of :func:`equilibrium_residual`'s equation, of floats or of arrays over steps, unchecked."""
    by_R, by_G, by_N = _equilibrium_factors(lr, weight_decay, l)
    return by_R * weight_sq_norm, by_G * grad_sq_norm + by_N * noise_trace


def _equilibrium_factors(lr: float, weight_decay: float, l: float) -> tuple[float, float, float]:
    """Return what multiplies R, G and N in (11), in SVAG's form of it, and in (12) at l = inf."""
    return (2 - lr * weight_decay / l) * weight_decay, lr / l, lr


def _covariance_3(
    R: Estimate, G: Estimate, N: Estimate, covariance: Sequence[Sequence[float]] | None
) -> Sequence[Sequence[float]]:
    if covariance is None:
        variances = [q.standard_error**2 for q in (R, G, N)]
        return [[variances[i] if i == j else 0.0 for j in range(3)] for i in range(3)]
    if len(covariance) != 3 or any(len(row) != 3 for row in covariance):
        raise ValueError(
            f"covariance must be 3x3, of the estimates of R, G and N, got rows of {[len(row) for row in covariance]}"
        )
    if any(not math.isfinite(c) for row in covariance for c in row) or any(covariance[i][i] < 0 for i in range(3)):
        raise ValueError(
            f"covariance must be finite, its diagonal not negative, got {[list(row) for row in covariance]}"
        )
    return covariance
