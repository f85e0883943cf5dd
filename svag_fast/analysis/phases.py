"""The parts of a run that are judged: each phase of constant learning rate, by its last half, and the end."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from svag_fast.analysis.runs import Run
from svag_fast.experiments.run_folder import Array

END = "end"
_LEAST = 0.1  # of the run: a shorter stretch of constant rate is no phase (a warm-up's step, a cosine's row)
SAME = 0.02  # of the run: two runs' phases may begin and end so far apart, since milestones fall on whole steps


def same_rate(a: Array, b: Array) -> npt.NDArray[np.bool_]:
    """Return where two learning rates are one, whatever a schedule's rounding."""
    return np.abs(a - b) <= 1e-9 * np.abs(b)


def constant_stretches(lr: Array, steps: Array) -> list[tuple[int, int, float, float]]:
    """Return each stretch of constant rate: its first and last row, and the steps at which it begins and ends."""
    if len(steps) == 0:
        return []
    changes = (np.flatnonzero(~same_rate(lr[:-1], lr[1:])) + 1).tolist()
    # A row holds the rate of the step before it, so a stretch begins at the last row of the one before.
    bounds = zip([0, *changes], [*(change - 1 for change in changes), len(lr) - 1], strict=True)
    return [(first, last, float(steps[max(first - 1, 0)]), float(steps[last])) for first, last in bounds]


def phases(run: Run) -> list[tuple[float, float]]:
    """Return the effective steps at which each phase of constant learning rate begins and ends."""
    stretches = constant_stretches(run.metrics["lr"], run.metrics["effective_step"])
    return [(begin, end) for _, _, begin, end in stretches if end - begin >= _LEAST * run.effective_steps]


def phase_rates(run: Run) -> dict[str, float]:
    """Return the learning rate of each part by its name, nan of an end that is in no phase: there it is moving."""
    lr = run.metrics["lr"]
    stretches = constant_stretches(lr, run.metrics["effective_step"])
    rows = [last for _, last, begin, end in stretches if end - begin >= _LEAST * run.effective_steps]
    rates = {f"phase {i}": float(lr[row]) for i, row in enumerate(rows, 1)}
    return rates | {END: float(lr[-1]) if len(lr) - 1 in rows else math.nan}


def same_within_rounding(rate: float, other: float) -> bool:
    """Whether two parts have the same rate, or both a moving one."""
    return abs(rate - other) <= 1e-6 * rate or (math.isnan(rate) and math.isnan(other))


def common_phases(runs: Sequence[Run]) -> dict[str, tuple[float, float]]:
    """Return the judged window of each part by its name: "phase 1", ... (its last half) and "end" (the value there).

    Raises:
        ValueError: The runs differ in length, phases or their rates, so that their parts cannot be compared; two of
            them are named.
    """
    first, *others = runs
    found = phases(first)
    for other in others:
        theirs = phases(other)
        # Not strict: another number of phases is refused below, with the same words.
        apart = [abs(a - b) for x, y in zip(found, theirs, strict=False) for a, b in zip(x, y, strict=True)]
        total = first.effective_steps
        if other.effective_steps != total or len(theirs) != len(found) or max(apart, default=0.0) > SAME * total + 1:
            raise ValueError(
                f"{first.name} has {_words(first, found)} and {other.name} {_words(other, theirs)}: runs that are "
                "compared must have the same length and schedule"
            )
        ours, others_rates = phase_rates(first), phase_rates(other)
        for part, rate in ours.items():
            if not same_within_rounding(rate, others_rates[part]):
                raise ValueError(
                    f"{first.name} has the rate {rate:g} in {part} (column lr of metrics.csv) and {other.name} "
                    f"{others_rates[part]:g}: runs that are compared must have the same schedule"
                )
    # The first half is left out: after a drop of the rate a run needs a while to its new equilibrium.
    windows = {f"phase {i}": ((begin + end) / 2, end) for i, (begin, end) in enumerate(found, 1)}
    return windows | {END: (math.nan, math.nan)}


def part_mean(run: Run, metric: str, part: str, window: tuple[float, float]) -> tuple[float, int]:
    """Return the run's mean of ``metric`` over a part, and over how many measurements; NaN and 0 where there are none.

    Raises:
        KeyError: metrics.csv has no such column.
    """
    if part == END:
        last = run.final(metric)
        return last, int(not math.isnan(last))
    steps, values = run.series(metric)
    begin, end = window
    rounding = 0.5 / run.l + 1e-6  # rows fall on whole steps of 1/l
    values = values[(steps > begin + rounding) & (steps <= end + rounding)]
    return (float(values.mean()), len(values)) if len(values) else (math.nan, 0)


def resolution(values: Array) -> float:
    """Return the least gap between two values: an accuracy's is one over the number of test images."""
    finite = np.unique(values[np.isfinite(values)])  # N/G may be infinite
    gaps = np.diff(finite)
    gaps = gaps[gaps > 1e-9 * np.abs(finite).max(initial=0.0)]  # less is one value that was rounded in two ways
    return float(gaps.min()) if len(gaps) else 0.0


def _words(run: Run, found: Sequence[tuple[float, float]]) -> str:
    stretches = ", ".join(f"{begin:g} to {end:g}" for begin, end in found) or "none"
    return f"{run.effective_steps:g} effective steps with phases of constant rate {stretches}"
