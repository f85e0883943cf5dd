"""What a check of the battery is, and how it decides."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Z_BOUND = 5.0
"""A z-score beyond this fails: 6e-7 a check for a true formula, below 1e-4 for the whole battery."""

Z_QUANTILE = 1.959963984540054  # of a 95 % interval


@dataclass(frozen=True)
class SuiteSettings:
    """How hard to look: `fast` takes fewer trajectories, sizes and nets; `seed` is that of every random number."""

    fast: bool = False
    seed: int = 0

    def choose(self, fast: int, full: int) -> int:
        """A size: the first in fast mode."""
        return fast if self.fast else full


@dataclass(frozen=True)
class Check:
    """One comparison: `measured` against `expected`, both in words, and the z-score where there is one."""

    source: str  # theorem, lemma or equation
    name: str
    measured: str
    expected: str
    passed: bool
    z: float | None = None


@dataclass
class Outcome:
    """A group's checks, and the numbers that its panel of the picture is drawn from."""

    checks: list[Check] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """Some checks that run together; `cost` is its share of the battery's time, for the progress bar."""

    title: str
    run: Callable[[SuiteSettings], Outcome]
    cost: float


def z_check(source: str, name: str, measured: float, error: float, expected: float) -> Check:
    """Pass where `measured`, of standard error `error`, is within Z_BOUND of them from `expected`."""
    # With no error at all, any distance is infinitely many of them; and nan, which fails, where it is nan itself.
    z = (measured - expected) / error if error > 0 else math.inf * (measured - expected or math.nan)
    if error == 0 and measured == expected:
        z = 0.0
    return Check(source, name, f"{measured:.6g} ± {error:.1g}", f"{expected:.6g}", abs(z) < Z_BOUND, z)


def exact_check(source: str, name: str, off: float, tolerance: float) -> Check:
    """Pass where a number that has no error but rounding is off by less than `tolerance`."""
    return Check(source, name, f"off by {off:.2g}", f"below {tolerance:g}", off < tolerance)


@dataclass(frozen=True)
class Slope:
    """A log-log slope and the half width of its interval (Z_BOUND standard errors, and the truncation's size)."""

    value: float
    half_width: float

    def covers(self, slope: float) -> bool:
        """Whether the interval holds `slope`."""
        return abs(self.value - slope) <= self.half_width


def log_log_slope(l: Sequence[float], errors: Sequence[float], standard_errors: Sequence[float] | None = None) -> Slope:
    """The slope s of ``error = c l^s (1 + a/l + b/l^2)`` by weighted least squares on logarithms.

    The interval adds up Z_BOUND standard errors (delta method on the logarithm) and the change of the slope when the
    term in 1/l^2 is left out: the truncation's own size, which is all there is where the errors are exact.
    """
    # Weights on the logarithm's scale, where an error is a relative one.
    x, y = np.asarray(l, dtype=float), np.log(np.abs(np.asarray(errors, dtype=float)))
    weights = np.ones_like(x) if standard_errors is None else np.abs(np.asarray(errors)) / np.asarray(standard_errors)
    fits = []
    for terms in (1, 2):
        design = np.column_stack([np.ones_like(x), np.log(x), *(x**-p for p in range(1, terms + 1))])
        fits.append(_weighted_fit(design, y, weights))
    (first, first_error), (second, second_error) = fits
    if standard_errors is None:
        return Slope(second, abs(second - first))
    # With noise, the fit with one term, unless the second term moves it by more than noise explains.
    truncation = max(0.0, abs(second - first) - Z_QUANTILE * second_error)
    return Slope(first, Z_BOUND * first_error + truncation)


def _weighted_fit(
    design: NDArray[np.float64], y: NDArray[np.float64], weights: NDArray[np.float64]
) -> tuple[float, float]:
    """The second coefficient and its standard error."""
    weighted = design * weights[:, None]
    coefficients, *_ = np.linalg.lstsq(weighted, y * weights, rcond=None)
    return float(coefficients[1]), math.sqrt(float(np.linalg.inv(weighted.T @ weighted)[1, 1]))


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread: on a small net a second one costs more than it brings, on a busy machine far more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def failures(outcomes: Sequence[Outcome]) -> Iterator[Check]:
    """The checks that did not pass."""
    for outcome in outcomes:
        yield from (check for check in outcome.checks if not check.passed)
