"""The picture of the main job: does SVAG converge as l grows, and does SGD stay with the limit?"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from svag_fast.curves import Array, Run, group_by_batch_size, group_by_l
from svag_fast.estimate import Estimate
from svag_fast.plots import GREY, l_colors
from svag_fast.verdict import Verdict
from svag_fast.verdict_text import headline, unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SMOOTH = 0.08  # of the run: the window that drawn lines are averaged over
_LABEL_GAP = 0.062  # of the panel's height: the least distance between two labels at the right


@dataclass(frozen=True)
class _Line:
    """A drawn line and the words at its end; of lines that end together the one of higher rank is named above."""

    x: Array
    y: Array
    label: str
    color: str
    rank: float


def convergence_figure(runs: Sequence[Run], verdicts: Sequence[Verdict]) -> Figure:
    """Draw, for each batch size, the metric against effective steps for every l, and each l's distance to the largest.

    Lines are means over finished seeds, averaged over a moving window of the run; bands are one run's standard
    deviation about them; unfinished runs are thin lines. The upper axis is the SDE's time, the sum of lr/l. Every panel
    after the first carries the first one's largest l, in grey and against time: under the linear scaling rule the two
    have the same limit. Any number of batch sizes, finished runs or not, can be drawn.

    Args:
        runs: From :func:`svag_fast.curves.load_runs`.
        verdicts: From :func:`svag_fast.verdict.judge` on the same runs.

    Returns:
        The figure: make it, and save it with :func:`svag_fast.plots.save`, inside :func:`svag_fast.plots.style`.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    groups = list(group_by_batch_size(runs).values())
    columns = len(groups)
    width = 5.7 if columns < 3 else 4.8  # of a panel with its labels, in inches
    metric = verdicts[0].metric
    factor, _ = unit(metric)
    layout = ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.09, wspace=0.03)
    figure = Figure(figsize=(2.2 + width * columns, 7.6), layout=layout)
    axes = figure.subplots(2, columns, squeeze=False, height_ratios=[3, 1.2], sharey="row")
    colors = l_colors([run.l for run in runs])
    reference = None
    for column, (group, verdict) in enumerate(zip(groups, verdicts, strict=True)):
        _curves_panel(axes[0, column], group, verdict, colors, reference)
        _distance_panel(axes[1, column], verdict, colors, factor, width)
        reference = reference or _reference(group, verdict)
    axes[0, 0].set_ylabel(_axis_name(metric))
    if factor == 100:
        axes[0, 0].set_ylim(0, 100)
    axes[1, 0].set_ylabel("distance to\nlargest l" + (" (points)" if factor == 100 else ""), fontsize=12)
    measured = [c.curve for v in verdicts for c in v.comparisons.values() if c.curve is not None]
    if measured:
        axes[1, 0].set_ylim(0, 1.3 * factor * max(max(c.high, c.seed_noise) for c in measured))
    else:
        axes[1, 0].set_yticks([])
    _titles(figure, runs, verdicts)
    return figure


def _titles(figure: Figure, runs: Sequence[Run], verdicts: Sequence[Verdict]) -> None:
    width = figure.get_figwidth()
    title = textwrap.fill(headline(verdicts), int(width * 7.2))
    figure.suptitle(title, x=0.01, ha="left", fontsize=19, fontweight="bold")
    finished = sum(run.finished for run in runs)
    config = runs[0].config
    parts = [f"{config.get('dataset')}", f"{config.get('model')}", f"weight decay {config['weight_decay']:g}"]
    seeds = {len({run.seed for run in group}) for group in group_by_l(runs).values()}
    parts.append(f"{max(seeds)} seed{'s' if max(seeds) > 1 else ''}" + (" at most" if len(seeds) > 1 else ""))
    if finished < len(runs):
        parts.append(f"{finished} of {len(runs)} runs finished")
    parts.append("bands and grey bars: standard deviation of one run")
    caption = textwrap.fill(" · ".join(parts), int(width * 11))
    figure.supxlabel(caption, x=0.01, ha="left", fontsize=11.5, color="#5B626B")


