r"""Weights of generalised SVAG: K batches, ``sum(w) == 1``, ``sum(w**2) == l``, least third moment.

The paper (Li, Malladi, Arora 2021, after Thm 4.3): any design that keeps the mean and multiplies the covariance by l
is a first-order approximation as well. The step's third moment carries the noise's own third cumulant times
``sum(w**3)`` (Lemma 4.7 (iii), general form), so that is what a good choice makes small.

Derivation. Write ``w = 1/K + u``: ``sum(u) = 0``, ``|u|^2 = l - 1/K = r^2`` and

    sum(w^3) = 1/K^2 + 3 r^2/K + sum(u^3),    |sum(u^3)| <= r^3 (K - 2)/sqrt(K (K - 1)).

The bound is reached at one coordinate against K - 1 equal ones. So:

* K = 2: the bound is zero, there is only SVAG's own solution ``(1 +- sqrt(2l - 1))/2``, with (3l - 1)/2.
* If the bound is less than ``1/K^2 + 3 r^2/K`` the least is at the extreme point: one negative weight
  ``1/K - r sqrt((K-1)/K)``, the others equal.
* Otherwise the third moment can be made exactly zero. Among those solutions the one with the least ``sum(w^4)`` is
  taken. At a stationary point of sum(w^4) under the three constraints ``4 w^3 = a + 2 b w + 3 c w^2`` for every
  weight, so there are at most three distinct weights: a finite search over their multiplicities.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from svag_fast.numeric import integer
from svag_fast.ops.checks import check_l
from svag_fast.ops.step import svag_coefficients


def svag_weights(l: float, batches: int = 2) -> tuple[float, ...]:
    """The weights of `batches` independent batches whose sum is 1, sum of squares l, and |sum of cubes| least.

    Args:
        l: SVAG's hyperparameter, any real number >= 1.
        batches: K >= 2. With two, these are SVAG's c1, c2 (paper, eq. 5).

    Returns:
        K floats in decreasing order. ``svag_weights(1.0)`` is ``(1.0, 0.0)``, SGD; with three or more batches l = 1
        is a combination that has SGD's covariance and a smaller third moment.

    Raises:
        ValueError: l is less than 1 or not finite, or fewer than two batches.

    >>> svag_weights(5.0)
    (2.0, -1.0)
    >>> three = svag_weights(16.0, batches=3)
    >>> abs(sum(w**3 for w in three)) < 1e-10
    True
    """
    l = check_l(l)
    batches = integer("batches", batches, least=2)
    if batches == 2:
        return svag_coefficients(l)
    # At the threshold itself the solutions meet in the extreme point, a double root that roots() may miss.
    if l < _threshold(batches) * (1 + 1e-9):
        radius = math.sqrt(l - 1 / batches)
        large = 1 / batches + radius / math.sqrt(batches * (batches - 1))
        return (*[large] * (batches - 1), 1 / batches - radius * math.sqrt((batches - 1) / batches))
    return min(_zero_third_moment(l, batches), key=lambda weights: sum(w**4 for w in weights))


def vanishing_third_moment_l(batches: int) -> float:
    """The least l at which K = `batches` weights can have ``sum(w**3) == 0``; infinite for K = 2.

    >>> round(vanishing_third_moment_l(3), 4)
    6.5497
    >>> vanishing_third_moment_l(2)
    inf
    """
    batches = integer("batches", batches, least=2)
    return math.inf if batches == 2 else max(1.0, _threshold(batches))


def _threshold(batches: int) -> float:
    """The least sum of squares at which sum(w**3) == 0 is within the bound, K >= 3; below 1 from K = 6 on."""
    # The largest root in r of r^3 (K - 2)/sqrt(K (K - 1)) = 1/K^2 + 3 r^2/K.
    cubic = (batches - 2) / math.sqrt(batches * (batches - 1))
    roots = np.roots([cubic, -3 / batches, 0, -1 / batches**2])
    radius = max(float(root.real) for root in roots if abs(root.imag) < 1e-9)
    return radius**2 + 1 / batches


def _zero_third_moment(l: float, batches: int) -> Iterator[tuple[float, ...]]:
    """Every solution of ``sum w = 1, sum w^2 = l, sum w^3 = 0`` with at most three distinct weights."""
    radius = math.sqrt(l - 1 / batches)
    target = -(1 / batches**2 + 3 * radius**2 / batches)
    # At a stationary point of sum(w^4) under three constraints each weight is a root of one cubic: at most three
    # levels.
    for first in range(1, batches - 1):
        for second in range(first, (batches - first) // 2 + 1):
            yield from _on_circle(np.array([first, second, batches - first - second]), radius, target)


def _on_circle(counts: np.ndarray, radius: float, target: float) -> Iterator[tuple[float, ...]]:
    """Solutions of given multiplicities: the circle ``u = r (cos t e1 + sin t e2)`` cut by ``sum u^3 = target``."""
    batches = int(counts.sum())
    # Orthonormal in the inner product weighted by the multiplicities, both orthogonal to the constant vector.
    e1 = np.array([1 / counts[0], -1 / (batches - counts[0]), -1 / (batches - counts[0])])
    e1 /= math.sqrt(float(counts @ e1**2))
    e2 = np.array([0.0, 1 / counts[1], -1 / counts[2]])
    e2 /= math.sqrt(float(counts @ e2**2))
    # With cos t = (1 - s^2)/(1 + s^2), sin t = 2s/(1 + s^2): a polynomial of degree six in s.
    cos, sin, one = np.poly1d([-1.0, 0, 1]), np.poly1d([2.0, 0]), np.poly1d([1.0, 0, 1])
    cubes = sum((float(counts[j]) * (cos * e1[j] + sin * e2[j]) ** 3 for j in range(3)), np.poly1d([0.0]))
    for root in np.roots((radius**3 * cubes - target * one**3).coeffs):
        # A double root comes out of roots() as a pair with small imaginary parts.
        if abs(root.imag) < 1e-6 * (1 + abs(root)):
            angle = _polish(2 * math.atan(root.real), counts, e1, e2, radius, target)
            levels = 1 / batches + radius * (math.cos(angle) * e1 + math.sin(angle) * e2)
            yield tuple(sorted(np.repeat(levels, counts).tolist(), reverse=True))


def _polish(angle: float, counts: np.ndarray, e1: np.ndarray, e2: np.ndarray, radius: float, target: float) -> float:
    """Newton steps on ``sum u^3 = target``: the roots of a degree-six polynomial are good to eight digits only."""
    for _ in range(4):
        u = radius * (math.cos(angle) * e1 + math.sin(angle) * e2)
        slope = 3 * float(counts @ (u**2 * radius * (math.cos(angle) * e2 - math.sin(angle) * e1)))
        # At a double root Newton's step would divide by nearly nothing.
        if abs(slope) < 1e-12 * radius**3:
            break
        angle -= (float(counts @ u**3) - target) / slope
    return angle
