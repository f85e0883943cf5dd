r"""A scale-invariant toy in the plane with weight decay on which E g is exact for SGD and SVAG: it takes R alone.

``L_gamma(x) = xi_gamma theta(x)``, theta the angle of x, xi of a finite law of mean mu and variance s^2. (The loss
lives on the angle's universal cover: a smooth scale-invariant loss on the plane itself has a maximum, where its
gradient vanishes.) With R = |x|^2 and e the unit tangent,

    grad L_gamma = xi e/|x|,        G = mu^2/R,        N = s^2/R,

so a step of size h along a gradient estimate xi turns the angle by ``-atan(h xi/((1 - h lambda) R))`` and takes R to
``(1 - h lambda)^2 R + h^2 xi^2/R``, whatever the angle is. Hence

    E[g(R_k) exp(i m theta_k)] = exp(i m theta_0) u_k(R_0)

with a backward recursion for u, a function of one variable: :meth:`CircleToy.process_mean` takes it on Chebyshev
interpolants, exact to rounding. A recursion for numbers is had for SGD with ``|xi|`` fixed, whose R is not random.
For SVAG at l > 1 there is none: ``w_1 xi_1 + w_2 xi_2`` takes at least three values, so its square is random.

Under the SDE (6) R is not random either, and theta is Gaussian: ``d theta = -(mu/R) dt + (lr^(1/2) s/R) dW``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.integrate
import torch
from numpy.polynomial import chebyshev
from numpy.typing import NDArray
from torch import Tensor

from svag_fast.numeric import integer, number
from svag_fast.sde.checks import check_vector
from svag_fast.sde.draws import Draws
from svag_fast.sde.problems.scale_invariant import sde_weight_sq_norm
from svag_fast.sde.processes import GradientEstimate, GradientFlow, Process

Array = NDArray[np.float64]


@dataclass(frozen=True)
class CircleToy:
    """The problem of this module's docstring; states are ensembles [n, 2].

    Args:
        slopes: the equally likely values of xi, that of the whole batch gradient; repeat one to make it likelier.
    """

    slopes: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.slopes:
            raise ValueError("slopes must be one finite number or more, got none")
        object.__setattr__(self, "slopes", tuple(number("slopes", slope) for slope in self.slopes))

    @property
    def state_dim(self) -> int:
        """One: a state is a vector [2]."""
        return 1

    @property
    def mean(self) -> float:
        """mu."""
        return math.fsum(self.slopes) / len(self.slopes)

    @property
    def variance(self) -> float:
        """s^2."""
        return math.fsum((value - self.mean) ** 2 for value in self.slopes) / len(self.slopes)

    def _check(self, x: Tensor) -> None:
        if x.dim() != 2 or x.shape[1] != 2:
            raise ValueError(f"states must be of shape [n, 2], got {list(x.shape)}")

    def batch_grad(self, x: Tensor, weights: Sequence[float], draws: Draws) -> Tensor:
        """``sum_j weights[j] g_j``."""
        self._check(x)
        slopes = torch.tensor(self.slopes, dtype=x.dtype, device=x.device)
        slope = torch.zeros_like(x[:, 0])
        for weight in weights:
            slope.add_(slopes[draws.indices(len(slopes), (len(x),))], alpha=weight)
        return self._turn(x, slope)

    def mean_grad(self, x: Tensor) -> Tensor:
        """``mu e/|x|``."""
        self._check(x)
        return self._turn(x, torch.full_like(x[:, 0], self.mean))

    def gaussian_grad(self, x: Tensor, noise_scale: float, draws: Draws) -> Tensor:
        """``(mu + noise_scale s z) e/|x|``."""
        self._check(x)
        noise = draws.normal_(torch.empty_like(x[:, 0]))
        return self._turn(x, noise.mul_(noise_scale * self.variance**0.5).add_(self.mean))

    def mean_grad_and_noise(self, x: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Both parts of the noisy gradient."""
        noise = draws.normal_(torch.empty_like(x[:, 0])).mul_(self.variance**0.5)
        return self.mean_grad(x), self._turn(x, noise)

    def hessian_product(self, x: Tensor, v: Tensor) -> Tensor:
        """``-mu (e (u.v) + u (e.v))/|x|^2``, u the unit vector of x."""
        r = x.square().sum(1, keepdim=True)
        tangent = torch.stack([-x[:, 1], x[:, 0]], dim=1)
        both = tangent * (x * v).sum(1, keepdim=True) + x * (tangent * v).sum(1, keepdim=True)
        return both.mul_(-self.mean).div_(r.square())

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """G, N, R of each trajectory, exact at its state: three tensors [n]."""
        self._check(x)
        r = x.square().sum(1)
        return self.mean**2 / r, self.variance / r, r

    def process_mean(
        self,
        process: Process,
        x0: Tensor,
        time: float,
        function: Callable[[Array], Array] = np.ones_like,
        *,
        frequency: int = 0,
        degree: int = 32,
    ) -> complex:
        """Exact ``E[function(R) exp(i frequency theta)]`` of a process with batch gradients, at `time` from `x0` [2].

        Args:
            process: an SGDProcess, SVAGProcess, OneBatchSVAG or GD.
            x0: the start, [2], not the origin.
            time: a whole number of steps.
            function: of R, elementwise and smooth (analytic) on the values that R can take.
            frequency: m; the real part for m = 1 and ``function=np.sqrt`` is E of x's first coordinate.
            degree: of the interpolants; their error falls geometrically with it.

        Raises:
            ValueError: a process with Gaussian noise, gradient flow, or a step that may reach the origin.
        """
        check_vector("x0", x0, 2)
        frequency = integer("frequency", frequency, least=-(2**31))
        degree = integer("degree", degree, least=1)
        steps, h = process.steps(time), process.step_size
        keep = 1 - h * process.weight_decay
        if any(e.noise_scale for e in process.estimates) or isinstance(process, GradientFlow):
            raise ValueError(
                f"process must be one of steps along batch gradients or GD's, got {type(process).__name__}"
            )
        if keep <= 0:
            raise ValueError(f"lr weight_decay must be below 1 a step, got {1 - keep}")
        slopes, chances = self._outcomes(process.estimates)
        r0, angle0 = float(x0.double().square().sum()), math.atan2(float(x0[1]), float(x0[0]))
        if r0 == 0:
            raise ValueError("x0 must be off the origin, where the angle has no value, got the origin")

        # Forwards: the interval that holds R after each step.
        intervals = [(r0, r0)]
        for _ in range(steps):
            intervals.append(_image(intervals[-1], keep**2, h**2 * slopes**2))
        # Backwards: u on each interval, by its values at Chebyshev's points.
        points = chebyshev.chebpts1(degree + 1)
        to_coefficients = np.linalg.inv(chebyshev.chebvander(points, degree))
        coefficients = to_coefficients @ function(_spread(intervals[steps], points)).astype(complex)
        for step in reversed(range(steps)):
            r = _spread(intervals[step], points)[:, None]
            after = _gathered(intervals[step + 1], keep**2 * r + h**2 * slopes**2 / r)
            turn = np.exp(-1j * frequency * np.arctan2(h * slopes, keep * r))
            coefficients = to_coefficients @ ((chebyshev.chebval(after, coefficients) * turn) @ chances)
        value = chebyshev.chebval(_gathered(intervals[0], np.array(r0)), coefficients)
        return complex(value * np.exp(1j * frequency * angle0))

    def sde_mean(
        self,
        x0: Tensor,
        time: float,
        function: Callable[[Array], Array] = np.ones_like,
        *,
        lr: float,
        weight_decay: float,
        frequency: int = 0,
    ) -> complex:
        """Exact ``E[function(R) exp(i frequency theta)]`` of the SDE (6) at `time` >= 0 from `x0` [2]."""
        check_vector("x0", x0, 2)
        time = number("time", time, least=0)
        lr = number("lr", lr, above=0)
        weight_decay = number("weight_decay", weight_decay, least=0)
        frequency = integer("frequency", frequency, least=-(2**31))
        if not bool(x0.any()):
            raise ValueError("x0 must be off the origin, where the angle has no value, got the origin")
        r0, angle0 = float(x0.double().square().sum()), math.atan2(float(x0[1]), float(x0[0]))

        def r(t: float) -> float:
            return sde_weight_sq_norm(r0, t, diffusion=lr * self.variance, weight_decay=weight_decay)

        mean = angle0 - self.mean * scipy.integrate.quad(lambda t: 1 / r(t), 0, time, epsabs=1e-13)[0]
        variance = lr * self.variance * scipy.integrate.quad(lambda t: r(t) ** -2, 0, time, epsabs=1e-13)[0]
        wave = np.exp(1j * frequency * mean - frequency**2 * variance / 2)
        return complex(function(np.array(r(time))) * wave)

    def _outcomes(self, estimates: Sequence[GradientEstimate]) -> tuple[Array, Array]:
        """The values of a step's xi and their probabilities."""
        values: list[float] = []
        chances: list[float] = []
        for estimate in estimates:
            drawn = (
                [self.mean]
                if not estimate.weights
                else [
                    math.fsum(w * xi for w, xi in zip(estimate.weights, pick, strict=True))
                    for pick in itertools.product(self.slopes, repeat=len(estimate.weights))
                ]
            )
            values += drawn
            chances += [estimate.probability / len(drawn)] * len(drawn)
        distinct, which = np.unique(values, return_inverse=True)
        return distinct, np.bincount(which, weights=chances).astype(np.float64)

    @staticmethod
    def _turn(x: Tensor, slope: Tensor) -> Tensor:
        """``slope e/|x|``."""
        return torch.stack([-x[:, 1], x[:, 0]], dim=1).mul_((slope / x.square().sum(1))[:, None])


def _image(interval: tuple[float, float], keep: float, pushes: Array) -> tuple[float, float]:
    """The least interval that holds ``keep r + push/r`` for r in `interval` and each push."""
    low, high = interval
    ends = np.concatenate([keep * r + pushes / r for r in interval])
    turns = np.sqrt(pushes / keep)  # the least value is here, where it is inside
    inside = (turns > low) & (turns < high)
    return float(np.append(ends, 2 * keep * turns[inside]).min()), float(ends.max())


def _spread(interval: tuple[float, float], points: Array) -> Array:
    """Values in the interval (of some width, always) for points in [-1, 1]."""
    middle, half = _middle_and_half(interval)
    return middle + half * points


def _gathered(interval: tuple[float, float], r: Array) -> Array:
    """The inverse of :func:`_spread`."""
    middle, half = _middle_and_half(interval)
    return (r - middle) / half


def _middle_and_half(interval: tuple[float, float]) -> tuple[float, float]:
    low, high = interval
    middle = (low + high) / 2
    return middle, max((high - low) / 2, 1e-3 * middle)
