"""Has a run reached the equilibrium of R, G and N (section 5 of the paper), and with what errors are they known?

Two questions are asked of series of R = |x|², G and N over the steps of one phase of constant learning rate: is each
stationary, and do their means obey equation (11)? Errors allow for autocorrelation (``noise.mean_standard_error``).

The drift test. A line is fitted to the series; its slope's error comes from the long-run variance of what a parabola
leaves over, and is held against Student's t with the effective sample size. Where that size is below 16 the error can't
be trusted, and the means of six equal batches are tested for monotony instead (Kendall's tau, exact). Both are used
above 16, with Bonferroni's correction. On made AR(1) series the test at level 0.01 raises a false alarm in at most 4 of
100 where the window holds 15 independent values or more, in at most 8 of 100 where it holds 5
(tests/test_equilibrium.py measures it).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from svag_fast.estimate import Estimate, normal_quantile, require_positive
from svag_fast.noise import mean_standard_error
from svag_fast.theory import EquilibriumResidual, equilibrium_residual, equilibrium_sides, nsr

__all__ = ["Equilibrium", "Stationarity", "detect_equilibrium", "stationarity"]

State: TypeAlias = Literal["found", "not found", "undecided"]

BATCHES = 6  # 6! orders: two of them monotone, p = 0.0028
ENOUGH = 16  # effective values below which a long-run variance is no error estimate
LEAST = 12  # values, two a batch


@dataclass(frozen=True)
class Stationarity:
    """Whether a series drifts: its mean, and the fitted line's change over the window, relative to the mean.

    ``p_value`` is that of the drift test; ``state`` is "drifting" where it lies below the level and the change exceeds
    the tolerance, "undecided" where a change as large as the tolerance would not show, else "stationary".
    """

    mean: Estimate
    drift: Estimate
    p_value: float
    effective_samples: float
    state: Literal["stationary", "drifting", "undecided"]


@dataclass(frozen=True)
class Equilibrium:
    """What :func:`detect_equilibrium` found; ``state`` sums it up, ``reasons`` says why it is not "found"."""

    weight_sq_norm: Stationarity | None
    grad_sq_norm: Stationarity
    noise_trace: Stationarity
    covariance: float  # of the estimates of G and N
    nsr: Estimate | None  # None where G's mean is not positive
    residual: EquilibriumResidual | None  # of equation (11); None without R or weight decay
    state: State
    reasons: tuple[str, ...]


def stationarity(series: ArrayLike, *, level: float = 0.01, tolerance: float = 0.2) -> Stationarity:
    """Test a series for drift, allowing for its autocorrelation (the module's docstring says how).

    Args:
        series: [n] float, n >= 12, in order of time; its mean should not be near 0.
        level: of the drift test, the rate of false alarms on a stationary series.
        tolerance: the change over the window, relative to the mean, that is small enough to be called stationary.

    Raises:
        ValueError: too short, not 1-D, not finite, or level or tolerance out of range.
    """
    x = _series("series", series)
    _check_level(level, tolerance)
    n = x.size
    mean = mean_standard_error(x)
    # Orthonormal polynomials of degree 0, 1, 2 on the window: the coefficients are independent under the null.
    basis, _ = np.linalg.qr(np.vander(np.linspace(-1, 1, n), 3, increasing=True))
    coefficients = basis.T @ x
    rest = mean_standard_error(x - basis @ coefficients)
    slope_error = rest.standard_error * math.sqrt(n)
    change = float(coefficients[1] * (basis[-1, 1] - basis[0, 1]))
    change_error = slope_error * abs(float(basis[-1, 1] - basis[0, 1]))
    scale = abs(mean.mean)
    if scale == 0:
        raise ValueError("series has mean 0: a drift relative to the mean can't be judged")
    drift = Estimate(change / mean.mean, change_error / scale)
    p_value = _drift_p_value(x, float(coefficients[1]), slope_error, rest.effective_samples)
    if p_value < level and abs(drift.value) > tolerance:
        state: Literal["stationary", "drifting", "undecided"] = "drifting"
    elif drift.standard_error > tolerance:
        state = "undecided"
    else:
        state = "stationary"
    return Stationarity(Estimate(mean.mean, mean.standard_error), drift, p_value, mean.effective_samples, state)


def detect_equilibrium(
    grad_sq_norm: ArrayLike,
    noise_trace: ArrayLike,
    weight_sq_norm: ArrayLike | None = None,
    *,
    lr: float,
    weight_decay: float = 0.0,
    l: float = 1,
    level: float = 0.01,
    tolerance: float = 0.2,
) -> Equilibrium:
    """Test series of G, N and R, row by row of the same steps, for the equilibrium of equation (11).

    "found": none drifts, and equation (11) (SVAG's form of it for ``l`` > 1) holds within ``tolerance`` or within its
    error. "not found": one drifts, or the equation fails. "undecided": the series are too short or noisy to say.
    Without R, or at weight decay 0 (where no equilibrium exists), only stationarity is judged.

    Raises:
        ValueError: series of different length, too short or not finite; rates out of range.
    """
    G, N = _series("grad_sq_norm", grad_sq_norm), _series("noise_trace", noise_trace)
    R = None if weight_sq_norm is None else _series("weight_sq_norm", weight_sq_norm)
    if len({len(s) for s in (G, N, R) if s is not None}) != 1:
        raise ValueError("grad_sq_norm, noise_trace and weight_sq_norm must have the same length")
    _check_level(level, tolerance)
    require_positive("lr", lr)
    tests = {
        name: stationarity(series, level=level, tolerance=tolerance)
        for name, series in (("weight_sq_norm", R), ("grad_sq_norm", G), ("noise_trace", N))
        if series is not None
    }
    g, n = tests["grad_sq_norm"].mean, tests["noise_trace"].mean
    covariance = _covariance(G, N, g, n)
    ratio = nsr(g, n, covariance=covariance) if g.value > 0 and n.value >= 0 else None
    residual = None
    if R is not None and weight_decay > 0 and ratio is not None:
        residual = _residual(R, G, N, lr=lr, weight_decay=weight_decay, l=l)
    state, reasons = _verdict(tests, ratio, residual, tolerance)
    return Equilibrium(
        tests.get("weight_sq_norm"),
        tests["grad_sq_norm"],
        tests["noise_trace"],
        covariance,
        ratio,
        residual,
        state,
        reasons,
    )


def _drift_p_value(x: NDArray[np.float64], slope: float, slope_error: float, effective: float) -> float:
    size = x.size // BATCHES
    batches = x[x.size - BATCHES * size :].reshape(BATCHES, size).mean(axis=1)
    if np.ptp(batches) == 0:
        return 1.0
    monotony = float(stats.kendalltau(np.arange(BATCHES), batches, method="exact").pvalue)
    if effective < ENOUGH or slope_error == 0:
        return monotony
    line = float(2 * stats.t.sf(abs(slope) / slope_error, effective - 3))
    return min(1.0, 2 * min(line, monotony))


def _covariance(G: NDArray[np.float64], N: NDArray[np.float64], g: Estimate, n: Estimate) -> float:
    """Covariance of the two means, from the error of the mean of N - (N/G) G: with it nsr's error is that mean's."""
    limit = g.standard_error * n.standard_error
    if limit == 0 or g.value <= 0 or n.value <= 0:
        return 0.0
    ratio = n.value / g.value
    together = mean_standard_error(N - ratio * G).standard_error
    covariance = (ratio**2 * g.standard_error**2 + n.standard_error**2 - together**2) / (2 * ratio)
    return min(max(covariance, -limit), limit)


def _residual(
    R: NDArray[np.float64],
    G: NDArray[np.float64],
    N: NDArray[np.float64],
    *,
    lr: float,
    weight_decay: float,
    l: float,
) -> EquilibriumResidual:
    """Equation (11) of the means, each error from the series of that very quantity, linearised for the ratio."""
    means = (float(R.mean()), float(G.mean()), float(N.mean()))
    found = equilibrium_residual(*means, lr=lr, weight_decay=weight_decay, l=l)
    left, right = equilibrium_sides(R, G, N, lr=lr, weight_decay=weight_decay, l=l)
    ratio = found.ratio.value
    errors = [mean_standard_error(s).standard_error for s in (left, right, (left - ratio * right) / found.right.value)]
    return EquilibriumResidual(
        Estimate(found.left.value, errors[0]), Estimate(found.right.value, errors[1]), Estimate(ratio, errors[2])
    )


def _verdict(
    tests: dict[str, Stationarity], ratio: Estimate | None, residual: EquilibriumResidual | None, tolerance: float
) -> tuple[State, tuple[str, ...]]:
    against, unclear = [], []
    for name, test in tests.items():
        percent = f"{100 * test.drift.value:+.0f} ± {100 * test.drift.standard_error:.0f} %"
        if test.state == "drifting":
            against.append(f"{name} drifts: {percent} over the window")
        elif test.state == "undecided":
            unclear.append(f"{name} is too noisy or the window too short: its drift is {percent}")
    if ratio is None:
        unclear.append("grad_sq_norm's mean is not positive, or noise_trace's negative: average over more steps")
    if residual is not None:
        off, error = residual.residual.value, residual.residual.standard_error
        percent = f"{100 * off:+.0f} ± {100 * error:.0f} %"
        if abs(off) - normal_quantile(0.95) * error > tolerance:
            against.append(f"equation (11)'s left side is {percent} off its right side")
        elif error > tolerance:
            unclear.append(f"equation (11)'s residual is too uncertain: {percent}")
    return ("not found" if against else "undecided" if unclear else "found"), (*against, *unclear)


def _series(name: str, series: ArrayLike) -> NDArray[np.float64]:
    x = np.asarray(series, dtype=np.float64)
    if x.ndim != 1 or x.size < LEAST:
        raise ValueError(f"{name} must be 1-D with at least {LEAST} values, got shape {list(x.shape)}")
    if not np.isfinite(x).all():
        raise ValueError(f"{name} must be finite, but row {int(np.flatnonzero(~np.isfinite(x))[0])} is not")
    return x


def _check_level(level: float, tolerance: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance must be finite and not negative, got {tolerance}")
