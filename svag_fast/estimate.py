"""A number with its standard error, and the checks of numeric arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeAlias


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error (0: exact).

    >>> Estimate(1.1, 0.05).interval()  # 95 %, of a normal distribution
    (1.002..., 1.197...)
    >>> print(Estimate(4.2123, 0.104))
    4.21 ± 0.10
    """

    value: float
    standard_error: float = 0.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"value must be finite, got {self.value}")
        if not (math.isfinite(self.standard_error) and self.standard_error >= 0):
            raise ValueError(f"standard_error must be finite and not negative, got {self.standard_error}")

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return the central interval of a normal distribution that holds ``confidence``."""
        half = normal_quantile(confidence) * self.standard_error
        return self.value - half, self.value + half

    def __str__(self) -> str:
        if self.standard_error == 0:
            return f"{self.value:.4g}"
        digits = max(0, 1 - math.floor(math.log10(self.standard_error)))
        return f"{self.value:.{digits}f} ± {self.standard_error:.{digits}f}"


Number: TypeAlias = float | Estimate


def delta_method(value: float, slopes: Sequence[float], covariance: Sequence[Sequence[float]]) -> Estimate:
    """Delta method: the variance of f is, to first order, ∇fᵀ Cov ∇f."""
    variance = sum(
        a * b * c for a, row in zip(slopes, covariance, strict=True) for b, c in zip(slopes, row, strict=True)
    )
    return Estimate(value, math.sqrt(max(variance, 0.0)))


def as_estimate(name: str, value: Number) -> Estimate:
    """Return a plain number as an exact estimate; raise ValueError, naming it, where it is not finite."""
    if isinstance(value, Estimate):
        return value
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return Estimate(float(value))


def require_positive(name: str, value: float) -> None:
    """Raise ValueError, naming the argument, unless it is positive and finite."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite, got {value}")


def require_not_negative(name: str, value: float) -> None:
    """Raise ValueError, naming the argument, unless it is finite and not negative."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and not negative, got {value}")


def normal_quantile(confidence: float) -> float:
    """Return how many standard errors the central interval of ``confidence`` reaches to either side."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    return NormalDist().inv_cdf(0.5 + confidence / 2)
