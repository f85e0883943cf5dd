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
        raise TypeError(f"x0 must be a floating-point Tensor, such as torch.tensor(1.0), got {shown(x0)}")
    if not x0.is_floating_point():
        raise TypeError(f"x0 must be a floating-point Tensor, such as x0.double(), got one of {x0.dtype}")
    if x0.dim() < problem.state_dim:
        raise ValueError(
            f"x0 must be of at least {problem.state_dim} dimension for {type(problem).__name__}, got shape "
            f"{list(x0.shape)}"
        )


def check_vector(name: str, x: object, size: int) -> None:
    """Refuse what is no real Tensor [size].

    Raises:
        TypeError, ValueError: it is none.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor [{size}], got {shown(x)}")
    if x.shape != torch.Size([size]) or x.is_complex():
        raise ValueError(f"{name} must be a real Tensor [{size}], got {x.dtype} of shape {list(x.shape)}")
