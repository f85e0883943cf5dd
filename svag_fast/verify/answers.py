"""The product's two answers on made data whose truth is known: the critical batch size, and the verdict."""

from __future__ import annotations

import csv
import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import signal, stats

from svag_fast.analysis.margins import Margin
from svag_fast.analysis.prediction import Series, from_baseline, from_runs, measure
from svag_fast.analysis.runs import Run
from svag_fast.analysis.shared_limit import shared_limits
from svag_fast.analysis.verdict import judge
from svag_fast.stats.limit_fit import fit_limit, outside, within
from svag_fast.verify.check import Check, Outcome, SuiteSettings, exact_check, z_check

Array = NDArray[np.float64]
SOURCE = "Theorem 5.6"
B, LR, DECAY, G, NSR = 8, 0.1, 0.02, 2.0, 3.0
ROWS, PER = 400, 5  # rows a run, steps a row; the rate falls after 80 %
KAPPA = 2 * (1 + NSR)  # Theorem 5.6 at C = √2
LS, LIMIT, MARGIN = (1.0, 2.0, 4.0, 8.0), 1.0, 0.02  # of the made curves; the margin in the loss's units
TAIL = 1e-7
"""Of a binomial count beyond its bound, each side."""


def prediction(settings: SuiteSettings) -> Outcome:
    """κ*, B* and B_simple from a made run folder, and over many made series: the errors and the interval's coverage."""
    outcome = Outcome()
    rng = np.random.default_rng([settings.seed, 31])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        runs = [_series(rng, seed) for seed in range(3)]
        for seed, run in enumerate(runs):
            _write_run(folder / f"seed{seed}", run, seed)
        found = from_runs(folder)
    window = slice(ROWS * 4 // 5 - ROWS // 5, ROWS * 4 // 5)  # the last quarter of the first phase, 4/5 of the rows
    mean_G, mean_N = (
        np.mean([column[window] for column in columns])
        for columns in ([run.grad_sq_norm for run in runs], [run.noise_trace for run in runs])
    )
    # Against the window's own means, not the truth: to rounding, so that the arithmetic is checked without statistics.
    kappa, star = found.kappa["exact"], found.batch_size()
    assert star is not None
    assert found.noise_scale is not None
    state = found.baseline.equilibrium.state
    for label, value, right in (
        ("κ*", kappa.value, 2 * (1 + mean_N / mean_G)),
        ("κ* by the approximate form", found.kappa["approximate"].value, 2 * mean_N / mean_G),
        ("B*", star.value, 2 * B * (1 + mean_N / mean_G)),
        ("B_simple", found.noise_scale.value, B * mean_N / mean_G),
    ):
        name = f"predict on a made folder: {label} of the window's means"
        outcome.checks.append(exact_check(SOURCE, name, abs(value / right - 1), 1e-12))
    outcome.checks.append(
        Check(
            SOURCE,
            "predict on a made folder: its words",
            found.headline(),
            "B* and the state of the equilibrium as found",
            all(f" {w}" in found.headline() for w in (f"B* = {star.value:.3g} ", f"equilibrium {state})")),
        )
    )
    outcome.checks += _coverage(settings)
    return outcome


def verdict(settings: SuiteSettings) -> Outcome:
    """Made curves of known limit and distance: the right answers and numbers; and how often intervals hold and err."""
    outcome = Outcome()
    rng = np.random.default_rng([settings.seed, 33])
    cases = {  # SGD's distance and the rows' noise, in margins; the answer
        "at its limit": (0.0, 0.1, "matches"),
        "half a margin off": (0.5, 0.1, "matches"),
        "3 margins above": (3.0, 0.1, "departs"),
        "3 margins below": (-3.0, 0.1, "departs"),
        "at its limit, much noise": (0.0, 30.0, "open"),
    }
    for name, (distance, noise, answer) in cases.items():
        [found] = judge(_curves(rng, distance, noise), metrics=["test_loss"], margins={"test_loss": Margin(MARGIN)})
        for part in ("phase 1", "phase 2"):
            cell = found.cells["test_loss"][part]
            sgd = cell.sgd
            assert sgd is not None
            assert cell.figure is not None
            outcome.checks.append(
                Check(
                    "Verdict",
                    f"made curves, SGD {name}, {part}",
                    f"{sgd.answer}, SVAG has converged by l = {cell.converged_by}",
                    f"{answer}, {'by 2' if answer == 'matches' else 'not by 2'}",
                    sgd.answer == answer == found.answer and (cell.converged_by == 2) == (answer == "matches"),
                )
            )
            # A 95 % interval is at least 1.96 errors long each side: this is not less than the error.
            error = (sgd.interval[1] - sgd.interval[0]) / 2 / 1.9
            level = LIMIT * (0.5 if part == "phase 2" else 1.0)
            limit_error = float(cell.figure.standard_error)
            outcome.checks += [
                Check(
                    "Verdict",
                    f"made curves, SGD {name}, {part}: its distance, in margins",
                    f"{sgd.value / MARGIN:.4g} ± {error / MARGIN:.1g}",
                    f"{distance:g} within 5 of them",
                    abs(sgd.value / MARGIN - distance) < 5 * error / MARGIN,
                ),
                Check(
                    "Verdict",
                    f"made curves, SGD {name}, {part}: the limit",
                    f"{cell.limit:.5g} ± {limit_error:.1g}",
                    f"{level:g} within 5 of them",
                    abs(float(cell.figure.value) - level) < 5 * limit_error + float(cell.figure.systematic),
                ),
            ]
    outcome.checks += [_shared(rng, 0.0, "matches"), _shared(rng, 3.0, "departs"), _diverged(rng)]
    outcome.checks += _error_rates(settings)
    return outcome


def _shared(rng: np.random.Generator, apart: float, answer: str) -> Check:
    """Two batch sizes of one lr/B whose limits are `apart` margins from each other."""
    runs = [*_curves(rng, 0.0, 0.3), *_curves(rng, 0.0, 0.3, batch_size=4 * B, raised=apart)]
    [found] = shared_limits(judge(runs, metrics=["test_loss"], margins={"test_loss": Margin(MARGIN)}))
    name = f"two batch sizes whose limits are {apart:g} margins apart"
    return Check("Verdict", name, found.answer, answer, found.answer == answer and found.reference == B)


def _diverged(rng: np.random.Generator) -> Check:
    runs = [replace(run, diverged_at=3.0) if run.l == 1 else run for run in _curves(rng, 0.0, 0.3)]
    [found] = judge(runs, metrics=["test_loss"], margins={"test_loss": Margin(MARGIN)})
    return Check("Verdict", "every run of SGD diverged, SVAG none", found.answer, "departs", found.answer == "departs")


def _error_rates(settings: SuiteSettings) -> list[Check]:
    """The fit on Gaussian means of 4 l and 12 seeds: coverage, and both wrong answers where they are likeliest."""
    repeats, seeds, ls = settings.choose(4_000, 20_000), 12, np.array(LS)
    rng = np.random.default_rng([settings.seed, 34])
    checks = []
    for distance in (0.0, 1.0, 2.0):
        runs = distance / ls[:, None] + 0.5 * rng.standard_normal((repeats, len(ls), seeds))
        fit = fit_limit(ls, runs.mean(-1), runs.var(-1, ddof=1), np.full(len(ls), seeds), 1.0)
        low, high = ends = fit.distances.at(0).interval()
        counts = {"holds the truth": int(((low <= distance) & (distance <= high)).sum())}
        bounds = {"holds the truth": (0.93, 0.97)}
        if distance == 1:
            counts["wrong 'matches'"], bounds["wrong 'matches'"] = int(within(ends, 1.0).sum()), (0.0, 0.05)
        if distance == 0:
            counts["wrong 'departs'"], bounds["wrong 'departs'"] = int(outside(ends, 1.0).sum()), (0.0, 0.025)
        for what, count in counts.items():
            least, most = stats.binom.ppf([TAIL, 1 - TAIL], repeats, bounds[what])
            checks.append(
                Check(
                    "Verdict",
                    f"the fit where SGD is {distance:g} margins off, {repeats} times: {what}",
                    f"{100 * count / repeats:.2f} %",
                    f"{100 * bounds[what][0]:g} to {100 * bounds[what][1]:g} %, and chance at {TAIL:g}",
                    bool((bounds[what][0] == 0 or least <= count) and count <= most),
                )
            )
    return checks


def _curves(
    rng: np.random.Generator, distance: float, noise: float, *, batch_size: int = B, raised: float = 0.0
) -> list[Run]:
    """Six runs for each l: a test loss that settles at LIMIT + a/l by the phase's middle, half as high in phase 2."""
    rows, total = 81, 400.0 * B / batch_size
    done = np.linspace(0, 1, rows)
    lr = LR * batch_size / B * np.where(done <= 0.8, 1.0, 0.1)
    runs = []
    for l in LS:
        for seed in range(6):
            # The curve settles within each phase's first half, which the verdict leaves out.
            level = LIMIT * np.where(done <= 0.8, 1.0, 0.5) + MARGIN * (raised + distance / l)
            loss = level + np.exp(-60 * done) + noise * MARGIN * rng.standard_normal(rows)
            config = {"batch_size": batch_size, "lr": lr[0], "l": l, "seed": seed, "effective_steps": total}
            runs.append(Run(f"l{l:g}-{seed}", config, {"effective_step": total * done, "lr": lr, "test_loss": loss}))
    return runs


def _coverage(settings: SuiteSettings) -> list[Check]:
    repeats = settings.choose(250, 500)
    rng = np.random.default_rng([settings.seed, 32])
    held, values, errors = 0, [], []
    for _ in range(repeats):
        found = from_baseline(measure([_series(rng, seed) for seed in range(3)]))
        low, high = found.kappa_interval
        held += low <= KAPPA <= high
        values.append(found.kappa["exact"].value)
        errors.append(found.kappa["exact"].standard_error)
    spread = float(np.std(values) / math.sqrt(np.mean(np.square(errors))))
    low, high = stats.binom.ppf([TAIL, 1 - TAIL], repeats, [0.93, 0.97])
    mean, error = float(np.mean(values)), float(np.std(values)) / math.sqrt(repeats)
    made = f"{repeats} made baselines"
    return [
        Check(
            SOURCE,
            f"κ*'s 95 % interval over {made} of three correlated series",
            f"holds the truth {held} times",
            f"{low:.0f} to {high:.0f}, as 93 to 97 % would",
            bool(low <= held <= high),
        ),
        Check(
            SOURCE,
            f"κ* over {made}: its spread over its standard error, G and N being correlated",
            f"{spread:.3f}",
            "1 within 10 % and 5 standard errors",
            abs(spread - 1) < 0.1 + 5 / math.sqrt(2 * repeats),
        ),
        z_check(SOURCE, f"κ*'s mean over {made}", mean, error, KAPPA),
    ]


def _series(rng: np.random.Generator, seed: int) -> Series:
    """R, G, N at equation 11's equilibrium, after they settled and until the rate falls; G and N move together."""
    step = PER * np.arange(1, ROWS + 1)
    late = step > 0.8 * step[-1]
    lr = np.where(late, 0.1 * LR, LR)
    settling = 1 + 5 * np.exp(-np.arange(ROWS) / (0.03 * ROWS))

    def noise() -> Array:
        x: Array = signal.lfilter([1.0], [1.0, -0.5], rng.standard_normal(ROWS + 50))[50:] * math.sqrt(0.75)
        return x

    # G and N of one run move together, as measured ones do: independent errors would be too small or too large.
    shared = noise()
    grad = G * settling * (1 + 0.15 * shared + 0.05 * noise()) * np.where(late, 0.3, 1.0)
    trace = NSR * G * settling * (1 + 0.15 * shared + 0.05 * noise()) * np.where(late, 3.0, 1.0)
    R = LR * G * (1 + NSR) / ((2 - LR * DECAY) * DECAY) * (1 + 0.01 * noise())
    return Series(f"seed {seed}", B, DECAY, step.astype(float), lr, grad, trace, R)


def _write_run(folder: Path, series: Series, seed: int) -> None:
    """A folder as `svag-fast run` leaves it, as far as the prediction reads it."""
    folder.mkdir()
    assert series.weight_sq_norm is not None
    settings = {"dataset": "digits", "model": "digits-net", "batch_size": B, "lr": LR, "weight_decay": DECAY, "l": 1}
    settings |= {
        "sampling": "replacement",
        "seed": seed,
        "effective_steps": PER * ROWS,
        "schedule": "step",
        "versions": {},
        "commit": None,
    }
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    columns = {
        "step": series.step,
        "effective_step": series.step,
        "lr": series.lr,
        "grad_sq_norm": series.grad_sq_norm,
        "noise_trace": series.noise_trace,
        "weight_sq_norm": series.weight_sq_norm,
    }
    with (folder / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(columns)
        table.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))
