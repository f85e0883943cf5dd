"""The formulas behind the product's answers, one by one: each against its own written out, or on a case made for it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import signal, stats

from svag_fast.analysis.margins import Margin
from svag_fast.analysis.prediction import Series, from_baseline, measure
from svag_fast.analysis.runs import Run
from svag_fast.analysis.verdict import Verdict, combine, decide, judge
from svag_fast.noise.estimators import from_sample_norms
from svag_fast.stats.estimate import Estimate, fieller_interval
from svag_fast.stats.limit_fit import fit_limit
from svag_fast.stats.series import joint_means, mean_estimate
from svag_fast.theory.closeness import Norms, c_closeness, linear_scaling_invariance, simple_noise_scale
from svag_fast.theory.equilibrium import detect_equilibrium, stationarity
from svag_fast.verify.check import Check, Outcome, SuiteSettings, exact_check

Array = NDArray[np.float64]
SOURCE = "Rules"


def checks(settings: SuiteSettings) -> Outcome:
    """All of them; none takes longer in the full battery."""
    rng = np.random.default_rng([settings.seed, 35])
    return Outcome(
        [
            *_fit(rng),
            *_regime(),
            *_answers(rng),
            *_seeds(),
            *_series(rng),
            *_ratio(),
            *_detector(rng),
            *_outlook(rng),
            *_weighted(rng),
        ]
    )


def _said(name: str, measured: object, expected: object) -> Check:
    return Check(SOURCE, name, str(measured), str(expected), bool(measured == expected))


def _fit(rng: np.random.Generator) -> list[Check]:
    """l = 1, 2, 4 by hand: SGD's distance is m(1) - (2 m(4) - m(2)), by Welch's t."""
    ls, counts = np.array([1.0, 2.0, 4.0]), np.array([3, 5, 4])
    variances = np.array([4e-4, 1e-4, 2e-4])
    means = 1 + 0.5 / ls + 1e-5 * rng.standard_normal(3)
    fit = fit_limit(ls, means, variances, counts, 1.0)
    parts = np.array([1.0, 1.0, 4.0]) * variances / counts
    freedom = parts.sum() ** 2 / (parts**2 / (counts - 1)).sum()
    distance = means[0] - (2 * means[2] - means[1])
    half = stats.t.ppf(0.975, freedom) * math.sqrt(parts.sum())
    low, high = fit.distances.at(0).interval()
    off = max(abs(low - distance + half), abs(high - distance - half)) / half
    found = [exact_check(SOURCE, "l = 1, 2, 4: SGD's distance and its Welch interval, written out", off, 1e-9)]
    wide = replace(fit.limit, systematic=np.array(0.25))
    both = wide.minus(replace(fit.limit, systematic=np.array(0.5)))
    one = parts[1:].sum()
    freedom = (2 * one) ** 2 / (2 * (parts[1:] ** 2 / (counts[1:] - 1)).sum())
    right = stats.t.ppf(0.975, freedom) * math.sqrt(2 * one) + 0.75
    off = abs(float(both.interval()[1]) / right - 1)
    return [*found, exact_check(SOURCE, "the difference of two limits: variances and doubts add up", off, 1e-9)]


def _regime() -> list[Check]:
    """Curves without noise to speak of that 1/l does not describe, or whose largest l is far from the limit."""
    ls, found = np.array([1.0, 2.0, 4.0, 8.0]), []
    cases = {
        "2/l + 5/l²": (2 / ls + 5 / ls**2, False),
        "40/l, five margins from the limit at l = 8": (40 / ls, False),
        "2/l": (2 / ls, True),
    }
    for name, (means, reached) in cases.items():
        fit = fit_limit(ls, means, np.full(4, 1e-6), np.full(4, 5), 1.0)
        low, high = fit.distances.at(0).interval()
        holds = bool(low <= means[0] <= high) and bool(fit.regime_reached) == reached
        said = f"regime {'' if fit.regime_reached else 'not '}reached, {low:.3g} to {high:.3g}"
        right = f"{'' if reached else 'not '}reached, holds {means[0]:g}"
        found.append(Check(SOURCE, f"m(l) = {name}: SGD's distance", said, right, holds))
    return found


def _answers(rng: np.random.Generator) -> list[Check]:
    tenth = Margin(0.1)
    runs = _runs(rng, 0.01)
    quiet = _judged(runs, tenth)
    cell = quiet.cells["loss"]["end"]
    values = np.array([run.metrics["loss"][-1] for run in runs if run.l == 1])
    same = cell.means[1]
    found = [
        _said("a metric at its limit", (quiet.answer, cell.converged_by), ("matches", 2.0)),
        exact_check(SOURCE, "the end is the last row's value", abs(same.value / values.mean() - 1), 1e-12),
        exact_check(
            SOURCE,
            "its standard error, n - 1 below",
            abs((same.standard_error or 0) / (values.std(ddof=1) / math.sqrt(5)) - 1),
            1e-9,
        ),
    ]
    grid = _runs(rng, 0.0)
    for run in grid:
        run.metrics["loss"][:] = np.round(run.metrics["loss"], 2)
    step = _judged(grid, tenth).cells["loss"]["end"].means[1]
    off = abs((step.standard_error or 0) / (0.01 / math.sqrt(12 * 5)) - 1)
    found.append(exact_check(SOURCE, "runs that end on one value of a grid of 0.01: its rounding error", off, 1e-6))
    # Metrics may be negative; a margin in percent is of their size.
    size = _judged(runs, Margin.parse("10%")).cells["loss"]["end"].margin
    off = abs((size or 0) / 0.1 - 1)
    found.append(exact_check(SOURCE, "a margin of 10 % of -1", off, 0.02))
    both = [combine(["departs", "matches"]), combine(["matches", "open"]), combine(["matches", "matches"])]
    found.append(_said("one departs; one is open; all match", both, ["departs", "open", "matches"]))
    some = _judged([replace(r, diverged_at=3.0) if r is runs[0] else r for r in runs], tenth)
    found.append(_said("one of five SGD runs diverged: the others are no mean", some.answer, "open"))
    some = _judged([replace(r, diverged_at=3.0) if (r.l, r.seed) == (4, 0) else r for r in runs], tenth)
    found.append(_said("a run of l = 4 diverged: which l count", sorted(some.cells["loss"]["end"].means), [1.0, 8.0]))
    return found


def _seeds() -> list[Check]:
    """How many seeds would settle SGD's distance at equal variances s² for l = 1, 2, 4, 8, by a search of its own."""
    ls, s2, margin, distance = np.array([1.0, 2.0, 4.0, 8.0]), 0.04, 1.0, 0.8
    design = np.stack([np.ones(3), 1 / ls[1:]], axis=1)
    weights = np.array([1.0, *-np.linalg.solve(design.T @ design, design.T)[0]])

    def half(count: int) -> float:
        parts = weights**2 * s2 / count
        freedom = parts.sum() ** 2 / (parts**2 / (count - 1)).sum()
        return float(stats.t.ppf(0.975, freedom) * math.sqrt(parts.sum()))

    fit = fit_limit(ls, distance / ls, np.full(4, s2), np.full(4, 3), margin)
    needed = decide(fit.distances.at(0), margin, 0.95).seeds_needed
    least = next(count for count in range(2, 10_000) if half(count) < margin - distance)
    return [_said("seeds that would settle a distance of 0.8 margins", needed, least)]


