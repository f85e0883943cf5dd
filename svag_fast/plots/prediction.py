"""The paper's Figure 3 for one's own runs: G/N against batch size, and where linear scaling must fail."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from svag_fast.analysis.prediction import Baseline, Prediction
from svag_fast.experiments.run_folder import Array
from svag_fast.plots import style as plots
from svag_fast.stats.estimate import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASE_COLOR = "#0072B2"


def figure(predictions: Sequence[Prediction]) -> Figure:
    """Draw G/N of each baseline, its extrapolation, B* with its interval, and what was measured elsewhere.

    The extrapolation is G/N ∝ B, over (n - B)/(n - 1) where batches are made of distinct samples of n.
    Above G/N = C² - 1 (Theorem 5.2) SGD and its SDE are not C-close; the dotted line 1/C² is the paper's Figure 3's.

    Raises:
        ValueError: no prediction with a positive G, or predictions of different C.
    """
    usable = [p for p in predictions if p.kappa]
    if not usable:
        raise ValueError("predictions must be some with a positive grad_sq_norm, got none: there is nothing to draw")
    if len({p.C for p in usable}) != 1:
        raise ValueError("the predictions must be of one C, got several")
    with plots.style():
        from matplotlib.figure import Figure

        drawn = Figure(figsize=(9.6, 6.0), layout="constrained")
        axes = drawn.add_subplot()
        _draw(axes, usable)
        drawn.legend(loc="outside lower center", ncols=2, fontsize=11)
        return drawn


def save(predictions: Sequence[Prediction], path: str | os.PathLike[str]) -> None:
    """Draw :func:`figure` and write it as PNG to ``path``, in one step.

    Raises:
        ValueError: nothing to draw.
        OSError: the folder is missing or not writable, or the disk is full.
    """
    drawn = figure(predictions)
    with plots.style():
        plots.save(drawn, path)


def _draw(axes: Axes, predictions: list[Prediction]) -> None:
    C = predictions[0].C
    square = C * C
    axes.set(xscale="log", yscale="log", xlabel="batch size B", ylabel="G / N   (signal to noise, per batch)")
    elsewhere: dict[int, Baseline] = {}
    for p in predictions:
        elsewhere |= {
            o.batch_size: o.measured for o in p.outlook if o.measured is not None and o.measured.equilibrium.nsr
        }
    sizes = [p.baseline.batch_size for p in predictions] + list(elsewhere)
    stars = [star for p in predictions if (star := p.batch_size()) is not None]
    ends = [p.batch_size_interval[1] for p in predictions if p.kappa]
    right = 2.2 * max([*sizes, *(star.value for star in stars), *filter(np.isfinite, ends)])
    left = min(sizes) / 2
    axes.set_xlim(left, right)
    for p, star in zip(predictions, stars, strict=True):
        low, high = p.batch_size_interval
        nsr = p.kappa["approximate"].value / square
        grid, extrapolated = _extrapolation(p.baseline, nsr, right)
        axes.plot(grid, extrapolated, "--", color=BASE_COLOR, linewidth=1.4, zorder=2)
        axes.axvspan(low, min(high, right), color=plots.SGD_COLOR, alpha=0.22, linewidth=0, zorder=1)
        axes.axvline(star.value, color=plots.SGD_COLOR, linewidth=1.8, zorder=2)
        axes.annotate(
            f"B* = {star.value:.3g}",
            (star.value, 0.02),
            xycoords=axes.get_xaxis_transform(),
            xytext=(6, 0),
            textcoords="offset points",
            color=plots.SGD_COLOR,
            weight="bold",
        )
    law = "B" if all(p.baseline.population is None for p in predictions) else "B (n - 1)/(n - B)"
    axes.axvspan(min(*ends, right), right, color=plots.SGD_COLOR, alpha=0.07, linewidth=0, zorder=0)
    _points(axes, [p.baseline for p in predictions], BASE_COLOR, "baseline, SGD", filled=True)
    _points(axes, list(elsewhere.values()), BASE_COLOR, "SGD measured there (lr by linear scaling)", filled=False)
    axes.plot([], [], "--", color=BASE_COLOR, linewidth=1.4, label=f"baseline extrapolated: G/N ∝ {law}")
    axes.plot([], [], color=plots.SGD_COLOR, label="B*: beyond it linear scaling must fail (Theorem 5.6)")
    axes.axhline(
        square - 1, color=plots.INK, linewidth=1.4, label=f"C² - 1 = {square - 1:.3g}: above, not C-close (Theorem 5.2)"
    )
    axes.axhline(
        1 / square,
        color=plots.GREY,
        linewidth=1.4,
        linestyle=":",
        label=f"1/C² = {1 / square:.3g} (the paper's Figure 3)",
    )
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.5 / square), max(high, 1.5 * (square - 1)))
    states = ", ".join(f"B = {p.baseline.batch_size}: {p.baseline.equilibrium.state}" for p in predictions)
    axes.set_title(f"Where must linear scaling fail?  C = {C:.4g}; equilibrium at {states}", fontsize=13)
    _plain_ticks(axes)


def _extrapolation(baseline: Baseline, nsr: float, right: float) -> tuple[Array, Array]:
    """Return batch sizes up to ``right``, or nearly all samples where they are distinct, and G/N were G and Σ₁ kept."""
    base, n = baseline.batch_size, baseline.population
    grid = np.geomspace(base, right if n is None else min(right, max(base, 0.95 * n)), 50)
    factors = np.ones(len(grid)) if n is None else (n - grid) / (n - base)
    return grid, grid / base / factors / nsr


def _points(axes: Axes, baselines: list[Baseline], color: str, label: str, *, filled: bool) -> None:
    if not baselines:
        return
    inverse = [_signal_to_noise(b) for b in baselines]
    axes.errorbar(
        [b.batch_size for b in baselines],
        [s.value for s in inverse],
        yerr=[s.half_width() for s in inverse],
        fmt="o",
        markersize=9,
        color=color,
        markerfacecolor=color if filled else "white",
        markeredgewidth=1.8,
        capsize=4,
        label=label,
        zorder=4,
    )


def _signal_to_noise(baseline: Baseline) -> Estimate:
    """Return G/N with its error, from nsr = N/G."""
    nsr = baseline.equilibrium.nsr
    assert nsr is not None, "callers leave out baselines without nsr"
    return replace(nsr, value=1 / nsr.value, standard_error=nsr.standard_error / nsr.value**2)


def _plain_ticks(axes: Axes) -> None:
    """Label batch sizes at powers of two, and write numbers out rather than as powers."""
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    low, high = axes.get_xlim()
    ticks = [2.0**e for e in range(int(np.floor(np.log2(low))), int(np.ceil(np.log2(high)))) if low <= 2.0**e <= high]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