def _curves_panel(
    axes: Axes,
    runs: Sequence[Run],
    verdict: Verdict,
    colors: Mapping[float, str],
    reference: tuple[Run, _Line] | None,
) -> None:
    factor, _ = unit(verdict.metric)
    lines = []
    total = max(run.effective_steps for run in runs)
    clock = max(runs, key=lambda run: (run.finished, run.l, len(run.metrics["effective_step"])))
    if reference is not None and _same_limit(reference[0], runs[0]):
        line = _at_same_time(*reference, clock)
        if line is not None:
            axes.plot(line.x, line.y, color=GREY, lw=5, alpha=0.55, zorder=1.5)
            lines.append(line)
    for l, group in group_by_l(runs).items():
        color = colors[l]
        for run in group:
            if not run.finished:
                x, y = run.series(verdict.metric) if len(run.metrics["effective_step"]) else (np.empty(0), np.empty(0))
                axes.plot(x, factor * y, color=color, lw=0.9, alpha=0.7, zorder=2)
        mean = _mean_line([run for run in group if run.finished], verdict.metric)
        if mean is None:
            continue
        x, y, sd = mean
        low, high = (
            np.clip(factor * (y + sign * sd), *((0, 100) if factor == 100 else (None, None))) for sign in (-1, 1)
        )
        axes.fill_between(x, low, high, color=color, alpha=0.13, lw=0, zorder=2)
        axes.plot(x, factor * y, color=color, lw=3 if l in (1, verdict.largest_l) else 2.2, zorder=3, label=_l_name(l))
        lines.append(_Line(x, factor * y, _l_name(l), color, l))
    axes.set_xlim(0, total)
    axes.set_xlabel("effective steps  k/l")
    axes.set_title(f"B = {verdict.batch_size},  lr = {verdict.lr:.4g}", pad=10)
    if not any(len(run.metrics["effective_step"]) for run in runs):
        axes.text(0.5, 0.5, "no run has come this far", transform=axes.transAxes, ha="center", color=GREY)
    _end_labels(axes, lines, 100.0 if factor == 100 else None)
    _time_axis(axes, clock, total)


def _distance_panel(axes: Axes, verdict: Verdict, colors: Mapping[float, str], factor: float, width: float) -> None:
    axes.set_title(_short_verdict(verdict), fontsize=13, weight="normal")
    axes.grid(visible=False, axis="x")
    if verdict.largest_l is None or not any(comparison.curve for comparison in verdict.comparisons.values()):
        axes.text(0.5, 0.5, "needs two finished seeds of two l", transform=axes.transAxes, ha="center", color=GREY)
        axes.set_xticks([])
        return
    ls = [*verdict.comparisons, verdict.largest_l]
    roomy = width > 1.1 * len(ls)
    for place, l in enumerate(ls):
        comparison = verdict.comparisons.get(l)
        if comparison is None:
            axes.plot(place, 0, "o", ms=9, mfc="white", mec=colors[l], mew=2, zorder=3, clip_on=False)
            axes.annotate("reference", (place, 0), (0, 9), textcoords="offset points", ha="center", color=GREY, size=11)
        elif comparison.curve is not None:
            found = comparison.curve
            axes.bar(place, factor * found.seed_noise, width=0.62, color="#DADDE1", zorder=1.5)
            size = factor * found.size.value
            errors = [[size - factor * found.low], [factor * found.high - size]]
            axes.errorbar(place, size, errors, fmt="o", ms=9, color=colors[l], capsize=4, elinewidth=2, zorder=3)
            error = factor * found.size.standard_error
            label = f"{size:.1f}" if factor == 100 else f"{size:.2g}"
            if roomy:
                label = f"{size:.1f} ± {error:.1f}" if factor == 100 else str(Estimate(size, error))
            above = (place, factor * found.high)
            axes.annotate(label, above, (0, 7), textcoords="offset points", ha="center", size=12, weight="bold")
    axes.set_xticks(range(len(ls)), ["SGD" if l == 1 else f"l = {l:g}" for l in ls])
    axes.set_xlim(-0.6, max(len(ls), 1) - 0.4)


