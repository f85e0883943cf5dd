r"""The processes of the paper behind one interface: ``process.step_(problem, x, draws)``.

All of them are ``x <- x - h (estimate + lambda x)``, h the time that a step takes, and differ in the estimate of the
gradient alone (the order-2 SDE adds a Hessian term, gradient flow is integrated by Runge-Kutta):

===================  ==================================  ============  =================================================
process              estimate                            h             source
===================  ==================================  ============  =================================================
`SGDProcess`         g                                   lr            eq. 1; with weight decay eq. 7
`SVAGProcess`        sum_j w_j g_j                       lr/l          eq. 5 (two batches); or "any other design"
`OneBatchSVAG`       (1 +- sqrt(l - 1)) g                lr/l          the authors' code; no approximation of the SDE
`NGD`                grad L + Sigma^(1/2) z              lr            eq. 3
`GD`                 grad L                              lr
`GradientFlow`       (dX = -grad f dt)                   step_size     lr -> 0
`EulerMaruyama`      grad L + sqrt(lr/h) Sigma^(1/2) z   step_size     eq. 16, of the SDEs (2) and (6)
`SDE2`               the same + (lr/2) Hessian f grad f  step_size     Thm E.4
===================  ==================================  ============  =================================================

f = L + (weight_decay/2) |x|^2. Source: Li, Malladi, Arora, "On the Validity of Modeling SGD with Stochastic
Differential Equations (SDEs)", NeurIPS 2021, arXiv 2102.12470; equation numbers are its own. "Weak order p in s" below
means: expectations of smooth functions at a fixed time differ by O(s^p).
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from svag_fast import moved
from svag_fast.numeric import number
from svag_fast.sde.draws import Draws
from svag_fast.sde.problems.base import Problem
from svag_fast.sde.weights import svag_weights


class GradientEstimate(NamedTuple):
    """A random estimate of the gradient, used with `probability` (one of several a process may mix).

    ``sum_j weights[j] g_j`` over independent batches; where `weights` is empty, grad L plus ``noise_scale`` times
    Gaussian noise of the batch gradient's covariance.
    """

    weights: tuple[float, ...] = ()
    noise_scale: float = 0.0
    probability: float = 1.0


@dataclass(frozen=True)
class Process(ABC):
    """A discrete-time process on any :class:`~svag_fast.sde.problems.base.Problem`.

    Args:
        lr: SGD's learning rate, the paper's eta, > 0: it sets the size of the noise, also of the SDEs.
        weight_decay: the paper's lambda, >= 0.

    Raises:
        ValueError: a parameter is out of its range.
    """

    lr: float
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "lr", number("lr", self.lr, above=0))
        object.__setattr__(self, "weight_decay", number("weight_decay", self.weight_decay, least=0))
        number("step_size", self.step_size, above=0)  # of checked numbers, or h

    @property
    def step_size(self) -> float:
        """h: the multiplier of the gradient estimate, and the continuous time that one step takes; lr by default."""
        return self.lr

    @property
    @abstractmethod
    def estimates(self) -> tuple[GradientEstimate, ...]:
        """The mixture that a step's gradient estimate is drawn from."""

    @property
    def hessian_weight(self) -> float:
        """Coefficient of the drift ``Hessian f grad f`` added to the gradient."""
        return 0.0

    def steps(self, time: float) -> int:
        """Number of steps that take continuous time `time`; it must be a whole number.

        Raises:
            TypeError, ValueError: `time` is no finite number of at least 0, or no whole number of steps.
        """
        time = number("time", time, least=0)
        count = round(time / self.step_size)
        if abs(count * self.step_size - time) > 1e-9 * max(abs(time), self.step_size):
            raise ValueError(f"time must be a whole number of steps of {self.step_size}, got {time}")
        return count

    def step_(self, problem: Problem, x: Tensor, draws: Draws) -> Tensor:
        """One step of every trajectory in `x`, in place."""
        self.check_dtype(x.dtype)
        h = self.step_size
        estimate = self._estimate(problem, x, draws)
        if self.weight_decay:
            x.mul_(1 - h * self.weight_decay)
        return x.sub_(estimate, alpha=h)

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Refuse a step whose numbers are infinite in the state's dtype, or whose size is 0 there.

        Raises:
            ValueError: it names the number.
        """
        _check_dtype(self, dtype)

    def _estimate(self, problem: Problem, x: Tensor, draws: Draws) -> Tensor:
        (estimate,) = self.estimates
        if estimate.weights:
            return problem.batch_grad(x, estimate.weights, draws)
        if estimate.noise_scale == 0:
            return problem.mean_grad(x)
        return problem.gaussian_grad(x, estimate.noise_scale, draws)


@functools.lru_cache(maxsize=128)
def _check_dtype(process: Process, dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    named = {
        "step_size": process.step_size,
        "weight_decay": process.weight_decay,
        "hessian_weight": process.hessian_weight,
    }
    for estimate in process.estimates:
        named["noise_scale"] = estimate.noise_scale
        for j, weight in enumerate(estimate.weights):
            named[f"weights[{j}]"] = weight
        for name, value in named.items():
            if abs(value) > limits.max:
                raise ValueError(f"{name} of {process} must be finite in {dtype}, got {value}")
    if torch.tensor(process.step_size, dtype=dtype, device="cpu") == 0:
        raise ValueError(f"step_size of {process} must be a number above 0 in {dtype}, got {process.step_size}")


@dataclass(frozen=True)
class SGDProcess(Process):
    """Stochastic gradient descent, eq. 1; with `weight_decay` eq. 7.

    Weak order 1 in lr to the SDE (2) (Li, Tai, E 2019), 2 to `SDE2` (Thm E.4).
    """

    @property
    def estimates(self) -> tuple[GradientEstimate, ...]:
        """One batch."""
        return (GradientEstimate((1.0,)),)


@dataclass(frozen=True)
class SVAGProcess(Process):
    """SVAG, eq. 5, for any real l >= 1, and its general form with more than two batches.

    Weak order 1 in 1/l to the SDE (2) at the same lr (Thm 4.3). l = 1 with two batches is SGD. With `batches` > 2 the
    weights are those of :func:`~svag_fast.sde.weights.svag_weights`, of least third moment.
    """

    l: float = 1.0
    batches: int = 2

    def __post_init__(self) -> None:
        svag_weights(self.l, self.batches)
        super().__post_init__()

    @property
    def step_size(self) -> float:
        """lr/l: l steps are one effective step."""
        return self.lr / self.l

    @property
    def estimates(self) -> tuple[GradientEstimate, ...]:
        """The weighted batches; a batch of weight zero is not drawn."""
        return (GradientEstimate(tuple(w for w in svag_weights(self.l, self.batches) if w)),)


@dataclass(frozen=True)
class OneBatchSVAG(Process):
    """The authors' one-batch variant: the loss times ``1 + s sqrt(l - 1)``, ``s = +-1`` by a fair coin. Order 0.

    Its covariance is ``l Sigma + (l - 1) grad L grad L^T``: at step lr/l the second term adds ``lr^2 (1 - 1/l)/l
    grad L grad L^T`` a step, lr grad L grad L^T a unit of time, which doesn't vanish as l grows. Its limit is the SDE
    with covariance ``lr (Sigma + grad L grad L^T)``. Here as the counter-example.
    """

    l: float = 1.0

    def __post_init__(self) -> None:
        svag_weights(self.l)
        super().__post_init__()

    @property
    def step_size(self) -> float:
        """lr/l: l steps are one effective step."""
        return self.lr / self.l

    @property
    def estimates(self) -> tuple[GradientEstimate, ...]:
        """Amplified up or down."""
        root = math.sqrt(self.l - 1)
        return GradientEstimate((1 + root,), probability=0.5), GradientEstimate((1 - root,), probability=0.5)

    def _estimate(self, problem: Problem, x: Tensor, draws: Draws) -> Tensor:
        grad = problem.batch_grad(x, (1.0,), draws)
        rows = x.shape[: x.dim() - problem.state_dim]
        signs = (2 * draws.indices(2, tuple(rows)) - 1).to(x.dtype)
        return grad.mul_((1 + math.sqrt(self.l - 1) * signs).reshape((*rows, *[1] * problem.state_dim)))


@dataclass(frozen=True)
class NGD(Process):
    """Noisy gradient descent, eq. 3: SGD with Gaussian noise of the same covariance. Weak order 1 in lr to the SDE."""

    @property
    def estimates(self) -> tuple[GradientEstimate, ...]:
        """Full gradient with unit noise."""
        return (GradientEstimate(noise_scale=1.0),)


@dataclass(frozen=True)
class GD(Process):
    """Gradient descent: the full gradient. Order 1 in lr to gradient flow."""

    @property
    def estimates(self) -> tuple[GradientEstimate, ...]:
        """Full gradient, no noise."""
        return (GradientEstimate(),)


@dataclass(frozen=True)
class _Integrated(Process):
    """A process in continuous time, integrated with steps of time `h`."""

    h: float = 0.0

    @property
    def step_size(self) -> float:
        """The integrator's time step h."""
        return self.h


