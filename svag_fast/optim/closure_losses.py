"""The losses that a closure returns at its two calls."""

from __future__ import annotations

import numbers
from typing import Any

from torch import Tensor


def detached(value: Any) -> Any:
    """Return a loss without its graph, which the second batch's needs no longer."""
    return value.detach() if isinstance(value, Tensor) else value


def mean(first: Any, second: Any) -> Any:
    """Return the mean of two losses; where they have none, the first that there is."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        averaged = first.shape == second.shape and first.device == second.device
    else:
        averaged = isinstance(first, numbers.Real) and isinstance(second, numbers.Real)
    if averaged:
        return (first + second) / 2
    return second if first is None else first
