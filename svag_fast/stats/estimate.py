"""A number with its standard error."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from svag_fast.numeric import number, real

# A standard error is the root of a variance, whose own rounding is the float's: less than this of the value is none.
_ROUNDING = math.sqrt(sys.float_info.epsilon)
ENOUGH = 16  # effective samples below which a standard error is itself too uncertain to be relied on


@dataclass(frozen=True)
class Estimate:
    """A value, such as a mean, and its standard error (0: exact; nan: unknown, as of one measurement).

    A value that was never measured is nan too; the functions of `svag_fast.theory` refuse what is not finite.
    ``degrees_of_freedom`` are those of the error (None: as good as known; intervals are then a normal distribution's,
    else Student's t). ``effective_samples``: how many independent values the estimate rests on (None: not told).

    >>> Estimate(1.1, 0.05).interval()  # 95 %
    (1.002..., 1.197...)
    >>> Estimate(1.1, 0.05, degrees_of_freedom=3).interval()
    (0.940..., 1.259...)
    >>> print(Estimate(4.2123, 0.104))
    4.21 ± 0.10
    >>> print(Estimate(4.2123e-9, 0.104e-9))
    (4.21 ± 0.10)e-09

    Raises:
        TypeError: the value or the error is no number.
        ValueError: the error is negative.
    """

    value: float
    standard_error: float = 0.0
    degrees_of_freedom: float | None = field(default=None, repr=False)
    effective_samples: float | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", real("value", self.value))
        error = real("standard_error", self.standard_error)
        if error < 0:
            number("standard_error", error, least=0)
        object.__setattr__(self, "standard_error", error)

    @property
    def mean(self) -> float:
        """The value, where it is a mean."""
        return self.value

    @property
    def trusted(self) -> bool:
        """Whether its error can be relied on: it rests on 16 independent values or more, as far as is told."""
        return self.effective_samples is None or self.effective_samples >= ENOUGH

    def half_width(self, confidence: float = 0.95) -> float:
        """Return how far the central interval that holds ``confidence`` reaches to either side."""
        return quantile(confidence, self.degrees_of_freedom) * self.standard_error

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return the central interval that holds ``confidence``."""
        half = self.half_width(confidence)
        return self.value - half, self.value + half

    def affine(self, slope: float, constant: float = 0.0) -> Estimate:
        """Return ``constant + slope * self``."""
        return replace(self, value=constant + slope * self.value, standard_error=abs(slope) * self.standard_error)

    def __str__(self) -> str:
        value, error = self.value, self.standard_error
        if error <= _ROUNDING * abs(value):
            return f"{value:.4g}"
        largest = max(abs(value), error)
        if not (math.isfinite(value) and math.isfinite(error) and largest > 1e-300):
            return f"{value:.4g} ± {error:.2g}"
        power = 0 if 1e-4 <= largest < 1e6 else math.floor(math.log10(largest))
        value, error = value / 10.0**power, error / 10.0**power
        digits = max(0, 1 - math.floor(math.log10(error)))
        text = f"{value:.{digits}f} ± {error:.{digits}f}"
        return f"({text})e{power:+03d}" if power else text


Number: TypeAlias = float | Estimate


def delta_method(
    value: float, slopes: Sequence[float], covariance: Sequence[Sequence[float]], of: Sequence[Estimate] = ()
) -> Estimate:
    """Delta method: the variance of f is, to first order, ∇fᵀ Cov ∇f.

    ``of``: what f is a function of; the result has the fewest degrees of freedom and effective samples among them.
    """
    variance = sum(
        a * b * c for a, row in zip(slopes, covariance, strict=True) for b, c in zip(slopes, row, strict=True)
    )
    uncertain = [e for e in of if e.standard_error > 0]
    return Estimate(
        number("value", value),
        number("standard_error", math.sqrt(max(variance, 0.0))),
        min((e.degrees_of_freedom for e in uncertain if e.degrees_of_freedom is not None), default=None),
        min((e.effective_samples for e in uncertain if e.effective_samples is not None), default=None),
    )


def fieller_interval(
    numerator: Estimate, denominator: Estimate, covariance: float, confidence: float = 0.95
) -> tuple[float, float]:
    """Return Fieller's interval for a ratio of means that is known not to be negative.

    All θ >= 0 for which ``numerator - θ denominator`` may be 0, by a t test: exact for normal means, however uncertain
    the denominator. Where that can't be told from 0 the upper end is ``math.inf``.
    Source: E. C. Fieller, "Some problems in interval estimation", J. R. Stat. Soc. B 16 (1954).

    >>> fieller_interval(Estimate(3.0, 0.1), Estimate(2.0, 0.0), 0.0)
    (1.402..., 1.597...)
    >>> fieller_interval(Estimate(3.0, 0.1), Estimate(0.1, 0.1), 0.0)
    (10.1..., inf)
    """
    numerator, denominator = as_estimate("numerator", numerator), as_estimate("denominator", denominator)
    top, bottom = (max(abs(e.value), e.standard_error) or 1.0 for e in (numerator, denominator))
    # In units of their own: squares of 1e-160 vanish, those of 1e160 overflow.
    up = replace(numerator, value=numerator.value / top, standard_error=numerator.standard_error / top)
    down = replace(denominator, value=denominator.value / bottom, standard_error=denominator.standard_error / bottom)
    low, high = _fieller(up, down, covariance / top / bottom, confidence)
    return low * (top / bottom), high * (top / bottom)


def _fieller(numerator: Estimate, denominator: Estimate, covariance: float, confidence: float) -> tuple[float, float]:
    freedoms = [e.degrees_of_freedom for e in (numerator, denominator) if e.degrees_of_freedom is not None]
    t2 = quantile(confidence, min(freedoms, default=None)) ** 2
    # t(θ)² <= t²  <=>  a θ² - 2 b θ + c <= 0
    a = denominator.value**2 - t2 * denominator.standard_error**2
    b = numerator.value * denominator.value - t2 * covariance
    c = numerator.value**2 - t2 * numerator.standard_error**2
    discriminant = b * b - a * c
    if a > 0 and denominator.value < 0:  # against what is known: nothing can be told
        return 0.0, math.inf
    if a > 0:
        root = math.sqrt(max(discriminant, 0.0))
        return max((b - root) / a, 0.0), max((b + root) / a, 0.0)
    # The denominator may be 0. Then θ is bounded at most from below: the larger root of a downward parabola.
    if discriminant < 0 or c <= 0:
        return 0.0, math.inf
    low = c / (2 * b) if a == 0 and b > 0 else (b - math.sqrt(discriminant)) / a if a < 0 else math.inf
    return max(low, 0.0), math.inf


def as_estimate(name: str, value: Number) -> Estimate:
    """Return a plain number as an exact estimate; refuse, by name, a value or an error that is not finite."""
    if not isinstance(value, Estimate):
        return Estimate(number(name, value))
    number(name, value.value)
    number(f"{name}.standard_error", value.standard_error)
    return value


def require_whole(name: str, value: float) -> int:
    """Return a whole number as an int; raise ValueError, naming the argument, where it is none."""
    if not (math.isfinite(value) and value == int(value)):
        raise ValueError(f"{name} must be a whole number, got {value}")
    return int(value)


def quantile(confidence: float, degrees_of_freedom: float | None = None) -> float:
    """Return how many standard errors the central interval of ``confidence`` reaches to either side."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    from scipy import stats  # here: the others of this module do without, and importing it takes time

    tail = 0.5 - confidence / 2
    return float(stats.norm.isf(tail) if degrees_of_freedom is None else stats.t.isf(tail, degrees_of_freedom))
