"""What a process needs to know of a problem, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from svag_fast.sde.draws import Draws


class Problem(Protocol):
    """A loss ``L = E L_gamma`` whose batch gradients have covariance ``Sigma(x)``, at one state or at many.

    A state `x` is a tensor of any shape that the problem understands. The closed-form problems take ensembles, one
    trajectory a row; :class:`svag_fast.sde.problems.network.NetworkProblem` takes the flat parameter vector of one net.
    Every method returns a tensor of x's shape that the caller may overwrite, and leaves x as it is.
    """

    @property
    def state_dim(self) -> int:
        """Trailing dimensions that make one state: 0 for scalars in an ensemble [n], 1 for vectors [n, d] or [P]."""

    def batch_grad(self, x: Tensor, weights: Sequence[float], draws: Draws) -> Tensor:
        """``sum_j weights[j] * grad L_{gamma_j}(x)`` over independent batches, fresh at every call."""

    def mean_grad(self, x: Tensor) -> Tensor:
        """The full gradient ``grad L(x)``."""

    def gaussian_grad(self, x: Tensor, noise_scale: float, draws: Draws) -> Tensor:
        """``grad L(x) + noise_scale * Sigma(x)^(1/2) z`` with fresh ``z ~ N(0, I)``."""

    def mean_grad_and_noise(self, x: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """``grad L(x)`` and ``Sigma(x)^(1/2) z`` apart, from one pass over the data."""

    def hessian_product(self, x: Tensor, v: Tensor) -> Tensor:
        """``Hessian L(x) v``, row by row for an ensemble."""
