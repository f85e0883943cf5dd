"""The picture of the main job: the curves of every l, their limit, and the theorem itself, means against 1/l."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from svag_fast.analysis.phases import END, common_phases
from svag_fast.analysis.runs import Run, group_by_batch_size, group_by_l
from svag_fast.analysis.shared_limit import SharedLimit, same_sde, shared_limits
from svag_fast.analysis.verdict import Cell, Verdict
from svag_fast.analysis.verdict_text import headline, svag_answer, unit
from svag_fast.experiments.data.sampling import MODES
from svag_fast.experiments.task_file import short_name
from svag_fast.plots.curves import LABEL_GAP, Line, axis_name, end_labels, l_name, mean_line
from svag_fast.plots.style import GREY, INK, l_colors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LAW_LABEL_GAP = 0.33  # of the lower panels', for two lines
_MARKS = ("o", "s", "D", "^", "v")
_SOFT = "#5B626B"


def convergence_figure(runs: Sequence[Run], verdicts: Sequence[Verdict]) -> Figure:
    """Draw, for each batch size, the first metric's curves with their limit, and each metric's means against 1/l.

    Above, lines are means over finished runs, averaged over a moving window of the run. Bands are one run's standard
    deviation about them. Unfinished runs are thin lines, and diverged ones end in a cross. The black bars are the
    fitted limit of each phase with its interval, over the window that is averaged. The grey ones in later panels are
    the first panel's: under the linear scaling rule the two are the same. The upper axis is the SDE's time, the sum of
    lr/l.

    Below are the means over runs of each part against 1/l, with the line m_inf + a/l, solid where it was fitted. The
    limit with its interval is at 1/l = 0, and the shade around it is the margin. Any number of batch sizes, finished
    runs or not, can be drawn.

    Args:
        runs: From :func:`svag_fast.analysis.runs.load_runs`.
        verdicts: From :func:`svag_fast.analysis.verdict.judge` on the same runs.

    Returns:
        The figure: make it, and save it with :func:`svag_fast.plots.save`, inside :func:`svag_fast.plots.style`.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    groups = list(group_by_batch_size(runs).values())
    columns = len(groups)
    metrics = list(verdicts[0].cells)
    width = 5.7 if columns < 3 else 4.6  # of a panel with its labels, in inches
    layout = ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.09, wspace=0.03)
    figure = Figure(figsize=(2.2 + width * columns, 5.6 + 2.3 * len(metrics)), layout=layout)
    axes = figure.subplots(1 + len(metrics), columns, squeeze=False, height_ratios=[3] + [1.7] * len(metrics))
    colors = l_colors([run.l for run in runs])
    for column in range(1, columns):
        # One scale for all batch sizes: whether they share a limit is seen by eye.
        axes[0, column].sharey(axes[0, 0])
        axes[0, column].tick_params(labelleft=False)
    shared = shared_limits(verdicts)
    lines = [_curves(a, g, v, metrics[0], colors) for a, g, v in zip(axes[0], groups, verdicts, strict=True)]
    # In a second pass, since labels and limits are placed on the scale that all curves have set together.
    for column, (group, verdict) in enumerate(zip(groups, verdicts, strict=True)):
        first = verdicts[0] if column and same_sde(verdicts[0], verdict) else None
        _limits_and_labels(axes[0, column], group, verdict, metrics[0], lines[column], first)
        for row, metric in enumerate(metrics, 1):
            _law_panel(axes[row, column], verdict, metric, colors)
        said = _short_verdict(verdict) + [
            _short_shared(s) for s in shared if (s.batch_size, s.lr) == (verdict.batch_size, verdict.lr)
        ]
        title = "\n".join(textwrap.fill(line, int(width * 8.5)) for line in said)
        axes[1, column].set_title(title, fontsize=13, weight="normal")
        axes[-1, column].set_xlabel("1/l    (0: the limit,  1: SGD)")
    for row, metric in zip(axes[:, 0], [metrics[0], *metrics], strict=True):
        row.set_ylabel(axis_name(metric))
    _titles(figure, runs, verdicts)
    return figure


