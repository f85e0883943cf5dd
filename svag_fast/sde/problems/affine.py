"""One-dimensional problems whose batch gradient is affine in x: all of the paper's scalar closed forms in one class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from svag_fast.numeric import number
from svag_fast.sde.draws import Draws
from svag_fast.sde.laws import Gaussian, Law, Poisson


@dataclass(frozen=True)
class AffineProblem:
    """Batch gradient ``(curvature x - offset) + (noise_slope x + noise_offset) e``, e of a standardised `law`.

    So ``L = curvature x^2/2 - offset x`` and ``Sigma = (noise_slope x + noise_offset)^2``. The conditional moments of a
    step are polynomials in x, which makes the moments of SGD, SVAG, NGD and Euler-Maruyama linear recursions and those
    of the SDEs linear differential equations: :mod:`svag_fast.sde.moments` solves both exactly.

    States are ensembles ``x`` of shape [n]. `law` is that of the whole batch gradient, of `batch_size` samples.
    """

    curvature: float
    offset: float = 0.0
    noise_slope: float = 0.0
    noise_offset: float = 0.0
    law: Law = field(default_factory=Gaussian)
    batch_size: float = 1.0

    def __post_init__(self) -> None:
        for name in ("curvature", "offset", "noise_slope", "noise_offset"):
            object.__setattr__(self, name, number(name, getattr(self, name)))
        object.__setattr__(self, "batch_size", number("batch_size", self.batch_size, above=0))

    @property
    def state_dim(self) -> int:
        """Zero: a state is a number."""
        return 0

    def at_batch_size(self, batch_size: float) -> AffineProblem:
        """The same samples in batches of another size (any positive real: the laws are infinitely divisible)."""
        batch_size = number("batch_size", batch_size, above=0)
        ratio = batch_size / self.batch_size
        return replace(
            self,
            # A mean over `ratio` times the samples has its variance divided by `ratio`.
            noise_slope=self.noise_slope / ratio**0.5,
            noise_offset=self.noise_offset / ratio**0.5,
            law=self.law.averaged(ratio),
            batch_size=batch_size,
        )

    def with_law(self, law: Law) -> AffineProblem:
        """The same mean and covariance with another law of the noise."""
        return replace(self, law=law)

    def batch_grad(self, x: Tensor, weights: Sequence[float], draws: Draws) -> Tensor:
        """``sum_j weights[j] g_j``: the noises are combined before the state is looked at."""
        noise = self.law.fill_(torch.empty_like(x), draws)
        # A pass over memory saved for SGD and for each batch that is drawn alone.
        if weights[0] != 1:
            noise.mul_(weights[0])
        for weight in weights[1:]:
            noise.add_(self.law.fill_(torch.empty_like(x), draws), alpha=weight)
        return self._combine(x, noise, sum(weights), 1.0)

    def mean_grad(self, x: Tensor) -> Tensor:
        """``curvature x - offset``."""
        return torch.mul(x, self.curvature).sub_(self.offset)

    def gaussian_grad(self, x: Tensor, noise_scale: float, draws: Draws) -> Tensor:
        """``curvature x - offset + noise_scale |noise_slope x + noise_offset| z`` (the sign of z is free)."""
        return self._combine(x, draws.normal_(torch.empty_like(x)), 1.0, noise_scale)

    def mean_grad_and_noise(self, x: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Both parts of the noisy gradient."""
        noise = draws.normal_(torch.empty_like(x))
        return self.mean_grad(x), noise.mul_(torch.mul(x, self.noise_slope).add_(self.noise_offset))

    def hessian_product(self, x: Tensor, v: Tensor) -> Tensor:
        """``curvature v``."""
        return torch.mul(v, self.curvature)

    def _combine(self, x: Tensor, noise: Tensor, mean_weight: float, noise_scale: float) -> Tensor:
        """``mean_weight (curvature x - offset) + noise_scale (noise_slope x + noise_offset) noise`` over `noise`."""
        # Additive noise needs one pass less over the ensemble.
        if self.noise_slope == 0:
            noise.mul_(noise_scale * self.noise_offset).add_(x, alpha=mean_weight * self.curvature)
        else:
            # x (mean_weight curvature + noise_scale noise_slope e) + noise_scale noise_offset e
            additive = noise * (noise_scale * self.noise_offset) if self.noise_offset else None
            noise.mul_(noise_scale * self.noise_slope).add_(mean_weight * self.curvature).mul_(x)
            if additive is not None:
                noise.add_(additive)
        return noise.sub_(mean_weight * self.offset) if self.offset else noise


def additive_quadratic(curvature: float, noise_std: float, law: Law | None = None) -> AffineProblem:
    """``grad L_gamma = curvature (x - gamma)``, gamma of mean 0, deviation `noise_std`: the SDE is Ornstein-Uhlenbeck.

    `law` is that of ``-gamma/noise_std``.
    """
    return AffineProblem(curvature, noise_offset=curvature * noise_std, law=law or Gaussian())


def multiplicative_quadratic(curvature: float, noise_std: float, law: Law | None = None) -> AffineProblem:
    """``grad L_gamma = gamma x``, gamma of mean `curvature`, deviation `noise_std`: the SDE is geometric Brownian."""
    return AffineProblem(curvature, noise_slope=noise_std, law=law or Gaussian())


def constant_poisson_gradient(batch_size: float, slope: float = 0.0) -> AffineProblem:
    """A constant gradient distribution of infinitely divisible noise (our instance of the paper's appendix B.1).

    The batch gradient is ``slope + (Poisson(batch_size) - batch_size)/batch_size``, wherever x is. Over a time T the
    sum of the steps depends on lr/batch_size alone, so linear scaling is exact at every learning rate, yet its third
    cumulant ``-(lr/batch_size)^2 T`` stays away from the Gaussian SDE's zero.
    """
    batch_size = number("batch_size", batch_size, above=0)
    return AffineProblem(
        0.0, offset=-slope, noise_offset=batch_size**-0.5, law=Poisson(batch_size), batch_size=batch_size
    )
