"""From where RMSprop's ``square_avg`` starts: RMSprop has no bias correction, so that ``l > 1`` can't start from zero.

From zero a step is lr/√l · g/(√((1-α)/l) |g|), of size lr/√(1-α) whatever l is, and the average needs l/(1-α) steps to
come up: the variance after one effective step grows like log l, and the limit does not exist.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from svag_fast.numeric import number
from svag_fast.ops.step_options import svag_coefficients

MEASURE = "measure"
MEASURED_STEPS = 100
"""With so many pairs a second moment has a relative standard error of at most √(2/100) for Gaussian noise."""


def check_start(value: Any, l: float) -> None:
    """Refuse what is neither None (at ``l = 1``), a number (positive at ``l > 1``), nor "measure"."""
    if value is None:
        if l != 1:
            raise ValueError(
                f'initial_square_avg must be "{MEASURE}" or a number at l = {l:g}, got None (RMSprop has no bias '
                "correction; the number is plain RMSprop's square_avg, the same at l = 1, if paths are to be compared)"
            )
    elif isinstance(value, str):
        if value != MEASURE:
            raise ValueError(f'initial_square_avg must be None, a number or "{MEASURE}", got {value!r}')
    else:
        if number("initial_square_avg", value, least=0) == 0 and l != 1:
            raise ValueError(f"initial_square_avg must be > 0 at l = {l:g}, got {value}")


def filled(zeros: Tensor, value: float, l: float) -> Tensor:
    """Return ``l * value`` in the shape and layout of ``zeros``.

    Raises:
        ValueError: the tensor's dtype has no such number.
    """
    start = zeros + l * float(value)
    if start.numel() and (not start.isfinite().all() or (value and not start.any())):
        raise ValueError(
            f"initial_square_avg, times l = {l:g}, must be a finite number above 0 in {zeros.dtype}, the dtype of a "
            f"parameter of shape {list(zeros.shape)}, got {value}"
        )
    return start


def second_moment(p: Tensor, g1: Tensor, g2: Tensor | None, l: float, weight_decay: float, maximize: bool) -> Tensor:
    """Return, entry by entry, an unbiased estimate of what ``square_avg`` averages at ``l``: E (c1 g1 + c2 g2 + λx)².

    The mean of that square and of the one with the batches exchanged: (∇L)² + l Σ_ii without decay, at l = 1
    (g1² + g2²)/2. In float64 for float64, else in float32.
    """
    dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
    c1, c2 = (-c if maximize else c for c in svag_coefficients(l))
    decay = weight_decay * p.to(dtype)
    g1 = g1.to(dtype)
    if g2 is None:
        return (c1 * g1 + decay).square()
    g2 = g2.to(dtype)
    return ((c1 * g1 + c2 * g2 + decay).square() + (c2 * g1 + c1 * g2 + decay).square()) / 2


def averaged(average: Tensor, new: Tensor, count: int, l: float) -> Tensor:
    """Return the mean over ``count + 1`` steps, given the one over ``count``, in its dtype and layout.

    After the last step entries that no gradient reached (an embedding's rows) get the mean of the others, since zero is
    no start.

    Raises:
        RuntimeError: it is not finite; or after the last step, at ``l > 1``, all of it is zero.
    """
    mean = average.to(new.dtype).lerp(new, 1 / (count + 1))
    if not mean.isfinite().all():
        raise RuntimeError(f"a gradient's square is not finite while square_avg is measured (shape {list(mean.shape)})")
    if count + 1 == MEASURED_STEPS and mean.numel():
        seen = mean != 0
        if seen.any():
            mean = mean.where(seen, mean[seen].mean())
        elif l != 1:
            raise RuntimeError(
                f"the gradient of a parameter of shape {list(mean.shape)} was zero in all {MEASURED_STEPS} steps in "
                "which square_avg was measured: give initial_square_avg a number for it, in a param group of its own"
            )
    return torch.empty_like(average).copy_(mean)
