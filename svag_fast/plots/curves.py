"""Curves of runs and the names at their ends, as several figures draw them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from svag_fast.analysis.runs import Run
from svag_fast.analysis.verdict_text import unit
from svag_fast.experiments.run_folder import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SMOOTH = 0.08  # of the run: the window that drawn lines are averaged over
LABEL_GAP = 0.062  # of a large panel's height: the least distance between two labels at the right


@dataclass(frozen=True)
class Line:
    """A drawn line and the words at its end; of lines that end together the one of higher rank is named above."""

    x: Array
    y: Array
    label: str
    color: str
    rank: float


def mean_line(runs: Sequence[Run], metric: str) -> tuple[Array, Array, Array] | None:
    """Effective steps, smoothed mean over seeds, and the standard deviation of one run (0 for a single one)."""
    curves = [curve for run in runs if len((curve := run.series(metric))[0])]
    if not curves:
        return None
    x = min((x for x, _ in curves), key=len)
    values = np.array([np.interp(x, *curve) for curve in curves])
    breaks = _rate_drops(runs[0])
    sd = np.sqrt(_moving_mean(x, values.var(axis=0, ddof=1), breaks)) if len(curves) > 1 else np.zeros(len(x))
    return x, _moving_mean(x, values.mean(axis=0), breaks), sd


def _rate_drops(run: Run) -> Array:
    """Effective steps where the rate falls by half or more at once: curves have a corner there."""
    steps, lr = run.metrics["effective_step"], run.metrics["lr"]
    drops: Array = steps[1:][lr[1:] < 0.5 * lr[:-1]]
    return drops


def _moving_mean(x: Array, y: Array, breaks: Array) -> Array:
    """Mean over a centred window that is narrower at the start, where curves are steep, and crosses no break."""
    half = _SMOOTH / 2 * (x[-1] - x[0])
    part = np.searchsorted(breaks, x, side="right")
    means = np.empty_like(y)
    for i, at in enumerate(x):
        near = (np.abs(x - at) <= min(half, at - x[0]) + 1e-9 * half) & (part == part[i])
        means[i] = y[near].mean()
    return means


def end_labels(axes: Axes, lines: Sequence[Line], least_gap: float) -> None:
    """Name each line at its right end, moved apart where they would overlap, with a hair line to the end."""
    if not lines:
        return
    low, high = axes.get_ylim()
    gap = least_gap * (high - low)
    ordered = sorted(lines, key=lambda line: (round(2 * float(line.y[-1]) / gap), line.rank))
    places = _spread([float(line.y[-1]) for line in ordered], gap, low + gap / 2, high)
    for line, place in zip(ordered, places, strict=True):
        axes.annotate(
            line.label,
            (1, float(np.clip(line.y[-1], low, high))),
            (1.05, place),
            xycoords=axes.get_yaxis_transform(),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            color=line.color,
            weight="bold",
            size=12.5,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": line.color,
                "lw": 0.9,
                "shrinkA": 2,
                "shrinkB": 1,
                "relpos": (0, 0.5),
            },
        )


def _spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places as near to the wanted ones (ascending) as a least gap and two ends allow."""
    places = list(wanted)
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    if places:
        places[-1] = min(places[-1], high)
    for i in range(len(places) - 2, -1, -1):
        places[i] = min(places[i], places[i + 1] - gap)
    shift = max(0.0, low - places[0]) if places else 0.0
    return [place + shift for place in places]


def l_name(l: float) -> str:
    """What a line of this l is called."""
    return "SGD (l = 1)" if l == 1 else f"l = {l:g}"


def axis_name(metric: str) -> str:
    """What an axis of this metric is called."""
    name = metric.replace("_", " ")
    return f"{name} (%)" if unit(metric)[0] == 100 else name
