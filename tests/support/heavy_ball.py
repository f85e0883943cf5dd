"""SVAG with momentum on f = x²/2 with noise of variance 1: its moments exactly, and by any implementation of the step.

A step is linear in x, v and the noise: x after k steps is its mean plus the noises' responses, each times its noise.
So a tensor of replicas that differ in one unit of noise, one for each step and batch, gives mean and variance exactly.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from svag_fast import svag_coefficients

LR, MOMENTUM, EFFECTIVE_STEPS = 0.05, 0.9, 20
# rule, l: mean and variance from x = 1 after 20 effective steps, as computed once, to the digits given.
KNOWN = {
    ("time", 1): (-0.121, 0.2193),
    ("time", 2): (-0.165, 0.2128),
    ("time", 4): (-0.186, 0.2102),
    ("time", 8): (-0.196, 0.2090),
    ("time", 16): (-0.2015, 0.2085),
    ("time", 32): (-0.2040, 0.2082),
    ("time", 64): (-0.2053, 0.2081),
    ("fixed", 1): (-0.121, 0.2193),
    ("fixed", 2): (0.116, 0.2483),
    ("fixed", 4): (0.0019, 0.2508),
    ("fixed", 64): (0.0, 0.2501),
}


def exact(l: int, rule: str, momentum: float = MOMENTUM, lr: float = LR) -> tuple[float, float]:
    """Return mean and variance by the recursion of the first two moments of (x, v)."""
    mu, rate = (1 - (1 - momentum) / l, lr / l**2) if rule == "time" else (momentum, lr / l)
    # v <- mu v + x + noise, x <- x - rate v; the combined gradient's noise has variance l.
    step = torch.tensor([[1 - rate, -rate * mu], [1.0, mu]], dtype=torch.float64)
    noise = torch.tensor([-rate, 1.0], dtype=torch.float64)
    mean, covariance = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    for _ in range(EFFECTIVE_STEPS * l):
        mean = step @ mean
        covariance = step @ covariance @ step.T + l * torch.outer(noise, noise)
    return float(mean[0]), float(covariance[0, 0])


def by_steps(l: int, step: Callable[[Tensor, Tensor, Tensor], None], dtype: torch.dtype) -> tuple[float, float]:
    """Return mean and variance from ``step(x, g1, g2)``, which updates x [1 + 2 * steps] of a given dtype in place."""
    steps = EFFECTIVE_STEPS * l
    x = torch.ones(1 + 2 * steps, dtype=dtype)
    for k in range(steps):
        g1, g2 = x.clone(), x.clone()
        g1[1 + 2 * k] += 1
        g2[2 + 2 * k] += 1
        step(x, g1, g2)
    mean, *replicas = x.double()
    return float(mean), float((torch.stack(replicas) - mean).square().sum())


def combine(l: float, g1: Tensor, g2: Tensor) -> Tensor:
    """Return the two-batch combination."""
    c1, c2 = svag_coefficients(l)
    return c1 * g1 if c2 == 0 else c1 * g1 + c2 * g2
