"""The order of weak convergence from the means at several l: the limit, the differences from it, and their slope.

Weak convergence of order 1 (Theorem 4.3) gives the mean of a test function as m(l) = m_inf + a/l + b/l² + ... Then log
|m(l) - m_inf| against log l has slope -1, once l is so large that a/l is nearly all of the difference. On a net b/l² is
seldom small at the l that can be trained, and a line through the points would be too steep or too flat. Therefore
the limit m_inf is that of m_inf + a/l + b/l², by least squares, and the slope that of m + A l^slope (1 + c/l): of the
line that the differences approach as l grows. As theory gives all test functions the same order, `common_slope` fits
one to all of them.

tests/stats/test_weak_order.py says how often the slope's interval has -1 in it where the order is 1, and how often
where it is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]

LACK_OF_FIT_LEVEL = 0.05
SIGNIFICANT = 2.0  # standard errors from the limit
REGIME = 0.2  # a level with more of b/l² over a/l is outside the 1/l regime
_SLOPES = np.linspace(-3.0, -0.2, 281)


@dataclass(frozen=True)
class WeakOrder:
    """What the means of one test function at one time say; K levels of l.

    Attributes:
        ls, means, errors: [K] each.
        limit, limit_error: m_inf; nan where no levels fit the formula.
        a, a_error, b, b_error: the coefficients of 1/l and 1/l².
        fitted: [K] the levels that limit and slope are from.
        regime: [K] those of them in the 1/l regime.
        differences, difference_errors: [K] m(l) - m_inf, with the limit's error in them.
        slope, low, high: of log |m(l) - m_inf| against log l as l grows, and its 95 % interval; nan: can't be told.
        reason: why it can't be told, else "".
        gains: what `common_slope` needs, None where no levels fit.
    """

    ls: Array
    means: Array
    errors: Array
    limit: float
    limit_error: float
    a: float
    a_error: float
    b: float
    b_error: float
    fitted: NDArray[np.bool_]
    regime: NDArray[np.bool_]
    differences: Array
    difference_errors: Array
    slope: float
    low: float
    high: float
    reason: str
    gains: Array | None = field(repr=False)

    @property
    def told(self) -> bool:
        """Whether there is a slope."""
        return not self.reason


def bootstrap_means(values: list[Array], draws: int, seed: int) -> Array:
    """Return the means [draws, ..., K] of runs drawn again with replacement, each level by itself.

    Args:
        values: of each level [..., runs]; what belongs to one run is drawn together.
        draws: how many.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    means = []
    for x in values:
        runs = x.shape[-1]
        weights = rng.multinomial(runs, np.full(runs, 1 / runs), size=draws) / runs
        means.append(np.moveaxis(x @ weights.T, -1, 0))
    return np.stack(means, axis=-1)


def weak_order(ls: Array, means: Array, errors: Array, drawn: Array) -> WeakOrder:
    """Fit one test function's limit, and the slope of the differences from it.

    Args:
        ls: [K] ascending.
        means: [K] over runs; nan for a level that has none, which is left out.
        errors: [K] their standard errors.
        drawn: [draws, K] means of the bootstrap.
    """
    there = np.isfinite(means)
    if (exact := there & (errors <= 0)).any():
        return _untold(ls, means, errors, f"all runs agree at l = {ls[exact][0]:g}")
    # The least level from which on the formula shows no lack of fit. Four levels, as it has three coefficients itself.
    first = next(
        (i for i in np.flatnonzero(there).tolist() if there[i:].sum() >= 4 and _fits(ls, means, errors, i)), None
    )
    if first is None:
        return _untold(ls, means, errors, "no four levels fit m_inf + a/l + b/l²")
    fitted = there & (np.arange(len(ls)) >= first)
    to_fit, covariance = _contrasts(ls, errors, fitted)
    limit, a, b = (float(c) for c in to_fit @ means[fitted])
    limit_error, a_error, b_error = (float(e) for e in np.sqrt(np.diag(covariance)))
    differences = means - limit
    own = np.zeros(len(ls))
    own[fitted] = to_fit[0] * errors[fitted] ** 2
    difference_errors = np.sqrt(np.maximum(errors**2 + limit_error**2 - 2 * own, 0.0))
    regime = fitted & (abs(b) / ls <= REGIME * abs(a))
    slope = low = high = np.nan
    reason = ""
    gains = _gains(ls[fitted], np.vstack([means[fitted], drawn[:, fitted]]) - limit, errors[fitted])
    if (np.abs(differences[fitted]) > SIGNIFICANT * difference_errors[fitted]).sum() < 3:
        reason = "fewer than three levels differ from the limit by more than the noise"
    else:
        # Each draw makes the means, the limit and the slope again; levels and weights stay those of the runs.
        slopes = _best(gains)
        slope = float(slopes[0])
        low, high = (float(end) for end in np.quantile(slopes[1:], [0.025, 0.975]))
        if low <= _SLOPES[1] or high >= _SLOPES[-2]:
            reason, slope, low, high = "the noise leaves the slope open", np.nan, np.nan, np.nan
    return WeakOrder(
        ls, means, errors, limit, limit_error, a, a_error, b, b_error,
        fitted, regime, differences, difference_errors, slope, low, high, reason, gains,
    )  # fmt: skip


