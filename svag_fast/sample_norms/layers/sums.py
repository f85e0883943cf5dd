"""Sums over the dimensions behind the samples."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def positions(x: Tensor) -> Tensor:
    """Σ_t over everything behind [B, C]."""
    return x.flatten(2).sum(2) if x.dim() > 2 else x


def wide(x: Tensor) -> Tensor:
    """At least float32: half-precision products are summed in it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def tokens(x: Tensor, kept: tuple[int, ...]) -> Tensor:
    """Σ_t over the dimensions between the samples and the last ones of shape `kept`."""
    between = x.shape[1 : x.dim() - len(kept)]
    return x.reshape(x.shape[0], math.prod(between), *kept).sum(1)


def all_but_first(x: Tensor) -> Tensor:
    """All dimensions but the first as one."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))