def _short_verdict(verdict: Verdict) -> str:
    svag = {
        "converged": f"SVAG has converged by l = {verdict.converged_by or 0:g}",
        "not converged": f"SVAG has not converged by l = {verdict.largest_l or 0:g}",
        "cannot tell": "SVAG: cannot tell yet",
    }
    sgd = {
        "matches": "SGD matches it",
        "departs": "SGD departs",
        "cannot tell": "SGD: cannot tell yet",
        "not run": "no SGD",
    }
    return f"{svag[verdict.convergence]}; {sgd[verdict.sgd]}"


def _mean_line(runs: Sequence[Run], metric: str) -> tuple[Array, Array, Array] | None:
    """Effective steps, smoothed mean over seeds, and the standard deviation of one run (0 for a single one)."""
    if not runs:
        return None
    curves = [run.series(metric) for run in runs]
    x = min((x for x, _ in curves), key=len)
    values = np.array([np.interp(x, *curve) for curve in curves])
    breaks = _rate_drops(runs[0])
    sd = np.sqrt(_moving_mean(x, values.var(axis=0, ddof=1), breaks)) if len(runs) > 1 else np.zeros(len(x))
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


def _reference(runs: Sequence[Run], verdict: Verdict) -> tuple[Run, _Line] | None:
    """The largest l's curve of a panel, and a run whose times belong to it."""
    finished = [run for run in runs if run.finished and run.l == verdict.largest_l]
    mean = _mean_line(finished, verdict.metric)
    if mean is None:
        return None
    factor, _ = unit(verdict.metric)
    label = f"B = {verdict.batch_size}, l = {verdict.largest_l:g}"
    return finished[0], _Line(mean[0], factor * mean[1], label, "#6B727B", np.inf)


def _same_limit(a: Run, b: Run) -> bool:
    """Whether lr/B, and with it the SDE, is the same: the linear scaling rule."""
    return abs(a.lr * b.batch_size / (b.lr * a.batch_size) - 1) < 1e-6


def _at_same_time(source: Run, line: _Line, target: Run) -> _Line | None:
    """``line`` moved from the effective steps of ``source`` to those at which ``target`` has the same time."""
    if not target.finished:
        return None
    steps, times = target.series("time")
    time = np.interp(line.x, *source.series("time"))
    reached = time <= 1.01 * times[-1]  # milestones fall on whole steps: the two ends' times differ a little
    return _Line(np.interp(time, times, steps)[reached], line.y[reached], line.label, line.color, line.rank)


def _end_labels(axes: Axes, lines: Sequence[_Line], top: float | None) -> None:
    """Name each line at its right end, moved apart where they would overlap, with a hair line to the end."""
    if not lines:
        return
    if top is None:
        axes.autoscale_view()
        low, high = axes.get_ylim()
    else:
        low, high = 0.0, top
    gap = _LABEL_GAP * (high - low)
    ordered = sorted(lines, key=lambda line: (round(2 * float(line.y[-1]) / gap), line.rank))
    places = _spread([float(line.y[-1]) for line in ordered], gap, low + gap / 2, high)
    for line, place in zip(ordered, places, strict=True):
        axes.annotate(
            line.label,
            (1, float(line.y[-1])),
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


def _time_axis(axes: Axes, clock: Run, total: float) -> None:
    """Put the SDE's time on the upper edge, once a run has gone through all of it."""
    from matplotlib.ticker import MaxNLocator

    if not clock.finished:
        return
    steps, times = clock.series("time")
    top = axes.twiny()
    top.set_xlim(0, total)
    top.spines["top"].set_visible(True)
    top.grid(visible=False)
    ticks = [tick for tick in MaxNLocator(5).tick_values(0, times[-1]) if 0 <= tick <= times[-1]]
    top.set_xticks(np.interp(ticks, times, steps), [f"{tick:g}" for tick in ticks])
    top.set_xlabel("time of the SDE,  Σ lr/l", color="#5B626B", fontsize=12)
    top.tick_params(colors="#5B626B", labelsize=11)


def _l_name(l: float) -> str:
    return "SGD (l = 1)" if l == 1 else f"l = {l:g}"


def _axis_name(metric: str) -> str:
    name = metric.replace("_", " ")
    return f"{name} (%)" if unit(metric)[0] == 100 else name