def _untold(ls: Array, means: Array, errors: Array, reason: str) -> WeakOrder:
    nan, nowhere, unknown = np.nan, np.zeros(len(ls), dtype=bool), np.full(len(ls), np.nan)
    return WeakOrder(
        ls, means, errors, nan, nan, nan, nan, nan, nan,
        nowhere, nowhere, unknown, unknown, nan, nan, nan, reason, None,
    )  # fmt: skip


def _fits(ls: Array, means: Array, errors: Array, first: int) -> bool:
    """Whether the levels from one on show no lack of fit."""
    from scipy.special import chdtrc

    use = np.isfinite(means) & (np.arange(len(ls)) >= first)
    to_fit, _ = _contrasts(ls, errors, use)
    fit = _design(ls[use]) @ (to_fit @ means[use])
    square = float((((means[use] - fit) / errors[use]) ** 2).sum())
    return bool(chdtrc(use.sum() - 3, square) >= LACK_OF_FIT_LEVEL)


def _design(ls: Array) -> Array:
    return np.stack([np.ones_like(ls), 1 / ls, 1 / ls**2], axis=1)


def _contrasts(ls: Array, errors: Array, use: NDArray[np.bool_]) -> tuple[Array, Array]:
    """Return the weights on the used levels' means that give m_inf, a and b, and the covariance of these."""
    inverse = np.linalg.pinv(_design(ls[use]) / errors[use, None])
    return inverse / errors[use], inverse @ inverse.T


def _gains(ls: Array, rows: Array, errors: Array) -> Array:
    """Return what the fit takes off the weighted sum of squares of rows [rows, K] at each of `_SLOPES`."""
    # The limit is free here too. One that was fitted with a/l makes the differences from it look like a/l, whatever
    # they are (of a true 1/√l the slope from such a limit was -1.0 in simulation). So an interval may be wide.
    powers = (np.zeros_like(_SLOPES), _SLOPES, _SLOPES - 1)
    columns = np.stack([ls[:, None] ** power for power in powers], axis=-1) / errors[:, None, None]
    basis = np.linalg.qr(columns.transpose(1, 0, 2))[0]  # [slopes, K, 3]
    along = (rows / errors) @ basis.transpose(1, 0, 2).reshape(len(ls), -1)
    gains: Array = (along**2).reshape(len(rows), -1, len(powers)).sum(-1)
    return gains


def _best(gains: Array) -> Array:
    """Return the slope [rows] of the largest gain, between the grid's by a parabola."""
    best = np.clip(gains.argmax(-1), 1, len(_SLOPES) - 2)
    left, middle, right = (np.take_along_axis(gains, (best + i)[:, None], -1)[:, 0] for i in (-1, 0, 1))
    bend = left - 2 * middle + right
    step = np.where(bend < 0, 0.5 * (left - right) / np.where(bend < 0, bend, 1.0), 0.0)
    return np.asarray(_SLOPES[best] + np.clip(step, -1, 1) * (_SLOPES[1] - _SLOPES[0]))


def common_slope(orders: Sequence[WeakOrder]) -> tuple[float, float, float]:
    """Return the slope that all test functions share and its 95 % interval; nan where the noise leaves it open.

    Args:
        orders: of the same runs and draws.
    """
    gains = [order.gains for order in orders if order.gains is not None]
    if not gains:
        return np.nan, np.nan, np.nan
    # In the bootstrap a run keeps all its values, so what the functions share is in the interval.
    slopes = _best(np.sum(gains, axis=0))
    low, high = (float(end) for end in np.quantile(slopes[1:], [0.025, 0.975]))
    if low <= _SLOPES[1] or high >= _SLOPES[-2]:
        return np.nan, np.nan, np.nan
    return float(slopes[0]), low, high
