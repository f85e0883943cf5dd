"""verify.png: what the battery found, in six panels."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from svag_fast.plots import GREY, INK, SGD_COLOR, l_colors, save, style
from svag_fast.verify.check import Z_BOUND, Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE = l_colors([1, 2])[2]


def draw(outcomes: Mapping[str, Outcome], path: str | os.PathLike[str]) -> None:
    """Draw the outcomes of the whole battery (or of the groups that ran) to a PNG file."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(19, 11), layout="constrained")
        axes = figure.subplots(2, 3)
        panels = (_errors, _sides, _order_two, _certificates, _tails, _scores)
        for ax, panel in zip(axes.flat, panels, strict=True):
            panel(ax, outcomes)
        checks = [check for outcome in outcomes.values() for check in outcome.checks]
        failed = sum(not check.passed for check in checks)
        verdict = f"all {len(checks)} checks pass" if not failed else f"{failed} of {len(checks)} checks FAIL"
        figure.suptitle(f"The paper's theorems, checked: {verdict}", fontsize=18, fontweight="bold", x=0.01, ha="left")
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
    for height, row in enumerate(rows):
        ratio = float(row["left"]) / float(row["right"])
        ax.plot(ratio, -height, "o", color=SGD_COLOR if "SGD" in str(row["name"]) else BLUE, markersize=9)
    ax.axvline(1, color=INK, linewidth=1)
    ax.set_yticks([-i for i in range(len(rows))], [str(row["name"]) for row in rows], fontsize=10)
    ax.set(xlim=(0.8, 1.2), xlabel="λ(2 − ηλ/l)R  over  (η/l)G + ηN")


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
        ax.plot(row["nsr"], row["C"], marker="X" if certified else "o", color=SGD_COLOR if certified else BLUE, ms=10)
        ax.annotate(
            f"κ = {row['kappa']:g}", (row["nsr"], row["C"]), xytext=(8, 4), textcoords="offset points", fontsize=10
        )
    ax.axhline(2**0.5, color=INK, linewidth=1, linestyle="--")
    ax.axvline(1, color=INK, linewidth=1, linestyle="--")
    ax.plot([], [], "X", color=SGD_COLOR, label="certified to fail", ms=10)
    ax.plot([], [], "o", color=BLUE, label="certificate silent", ms=10)
    ax.set(xscale="log", yscale="log", xlabel="N/G of SGD (threshold 1/(C² − 1))", ylabel="least C (threshold √2)")
    ax.set_yticks([1, 2**0.5, 2, 4], ["1", "√2", "2", "4"])
    ax.minorticks_off()
    ax.legend(loc="upper right")


def _tails(ax: Axes, outcomes: Mapping[str, Outcome]) -> None:
    ax.set_title("App. B.3: “tail index” α (2: Gaussian tails)")
    bars = _data(outcomes, "tail-known", "bars") + _data(outcomes, "tail-network", "bars")
    for height, bar in enumerate(bars):
        name = str(bar["name"])
        ax.plot(bar["alpha"], -height, "o", color=SGD_COLOR if "SGD" in name else BLUE, markersize=8)
    ax.set_yticks([-i for i in range(len(bars))], [str(bar["name"]) for bar in bars], fontsize=9)
    ax.axvline(2, color=INK, linewidth=1)
    ax.set(xlim=(0.8, 2.2), xlabel="α")


def _scores(ax: Axes, outcomes: Mapping[str, Outcome]) -> None:
    scores = np.array([check.z for outcome in outcomes.values() for check in outcome.checks if check.z is not None])
    ax.set_title(f"z-scores of {len(scores)} simulated checks")
    bins = np.linspace(-Z_BOUND - 1, Z_BOUND + 1, 25)
    ax.hist(np.clip(scores, bins[0], bins[-1]), bins=bins.tolist(), color=BLUE)
    z = np.linspace(-4, 4, 200)
    width = bins[1] - bins[0]
    ax.plot(
        z, len(scores) * width * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi), color=INK, linewidth=1.5, label="N(0, 1)"
    )
    for bound in (-Z_BOUND, Z_BOUND):
        ax.axvline(bound, color=SGD_COLOR, linestyle="--", linewidth=1.5)
    ax.set(xlabel="(measured − expected)/standard error", ylabel="checks")
    ax.legend()