@dataclass(frozen=True)
class GradientFlow(_Integrated):
    """``dX = -grad f(X) dt`` by the classical Runge-Kutta method (Kutta 1901). Order 4 in h."""

    @property
    def estimates(self) -> tuple[GradientEstimate, ...]:
        """Full gradient, no noise."""
        return (GradientEstimate(),)

    def step_(self, problem: Problem, x: Tensor, draws: Draws) -> Tensor:
        """One Runge-Kutta step, in place."""
        self.check_dtype(x.dtype)

        def slope(y: Tensor) -> Tensor:
            return problem.mean_grad(y).add_(y, alpha=self.weight_decay).neg_()

        k1 = slope(x)
        k2 = slope(torch.add(x, k1, alpha=self.h / 2))
        k3 = slope(torch.add(x, k2, alpha=self.h / 2))
        k4 = slope(torch.add(x, k3, alpha=self.h))
        return x.add_(k1.add_(k2, alpha=2).add_(k3, alpha=2).add_(k4), alpha=self.h / 6)


@dataclass(frozen=True)
class EulerMaruyama(_Integrated):
    """Euler-Maruyama (Maruyama 1955; eq. 16) of the Ito SDEs (2) and, with `weight_decay`, (6). Weak order 1 in h."""

    @property
    def estimates(self) -> tuple[GradientEstimate, ...]:
        """``x <- x - h grad + sqrt(h lr) Sigma^(1/2) z`` as a gradient estimate."""
        return (GradientEstimate(noise_scale=math.sqrt(self.lr / self.h)),)


@dataclass(frozen=True)
class SDE2(EulerMaruyama):
    """Euler-Maruyama of the order-2 SDE, Thm E.4: ``dX = -grad(f + (lr/4)|grad f|^2) dt + (lr Sigma)^(1/2) dW``.

    Weak order 1 in h to that SDE, which has weak order 2 in lr to SGD. A step needs one Hessian-vector product.
    """

    @property
    def hessian_weight(self) -> float:
        """lr/2."""
        return self.lr / 2

    def _estimate(self, problem: Problem, x: Tensor, draws: Draws) -> Tensor:
        grad, noise = problem.mean_grad_and_noise(x, draws)
        decay = self.weight_decay
        grad_f = torch.add(grad, x, alpha=decay)
        correction = problem.hessian_product(x, grad_f).add_(grad_f, alpha=decay)
        return grad.add_(correction, alpha=self.hessian_weight).add_(noise, alpha=math.sqrt(self.lr / self.h))


if not TYPE_CHECKING:  # else a type checker would take every unknown name for Any

    def __getattr__(name: str) -> Any:
        return moved.old_name(__name__, {"SGD": "SGDProcess", "SVAG": "SVAGProcess"}, name)
