"""What the public functions of this package check of states, with the offender named in the error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from svag_fast.numeric import shown


def check_state(x0: object, problem: Any) -> None:
    """Refuse what is no floating-point tensor of at least `problem`'s dimensions.

    Raises:
        TypeError, ValueError: it is none.
    """
    if not isinstance(x0, Tensor):
        raise TypeError(f"Invalid x0: {shown(x0)}, expected a floating-point Tensor, such as torch.tensor(1.0)")
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
        raise TypeError(f"Invalid {name}: {shown(x)}, expected a Tensor [{size}]")
    if x.shape != torch.Size([size]) or x.is_complex():
        raise ValueError(f"Invalid {name}: {x.dtype} of shape {list(x.shape)}, expected a real Tensor [{size}]")