def _titles(figure: Figure, runs: Sequence[Run], verdicts: Sequence[Verdict]) -> None:
    width = figure.get_figwidth()
    title = textwrap.fill(headline(verdicts), int(width * 7.2))
    figure.suptitle(title, x=0.01, ha="left", fontsize=19, fontweight="bold")
    finished = sum(run.finished and run.diverged_at is None for run in runs)
    diverged = sum(run.diverged_at is not None for run in runs)
    config = runs[0].config
    task = config.get("task")
    parts = [short_name(str(task))] if task else [f"{config.get('dataset')}", f"{config.get('model')}"]
    parts.append(f"weight decay {config['weight_decay']:g}")
    parts += [f"{100 * noise:g} % label noise"] if (noise := config.get("label_noise")) else []
    seeds = {len({run.seed for run in group}) for group in group_by_l(runs).values()}
    parts.append(f"{max(seeds)} seed{'s' if max(seeds) > 1 else ''}" + (" at most" if len(seeds) > 1 else ""))
    said = {"shared": "one initialisation for all runs", "own": "each run from its own initialisation"}
    parts += [said[config["init"]]] if config.get("init") in said else []
    parts += [MODES[verdicts[0].sampling].text] if verdicts[0].sampling else []
    if finished < len(runs):
        parts.append(f"{finished} of {len(runs)} runs finished")
    if diverged:
        parts.append(f"{diverged} diverged (×)")
    parts.append("colour bands: standard deviation of one run")
    level = f"{100 * verdicts[0].confidence:g} % interval"
    parts.append(f"bars on means: standard error, on limits: {level}; green: the margin about the limit")
    caption = textwrap.fill(" · ".join(parts), int(width * 11))
    figure.supxlabel(caption, x=0.01, ha="left", fontsize=11.5, color=_SOFT)


def _curves(axes: Axes, runs: Sequence[Run], verdict: Verdict, metric: str, colors: Mapping[float, str]) -> list[Line]:
    """Draw one batch size's curves, and return the means over runs."""
    factor, _ = unit(metric)
    lines = []
    for l, group in group_by_l(runs).items():
        color = colors[l]
        for run in group:
            if not run.finished or run.diverged_at is not None:
                _unfinished_line(axes, run, metric, color)
        mean = mean_line([run for run in group if run.finished and run.diverged_at is None], metric)
        if mean is None:
            continue
        x, y, sd = mean
        low, high = (
            # An accuracy's band must not leave 0 to 100 %.
            np.clip(factor * (y + sign * sd), *((0, 100) if factor == 100 else (None, None)))
            for sign in (-1, 1)
        )
        axes.fill_between(x, low, high, color=color, alpha=0.13, lw=0, zorder=2)
        axes.plot(x, factor * y, color=color, lw=3 if l in (1, verdict.largest_l) else 2.2, zorder=3, label=l_name(l))
        lines.append(Line(x, factor * y, l_name(l), color, l))
    if factor == 100:
        axes.set_ylim(0, 100)
    axes.set_title(f"B = {verdict.batch_size},  lr = {verdict.lr:.4g}", pad=10)
    if not any(len(run.metrics["effective_step"]) for run in runs):
        axes.text(0.5, 0.5, "no run has come this far", transform=axes.transAxes, ha="center", color=GREY)
    return lines


