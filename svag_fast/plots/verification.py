"""verify.png: what the battery found, in eight panels."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from svag_fast.plots.style import GREY, INK, SGD_COLOR, l_colors, save, style
from svag_fast.verify.check import Z_BOUND, Outcome
from svag_fast.verify.invariance import TOLERANCE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE = l_colors([1, 2])[2]


def draw(outcomes: Mapping[str, Outcome], path: str | os.PathLike[str]) -> None:
    """Draw the outcomes of the whole battery (or of the groups that ran) to a PNG file."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(25, 11.5), layout="constrained")
        axes = figure.subplots(2, 4)
        # A group that did not run leaves its panel empty, so that each panel keeps its place.
        panels = (_errors, _sides, _order_two, _scores, _certificates, _scaling, _tails, _invariance)
        for ax, panel in zip(axes.flat, panels, strict=True):
            panel(ax, outcomes)
        checks = [check for outcome in outcomes.values() for check in outcome.checks]
        failed = sum(not check.passed for check in checks)
        verdict = f"all {len(checks)} checks pass" if not failed else f"{failed} of {len(checks)} checks FAIL"
        figure.suptitle(f"The paper's theorems, checked: {verdict}", fontsize=20, fontweight="bold", x=0.01, ha="left")
        save(figure, path)


def _data(outcomes: Mapping[str, Outcome], name: str, key: str) -> list[dict[str, Any]]:
    return list(outcomes[name].data[key]) if name in outcomes else []


def _errors(ax: Axes, outcomes: Mapping[str, Outcome]) -> None:
    ax.set_title("Theorem 4.3: SVAG's weak error falls as 1/l")
    labelled = set()

    def label(text: str) -> str | None:
        first = text not in labelled
        labelled.add(text)
        return text if first else None

    for curve in _data(outcomes, "theorem-4.3-exact", "curves"):
        ax.loglog(curve["l"], curve["error"], color=GREY, linewidth=1.2, label=label("SVAG, closed form"))
    for curve in _data(outcomes, "theorem-4.3-simulated", "curves"):
        ax.errorbar(
            curve["l"],
            curve["error"],
            yerr=2 * np.asarray(curve["standard_error"]),
            color=BLUE,
            marker="o",
            linewidth=1.5,
            label=label("SVAG, simulated (±2 s.e.)"),
        )
    for curve in _data(outcomes, "contrast", "curves"):
        ax.loglog(curve["l"], curve["error"], color=SGD_COLOR, label=label("SGD at lr/l, B/l: E x³ stays off"))
    ls = np.array([64.0, 1024.0])
    ax.loglog(ls, 2 / ls, color=INK, linestyle="--", linewidth=1.5, label="slope −1")
    ax.set(xlabel="l", ylabel="|E g(x) − E g(X)|", xscale="log", yscale="log")
    ax.legend(fontsize=10, loc="lower left")


def _sides(ax: Axes, outcomes: Mapping[str, Outcome]) -> None:
    ax.set_title("Equations 11, 12: both sides at equilibrium")
    rows = _data(outcomes, "equilibrium-toy", "sides") + _data(outcomes, "norms-network", "sides")
    ax.axvline(1, color=INK, linewidth=1)
    for height, row in enumerate(rows):
        color = SGD_COLOR if "SGD" in row["name"] else BLUE
        ax.errorbar(row["ratio"], -height, xerr=2 * row["error"], fmt="o", color=color, ms=8, capsize=4, linewidth=1.8)
        _row_label(ax, row["name"], -height)
    _rows(ax, len(rows))
    # At least 2 %: agreement to many digits should look like agreement, not like scatter.
    widest = max([0.02, *(abs(row["ratio"] - 1) + 2 * row["error"] for row in rows)])
    ax.set(xlim=(1 - 1.2 * widest, 1 + 1.2 * widest), xlabel="λ(2 − ηλ/l)R  over  (η/l)G + ηN   (±2 s.e.)")


def _row_label(ax: Axes, text: str, height: float) -> None:
    """Write a row's name above its marks, inside the axes: labels on the left would take the panel's width."""
    ax.annotate(
        text, (0, height), xycoords=("axes fraction", "data"), xytext=(6, 15), textcoords="offset points", fontsize=11
    )


def _rows(ax: Axes, count: int) -> None:
    ax.set_yticks([])
    ax.set_ylim(0.6 - max(count, 1), 0.8)


def _order_two(ax: Axes, outcomes: Mapping[str, Outcome]) -> None:
    ax.set_title("Theorem E.4: |x|² at equilibrium")
    curves = _data(outcomes, "order-2", "curves")
    lrs = [curve["lr"] for curve in curves]
    for name, color, marker in (("SGD", SGD_COLOR, "o"), ("SDE2", BLUE, "s"), ("SDE", GREY, "^")):
        ax.plot(lrs, [curve[name] for curve in curves], color=color, marker=marker, label=name)
    ax.set(xscale="log", xlabel="learning rate (batch size in proportion)", ylabel="R")
    if curves:
        ax.set_xticks(lrs, [f"{lr:g}" for lr in lrs])
        ax.minorticks_off()
        ax.legend()


