"""The SVAG step with its four statistics as a user would write it."""

from __future__ import annotations

import torch
from torch import Tensor

from svag_fast import svag_coefficients


def eager(
    params: list[Tensor], grads1: list[Tensor], grads2: list[Tensor], *, lr: float, l: float, weight_decay: float
) -> list[Tensor]:
    c1, c2 = svag_coefficients(l)
    sums = [torch.zeros((), device=params[0].device) for _ in range(4)]
    for p, g1, g2 in zip(params, grads1, grads2, strict=True):
        for k, (a, b) in enumerate(((g1, g1), (g2, g2), (g1, g2), (p, p))):
            sums[k] = sums[k] + (a * b).sum()
        p -= (lr / l) * (c1 * g1 + c2 * g2 + weight_decay * p)
    return sums


def foreach(
    params: list[Tensor], grads1: list[Tensor], grads2: list[Tensor], *, lr: float, l: float, weight_decay: float
) -> list[Tensor]:
    sums, step = foreach_statistics(params, grads1, grads2), foreach_combined(grads1, grads2, l)
    torch._foreach_add_(step, params, alpha=weight_decay)
    torch._foreach_add_(params, step, alpha=-lr / l)
    return sums


def foreach_statistics(params: list[Tensor], grads1: list[Tensor], grads2: list[Tensor]) -> list[Tensor]:
    pairs = ((grads1, grads1), (grads2, grads2), (grads1, grads2))
    sums = [torch.stack([t.sum() for t in torch._foreach_mul(a, b)]).sum() for a, b in pairs]
    return [*sums, torch.stack(torch._foreach_norm(params)).square().sum()]


def foreach_combined(grads1: list[Tensor], grads2: list[Tensor], l: float) -> list[Tensor]:
    c1, c2 = svag_coefficients(l)
    step = list(torch._foreach_mul(grads1, c1))
    torch._foreach_add_(step, grads2, alpha=c2)
    return step
