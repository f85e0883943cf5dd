"""Activations with parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from svag_fast.sample_norms.layers.sums import all_but_first, positions, wide


def prelu(module: nn.PReLU, inputs: tuple[Any, ...], output_grad: Tensor) -> Mapping[str, Tensor]:
    """Σ_t b_t min(x_t, 0), over the channels too where they share one slope."""
    x = wide(inputs[0])
    rows = output_grad * x.clamp(max=0)
    if module.num_parameters == 1:
        return {"weight": all_but_first(rows).sum(1, keepdim=True)}
    return {"weight": positions(rows)}