def _limits_and_labels(
    axes: Axes, runs: Sequence[Run], verdict: Verdict, metric: str, lines: list[Line], first: Verdict | None
) -> None:
    """Add each phase's limit, names at the right, and the time axis, once all panels' curves have set the scale."""
    factor, _ = unit(metric)
    total = max(run.effective_steps for run in runs)
    axes.autoscale(enable=False, axis="y")  # a wide interval of the limit must not squeeze the curves
    ended = [run for run in runs if run.finished and run.diverged_at is None]
    windows = {part: window for part, window in common_phases(ended).items() if part != END} if ended else {}
    if first is not None:
        lines += _limit_bars(axes, windows, first.cells[metric], factor, GREY, f"limit at B = {first.batch_size}", 1e9)
    # The ranks put both limits' names above the curves', which l ranks.
    lines += _limit_bars(axes, windows, verdict.cells[metric], factor, INK, "limit", 2e9)
    axes.set_xlim(0, total)
    axes.set_xlabel("effective steps  k/l")
    end_labels(axes, lines, LABEL_GAP)
    _time_axis(axes, max(runs, key=lambda run: (run.finished, run.l, len(run.metrics["effective_step"]))), total)


def _unfinished_line(axes: Axes, run: Run, metric: str, color: str) -> None:
    """Draw a run that has not come to its end, thinly, and a cross where it diverged."""
    if not len(run.metrics["effective_step"]):
        return
    factor, _ = unit(metric)
    x, y = run.series(metric)
    # Up to its last finite value: from there a dotted line leads to the cross.
    x, y = x[np.isfinite(y)], factor * y[np.isfinite(y)]
    axes.plot(x, y, color=color, lw=0.9, alpha=0.7, zorder=2)
    if run.diverged_at is not None and len(y):
        axes.plot([x[-1], run.diverged_at], [y[-1], y[-1]], color=color, lw=0.9, ls=":", zorder=2)
        axes.plot(run.diverged_at, y[-1], "x", color=color, ms=11, mew=3, zorder=4, clip_on=False)


def _limit_bars(
    axes: Axes,
    windows: Mapping[str, tuple[float, float]],
    cells: Mapping[str, Cell],
    factor: float,
    color: str,
    label: str,
    rank: float,
) -> list[Line]:
    """Draw each phase's limit and its interval over the window that is averaged; return the last as a labelled line."""
    drawn = []
    for part, (begin, end) in windows.items():
        cell = cells.get(part)
        if cell is None or cell.limit is None or cell.limit_interval is None:
            continue
        low, high = (factor * value for value in cell.limit_interval)
        axes.fill_between([begin, end], low, high, color=color, alpha=0.16, lw=0, zorder=1.5)
        axes.plot([begin, end], [factor * cell.limit] * 2, color=color, lw=2, ls=(0, (4, 1.5)), zorder=3.6)
        drawn.append(Line(np.array([begin, end]), np.full(2, factor * cell.limit), label, color, rank))
    return drawn[-1:]


def _law_panel(axes: Axes, verdict: Verdict, metric: str, colors: Mapping[float, str]) -> None:
    """Draw one metric's means against 1/l, on the scale of the means: an interval may leave the panel."""
    factor, _ = unit(metric)
    axes.grid(visible=False, axis="x")
    axes.set_xlim(-0.07, 1.05)
    cells = {part: cell for part, cell in _shown_parts(verdict, metric).items() if cell.means}
    if not cells:
        axes.text(0.5, 0.5, "no run has finished", transform=axes.transAxes, ha="center", color=GREY)
        axes.set(xticks=[], yticks=[])
        return
    levels = [factor * mean.value for cell in cells.values() for mean in cell.means.values()]
    limits = [factor * cell.limit for cell in cells.values() if cell.limit is not None]
    # The means set the scale. Limits and intervals may be far off, and would squeeze all that was measured into a line.
    room = 0.3 * (max(levels) - min(levels)) or 0.1 * abs(levels[0]) or 1.0
    inside = np.clip([*levels, *limits], min(levels) - room, max(levels) + room)
    bars = max((factor * (m.standard_error or 0) for cell in cells.values() for m in cell.means.values()), default=0.0)
    pad = max(0.4 * room, min(1.2 * bars, 2 * room))
    axes.set_ylim(inside.min() - pad, inside.max() + pad)
    axes.set_yticks([tick for tick in axes.get_yticks() if axes.get_ylim()[0] <= tick <= axes.get_ylim()[1]])
    lines = [_law(axes, part, cell, i, factor, colors) for i, (part, cell) in enumerate(cells.items())]
    end_labels(axes, lines, _LAW_LABEL_GAP)
    ls = sorted({l for cell in cells.values() for l in cell.means}, reverse=True)
    ticks = [0.0, *(1 / l for l in ls)]
    names = ["0", *("1" if l == 1 else f"1/{l:g}" for l in ls)]
    for i in reversed(range(1, len(ticks) - 1)):  # names that would touch their neighbour's are left out
        right = next(tick for tick, text in zip(ticks[i + 1 :], names[i + 1 :], strict=True) if text)
        # A tenth of the axis is about a name's width.
        if ticks[i] < 0.1 or right - ticks[i] < 0.1:
            names[i] = ""
    axes.set_xticks(ticks, names)


