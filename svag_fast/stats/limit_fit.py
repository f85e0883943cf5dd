"""SVAG's limit from the means at several l, and each l's distance from it, with intervals that own up to the model.

Weak convergence (Theorem 4.3) gives the mean of a smooth statistic as m(l) = m_inf + a/l + O(1/l²). Everything here is
a fixed linear contrast of the means over runs, with each l's own variance (Welch) and Satterthwaite's degrees of
freedom. docs/verdict.md says why, and how often the intervals hold the truth. All functions work on whole arrays of
data sets at once: `...` means any leading axes, and the last axis is l, ascending.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]

LACK_OF_FIT_LEVEL = 0.05


@dataclass(frozen=True)
class Figure:
    """Estimates with what their intervals need; arrays of one shape.

    ``systematic`` is what the model may be wrong by, in the same units: it widens the interval to both sides.
    ``run_variance`` and ``run_spread`` are the sums of the parts of the estimate's variance, one from each l, and of
    their squares, with one run for each l: they tell what another number of runs, the same for each l, would give.
    """

    value: Array
    standard_error: Array
    degrees_of_freedom: Array
    systematic: Array
    run_variance: Array
    run_spread: Array

    def interval(self, confidence: float = 0.95) -> tuple[Array, Array]:
        """Return the two ends of the t interval, widened by ``systematic``."""
        half = t_quantile(confidence, self.degrees_of_freedom) * self.standard_error + self.systematic
        return self.value - half, self.value + half

    def minus(self, other: Figure) -> Figure:
        """Return the difference of two independent figures."""
        parts = (self.standard_error**2, other.standard_error**2)
        df = (self.degrees_of_freedom, other.degrees_of_freedom)
        variance = parts[0] + parts[1]
        return Figure(
            self.value - other.value,
            np.sqrt(variance),
            _satterthwaite(variance, parts[0] ** 2 / df[0] + parts[1] ** 2 / df[1]),
            self.systematic + other.systematic,
            self.run_variance + other.run_variance,
            self.run_spread + other.run_spread,
        )

    def with_seeds(self, count: int) -> tuple[Array, Array]:
        """Return the standard error and its degrees of freedom with ``count`` runs, at least 2, for each l."""
        df = _satterthwaite(self.run_variance, self.run_spread / (count - 1))
        return np.sqrt(self.run_variance / count), df

    def at(self, index: int) -> Figure:
        """Return one of the last axis."""
        return Figure(*(getattr(self, field.name)[..., index] for field in fields(self)))


@dataclass(frozen=True)
class LimitFit:
    """The fitted m_inf + a/l.

    Attributes:
        limit: m_inf [...].
        distances: m(l) - m_inf [..., K]. For an l in the fit it is a/l; for any other l (SGD among them, where there
            are enough l) its own mean minus m_inf, so that it need not be in the regime where 1/l holds.
        slope: a [...].
        first: Index [...] of the least l in the fit.
        regime_reached: [...] No lack of fit over all l, SGD's among them, and the largest l is within the margin of
            the limit. Else the largest l alone are fitted, and ``systematic`` is the length of the extrapolation.
        testable: Whether there were three l, so that lack of fit could be tested.
    """

    limit: Figure
    distances: Figure
    slope: Array
    first: NDArray[np.int64]
    regime_reached: NDArray[np.bool_]
    testable: bool


def fit_limit(ls: Array, means: Array, variances: Array, counts: Array, margin: Array | float) -> LimitFit:
    """Fit the limit, by as many l as 1/l describes.

    Lack of fit is tested over all l; where it is found, over all but the least, and so on. The fit then takes one l
    fewer than were tested: so SGD helps to show that 1/l holds, and is not part of the limit that it is compared with.

    Args:
        ls: [K] at least two values of l, ascending.
        means: [..., K] means over runs.
        variances: [..., K] variances of one run (n - 1 below).
        counts: [K] runs, at least 2 each.
        margin: [...] the distance that does not matter: a longer extrapolation is not taken on trust.
    """
    count = len(ls)
    if count < 2 or (np.diff(ls) <= 0).any() or (counts < 2).any():
        raise ValueError(f"the runs must be of at least two ascending l, two each, got l = {ls}, runs = {counts}")
    # Candidate j is the fit where the l from j on showed no lack of fit; the last means none.
    firsts = [j + 1 for j in range(count - 2)] + [count - 2]
    candidate = np.full(means.shape[:-1], len(firsts) - 1)
    for j in reversed(range(count - 2)):
        held = lack_of_fit(ls[j:], means[..., j:], variances[..., j:], counts[j:]) >= LACK_OF_FIT_LEVEL
        candidate = np.where(held, j, candidate)
    first = np.array(firsts)[candidate]
    # As they are, and as they would be with equally many runs for each l.
    (to_limit, to_slope, to_distances), (equal_limit, _, equal_distances) = (
        _contrasts(ls, runs, firsts, candidate) for runs in (counts, np.ones_like(counts))
    )
    slope = (to_slope * means).sum(-1)
    extrapolation = np.abs(slope) / ls[-1]
    regime = (candidate == 0) & (count > 2) & (extrapolation <= margin)
    systematic = np.where(regime, 0.0, extrapolation)
    limit = _contrast(to_limit, equal_limit, means, variances, counts, systematic)
    distances = _contrast(
        to_distances,
        equal_distances,
        means[..., None, :],
        variances[..., None, :],
        counts,
        np.broadcast_to(systematic[..., None], to_distances.shape[:-1]),
    )
    return LimitFit(limit, distances, slope, first, regime, count > 2)


def lack_of_fit(ls: Array, means: Array, variances: Array, counts: Array) -> Array:
    """Return the p-value [...] of the means' departure from a straight line in 1/l.

    The sum of squares about the line over its expectation from each l's own variance, against Box's F distribution
    (the ANOVA-type statistic of Brunner, Dette and Munk 1997).
    """
    from scipy.special import fdtrc

    x = np.stack([np.ones_like(ls), 1 / ls], axis=1)
    weighted = counts[:, None] * x
    residual = np.diag(counts).astype(float) - weighted @ np.linalg.solve(x.T @ weighted, weighted.T)
    noise = variances / counts
    square = np.einsum("...i,ij,...j->...", means, residual, means)
    expected = (np.diag(residual) * noise).sum(-1)
    spread = np.einsum("...i,ij,...j->...", noise, residual**2, noise)
    certain = expected <= 0  # no noise at all: any departure beyond rounding is one
    with np.errstate(divide="ignore", invalid="ignore"):
        numerator = expected**2 / spread
        denominator = _satterthwaite(expected, ((np.diag(residual) * noise) ** 2 / (counts - 1)).sum(-1))
        p: Array = fdtrc(numerator, denominator, np.maximum(square, 0.0) / expected)
    rounding = 1e-12 * (counts * means**2).sum(-1)
    return np.where(certain, np.where(square > rounding, 0.0, 1.0), p)


def within(ends: tuple[Array, Array], margin: Array | float) -> NDArray[np.bool_]:
    """Whether intervals are inside ± ``margin``: the distance matches."""
    low, high = ends
    return np.asarray((-margin < low) & (high < margin))


def outside(ends: tuple[Array, Array], margin: Array | float) -> NDArray[np.bool_]:
    """Whether intervals are beyond ± ``margin``, to one side: the distance departs."""
    low, high = ends
    return np.asarray((low > margin) | (high < -margin))


def t_quantile(confidence: float, degrees_of_freedom: Array) -> Array:
    """Return how many standard errors the central t interval of ``confidence`` reaches to either side."""
    from scipy.special import stdtrit

    return np.asarray(stdtrit(degrees_of_freedom, 0.5 + confidence / 2))


def _contrasts(
    ls: Array, counts: Array, firsts: Sequence[int], candidate: NDArray[np.int64]
) -> tuple[Array, Array, Array]:
    """Weights on the means: of m_inf and of a [..., K], and of each l's distance [..., K, K], for the chosen fits."""
    weights = np.array([_line_weights(ls, counts, first) for first in firsts])  # [candidates, (m_inf, a), K]
    to_limit, to_slope = weights[candidate, 0], weights[candidate, 1]
    fitted = np.arange(len(ls)) >= np.array(firsts)[candidate][..., None]
    own = np.eye(len(ls)) - to_limit[..., None, :]
    return to_limit, to_slope, np.where(fitted[..., None], to_slope[..., None, :] / ls[:, None], own)


def _line_weights(ls: Array, counts: Array, first: int) -> Array:
    """Weights [2, K] on the means whose sums are m_inf and a of the least-squares line over the l from ``first`` on."""
    x = np.stack([np.ones(len(ls) - first), 1 / ls[first:]], axis=1)
    weighted = counts[first:, None] * x
    weights = np.zeros((2, len(ls)))
    weights[:, first:] = np.linalg.solve(x.T @ weighted, weighted.T)
    return weights


def _contrast(weights: Array, equal: Array, means: Array, variances: Array, counts: Array, systematic: Array) -> Figure:
    """Apply ``weights`` to the means; ``equal`` are those that equal counts would give."""
    parts = weights**2 * variances / counts
    variance = parts.sum(-1)
    df = _satterthwaite(variance, (parts**2 / (counts - 1)).sum(-1))
    one = equal**2 * variances
    return Figure((weights * means).sum(-1), np.sqrt(variance), df, systematic, one.sum(-1), (one**2).sum(-1))


def _satterthwaite(variance: Array, spread: Array) -> Array:
    """Degrees of freedom of a variance that is a sum of estimated parts; ``spread`` is the sum of part² / df."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(variance > 0, variance**2 / spread, 1.0)  # without noise any number will do