def _certificates(ax: Axes, outcomes: Mapping[str, Outcome]) -> None:
    ax.set_title("Theorem 5.2: SGD against its SDE (toy)")
    for row in _data(outcomes, "certificates", "rows"):
        certified = "fails" in (row["5.2 by SGD"], row["5.2 by SDE"])
        marker, color = ("X", SGD_COLOR) if certified else ("o", BLUE)
        low, high = row["C interval"]
        errors = [[row["C"] - low], [high - row["C"]]]
        ax.errorbar(row["nsr"], row["C"], errors, marker=marker, color=color, ms=10, capsize=4)
        ax.annotate(
            f"κ = {row['kappa']:g}",
            (row["nsr"], row["C"]),
            xytext=(0, 10),
            textcoords="offset points",
            ha="center",
            fontsize=10,
        )
    ax.axhline(2**0.5, color=INK, linewidth=1, linestyle="--")
    ax.axvline(1, color=INK, linewidth=1, linestyle="--")
    ax.plot([], [], "X", color=SGD_COLOR, label="certified to fail", ms=10)
    ax.plot([], [], "o", color=BLUE, label="certificate silent", ms=10)
    ax.set(xscale="log", yscale="log", xlabel="N/G of SGD (threshold 1/(C² − 1))", ylabel="least C (threshold √2)")
    ax.set_yticks([1, 2**0.5, 2, 4], ["1", "√2", "2", "4"])
    ax.margins(0.12)
    ax.minorticks_off()
    ax.legend(loc="upper right")


def _scaling(ax: Axes, outcomes: Mapping[str, Outcome]) -> None:
    ax.set_title("Theorems 5.5, 5.6: linear scaling from B to κB (toy)")
    pairs = _data(outcomes, "certificates", "pairs")
    colors = {"holds": BLUE, "undecided": GREY, "fails": SGD_COLOR}
    for pair in pairs:
        at = (pair["base"], pair["base"] * pair["kappa"])
        ax.plot(*at, "s", color=colors[pair["LSI"]], markersize=22, alpha=0.35, markeredgewidth=0)
        if "fails" in (pair["5.5"], pair["5.6"]):
            ax.plot(*at, "X", color=INK, markersize=9)
    for verdict, color in colors.items():
        ax.plot([], [], "s", color=color, alpha=0.35, markersize=12, label=f"measured: {verdict}")
    ax.plot([], [], "X", color=INK, markersize=9, label="certified to fail")
    ax.set(xscale="log", yscale="log", xlabel="B (the base, in units of the smallest)", ylabel="κB")
    for axis, name in ((ax.xaxis, "base"), (ax.yaxis, "kappa")):
        ticks = sorted({pair["base"] * (pair["kappa"] if name == "kappa" else 1) for pair in pairs})
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.margins(0.15)
    ax.legend(fontsize=11, loc="lower right")


def _tails(ax: Axes, outcomes: Mapping[str, Outcome]) -> None:
    ax.set_title("App. B.3: “tail index” α (2: Gaussian tails)")
    bars = _data(outcomes, "tail-known", "bars") + _data(outcomes, "tail-network", "bars")
    names = list(dict.fromkeys(bar["name"] for bar in bars))
    markers = {10: "o", 100: "s", 1000: "^"}
    ax.axvline(2, color=INK, linewidth=1)
    for bar in bars:
        height = -names.index(bar["name"])
        color = SGD_COLOR if "SGD" in bar["name"] else BLUE
        if "expected" in bar:
            ax.plot(bar["expected"], height, "|", color=INK, markersize=20, markeredgewidth=1.5)
        ax.plot(bar["alpha"], height, markers[bar["block"]], color=color, markersize=9, alpha=0.85)
    for height, name in enumerate(names):
        _row_label(ax, name, -height)
    for block, marker in markers.items():
        ax.plot([], [], marker, color=BLUE, label=f"blocks of {block}")
    ax.plot([], [], "|", color=INK, markersize=14, label="formula")
    _rows(ax, len(names))
    ax.set(xlim=(0.8, 2.5), xlabel="α")
    ax.legend(fontsize=11, loc="lower right")


def _invariance(ax: Axes, outcomes: Mapping[str, Outcome]) -> None:
    ax.set_title("Scale invariance of the shipped nets")
    nets = _data(outcomes, "scale-invariance", "nets")
    for height, net in enumerate(nets):
        color = BLUE if net["claimed"] else GREY
        ax.plot(net["violation"], -height, "o", color=color, markersize=8)
    ax.set_yticks([-i for i in range(len(nets))], [net["name"] for net in nets], fontsize=10)
    ax.axvline(TOLERANCE, color=INK, linewidth=1, linestyle="--")
    ax.plot([], [], "o", color=BLUE, label="claims it")
    ax.plot([], [], "o", color=GREY, label="does not (contrast)")
    ax.set(xscale="log", xlabel="largest relative violation")
    ax.legend(fontsize=11, loc="center right")


def _scores(ax: Axes, outcomes: Mapping[str, Outcome]) -> None:
    scores = np.array([check.z for outcome in outcomes.values() for check in outcome.checks if check.z is not None])
    ax.set_title(f"z-scores of {len(scores)} simulated checks")
    bins = np.linspace(-Z_BOUND - 1, Z_BOUND + 1, 25)
    # A score beyond the axis stays in sight, in the last bin.
    ax.hist(np.clip(scores, bins[0], bins[-1]), bins=bins.tolist(), color=BLUE)
    z = np.linspace(-4, 4, 200)
    width = bins[1] - bins[0]
    ax.plot(
        z, len(scores) * width * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi), color=INK, linewidth=1.5, label="N(0, 1)"
    )
    for bound in (-Z_BOUND, Z_BOUND):
        ax.axvline(bound, color=SGD_COLOR, linestyle="--", linewidth=1.5)
    ax.set(xlabel="(measured − expected)/standard error", ylabel="checks")
    ax.legend(loc="upper left", bbox_to_anchor=(0.62, 1))
