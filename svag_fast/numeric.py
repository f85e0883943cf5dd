"""The one check of a number that comes from outside: what is no number, or out of range, is refused by name.

Imports nothing that takes time, so that every module can use it.
"""

from __future__ import annotations

import math
import sys
from numbers import Integral, Real
from typing import Any

_LARGEST = sys.float_info.max


def number(
    name: str,
    value: Any,
    *,
    least: float = -_LARGEST,
    most: float = _LARGEST,
    above: float = -math.inf,
    below: float = math.inf,
) -> float:
    """Return ``value`` as a float: a finite number from ``least`` to ``most``, above ``above`` and below ``below``.

    Python's numbers, NumPy's, and arrays and tensors of one element are numbers; text, bools and complex ones are not.

    Raises:
        TypeError: it is no number.
        ValueError: it is out of range.
    """
    result = value if type(value) is float else real(name, value)
    if least <= result <= most and above < result < below:
        return result
    bounds = [f">= {least:g}"] if least > -_LARGEST else []
    bounds += [f"> {above:g}"] if above > -math.inf else []
    bounds += [f"<= {most:g}"] if most < _LARGEST else []
    bounds += [f"< {below:g}"] if below < math.inf else []
    raise ValueError(must_be(name, _with("a finite number", bounds), shown(value)))


def real(name: str, value: Any) -> float:
    """Return what is a number in the sense of :func:`number` as a float, which may be inf or nan."""
    plain = value
    if hasattr(value, "item"):
        try:
            plain = value.item()  # of NumPy and PyTorch: the Python value of one element
        except (RuntimeError, ValueError, TypeError):
            plain = None  # of several
    if isinstance(plain, bool) or not isinstance(plain, Real):
        raise TypeError(must_be(name, "a number", _typed(value)))
    try:
        return float(plain)
    except OverflowError as error:
        raise ValueError(must_be(name, "a finite number", shown(value))) from error


def integer(name: str, value: Any, *, least: int | None = None, most: int | None = None) -> int:
    """Return ``value``, an integer of Python's or NumPy's, as an int.

    Raises:
        TypeError: it is none, or a bool.
        ValueError: out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(must_be(name, "an integer", _typed(value)))
    result = int(value)
    if (least is not None and result < least) or (most is not None and result > most):
        bounds = [f">= {least}"] if least is not None else []
        bounds += [f"<= {most}"] if most is not None else []
        raise ValueError(must_be(name, _with("an integer", bounds), shown(value)))
    return result


# torch.optim begins its errors about these "Invalid NAME: VALUE".
_TORCH_NAMES = frozenset(
    {
        *("learning rate", "momentum value", "weight_decay value", "epsilon value", "alpha value"),
        *("beta parameter at index 0", "beta parameter at index 1"),
    }
)


def must_be(name: str, expected: str, got: object) -> str:
    """Return the error's sentence about an argument: torch.optim's own where ``name`` is one of its names."""
    if name in _TORCH_NAMES:
        return f"Invalid {name}: {got} (expected {expected})"
    return f"{name} must be {expected}, got {got}"


def shown(value: object) -> str:
    """Return a value as an error message shows it."""
    if isinstance(value, int) and abs(value) > 10**200:  # Python refuses to write some of them
        return "an integer of many digits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _typed(value: object) -> str:
    return f"{shown(value)} ({type(value).__name__})"


def _with(kind: str, bounds: list[str]) -> str:
    return f"{kind} {' and '.join(bounds)}" if bounds else kind
