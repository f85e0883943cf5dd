"""Steps that layers take inside of a backward pass, as soon as the rows of both batches are known.

Their weights have no gradient in memory, neither batch's: see `SVAG`'s ``in_backward``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from svag_fast.ops.checks import arithmetic
from svag_fast.ops.step_options import StepOptions
from svag_fast.ops.step_stats import rounding
from svag_fast.ops.weight_grad.shapes import Geometry
from svag_fast.ops.weight_step import step_of_halves_

# What a weight's step in a backward pass doesn't have: the option's value that is served.
_SERVED: dict[str, Any] = {
    "momentum": 0.0,
    "maximize": False,
    "compensated": False,
    "capturable": False,
    "replicas": None,
}


def check_in_backward(group: dict[str, Any]) -> None:
    """Refuse a group whose other options a step inside of the backward pass doesn't have.

    Raises:
        TypeError, ValueError: which option.
    """
    if not isinstance(group["in_backward"], bool):
        raise TypeError(f"in_backward must be a bool, got {group['in_backward']!r}")
    if not group["in_backward"]:
        return
    for name, value in _SERVED.items():
        if group[name] != value:
            raise ValueError(f"{name} must be {value} with in_backward=True, got {group[name]!r}")
    if group["backend"] == "cuda":
        raise ValueError("backend must be auto, triton, cpu or reference with in_backward=True, got 'cuda'")


class StepsInBackward:
    """The steps of one backward pass.

    Args:
        options: of each weight that may take its own: its group's, checked, and its backend.
    """

    def __init__(self, options: dict[Tensor, tuple[StepOptions, str]]) -> None:
        self.options = options
        self.raws: list[Tensor] = []
        self.rounding = 0.0

    def take(
        self, weight: Tensor, inputs: Tensor, output_grads: Tensor, geometry: Geometry, *, norms: bool
    ) -> tuple[bool, Tensor | None]:
        """Take a weight's step; returns whether it was taken, and each row's squared norm [2B] if asked.

        Args:
            weight: the parameter.
            inputs, output_grads: the layer's rows, the first batch's first, with each batch's 1/B in the latter.
            geometry: of the convolution.
            norms: whether each row's squared norm is wanted.
        """
        found = self.options.get(weight)
        if found is None or inputs.dtype != output_grads.dtype or arithmetic(inputs.dtype) != weight.dtype:
            return False, None
        options, backend = found
        with torch.no_grad():
            sq_norms, raw = step_of_halves_(weight, inputs, output_grads, geometry, options, backend, norms=norms)
        self.raws.append(raw)
        self.rounding = max(self.rounding, rounding([weight]))
        return True, sq_norms
