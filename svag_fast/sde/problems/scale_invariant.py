r"""A scale-invariant toy with weight decay whose SDE has closed forms: the norm's path and the whole equilibrium.

``L_gamma(x) = -gamma . x/|x|`` on R^d, ``gamma = signal e_1 + noise_std e`` with standardised independent entries. With
u = x/|x| and P the projection onto u's complement,

    grad L_gamma = -P gamma/|x|,            G = signal^2 (1 - u_1^2)/|x|^2,
    Sigma = noise_std^2 P/|x|^2,            N = noise_std^2 (d - 1)/|x|^2.

Both drift and noise are orthogonal to x, so under the SDE (6) R = |X|^2 is not random at all:
``dR/dt = -2 lambda R + lr noise_std^2 (d - 1)/R``. At its equilibrium u follows Langevin dynamics on the sphere, whose
law is von Mises-Fisher with concentration ``2 R signal/(lr noise_std^2)`` (Mardia, Jupp, "Directional Statistics"): so
G's mean at equilibrium is a ratio of Bessel functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import scipy.special
import torch
from torch import Tensor

from svag_fast.numeric import integer, number
from svag_fast.sde.draws import Draws
from svag_fast.sde.laws import Gaussian, Law
from svag_fast.theory.closeness import Norms


def sde_weight_sq_norm(r0: float, time: float, *, diffusion: float, weight_decay: float) -> float:
    """R at `time` of ``dR/dt = -2 weight_decay R + diffusion/R``: eq. 9 where R E Tr Sigma-bar is a constant."""
    r0 = number("r0", r0, least=0)
    time, diffusion = number("time", time, least=0), number("diffusion", diffusion, least=0)
    weight_decay = number("weight_decay", weight_decay, least=0)
    decay = -4 * weight_decay * time
    # The limit of the other form, which divides by zero. expm1 keeps the digits where decay is small.
    relaxed = 2 * diffusion * time if weight_decay == 0 else -math.expm1(decay) * diffusion / (2 * weight_decay)
    return math.sqrt(r0**2 * math.exp(decay) + relaxed)


@dataclass(frozen=True)
class ScaleInvariantToy:
    """The problem of this module's docstring; states are ensembles [n, dim].

    `noise_std` and `law` are those of the whole batch gradient, of `batch_size` samples.
    """

    dim: int
    signal: float = 1.0
    noise_std: float = 1.0
    law: Law = field(default_factory=Gaussian)
    batch_size: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "dim", integer("dim", self.dim, least=2))
        object.__setattr__(self, "signal", number("signal", self.signal))
        object.__setattr__(self, "noise_std", number("noise_std", self.noise_std, least=0))
        object.__setattr__(self, "batch_size", number("batch_size", self.batch_size, above=0))

    @property
    def state_dim(self) -> int:
        """One: a state is a vector [d]."""
        return 1

    def at_batch_size(self, batch_size: float) -> ScaleInvariantToy:
        """The same samples in batches of another size (any positive real: the laws are infinitely divisible)."""
        batch_size = number("batch_size", batch_size, above=0)
        ratio = batch_size / self.batch_size
        return replace(self, noise_std=self.noise_std / ratio**0.5, law=self.law.averaged(ratio), batch_size=batch_size)

    def batch_grad(self, x: Tensor, weights: Sequence[float], draws: Draws) -> Tensor:
        """``sum_j weights[j] g_j``."""
        gamma = self.law.fill_(torch.empty_like(x), draws)
        if weights[0] != 1:
            gamma.mul_(weights[0])
        for weight in weights[1:]:
            gamma.add_(self.law.fill_(torch.empty_like(x), draws), alpha=weight)
        return self._project(x, gamma.mul_(-self.noise_std), -sum(weights) * self.signal)

    def mean_grad(self, x: Tensor) -> Tensor:
        """``-signal P e_1/|x|``."""
        return self._project(x, torch.zeros_like(x), -self.signal)

    def gaussian_grad(self, x: Tensor, noise_scale: float, draws: Draws) -> Tensor:
        """``grad L + noise_scale noise_std P z/|x|``."""
        noise = draws.normal_(torch.empty_like(x)).mul_(noise_scale * self.noise_std)
        return self._project(x, noise, -self.signal)

    def mean_grad_and_noise(self, x: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Both parts of the noisy gradient."""
        noise = draws.normal_(torch.empty_like(x)).mul_(self.noise_std)
        return self.mean_grad(x), self._project(x, noise, 0.0)

    def hessian_product(self, x: Tensor, v: Tensor) -> Tensor:
        """``((e_1.w) u + u_1 w)/|x| + P e_1 (u.v)/|x|^2``, times signal, ``w = P v/|x|`` being u's velocity."""
        self._check(x)
        norm = x.square().sum(1, keepdim=True).sqrt_()
        u = x / norm
        along = (u * v).sum(1, keepdim=True)
        w = (v - along * u) / norm
        pull = -u[:, :1] * u
        pull[:, 0] += 1
        return (w[:, :1] * u + u[:, :1] * w).add_(pull * along / norm).mul_(self.signal / norm)

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """G, N, R of each trajectory, exact at its state: three tensors [n]."""
        self._check(x)
        r = x.square().sum(1)
        return (
            self.signal**2 * (1 - x[:, 0].square() / r) / r,
            self.noise_std**2 * (self.dim - 1) / r,
            r,
        )

    def sde_weight_sq_norm(self, r0: float, time: float, *, lr: float, weight_decay: float) -> float:
        """R of the SDE (6) at `time`, exact for every trajectory, from R = `r0`: eq. 9 solved."""
        diffusion = lr * self.noise_std**2 * (self.dim - 1)
        return sde_weight_sq_norm(r0, time, diffusion=diffusion, weight_decay=weight_decay)

    def sde_equilibrium(self, *, lr: float, weight_decay: float) -> Norms:
        """The SDE's equilibrium, exact: eq. 12 with N = noise_std^2 (d-1)/R, and the von Mises-Fisher law for G."""
        lr = number("lr", lr, above=0)
        weight_decay = number("weight_decay", weight_decay, above=0)
        r = self.noise_std * math.sqrt(lr * (self.dim - 1) / (2 * weight_decay))
        # E (1 - u_1^2) = (d - 1) A(concentration)/concentration, A the ratio of Bessel functions.
        concentration = 2 * r * self.signal / (lr * self.noise_std**2)
        if concentration == 0:
            # Without a signal u is uniform, and each coordinate's square has the mean 1/d.
            spread = (self.dim - 1) / self.dim
        else:
            # Scaled by e^-x: the plain functions overflow, and the factor cancels in the ratio.
            bessel = scipy.special.ive([self.dim / 2, self.dim / 2 - 1], concentration)
            spread = (self.dim - 1) * float(bessel[0] / bessel[1]) / concentration
        return Norms(
            grad_sq_norm=self.signal**2 * spread / r,
            noise_trace=self.noise_std**2 * (self.dim - 1) / r,
            weight_sq_norm=r,
        )

    def _check(self, x: Tensor) -> None:
        if x.dim() != 2 or x.shape[1] != self.dim:
            raise ValueError(f"states must be of shape [n, {self.dim}], got {list(x.shape)}")

    def _project(self, x: Tensor, gamma: Tensor, first: float) -> Tensor:
        """``P (gamma + first e_1)/|x|``, over `gamma`."""
        self._check(x)
        gamma[:, 0] += first
        square = x.square().sum(1, keepdim=True)
        gamma.sub_(x * ((x * gamma).sum(1, keepdim=True) / square))
        return gamma.div_(square.sqrt_())
