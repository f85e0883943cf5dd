"""The paper's figures, drawn from the runs of a preset: make and save them inside `svag_fast.plots.style.style`."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from svag_fast.analysis.reproduction import C_SQUARED, Reproduction
from svag_fast.analysis.runs import Run, group_by_l
from svag_fast.experiments.presets import FAILURE
from svag_fast.experiments.run_folder import Array
from svag_fast.plots.curves import LABEL_GAP, Line, end_labels, l_name, mean_line
from svag_fast.plots.style import GREY, INK, SGD_COLOR, l_colors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = {"SGD": SGD_COLOR, "NGD": "#0072B2", "GD": GREY}
_DENSITY = "#009E73"
_BLUE = "#0072B2"


def reproduction_figure(found: Reproduction) -> Figure:
    """Draw a preset's figure in the paper's form."""
    from matplotlib.figure import Figure

    kind = found.preset.kind
    width, height = (13.5, 5.6) if kind == "paths" else (10.5, 9.4) if kind == "scaling" else (10.5, 6.4)
    figure = Figure(figsize=(width, height), layout="constrained")
    draw = {"processes": _processes, "paths": _paths, "scaling": _scaling, "convergence": _convergence}[kind]
    draw(figure, found)
    scale = "" if found.scale == "paper" else f" ({found.scale} scale)"
    title = f"Figure {found.preset.figure}{scale}: {found.preset.shows}"
    if not found.preset.figure[0].isdigit():
        title = f"Appendix {found.preset.figure}{scale}: {found.preset.shows}"
    figure.suptitle(textwrap.fill(title, int(6.9 * width)), x=0.01, ha="left", fontsize=16, fontweight="bold")
    figure.supxlabel(textwrap.fill(_caption(found), int(11 * width)), x=0.01, ha="left", fontsize=11.5, color="#5B626B")
    return figure


def _caption(found: Reproduction) -> str:
    kind = found.preset.kind
    if kind == "paths":
        shown = found.paths[0].shown.shape[1]
        return f"{found.setting} · blue: {shown} paths · green: density of all at the end · grey: the SDE's"
    parts = [found.setting]
    config = next(iter(found.runs.values()))[0].config
    if kind != "scaling":
        parts.append(f"B = {config['batch_size']}, lr = {config['lr']:g}")
    parts.append(f"weight decay {config['weight_decay']:g}")
    if kind == "scaling":
        parts.append(f"lr = {config['lr'] / config['batch_size']:.3g} B · bars: 95 % intervals of the means")
    else:
        parts.append("lines: means over seeds, smoothed · bands: standard deviation of one run")
    return " · ".join(parts)


def _curve(axes: Axes, runs: Sequence[Run], label: str, color: str, rank: float) -> Line | None:
    mean = mean_line([run for run in runs if run.diverged_at is None], "test_accuracy")
    for run in runs:
        if run.diverged_at is not None:
            axes.plot(run.diverged_at, 0, "x", color=color, ms=11, mew=3, clip_on=False, zorder=4)
    if mean is None:
        return None
    x, y, deviation = mean
    low, high = (np.clip(100 * (y + sign * deviation), 0, 100) for sign in (-1, 1))
    axes.fill_between(x, low, high, color=color, alpha=0.13, lw=0, zorder=2)
    axes.plot(x, 100 * y, color=color, zorder=3)
    return Line(x, 100 * y, label, color, rank)


def _accuracy_axes(axes: Axes, lines: list[Line | None], total: float, steps: str, least: float = 0) -> None:
    drawn = [line for line in lines if line is not None]
    axes.set(xlim=(0, total), ylim=(least, 100), xlabel=steps, ylabel="test accuracy (%)")
    end_labels(axes, drawn, LABEL_GAP)


def _processes(figure: Figure, found: Reproduction) -> None:
    axes = figure.add_subplot()
    names = {"SGD": "SGD", "NGD": "NGD: Gaussian noise", "GD": "GD: no noise"}
    lines = [
        _curve(axes, runs, names[name], _COLORS[name], rank) for rank, (name, runs) in enumerate(found.runs.items())
    ]
    runs = [run for group in found.runs.values() for run in group]
    # All curves end near each other: what is of interest is at the top.
    lows = [float(np.min(line.y[len(line.y) // 8 :])) for line in lines if line is not None]
    least = 5 * math.floor(min(lows) / 5 - 1) if lows and min(lows) > 60 else 0
    _accuracy_axes(axes, lines, max(run.effective_steps for run in runs), "steps", least)


def _convergence(figure: Figure, found: Reproduction) -> None:
    axes = figure.add_subplot()
    (runs,) = found.runs.values()
    colors = l_colors([run.l for run in runs])
    lines = [_curve(axes, of_l, l_name(l), colors[l], l) for l, of_l in group_by_l(runs).items()]
    _accuracy_axes(axes, lines, max(run.effective_steps for run in runs), "effective steps  k/l")


def _scaling(figure: Figure, found: Reproduction) -> None:
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1.35])
    sizes = list(found.errors)
    left, right = sizes[0] / 1.5, sizes[-1] * 1.5
    known = {b: e for b, e in found.errors.items() if not math.isnan(e.value)}
    if known:
        lowest = min(e.value for e in known.values())
        bars = [0.0 if math.isnan(e.standard_error) else 100 * e.half_width() for e in known.values()]
        above.errorbar(
            list(known), [100 * e.value for e in known.values()], bars, fmt="o-", color=INK, ms=7, capsize=4, lw=1.6
        )
        above.axhline(100 * (1 + FAILURE) * lowest, color=SGD_COLOR, lw=1.6, ls="--")
        above.annotate(
            f"{100 * FAILURE:.0f} % above the lowest", (1, 100 * (1 + FAILURE) * lowest),
            xycoords=above.get_yaxis_transform(), xytext=(-4, 5), textcoords="offset points", ha="right",
            color=SGD_COLOR, weight="bold", size=12,
        )  # fmt: skip
    above.set(yscale="log", ylabel="final test error (%)")
    _plain(above)
    measured = [(b, m.equilibrium.nsr) for b, m in found.measured.items() if m is not None and m.equilibrium.nsr]
    ratios = [(b, 1 / nsr.value, nsr.half_width() / nsr.value**2) for b, nsr in measured if nsr.value > 0]
    for b, ratio, _ in ratios:
        if any(p.baseline.batch_size == b for p in found.predictions):
            grid = np.array([b, right * 4])
            below.plot(grid, ratio * grid / b, color=_BLUE, lw=0.9, ls="--", alpha=0.6, zorder=2)
    if ratios:
        at, values, half = (np.array(column) for column in zip(*ratios, strict=True))
        low = np.minimum(half, 0.9 * values)  # on a logarithmic axis no bar reaches 0
        below.errorbar(at, values, [low, half], fmt="o", color=_BLUE, ms=8, capsize=4, zorder=4, label="measured G/N")
        below.plot([], [], color=_BLUE, lw=0.9, ls="--", label="from each B that holds, G/N ∝ B")
        below.set_ylim(0.5 * values.min(), 3 * max(values.max(), C_SQUARED))
    below.axhline(1 / C_SQUARED, color=INK, lw=1.5, ls=":", label=f"1/C² = {1 / C_SQUARED:g}, the paper's threshold")
    stars = [star.value for p in found.predictions if (star := p.batch_size()) is not None]
    if stars:
        right = max(right, 1.5 * max(stars))
        label = f"B*, where it must have failed: {min(stars):.3g} to {max(stars):.3g}"
        span = (min(stars) / 1.015, max(stars) * 1.015)
        below.axvspan(*span, color=GREY, alpha=0.45, lw=0, zorder=1, label=label)
    if found.fails_from is not None:
        begin = _before(sizes, found.fails_from)
        for axes in (above, below):
            axes.axvspan(begin, right, color=SGD_COLOR, alpha=0.10, lw=0, zorder=0)
        above.annotate(
            "linear scaling fails", (begin, 0.96), xycoords=above.get_xaxis_transform(), xytext=(8, 0),
            textcoords="offset points", va="top", color=SGD_COLOR, weight="bold",
        )  # fmt: skip
    below.set(xscale="log", yscale="log", xlim=(left, right), xlabel="batch size B", ylabel="G/N,  signal to noise")
    ticks = [2.0**k for k in range(math.ceil(math.log2(left)), math.floor(math.log2(right)) + 1)]
    below.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    below.minorticks_off()
    _plain(below)
    below.legend(loc="upper left", fontsize=11)


def _before(sizes: Sequence[int], at: int) -> float:
    """Half-way, on a logarithmic axis, to the batch size before `at`."""
    place = sizes.index(at)
    return math.sqrt(sizes[place - 1] * at) if place else at / math.sqrt(2)


def _plain(axes: Axes) -> None:
    """Write the numbers of a logarithmic vertical axis out, at 1, 2 and 5."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axes.yaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _paths(figure: Figure, found: Reproduction) -> None:
    panels = figure.subplots(1, 2 * len(found.paths), sharey=True, width_ratios=[3.2, 1] * len(found.paths))
    low = min(float(np.quantile(of.end, 0.0005)) for of in found.paths)
    high = max(float(of.shown.max()) for of in found.paths)
    edges = np.linspace(low - 0.2, high, 90)
    sde = _density(found.paths[0].end, edges)
    for number, of in enumerate(found.paths):
        axes, side = panels[2 * number], panels[2 * number + 1]
        axes.plot(of.times, of.shown, color=_BLUE, lw=0.9, alpha=0.35)
        axes.set(title=f"({'abc'[number]}) {of.name}", xlim=(0, of.times[-1]), xlabel="time  k·lr/l")
        centres = (edges[1:] + edges[:-1]) / 2
        side.fill_betweenx(centres, _density(of.end, edges), color=_DENSITY, alpha=0.55, lw=0)
        side.plot(sde, centres, color=GREY, lw=1.6)
        side.set(xticks=[], xlim=(0, 1.7 * sde.max()))
        side.grid(visible=False)
        side.spines["bottom"].set_visible(False)
    panels[0].set_ylabel("x")
    panels[0].set_ylim(edges[0], edges[-1])


def _density(values: Array, edges: Array) -> Array:
    return np.histogram(values, edges, density=True)[0]
