"""Each fused run's settings: read from one value for all or one for each, and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

from svag_fast.numeric import integer, number
from svag_fast.ops.checks import check_representable
from svag_fast.ops.step import svag_coefficients

Schedule: TypeAlias = "float | Sequence[tuple[int, float]]"


@dataclass(frozen=True)
class RunSettings:
    """One replica's."""

    seed: int
    batch_size: int
    l: float
    weight_decay: float
    rate_from: list[int]
    rates: list[float]

    def fields(self, step: int, to_step: int, last_step: int) -> tuple[Any, ...]:
        """What the kernel is told of the run."""
        c1, c2 = svag_coefficients(self.l)
        settings = (self.seed, self.batch_size, self.l, c1, c2, self.weight_decay, self.rate_from, self.rates)
        return (*settings, step, to_step, last_step)


def run_settings(count: int, seeds: Any, batch_size: Any, lr: Any, l: Any, weight_decay: Any) -> list[RunSettings]:
    """Return each replica's settings, checked."""
    schedules = [_schedule(f"lr[{s}]", value) for s, value in enumerate(_each_schedule(lr, count))]
    keys = listed("seeds", seeds)
    if len(keys) != count:
        raise ValueError(f"seeds must be one for each of the {count} replicas, got {len(keys)}")
    settings = [
        RunSettings(
            integer(f"seeds[{s}]", seed, least=0, most=2**64 - 1),
            integer("batch_size", size, least=1, most=2**31),
            number("l", own_l, least=1),
            number("weight_decay", decay, least=0),
            *schedule,
        )
        for s, (seed, size, own_l, decay, schedule) in enumerate(
            zip(
                keys,
                one_each("batch_size", batch_size, count),
                one_each("l", l, count),
                one_each("weight_decay", weight_decay, count),
                schedules,
                strict=True,
            )
        )
    ]
    for s, own in enumerate(settings):
        for rate in own.rates:
            check_representable(torch.float32, f"replica {s}", rate, own.l, own.weight_decay)
    return settings


def listed(name: str, values: Any) -> list[Any]:
    """Return the members of a sequence or a tensor."""
    if isinstance(values, (str, bytes)):
        raise TypeError(f"{name} must be a sequence, got {values!r}")
    try:
        return list(values.tolist() if isinstance(values, Tensor) else values)
    except TypeError as error:
        raise TypeError(f"{name} must be a sequence, got {values!r}") from error


def one_each(name: str, value: Any, count: int) -> list[Any]:
    """Return one value for each replica, of one for all or of one each."""
    if isinstance(value, (str, bytes)) or not hasattr(value, "__len__") or getattr(value, "ndim", 1) == 0:
        return [value] * count
    values = listed(name, value)
    if len(values) != count:
        raise ValueError(f"{name} must be one for each of the {count} replicas, got {len(values)}")
    return values


def _is_piece(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and not any(isinstance(v, (tuple, list)) for v in value)


def _each_schedule(lr: Any, count: int) -> list[Any]:
    shared = isinstance(lr, (tuple, list)) and len(lr) > 0 and all(_is_piece(piece) for piece in lr)
    return [lr] * count if shared else one_each("lr", lr, count)


def _schedule(name: str, value: Any) -> tuple[list[int], list[float]]:
    """Return the steps from which learning rates hold, and these."""
    pieces = value if isinstance(value, (tuple, list)) else [(0, value)]
    if not pieces or not all(_is_piece(piece) for piece in pieces):
        raise TypeError(f"{name} must be a number or pairs (from step, learning rate), got {value!r}")
    starts = [integer(f"{name}'s step", start, least=0, most=2**62) for start, _ in pieces]
    if starts[0] != 0 or any(a >= b for a, b in pairwise(starts)):
        raise ValueError(f"{name} must be pieces that begin at step 0, then at ascending steps, got {starts}")
    return starts, [number("learning rate", rate, least=0) for _, rate in pieces]
