"""Ensembles of random walks whose step and noise are affine in the state, all steps in one pass over the ensemble."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from svag_fast.numeric import number
from svag_fast.ops.backends import implements, select
from svag_fast.ops.checks import integer, numbers
from svag_fast.ops.memory import address, has_memory, mark_written
from svag_fast.ops.philox_normal import Key, check_stream, philox_normal_


@dataclass(frozen=True)
class AffineStep:
    """``x <- keep x + shift + (slope x + spread) e``, ``e = sum_j weights[j] z_j`` of fresh standard normals z_j."""

    keep: float
    shift: float
    slope: float
    spread: float
    weights: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        for name in ("keep", "shift", "slope", "spread"):
            object.__setattr__(self, name, number(name, getattr(self, name)))
        weights = tuple(numbers("weights", self.weights))
        if not weights:
            raise ValueError("weights must be one finite number or more, got none")
        object.__setattr__(self, "weights", weights)

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Refuse a step with a number that is infinite in ``dtype``."""
        for name in ("keep", "shift", "slope", "spread", "weights"):
            value = getattr(self, name)
            if max(map(abs, value if name == "weights" else (value,))) > torch.finfo(dtype).max:
                raise ValueError(f"{name} must be finite in {dtype}, got {value}")


def affine_walk_(
    x: Tensor,
    step: AffineStep,
    steps: int,
    *,
    key: Key,
    draw: int = 0,
    threads: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Take every trajectory in `x` through `steps` steps, in place.

    Trajectory i takes the normals of element i in draws ``draw + k K + j`` of the stream `key`, k the step, j the
    normal within it and K their number (:mod:`svag_fast.ops.philox_normal`): the result depends on nothing else.

    Args:
        x: float32 or float64, contiguous, any shape: one trajectory an element. A meta or fake tensor is left alone.
        step: what a step is.
        steps: how many, 0 or more.
        key: two integers in [0, 2^32).
        draw: the first step's first draw.
        threads: at most so many; default ``torch.get_num_threads()``.
        backend: a row of the table of backends.

    Returns:
        `x`.

    Raises:
        TypeError, ValueError: an argument is none of these.
        BackendError: the backend can't serve the call.
    """
    key, draw = check_stream(x, "x", key=key, draw=draw)
    if not isinstance(step, AffineStep):
        raise TypeError(f"step must be an AffineStep, got a {type(step).__name__}")
    step.check_dtype(x.dtype)
    steps = integer("steps", steps)
    threads = torch.get_num_threads() if threads is None else integer("threads", threads)
    if x.numel() > 2**33:
        raise ValueError(f"x must be of at most 2^33 elements, got {x.numel()}")
    if steps < 0 or draw + steps * len(step.weights) > 2**64:
        raise ValueError(f"steps must be >= 0 and make fewer than 2^64 draws, got {steps}")
    if not 1 <= threads < 2**31:
        raise ValueError(f"threads must be >= 1 and below 2^31, got {threads}")
    walk = select("affine_walk_", backend, [x])
    if has_memory(x):
        walk(x, step, steps, key, draw, threads)
        mark_written([x])
    return x


@implements("affine_walk_", "reference")
def _reference(x: Tensor, step: AffineStep, steps: int, key: Key, draw: int, threads: int) -> None:
    for _ in range(steps):
        e = torch.zeros_like(x)
        for weight in step.weights:
            e += weight * philox_normal_(torch.empty_like(x), key=key, draw=draw, backend="reference")
            draw += 1
        x.copy_((step.keep * x + step.shift) + (step.slope * x + step.spread) * e)


@implements("affine_walk_", "cpu")
def _cpu(x: Tensor, step: AffineStep, steps: int, key: Key, draw: int, threads: int) -> None:
    from svag_fast import _C

    _C.affine_walk(
        address(x, "x"),
        x.dtype == torch.float64,
        x.numel(),
        steps,
        step.keep,
        step.shift,
        step.slope,
        step.spread,
        step.weights,
        key,
        draw,
        threads,
    )
