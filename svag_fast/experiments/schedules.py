"""Learning-rate schedules: a factor on lr as a function of the part of a run that is done, one curve for every l.

A schedule is a text, a shape with or without a warm-up in front of it:

    constant | step | cosine | triangle | milestones:F[,F...][*FACTOR]
    warmup:F+SHAPE

F is a part of the run's effective steps, such as 0.8 or 250/300. Parts rather than numbers of steps, since runs of
different batch sizes, which train for the same time, take different numbers of them.

Nothing here imports torch: `config` checks settings with it.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple, TypeAlias

from svag_fast.numeric import number, shown

Factor: TypeAlias = Callable[[float], float]

FLOOR = 1e-4  # the paper's, of the shapes that would reach 0
SHAPES: dict[str, Factor] = {
    # the part of the effective steps done, in [0, 1) -> factor on lr
    "constant": lambda done: 1.0,
    "cosine": lambda done: max(FLOOR, (1 + math.cos(math.pi * done)) / 2),
    # The paper's, appendix F.1: two cycles of heights 1 and 0.5.
    "triangle": lambda done: max(FLOOR, (1.0 if done < 0.5 else 0.5) * (1 - abs(4 * (done % 0.5) - 1))),
}
STEP = "milestones:0.8*0.1"  # what "step" is short for
GRAMMAR = "constant, step, cosine, triangle or milestones:F,... (F a part of the run: 0.8 or 250/300), after warmup:F+"

_DECIMAL = r"\d*\.?\d+(?:e-\d+)?"
_PART = re.compile(rf"({_DECIMAL})(?:/({_DECIMAL}))?", re.ASCII)


class _Schedule(NamedTuple):
    factor: Factor
    milestones: tuple[float, ...] | None
    """Where a piecewise constant factor changes; None for the others."""


def resolve(schedule: str | Factor) -> Factor:
    """Return a schedule as a function of the part of the effective steps that is done, from 0 up to but without 1.

    Args:
        schedule: a text (see above), or a function of your own. Its values must be numbers above 0.

    Raises:
        TypeError: neither a text nor a function.
        ValueError: a text that is no schedule; it is named. The function returned raises it too, where a function of
            your own gives anything but a finite number above 0.
    """
    if isinstance(schedule, str):
        return _parse(schedule).factor
    if not callable(schedule):
        raise TypeError(f"schedule must be {GRAMMAR}, or a function, got {shown(schedule)}")
    return lambda done: number(f"schedule({done:g})", schedule(done), above=0)


def starts(schedule: str | Factor, done: Callable[[int], float], steps: int) -> list[int] | None:
    """Return the steps at which a piecewise constant schedule begins and changes; None where it is none.

    Args:
        schedule: as `resolve` takes it.
        done: of a step's number, the part of the run that is done before it.
        steps: of the run.

    Raises:
        ValueError: a text that is no schedule.
    """
    if (parts := milestones(schedule)) is None:
        return None
    first = {0, *(bisect_left(range(steps), part, key=done) for part in parts)}
    return sorted(step for step in first if step < steps)


def milestones(schedule: str | Factor) -> tuple[float, ...] | None:
    """Return the parts of the run at which a piecewise constant schedule changes; None where it is none.

    Raises:
        ValueError: a text that is no schedule.
    """
    return _parse(schedule).milestones if isinstance(schedule, str) else None


@lru_cache(maxsize=64)
def _parse(text: str) -> _Schedule:
    warmup, plus, shape = text.partition("+") if text.startswith("warmup") else ("", "", text)
    found = _shape(STEP if shape == "step" else shape)
    if found is None or (warmup and not plus):
        raise ValueError(f"schedule must be {GRAMMAR}, got {shown(text)}")
    if not plus:
        return found
    length = _part(warmup.removeprefix("warmup:"))
    if length is None:
        raise ValueError(f"schedule must be warmup:F+SHAPE, F a part of the run between 0 and 1, got {shown(text)}")
    # Beside the shape, not before it: milestones stay where they are said to be.
    return _Schedule(lambda done: min(1.0, max(FLOOR, done / length)) * found.factor(done), None)


def _shape(text: str) -> _Schedule | None:
    """The schedule without a warm-up, or None where it is none of ours."""
    if text in SHAPES:
        return _Schedule(SHAPES[text], () if text == "constant" else None)
    name, _, rest = text.partition(":")
    if name != "milestones":
        return None
    listed, times, said = rest.partition("*")
    at = [_part(part) for part in listed.split(",")]
    if any(part is None for part in at):
        raise ValueError(f"schedule's milestones must be parts of the run between 0 and 1, got {shown(text)}")
    parts = tuple(part for part in at if part is not None)
    if any(later <= earlier for earlier, later in pairwise(parts)):
        raise ValueError(f"schedule's milestones must be ascending, got {shown(text)}")
    factor = float(said) if re.fullmatch(_DECIMAL, said, re.ASCII) else 0.1 if not times else math.nan
    if not 0 < factor <= 1:
        raise ValueError(f"schedule's factor, behind *, must be a number above 0 and at most 1, got {shown(text)}")
    return _Schedule(lambda done: float(factor ** sum(done >= part for part in parts)), parts)


def _part(text: str) -> float | None:
    """A part of the run, 0.8 or 250/300, between 0 and 1; None where it is none."""
    found = _PART.fullmatch(text)
    if found is None:
        return None
    above, below = float(found[1]), float(found[2] or 1)
    return above / below if 0 < above < below else None
