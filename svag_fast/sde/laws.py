"""Standardised noise laws: mean 0, variance 1, known cumulants, and how they change with the batch size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from svag_fast.numeric import number
from svag_fast.sde.draws import Draws


class Law(Protocol):
    """The law of a real random variable with mean 0 and variance 1."""

    @property
    def third_cumulant(self) -> float:
        """E e^3."""

    @property
    def fourth_cumulant(self) -> float:
        """E e^4 - 3."""

    def fill_(self, out: Tensor, draws: Draws) -> Tensor:
        """Fill `out` with independent draws."""

    def averaged(self, batch_size: float) -> Law:
        """The standardised law of a mean of `batch_size` draws: cumulant j times ``batch_size^(1 - j/2)``."""


@dataclass(frozen=True)
class Gaussian:
    """N(0, 1)."""

    @property
    def third_cumulant(self) -> float:
        """E e^3."""
        return 0.0

    @property
    def fourth_cumulant(self) -> float:
        """E e^4 - 3."""
        return 0.0

    def fill_(self, out: Tensor, draws: Draws) -> Tensor:
        """Fill `out` with independent draws."""
        return draws.normal_(out)

    def averaged(self, batch_size: float) -> Gaussian:
        """Itself: a mean of Gaussians is one."""
        return self


@dataclass(frozen=True)
class Gamma:
    """``(Gamma(shape) - shape)/sqrt(shape)``: skewness ``2/sqrt(shape)``; infinitely divisible.

    At shape 1, the exponential law, each value is an increasing function of one normal draw, ``-log Phi(-z) - 1``:
    the same seed then couples it with :class:`Gaussian` (correlation 0.90), which is what simulations with common
    random numbers use.
    """

    shape: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", number("shape", self.shape, above=0))

    @property
    def third_cumulant(self) -> float:
        """E e^3."""
        return float(2 / self.shape**0.5)

    @property
    def fourth_cumulant(self) -> float:
        """E e^4 - 3."""
        return 6 / self.shape

    def fill_(self, out: Tensor, draws: Draws) -> Tensor:
        """Fill `out` with independent draws."""
        if self.shape == 1:
            # Phi(-z) = erfc(z/sqrt(2))/2, at half of log_ndtr's cost and as exact over all z that are drawn.
            return draws.normal_(out).mul_(math.sqrt(0.5)).erfc_().log_().neg_().add_(math.log(2) - 1)
        return draws.gamma_(out, self.shape).sub_(self.shape).div_(self.shape**0.5)

    def averaged(self, batch_size: float) -> Gamma:
        """The standardised mean of `batch_size` draws, any positive real."""
        return Gamma(self.shape * batch_size)


@dataclass(frozen=True)
class Poisson:
    """``(Poisson(rate) - rate)/sqrt(rate)``: skewness ``1/sqrt(rate)``; infinitely divisible."""

    rate: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "rate", number("rate", self.rate, above=0))

    @property
    def third_cumulant(self) -> float:
        """E e^3."""
        return float(self.rate**-0.5)

    @property
    def fourth_cumulant(self) -> float:
        """E e^4 - 3."""
        return 1 / self.rate

    def fill_(self, out: Tensor, draws: Draws) -> Tensor:
        """Fill `out` with independent draws."""
        return draws.poisson_(out, self.rate).sub_(self.rate).div_(self.rate**0.5)

    def averaged(self, batch_size: float) -> Poisson:
        """The standardised mean of `batch_size` draws, any positive real."""
        return Poisson(self.rate * batch_size)