def _law(axes: Axes, part: str, cell: Cell, index: int, factor: float, colors: Mapping[float, str]) -> Line:
    """Draw one part's means, its fitted line and limit; return the line to label, which ends at SGD."""
    for l, mean in cell.means.items():
        bar = None if mean.standard_error is None else factor * mean.standard_error
        mark = _MARKS[index % len(_MARKS)]
        axes.errorbar(
            1 / l, factor * mean.value, bar, fmt=mark, ms=8, color=colors[l], capsize=3, elinewidth=1.6, zorder=3
        )
    least = min(cell.means)
    end = factor * cell.means[least].value
    if cell.limit is not None and cell.slope is not None and cell.limit_interval is not None:
        assert cell.margin is not None  # comes with the limit
        limit, slope, margin = (factor * value for value in (cell.limit, cell.slope, cell.margin))
        axes.axhspan(limit - margin, limit + margin, color="#DCE9DF", lw=0, zorder=1)
        known, beyond = 1 / cell.fitted[0], 1 / least
        axes.plot([0, known], [limit, limit + slope * known], color=INK, lw=1.6, zorder=2)
        # Dotted where the line was not fitted: there it is only a comparison.
        axes.plot([known, beyond], [limit + slope * x for x in (known, beyond)], color=INK, lw=1.2, ls=":", zorder=2)
        low, high = (factor * value for value in cell.limit_interval)
        axes.errorbar(
            0, limit, [[limit - low], [high - limit]], fmt=_MARKS[index % len(_MARKS)], ms=8, mfc="white", mec=INK,
            ecolor=INK, capsize=3, elinewidth=1.6, zorder=4,
        )  # fmt: skip
    label = f"{part}\n{cell.answer}" if cell.sgd else part
    return Line(np.array([1.0]), np.array([end]), label, INK, index)


def _shown_parts(verdict: Verdict, metric: str) -> Mapping[str, Cell]:
    """The phases; or the end, where there is no phase (it is on the last phase's points otherwise)."""
    cells = verdict.cells[metric]
    return {part: cell for part, cell in cells.items() if part != END} or cells


def _short_verdict(verdict: Verdict) -> list[str]:
    if verdict.answer == "diverged":
        return ["every run diverged: no verdict"]
    said = {
        "matches": "SGD matches the limit",
        "departs": "SGD departs from the limit",
        "open": "open: does SGD match the limit?",
    }
    sgd = "SGD diverged: it departs" if verdict.sgd_diverged and verdict.answer == "departs" else said[verdict.answer]
    cells = [cell for parts in verdict.cells.values() for cell in parts.values()]
    answer, by = svag_answer(cells)
    svag = "open: has SVAG converged?" if answer == "open" else f"SVAG has {answer} by l = {by:g}"
    law = ["the 1/l regime is not reached"] if any(cell.regime_reached is False for cell in cells) else []
    return [sgd, svag, *law]


def _short_shared(shared: SharedLimit) -> str:
    said = {
        "matches": "the same limit as at B = {}",
        "departs": "not the limit of B = {}",
        "open": "open: the limit of B = {}?",
    }
    return said[shared.answer].format(
        f"{shared.reference}" + (f", lr {shared.reference_lr:g}" if shared.several_rates else "")
    )


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
