"""Least squares over a finite data set in d dimensions, with exact first and second moments of every process."""

from __future__ import annotations

from collections.abc import Sequence

import scipy.linalg
import torch
from torch import Tensor

from svag_fast.numeric import integer, number
from svag_fast.sde.checks import check_vector
from svag_fast.sde.draws import Draws
from svag_fast.sde.processes import GradientEstimate, GradientFlow, Process


class LinearRegression:
    """``L_i(x) = (a_i . x - y_i)^2 / 2`` over n samples, batches of B: gradients ``a_i (a_i . x - y_i)``.

    With ``z = (x, 1)`` a sample's gradient is ``A_i z``, ``A_i = a_i [a_i, -y_i]``, so ``E z z^T`` obeys a linear
    recursion for every process whose step is affine in z, and a linear differential equation for the SDEs. Only the
    batch gradient's mean and covariance enter.

    Args:
        features: a, [n, d].
        targets: y, [n].
        batch_size: B.
        replacement: whether a batch may hold a sample twice.

    States are ensembles [N, d] of the features' dtype.
    """

    def __init__(self, features: Tensor, targets: Tensor, *, batch_size: int, replacement: bool = True) -> None:
        batch_size = integer("batch_size", batch_size, least=1)
        if not (features.is_floating_point() and targets.dtype == features.dtype):
            raise TypeError(f"features and targets must be of one real dtype, got {features.dtype}, {targets.dtype}")
        if features.dim() != 2 or targets.shape != features.shape[:1] or len(features) < 2:
            raise ValueError(
                f"targets must be [n] for features [n, d], n at least 2, got shapes {tuple(targets.shape)} and "
                f"{tuple(features.shape)}"
            )
        if batch_size < 1 or (not replacement and batch_size > len(features)):
            raise ValueError(f"batch_size must be from 1 to {len(features)}, got {batch_size}")
        self.features, self.targets = features, targets
        self.batch_size, self.replacement = batch_size, replacement
        self.hessian = features.T @ features / len(features)

    @property
    def state_dim(self) -> int:
        """One: a state is a vector [d]."""
        return 1

    @property
    def noise_factor(self) -> float:
        """``Sigma`` over the covariance of one sample's gradient: 1/B, times ``(n - B)/(n - 1)`` w/o replacement."""
        n, b = len(self.features), self.batch_size
        return 1 / b if self.replacement else (n - b) / (n - 1) / b

    def batch_grad(self, x: Tensor, weights: Sequence[float], draws: Draws) -> Tensor:
        """``sum_j weights[j] g_j`` of independent batches, fresh for every trajectory."""
        total = torch.zeros_like(x)
        for weight in weights:
            if self.replacement:
                rows = draws.indices(len(self.features), (len(x), self.batch_size))
            else:
                rows = draws.subsets(len(self.features), len(x), self.batch_size)
            a = self.features[rows]
            # From left to right, so that no [d, d] matrix is formed for each trajectory.
            residual = (a @ x[:, :, None]).squeeze(2).sub_(self.targets[rows])
            total.add_((residual[:, None, :] @ a).squeeze(1), alpha=weight / self.batch_size)
        return total

    def mean_grad(self, x: Tensor) -> Tensor:
        """``grad L(x)``."""
        return (x @ self.features.T - self.targets) @ self.features / len(self.features)

    def gaussian_grad(self, x: Tensor, noise_scale: float, draws: Draws) -> Tensor:
        """``grad L + noise_scale Sigma^(1/2) z``, as one Gaussian combination of the samples' gradients."""
        grad, noise = self.mean_grad_and_noise(x, draws)
        return grad.add_(noise, alpha=noise_scale)

    def mean_grad_and_noise(self, x: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Both parts of the noisy gradient."""
        n = len(self.features)
        residuals = x @ self.features.T - self.targets
        xi = draws.normal_(torch.empty_like(residuals))
        xi.sub_(xi.mean(dim=1, keepdim=True)).mul_((self.noise_factor / n) ** 0.5)
        return residuals @ self.features / n, (xi * residuals) @ self.features

    def hessian_product(self, x: Tensor, v: Tensor) -> Tensor:
        """``(1/n) sum_i a_i (a_i . v)``."""
        return v @ self.hessian

    def process_second_moment(self, process: Process, x0: Tensor, times: Sequence[float]) -> Tensor:
        """Exact ``E (x, 1)(x, 1)^T`` of a discrete process: float64 [len(times), d + 1, d + 1]."""
        if isinstance(process, GradientFlow):
            raise ValueError("process must be affine in its step, got GradientFlow: use sde_second_moment(noise=False)")
        h, decay = process.step_size, process.weight_decay
        start = self._start(x0)
        total = torch.zeros_like(self._spread())
        for estimate in process.estimates:
            mean_weight, variance = _mean_and_variance(estimate)
            step = torch.eye(self._mean().shape[0], dtype=torch.float64, device=total.device) + h * self._drift(
                decay, process.hessian_weight, mean_weight
            )
            total += estimate.probability * (torch.kron(step, step) + h**2 * variance * self._spread())
        moments = [torch.linalg.matrix_power(total, process.steps(time)) @ start for time in times]
        return torch.stack(moments).view(len(times), *self._mean().shape)

    def sde_second_moment(
        self,
        x0: Tensor,
        times: Sequence[float],
        *,
        lr: float,
        weight_decay: float = 0.0,
        order: int = 1,
        noise: bool = True,
    ) -> Tensor:
        """Exact ``E (X_t, 1)(X_t, 1)^T`` of the SDE (2), (6) or of order 2: float64 [len(times), d + 1, d + 1]."""
        if order not in (1, 2):
            raise ValueError(f"order must be 1 or 2, got {order}")
        lr = number("lr", lr, above=0)
        weight_decay = number("weight_decay", weight_decay, least=0)
        times = [number("times", time, least=0) for time in times]
        drift = self._drift(weight_decay, lr / 2 if order == 2 else 0.0, 1.0)
        identity = torch.eye(drift.shape[0], dtype=torch.float64, device=drift.device)
        generator = torch.kron(drift, identity) + torch.kron(identity, drift) + float(noise) * lr * self._spread()
        start = self._start(x0).numpy()
        moments = [torch.from_numpy(scipy.linalg.expm(generator.numpy() * time) @ start) for time in times]
        return torch.stack(moments).view(len(times), *drift.shape)

    def _samples(self) -> Tensor:
        """A_i, float64 [n, d + 1, d + 1] with a last row of zeros."""
        a, y = self.features.double(), self.targets.double()
        rows = torch.cat([a, -y[:, None]], dim=1)
        columns = torch.cat([a, torch.zeros_like(y)[:, None]], dim=1)
        return columns[:, :, None] * rows[:, None, :]

    def _mean(self) -> Tensor:
        return self._samples().mean(0)

    def _spread(self) -> Tensor:
        """``E[D (x) D]`` for the centred batch matrix D: vec(S) -> vec(E D S D^T)."""
        centred = self._samples() - self._mean()
        n, size, _ = centred.shape
        products = torch.einsum("nij,nkl->ikjl", centred, centred) / n
        return self.noise_factor * products.reshape(size**2, size**2)

    def _drift(self, weight_decay: float, hessian_weight: float, mean_weight: float) -> Tensor:
        """``-(I + hessian_weight Hessian f)(mean_weight A + lambda)`` acting on z, last row zero."""
        mean = self._mean()
        decay = weight_decay * torch.eye(len(mean), dtype=torch.float64, device=mean.device)
        # The last entry of z is the constant 1, which nothing moves.
        decay[-1, -1] = 0
        hessian = mean.clone()
        # A derivative: the targets' column is constant in x.
        hessian[:, -1] = 0
        boost = torch.eye(len(mean), dtype=torch.float64, device=mean.device) + hessian_weight * (hessian + decay)
        return -boost @ (mean_weight * mean + decay)

    def _start(self, x0: Tensor) -> Tensor:
        check_vector("x0", x0, self.features.shape[1])
        z = torch.cat([x0.double(), torch.ones(1, dtype=torch.float64, device=x0.device)])
        return torch.outer(z, z).reshape(-1)


def _mean_and_variance(estimate: GradientEstimate) -> tuple[float, float]:
    if estimate.weights:
        return sum(estimate.weights), sum(w**2 for w in estimate.weights)
    return 1.0, estimate.noise_scale**2
