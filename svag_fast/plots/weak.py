"""weak.png: the differences from the limit against l, on logarithmic axes, beside a line of slope -1."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from svag_fast.analysis.weak import WeakReport
from svag_fast.plots.style import GREY, INK, l_colors
from svag_fast.stats.weak_order import SIGNIFICANT, WeakOrder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = ("test loss", "train loss", "|x|²", "N")
_MARKERS = "os^Dv<>ph"


def weak_figure(report: WeakReport, title: str) -> Figure:
    """Return a figure with a panel for each of four test functions; make and save it inside `style`."""
    from matplotlib.figure import Figure

    times = sorted({time for time, _ in report.orders})
    colors = list(l_colors([2.0 + i for i in range(len(times))]).values())
    figure = Figure(figsize=(13.5, 10), layout="constrained")
    names = [name for name in SHOWN if any(name == there for _, there in report.orders)]
    axes = figure.subplots(2, 2, sharex=True)
    for ax, name in zip(axes.flat, names, strict=False):
        _panel(ax, name, {time: report.orders[time, name] for time in times}, colors)
    for ax in axes[-1]:
        ax.set_xlabel("l")
    for ax in axes[:, 0]:
        ax.set_ylabel("|m(l) − m∞|")
    slope, low, high = report.common
    told = f"common slope {slope:.2f}  [{low:.2f}, {high:.2f}]" if not math.isnan(slope) else "slope: cannot be told"
    figure.suptitle(f"Theorem 4.3 on a net: {told}\n", fontsize=19, fontweight="bold", x=0.01, ha="left")
    figure.text(0.011, 0.945, title, fontsize=13, color=INK, ha="left")
    return figure


def _panel(ax: Axes, name: str, orders: dict[int, WeakOrder], colors: list[str]) -> None:
    ax.set_title(name)
    ax.set(xscale="log", yscale="log")
    ls = np.array([1.0])
    lowest, highest = math.inf, 0.0
    for i, (time, order) in enumerate(orders.items()):
        ls, d, e = order.ls, np.abs(order.differences), order.difference_errors
        clear = np.isfinite(d) & (d > SIGNIFICANT * e)
        label = f"{time} eff. steps: " + (
            f"{order.slope:.2f} [{order.low:.2f}, {order.high:.2f}]" if order.told else "cannot be told"
        )
        for use, face in ((clear & order.fitted, colors[i]), (clear & ~order.fitted, "white")):
            ax.errorbar(
                ls[use], d[use], yerr=2 * e[use], fmt=_MARKERS[i % len(_MARKERS)], color=colors[i], mfc=face, ms=8,
                capsize=3, linewidth=1.6, label=label if face != "white" else None,
            )  # fmt: skip
        if order.fitted.any():
            fine = np.geomspace(ls[order.fitted][0], ls[-1], 200)
            ax.plot(fine, np.abs(order.a / fine + order.b / fine**2), color=colors[i], linewidth=1.3, alpha=0.7)
        if clear.any():
            lowest, highest = min(lowest, d[clear].min()), max(highest, d[clear].max())
    if highest:
        ax.set_ylim(0.04 * lowest, 3 * highest)  # room for the legend
        guide = 1.6 * highest / ls
        ax.plot(ls, guide, color=INK, linestyle="--", linewidth=1.6, label="slope −1")
    ax.set_xticks(ls, [f"{l:g}" for l in ls])
    ax.minorticks_off()
    ax.tick_params(colors=INK)
    ax.grid(color=GREY, alpha=0.25)
    ax.legend(fontsize=10.5, loc="lower left")
