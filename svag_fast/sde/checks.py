"""What the public functions of this package check: numbers, counts and states, with the offender named in the error."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


def check_number(name: str, value: Any, *, least: float = -math.inf, above: float = -math.inf) -> None:
    """Refuse what is no finite real number of at least `least` and above `above`.

    Raises:
        TypeError: no real number (a tensor and a text are none).
        ValueError: out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"Invalid {name}: {_shown(value)}, expected a number")
    number = float(value)
    if not (math.isfinite(number) and number >= least and number > above):
        bound = f" of at least {least:g}" if least > -math.inf else f" above {above:g}" if above > -math.inf else ""
        raise ValueError(f"Invalid {name}: {value}, expected a finite number{bound}")


def check_count(name: str, value: Any, *, least: int = 0) -> None:
    """Refuse what is no integer of at least `least`.

    Raises:
        TypeError: no integer.
        ValueError: out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"Invalid {name}: {_shown(value)}, expected an integer")
    if value < least:
        raise ValueError(f"Invalid {name}: {value}, expected at least {least}")


def check_state(x0: object, problem: Any) -> None:
    """Refuse what is no floating-point tensor of at least `problem`'s dimensions.

    Raises:
        TypeError, ValueError: it is none.
    """
    if not isinstance(x0, Tensor):
        raise TypeError(f"Invalid x0: {_shown(x0)}, expected a floating-point Tensor, such as torch.tensor(1.0)")
    if not x0.is_floating_point():
        raise TypeError(f"Invalid x0: a Tensor of {x0.dtype}, expected a floating-point one, such as x0.double()")
    if x0.dim() < problem.state_dim:
        raise ValueError(
            f"Invalid x0: shape {list(x0.shape)}, expected at least {problem.state_dim} dimension "
            f"for {type(problem).__name__}"
        )


def check_vector(name: str, x: object, size: int) -> None:
    """Refuse what is no real Tensor [size].

    Raises:
        TypeError, ValueError: it is none.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"Invalid {name}: {_shown(x)}, expected a Tensor [{size}]")
    if x.shape != torch.Size([size]) or x.is_complex():
        raise ValueError(f"Invalid {name}: {x.dtype} of shape {list(x.shape)}, expected a real Tensor [{size}]")


def _shown(value: object) -> str:
    if isinstance(value, (str, int, float, complex, type(None))):
        return repr(value)
    return f"a {type(value).__name__}"