def _runs(rng: np.random.Generator, noise: float) -> list[Run]:
    """Five runs for each l of a metric that falls from 0 to -1, with rows that scatter by `noise`."""
    rows = 81
    done = np.linspace(0, 1, rows)
    runs = []
    for l in (1.0, 2.0, 4.0, 8.0):
        for seed in range(5):
            values = np.exp(-60 * done) - 1 + noise * rng.standard_normal(rows)
            config = {"batch_size": 8, "lr": 0.1, "l": l, "seed": seed, "effective_steps": 400.0}
            metrics = {"effective_step": 400 * done, "lr": np.full(rows, 0.1), "loss": values}
            runs.append(Run(f"l{l:g}-{seed}", config, metrics))
    return runs


def _judged(runs: Sequence[Run], margin: Margin) -> Verdict:
    [found] = judge(runs, metrics=["loss"], margins={"loss": margin})
    return found


def _series(rng: np.random.Generator) -> list[Check]:
    """Means of AR(1) series with correlation 1/2, whose autocorrelation time is 3; two of them correlated by 0.6."""
    n = 100_000
    kicks = rng.standard_normal((2, n))
    kicks[1] = 0.6 * kicks[0] + 0.8 * kicks[1]
    x = signal.lfilter([1.0], [1.0, -0.5], kicks, axis=1)
    one, both = mean_estimate(x[0]), joint_means(x[0], x[1])
    assert one.effective_samples is not None
    correlation = both.covariance[0][1] / (both[0].standard_error * both[1].standard_error)
    low, high = Estimate(1.0, 0.5, degrees_of_freedom=3).interval()
    half = stats.t.ppf(0.975, 3) * 0.5
    runs = x.reshape(2, 10, n // 10)
    levels, several = runs.mean(axis=2), joint_means(*runs)
    right = np.cov(levels) / 10
    off = float(np.abs(np.array(several.covariance) / right - 1).max())
    return [
        exact_check(SOURCE, "a correlated mean's effective samples", abs(3 * one.effective_samples / n - 1), 0.1),
        exact_check(SOURCE, "its error", abs(one.standard_error / (2 / math.sqrt(n)) - 1), 0.05),
        _said("its degrees of freedom", one.degrees_of_freedom, one.effective_samples / 2),
        exact_check(SOURCE, "two means' correlation", abs(correlation - 0.6), 0.05),
        exact_check(SOURCE, "an Estimate's interval is Student's t", abs(low - 1 + half) + abs(high - 1 - half), 1e-12),
        exact_check(SOURCE, "ten runs: the covariance of their own means", off, 1e-9),
        _said("ten runs: degrees of freedom", several.degrees_of_freedom, 9.0),
    ]


def _ratio() -> list[Check]:
    """Fieller's ends are where numerator - θ denominator is t standard errors from 0."""
    top, bottom, covariance = Estimate(3.0, 0.2, 9.0), Estimate(2.0, 0.3, 5.0), 0.03
    t = stats.t.ppf(0.975, 5)
    off = 0.0
    for ratio in fieller_interval(top, bottom, covariance):
        variance = 0.2**2 - 2 * ratio * covariance + (ratio * 0.3) ** 2
        off = max(off, abs(abs(3.0 - 2.0 * ratio) / (t * math.sqrt(variance)) - 1))
    return [exact_check(SOURCE, "Fieller's interval: t at its ends", off, 1e-9)]


def _detector(rng: np.random.Generator) -> list[Check]:
    """Series that drift by a known part, that are too noisy to say, and means that break or obey equation (11)."""
    n, runs = 120, 4
    noise, ramp = rng.standard_normal((3, runs, n)), np.linspace(-0.5, 0.5, n)
    states = {}
    for name, drift, spread in (("none", 0.0, 0.02), ("40 %", 0.4, 0.02), ("none seen", 0.0, 3.0)):
        states[name] = stationarity(1 + drift * ramp + spread * noise[0]).state
    drift = stationarity(1 + 0.4 * ramp + 1e-6 * noise[0]).drift.value
    lr, decay, G, N = 0.1, 0.02, 2.0, 3.0
    R = lr * (G + N) / ((2 - lr * decay) * decay)
    found = [
        detect_equilibrium(
            *(v * (1 + 0.02 * e) for v, e in zip((G, N, R_), noise, strict=True)), lr=lr, weight_decay=decay
        )
        for R_ in (R, 1.5 * R)
    ]
    return [
        _said(
            "drifts of 0 and 40 %, and too much noise", list(states.values()), ["stationary", "drifting", "undecided"]
        ),
        exact_check(SOURCE, "a drift of 40 %, measured", abs(drift / 0.4 - 1), 0.02),
        _said("R as equation (11) has it, and half as much again", [f.state for f in found], ["found", "not found"]),
    ]


def _outlook(rng: np.random.Generator) -> list[Check]:
    """G = N, so that κ* is 4 at C = √2: what is said of κ = 2 and 8, of distinct samples, and of closeness."""
    rows = 400
    step, steady = np.arange(0.0, 10.0 * rows, 10.0), np.full(rows, 0.1)
    G, N, R = 1 + 0.01 * rng.standard_normal((3, rows))
    found = from_baseline(measure([Series("made", 8, 0.02, step, steady, G, N, R)]), [(16, None), (64, None)])
    times = 4 * 0.1 * 0.02 * step[300]  # the window is the last quarter
    off = abs((found.baseline.relaxation_times or 0) / times - 1)
    low, high = found.kappa_interval
    whole = Norms(1.0, 1.0, 1.0)
    constants = (
        c_closeness(whole, Norms(2.0, 1.0, 1.0)).constant.value,
        c_closeness(whole, Norms(1.0, 1.0, 0.25)).constant.value,
        linear_scaling_invariance(whole, Norms(1.0, 1.0, 0.125), kappa=4).constant.value,
    )
    return [
        _said(
            "κ of B = 16 and 64 from B = 8",
            [(o.kappa, o.verdict) for o in found.outlook],
            [(2, "silent"), (8, "fails")],
        ),
        Check(SOURCE, "κ*'s interval", f"{low:.4g} to {high:.4g}", "3.9 to 4.1, with 4", 3.9 < low < 4 < high < 4.1),
        exact_check(SOURCE, "relaxation times before the window", off, 1e-9),
        exact_check(
            SOURCE,
            "B_simple of 8 distinct samples of 1000",
            abs(simple_noise_scale(1.0, 1.1 * 992 / 999, 8, population=1000).value - 8.8),
            1e-12,
        ),
        _said("least C: R half, N four times, N/κ twice as large", constants, (2.0, 4.0, 2.0)),
    ]


def _weighted(rng: np.random.Generator) -> list[Check]:
    """Samples of weights 1 and 3 in the loss: over all pairs of five samples the estimates' means are the truth."""
    data, weights = (
        torch.from_numpy(rng.standard_normal((5, 3)) + 1),
        torch.tensor([1.0, 3.0], dtype=torch.float64, device="cpu"),
    )
    found = []
    for pair in itertools.product(range(5), repeat=2):
        g = data[list(pair)]
        found.append(from_sample_norms(g.square().sum(1), (weights @ g).square().sum(), weights=weights))
    mean = data.mean(0)
    trace = float((data - mean).square().sum(1).mean())
    right = float(mean.square().sum()), trace * 10 / 16, trace
    means = [float(torch.stack([f[i] for f in found if f[i] is not None]).mean()) for i in range(3)]  # type: ignore[misc]
    off = max(abs(a / b - 1) for a, b in zip(means, right, strict=True))
    return [exact_check(SOURCE, "weighted samples: G, N and Tr Σ₁ over all batches", off, 1e-12)]
