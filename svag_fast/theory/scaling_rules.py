"""How learning rates follow the batch size: the linear and the square-root scaling rule."""

from __future__ import annotations

import math
from dataclasses import dataclass

from svag_fast.numeric import number


@dataclass(frozen=True)
class SGDRates:
    """Batch size and learning rate of SGD; weight decay stays as it is."""

    batch_size: float
    lr: float


@dataclass(frozen=True)
class AdaptiveRates:
    """Batch size and hyperparameters of Adam, or of RMSprop (``beta1`` None, ``beta2`` torch's ``alpha``)."""

    batch_size: float
    lr: float
    beta1: float | None
    beta2: float
    eps: float


def linear_scaling_rule(kappa: float, *, batch_size: float, lr: float) -> SGDRates:
    """Return (κB, κη), the linear scaling rule (Definition 2.1); weight decay is left alone.

    >>> linear_scaling_rule(16, batch_size=8, lr=0.1)
    SGDRates(batch_size=128.0, lr=1.6)
    """
    kappa, batch_size = number("kappa", kappa, above=0), number("batch_size", batch_size, above=0)
    lr = number("lr", lr, above=0)
    return SGDRates(float(kappa * batch_size), kappa * lr)


def square_root_scaling_rule(
    kappa: float, *, batch_size: float, lr: float, beta2: float, eps: float, beta1: float | None = None
) -> AdaptiveRates:
    """Return the square-root scaling rule for Adam and RMSprop (Malladi et al. 2022): the rates at batch size κB.

    η → √κ η, 1-β → κ(1-β) for β1 and β2, ε → ε/√κ. Without ``beta1``: RMSprop, ``beta2`` being torch's ``alpha``.
    Raises ValueError where κ(1-β) > 1, which no β >= 0 satisfies.

    >>> square_root_scaling_rule(4, batch_size=64, lr=1e-3, beta1=0.9, beta2=0.99, eps=1e-8)
    AdaptiveRates(batch_size=256.0, lr=0.002, beta1=0.6..., beta2=0.96, eps=5e-09)
    """
    kappa, batch_size = number("kappa", kappa, above=0), number("batch_size", batch_size, above=0)
    lr, eps = number("lr", lr, least=0), number("eps", eps, least=0)
    root = math.sqrt(kappa)
    return AdaptiveRates(
        float(kappa * batch_size),
        root * lr,
        None if beta1 is None else _scaled_beta("beta1", beta1, kappa),
        _scaled_beta("beta2", beta2, kappa),
        eps / root,
    )


def _scaled_beta(name: str, beta: float, kappa: float) -> float:
    beta = number(name, beta, least=0, below=1)
    if kappa * (1 - beta) > 1:
        raise ValueError(f"kappa * (1 - {name}) must be at most 1, got {kappa * (1 - beta):.6g} ({name} = {beta})")
    return beta - (kappa - 1) * (1 - beta)
