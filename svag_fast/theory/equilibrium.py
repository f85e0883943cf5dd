"""Has a run reached the equilibrium of R, G and N (section 5 of the paper), and with what errors are they known?

Two questions are asked of series of R = |x|², G and N over the steps of one phase of constant learning rate: is each
stationary, and do their means obey equation (11)? Errors allow for autocorrelation (``svag_fast.stats.series``).

The drift test. A parabola is fitted to batch means of the runs, six or more a run; the slope's error is what they
scatter about it, its p-value Student's t. On made AR(1) series at level 0.01 false alarms stay within 2 of 100 where
the window holds 12 independent values a run, within 4 of 100 where it holds 6 (tests/theory/test_equilibrium.py
measures all that is said here).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from svag_fast.numeric import number
from svag_fast.stats.estimate import Estimate
from svag_fast.stats.series import JointMeans, batch_count, batches, effective_samples, joint_means, runs_of
from svag_fast.theory.closeness import nsr
from svag_fast.theory.equilibrium_equation import EquilibriumResidual, equilibrium_residual

__all__ = ["Equilibrium", "Stationarity", "detect_equilibrium", "stationarity"]

LEAST_BATCHES, VALUES_A_BATCH = 6, 4  # of the drift test

State: TypeAlias = Literal["found", "not found", "undecided"]


@dataclass(frozen=True)
class Stationarity:
    """Whether a series drifts: its mean, and the fitted line's change over the window, relative to the mean.

    ``p_value`` is that of the drift test; ``effective_samples`` of the series' own mean, over all runs.
    """

    mean: Estimate
    drift: Estimate
    p_value: float
    state: Literal["stationary", "drifting", "undecided"]

    @property
    def effective_samples(self) -> float:
        """How many independent values the mean is worth."""
        assert self.mean.effective_samples is not None, "made by joint_means"
        return self.mean.effective_samples


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
        series: [n] or [runs, n] float, n >= 12, in order of time; runs differ in the seed alone. The mean should not
            be near 0.
        level: of the drift test, the rate of false alarms on a stationary series.
        tolerance: the change over the window, relative to the mean, that is small enough to be called stationary.

    Raises:
        ValueError: too short, of another shape, not finite, or level or tolerance out of range.
    """
    x = runs_of("series", series)
    _check_level(level, tolerance)
    return _stationarity(x, joint_means(x)[0], level, tolerance)


def _stationarity(x: NDArray[np.float64], mean: Estimate, level: float, tolerance: float) -> Stationarity:
    runs, n = x.shape
    if mean.value == 0:
        raise ValueError("series must be of a mean other than 0, to which a drift is relative, got 0")
    # A drift looks like autocorrelation: what a parabola leaves over tells how many batches are independent.
    together = x.mean(axis=0)
    basis = _polynomials(n)
    rest = effective_samples(x - basis @ (basis.T @ together))
    means = batches(x, batch_count(rest / runs, n, least=LEAST_BATCHES, values=VALUES_A_BATCH))
    count = means.shape[1]
    basis = _polynomials(count)
    by_degree = basis.T @ means.mean(axis=0)
    freedom = means.size - len(by_degree)
    slope, scatter = float(by_degree[1]), float(((means - basis @ by_degree) ** 2).sum())
    error = math.sqrt(scatter / (freedom * runs))
    # From the first row to the last: count batches, of which the outermost are count - 1 apart.
    scale = float(basis[-1, 1] - basis[0, 1]) * count / (count - 1) / mean.value
    drift = Estimate(slope * scale, error * abs(scale), freedom, rest)
    z = abs(slope) / error if error > 0 else math.inf if slope != 0 else 0.0
    p_value = float(2 * stats.t.sf(z, freedom))
    low, high = drift.interval()
    # A drift as large as the tolerance is so called stationary in 1 of 40 cases, and found in 80 % or more where its
    # standard error is at most the tolerance over (t + 0.9), t Student's for the level.
    within = max(abs(low), abs(high)) <= tolerance
    if p_value < level and not within:
        state: Literal["stationary", "drifting", "undecided"] = "drifting"
    else:
        state = "stationary" if within else "undecided"
    return Stationarity(mean, drift, p_value, state)


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

    Each series is [n] or [runs, n], n >= 12, runs that differ in the seed alone.

    "found": none drifts, and equation (11) (SVAG's form of it for ``l`` > 1) holds, the 95 % interval of its residual
    within ``tolerance``. "not found": one drifts, or that interval is outside. "undecided": the series are too short
    or noisy to say. Without R, or at weight decay 0 (where no equilibrium exists), only stationarity is judged.

    Raises:
        ValueError: series of different shape, too short or not finite; rates out of range.
    """
    given = {"weight_sq_norm": weight_sq_norm, "grad_sq_norm": grad_sq_norm, "noise_trace": noise_trace}
    series = {name: runs_of(name, s) for name, s in given.items() if s is not None}
    if len({s.shape for s in series.values()}) != 1:
        raise ValueError(
            "grad_sq_norm, noise_trace and weight_sq_norm must be of the same length and as many runs, got "
            f"{[s.shape for s in series.values()]}"
        )
    _check_level(level, tolerance)
    lr = number("lr", lr, above=0)
    pair = joint_means(series["grad_sq_norm"], series["noise_trace"])  # without R, which moves more slowly
    g, n = pair[0], pair[1]
    covariance = pair.covariance[0][1]
    ratio = nsr(g, n, covariance=covariance) if g.value > 0 and n.value >= 0 else None
    means, residual = {"grad_sq_norm": g, "noise_trace": n}, None
    if weight_sq_norm is not None:
        means["weight_sq_norm"] = joint_means(series["weight_sq_norm"])[0]
        if weight_decay > 0 and ratio is not None:
            residual = _residual(joint_means(*series.values()), lr=lr, weight_decay=weight_decay, l=l)
    # One of them drifts by chance in ``level`` of cases (Bonferroni's correction).
    tests = {name: _stationarity(s, means[name], level / len(series), tolerance) for name, s in series.items()}
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


def _polynomials(n: int) -> NDArray[np.float64]:
    """Orthonormal polynomials [n, 3] of degree 0, 1, 2 on n points."""
    return np.linalg.qr(np.vander(np.linspace(-1, 1, n), 3, increasing=True))[0]


def _residual(means: JointMeans, *, lr: float, weight_decay: float, l: float) -> EquilibriumResidual:
    return equilibrium_residual(
        means[0], means[1], means[2], lr=lr, weight_decay=weight_decay, l=l, covariance=means.covariance
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
        off = residual.residual
        low, high = off.interval()
        percent = f"{100 * off.value:+.0f} ± {100 * off.standard_error:.0f} %"
        if low > tolerance or high < -tolerance:
            against.append(f"equation (11)'s left side is {percent} off its right side")
        elif not (-tolerance <= low and high <= tolerance):
            unclear.append(f"equation (11)'s residual is too uncertain: {percent}")
    return ("not found" if against else "undecided" if unclear else "found"), (*against, *unclear)


def _check_level(level: float, tolerance: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance must be finite and not negative, got {tolerance}")
