"""What the way in which a batch is drawn does to its noise: independent draws, or distinct samples of a finite set."""

from __future__ import annotations

import numpy as np


def noise_factor(batch_size: int, population: int | None) -> float:
    """Return N_B over Tr Σ₁/B: (n − B)/(n − 1) where a batch is B distinct samples of n, 1 for independent draws.

    Σ₁ is the covariance of one sample's gradient, with 1/n. Source: Cochran, "Sampling Techniques" (1977), theorem 2.2.

    Args:
        batch_size: B, at least 1.
        population: n, at least 2 and at least B; None for independent draws (with replacement).

    Raises:
        TypeError: not whole numbers.
        ValueError: out of range.

    >>> noise_factor(128, None), noise_factor(128, 1437), noise_factor(1437, 1437)
    (1.0, 0.911..., 0.0)
    """
    require_drawable(batch_size, population)
    return 1.0 if population is None else (population - batch_size) / (population - 1)


def halves_noise_factor(batch_size: int, population: int, l: float) -> float:
    """Return the noise of SVAG's step over l Tr Σ₁/B where its two batches are halves of 2B distinct samples of n.

    Tr Cov(c1 g1 + c2 g2) is (c1² + c2²) N + 2 c1 c2 E⟨g1 - ∇L, g2 - ∇L⟩. The last is -Tr Σ₁/(n − 1), so the factor is
    (n − B/l)/(n − 1). At l = 1 it is `noise_factor`'s. As l grows it tends to n/(n − 1), whatever B is: the SDE is that
    of independent draws, but for that.

    Args:
        batch_size: B, at least 1.
        population: n, at least 2B.
        l: SVAG's hyperparameter, at least 1; may be infinite.

    Raises:
        TypeError: sizes that are not whole numbers.
        ValueError: out of range.

    >>> halves_noise_factor(128, 1437, 1), halves_noise_factor(128, 1437, float("inf"))
    (0.911..., 1.00069...)
    """
    require_drawable(2 * batch_size, population)
    if not l >= 1:
        raise ValueError(f"l must be a number of at least 1, got {l}")
    return (population - batch_size / l) / (population - 1)


def require_drawable(batch_size: int, population: int | None) -> None:
    """Raise what :func:`noise_factor` does, unless such a batch can be drawn."""
    for value, name in ((batch_size, "the batch size"), (population, "population")):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | np.integer)):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if batch_size < 1:
        raise ValueError(f"the batch size must be at least 1, got {batch_size}")
    if population is not None and not 2 <= population >= batch_size:
        raise ValueError(f"population must be at least 2 and at least the {batch_size} samples drawn, got {population}")
