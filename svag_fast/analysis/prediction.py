"""From which batch size on must linear scaling fail? Predicted from SGD runs at one batch size (Theorem 5.6).

R, G and N are averaged over the last part of the longest phase of constant learning rate (the paper: epochs 200 to 250,
before the decay at 250), over all runs that differ in the seed alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from svag_fast.analysis.phases import constant_stretches, same_rate
from svag_fast.analysis.runs import Run, group_by_batch_size, load_run, load_runs, require_svag
from svag_fast.experiments.run_folder import Array, read_log
from svag_fast.numeric import integer, number
from svag_fast.stats.estimate import Estimate
from svag_fast.stats.sampling import noise_factor, require_drawable
from svag_fast.stats.series import LEAST
from svag_fast.theory.closeness import (
    SQRT2,
    Certificate,
    CertificateAnswer,
    KappaForm,
    critical_kappa,
    critical_kappa_interval,
    sde_fails_certificate,
    simple_noise_scale,
)
from svag_fast.theory.equilibrium import Equilibrium, detect_equilibrium

__all__ = [
    "Baseline",
    "Outlook",
    "Prediction",
    "Series",
    "from_baseline",
    "from_csv",
    "from_runs",
    "measure",
    "measure_each",
    "predict_if_possible",
]

_LEAST_MEAN = 1e-100  # below it squares vanish
FORMS: tuple[KappaForm, ...] = ("exact", "approximate", "tightened")


@dataclass(frozen=True)
class Series:
    """R, G and N of one SGD run: float64 arrays [rows], ``step`` ascending, ``lr`` the rate used at each row.

    ``population``: n, where a batch is made of distinct samples of n; None for independent draws, or with ``unsized``
    where n isn't known. ``met``: see :attr:`svag_fast.analysis.runs.Run.met_its_batches`.
    """

    name: str
    batch_size: int
    weight_decay: float
    step: Array
    lr: Array
    grad_sq_norm: Array
    noise_trace: Array
    weight_sq_norm: Array | None
    population: int | None = None
    unsized: bool = False
    met: bool = False


@dataclass(frozen=True)
class Baseline:
    """One batch size, measured: the runs and the steps that were averaged, and what they say.

    ``relaxation_times``: steps of the phase before the window, in units of 1/(4ηλ), in which R comes nearer to its
    equilibrium by a factor e (equation 9 with Tr Σ proportional to 1/R, linearised). None without weight decay.
    """

    runs: tuple[str, ...]
    batch_size: int
    lr: float
    weight_decay: float
    first_step: int
    last_step: int
    rows: int
    relaxation_times: float | None
    equilibrium: Equilibrium
    population: int | None = None
    """n, where a batch is made of distinct samples of n; None for independent draws, or where n isn't known."""
    unsized: bool = False
    """Whether a batch is made of distinct samples of a data set of unknown size."""
    met: bool = False
    """Whether G was estimated from images that the weights may have met since the epoch began."""

    def noise_factor(self, batch_size: int) -> float:
        """Return N over Tr Σ₁/B for batches of another size that are drawn in the same way."""
        return noise_factor(batch_size, self.population)


@dataclass(frozen=True)
class Outlook:
    """What is predicted of another batch size, and what was measured there, if SGD was run at it by linear scaling."""

    batch_size: int
    kappa: float
    verdict: CertificateAnswer
    measured: Baseline | None


@dataclass(frozen=True)
class Prediction:
    """κ* and B* by Theorem 5.6, from one batch size alone.

    ``kappa`` has the theorem's "exact" C²(1 + N/G), its "approximate" C² N/G, and the "tightened" C² + (C²-1) N/G
    (:func:`svag_fast.theory.critical_kappa`); it is empty where G's estimate is not positive. ``kappa_interval`` holds
    κ*, "exact", with ``confidence``, by Fieller's theorem: its upper end is ``math.inf`` where G can't be told from 0.
    N is that of the batches as they were drawn, which is what the theorem speaks of.
    ``noise_scale`` is McCandlish et al.'s B_simple = B N/G of the same measurement, times (n - 1)/(n - B) where batches
    are made of distinct samples of n: a property of the data, whatever the draw.
    ``sde`` is Theorem 5.2's certificate at the baseline itself.
    """

    baseline: Baseline
    C: float
    confidence: float
    kappa: dict[KappaForm, Estimate]
    kappa_interval: tuple[float, float]
    noise_scale: Estimate | None
    sde: Certificate | None
    outlook: tuple[Outlook, ...]

    def batch_size(self, form: KappaForm = "exact") -> Estimate | None:
        """Return B* = κ*B, or None where G's estimate is not positive."""
        return self.kappa[form].affine(self.baseline.batch_size) if form in self.kappa else None

    @property
    def batch_size_interval(self) -> tuple[float, float]:
        """The interval of B* that holds ``confidence``; the upper end may be ``math.inf``."""
        low, high = self.kappa_interval
        return low * self.baseline.batch_size, high * self.baseline.batch_size

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values for JSON, with B*, its interval and the words; None means no upper limit."""
        star = self.batch_size()
        return {
            **asdict(self),
            "kappa_interval": _finite(self.kappa_interval),
            "batch_size": None if star is None else asdict(star),
            "batch_size_interval": _finite(self.batch_size_interval),
            "verdict": self.sentences(),
        }

    def sentences(self) -> list[str]:
        """Return the prediction in words, a list of plain sentences."""
        base, found, star = self.baseline, self.baseline.equilibrium, self.batch_size()
        said = [self.headline()]
        if found.reasons:
            said.append(f"Equilibrium at B = {base.batch_size} {found.state}: {'; '.join(found.reasons)}.")
        if found.nsr is not None and not found.nsr.trusted:
            said.append(
                f"N/G rests on {found.nsr.effective_samples:.3g} independent values: its error is a rough one. "
                "Run longer or more seeds."
            )
        n = base.population
        if star is not None and n is not None and star.value > n:
            said.append(f"B* is more than the {n} samples that a batch of distinct ones can hold.")
        if base.unsized:
            said.append(
                "Batches are made of distinct images of a data set whose size n isn't known: B_simple lacks its factor "
                "(n-1)/(n-B), and N at another batch size is not quite 1/B's law."
            )
        if base.met:
            said.append(
                "Batches came from epochs, and G from images that the weights may have met since one began: G is too "
                "high by an unknown part, and N/G, B_simple and B* are too low."
            )
        for other in self.outlook:
            word = {"fails": "predicted to fail", "silent": "no failure predicted", "undecided": "within B*'s interval"}
            less = 1 - base.noise_factor(other.batch_size) / base.noise_factor(base.batch_size)
            distinct = f" Its images being distinct, its N is {100 * less:.2g} % below 1/B's law." if less else ""
            said.append(f"B = {other.batch_size} (κ = {other.kappa:g}): {word[other.verdict]}.{distinct}")
        if self.sde is not None and self.sde.verdict(self.confidence) == "fails":
            said.append(
                f"At B = {base.batch_size} itself SGD already is not {self.C:.4g}-close to its SDE (Theorem 5.2)."
            )
        return said

    @property
    def noise_scale_formula(self) -> str:
        """What ``noise_scale`` is, in symbols, with n where batches are made of distinct samples."""
        n = self.baseline.population
        return "B_simple = B·N/G" if n is None else f"B_simple = B·N/G·(n-1)/(n-B), n = {n},"

    def headline(self) -> str:
        """Return κ*, B* and B_simple in one sentence: the interval's confidence, the runs, the equilibrium."""
        base, star = self.baseline, self.batch_size()
        known = f"C = {self.C:.4g}; equilibrium {base.equilibrium.state}"
        low, high = self.batch_size_interval
        percent = f"{100 * self.confidence:g} %"
        of_runs = f"of {len(base.runs)} runs" if len(base.runs) > 1 else "of one run, without the scatter between runs"
        scaling = f"Linear scaling from B = {base.batch_size}, lr = {base.lr:g}"
        if star is None or self.noise_scale is None:
            return (
                f"{scaling}: no B* can be given, because G can't be told from 0 there "
                f"(B* is above {low:.3g} at {percent} {of_runs}; {known}). Average over more steps."
            )
        interval = f"interval {low:.3g} to {high:.3g}" if math.isfinite(high) else f"above {low:.3g}, no upper limit"
        return (
            f"{scaling} must fail beyond B* = {star.value:.3g} "
            f"({percent} {interval}, {of_runs}; {known}): κ* = C²(1 + N/G) = {self.kappa['exact'].value:.3g}; "
            f"the noise scale {self.noise_scale_formula} is {self.noise_scale.value:.3g}."
        )


def _finite(interval: tuple[float, float]) -> list[float | None]:
    return [end if math.isfinite(end) else None for end in interval]


class TooFewRowsError(ValueError):
    """There is nothing to predict from: too few rows with G and N, a run that diverged, or a mean of 0."""


def measure(series: Sequence[Series], *, last: float = 0.25, tolerance: float = 0.2) -> Baseline:
    """Average runs that differ in the seed alone over the last part of their phase, and test for equilibrium.

    Args:
        series: runs of the same batch size, lr and weight decay; only steps that all of them have are used.
        last: the window, as a fraction of the phase; widened to 12 rows where it holds fewer, up to half the phase.
        tolerance: of the equilibrium test, see :func:`svag_fast.theory.equilibrium.detect_equilibrium`.

    Raises:
        ValueError: no runs, runs of different settings, or fewer than 12 rows with G and N in half the phase.
    """
    if not series:
        raise ValueError("series must be one run or more, got none")
    if not 0 < last <= 1:
        raise ValueError(f"last must be in (0, 1], got {last}")
    first = series[0]
    name = ", ".join(s.name for s in series)
    if len({(s.batch_size, s.weight_decay, s.population, s.unsized, s.weight_sq_norm is None) for s in series}) != 1:
        raise ValueError(f"{name}: these differ in batch size, weight decay, sampling or columns and can't be averaged")
    measured = [_measured_steps(s) for s in series]
    common = measured[0]
    for steps in measured[1:]:
        common = np.intersect1d(common, steps)
    lr = _at(first, first.lr, common)
    if not all(same_rate(_at(s, s.lr, common), lr).all() for s in series):
        raise ValueError(f"{name}: these differ in learning rate and can't be averaged")
    begin, end = _longest_phase(lr, common)
    rows = max(math.floor(last * (end - begin)), LEAST)
    start = end - rows
    if rows > max(last, 0.5) * (end - begin):
        shared = " of all runs" if len(series) > 1 else ""
        raise TooFewRowsError(
            f"{name}: the longest phase at constant lr has {end - begin} rows with G and N{shared}, and its "
            f"later half must hold at least {LEAST}: run longer, log more often or keep the rate constant for longer"
        )
    window = common[start:end]

    def rows_of(column: Sequence[Array | None]) -> Array:
        return np.array([_at(s, v, window) for s, v in zip(series, column, strict=True) if v is not None])

    columns: dict[str, Sequence[Array | None]] = {
        "G": [s.grad_sq_norm for s in series],
        "N": [s.noise_trace for s in series],
        "R": [s.weight_sq_norm for s in series],
    }
    measured_there = {column: rows_of(values) for column, values in columns.items() if values[0] is not None}
    for column, values in measured_there.items():
        if not np.abs(values).mean() > _LEAST_MEAN:
            raise TooFewRowsError(
                f"{name}: {column} is {values.mean():g} from step {window[0]:g} on: no ratio to predict from"
            )
    if first.batch_size == first.population:
        raise TooFewRowsError(f"{name}: a batch of all {first.population} samples has no noise, and predicts nothing")
    rate = float(lr[start])
    equilibrium = detect_equilibrium(
        measured_there["G"],
        measured_there["N"],
        measured_there.get("R"),
        lr=rate,
        weight_decay=first.weight_decay,
        tolerance=tolerance,
    )
    phase_start = 0.0 if begin == 0 else common[begin]
    return Baseline(
        runs=tuple(s.name for s in series),
        batch_size=first.batch_size,
        lr=rate,
        weight_decay=first.weight_decay,
        first_step=int(window[0]),
        last_step=int(window[-1]),
        rows=len(window),
        relaxation_times=4 * rate * first.weight_decay * float(window[0] - phase_start) if first.weight_decay else None,
        equilibrium=equilibrium,
        population=first.population,
        unsized=first.unsized,
        met=any(s.met for s in series),
    )


def from_baseline(
    baseline: Baseline,
    others: Sequence[tuple[int, Baseline | None]] = (),
    *,
    C: float = SQRT2,
    confidence: float = 0.95,
) -> Prediction:
    """Return what ``baseline`` predicts of linear scaling, and of each batch size of ``others``."""
    found = baseline.equilibrium
    G, N, together = found.grad_sq_norm.mean, found.noise_trace.mean, found.covariance
    interval = critical_kappa_interval(G, N, C=C, covariance=together, confidence=confidence)
    kappa: dict[KappaForm, Estimate] = {}
    noise_scale = sde = None
    if found.nsr is not None:
        kappa = {form: critical_kappa(G, N, C=C, form=form, covariance=together) for form in FORMS}
        size, population = baseline.batch_size, baseline.population
        noise_scale = simple_noise_scale(G, N, size, covariance=together, population=population)
        sde = sde_fails_certificate(G, N, C=C, covariance=together)
    outlook = tuple(
        Outlook(size, size / baseline.batch_size, _verdict(interval, size / baseline.batch_size), measured)
        for size, measured in others
    )
    return Prediction(baseline, C, confidence, kappa, interval, noise_scale, sde, outlook)


def from_runs(
    folder: str | os.PathLike[str],
    *,
    C: float = SQRT2,
    last: float = 0.25,
    tolerance: float = 0.2,
    confidence: float = 0.95,
) -> Prediction:
    """Predict from one run's folder, or from a folder of runs: there from the smallest batch's SGD runs alone.

    The other batch sizes' SGD runs, where lr followed the linear scaling rule, only stand beside the prediction.

    Raises:
        FileNotFoundError: no run there.
        ValueError: no SGD run (l = 1) there, one of the smallest batch's diverged, an unreadable file, or too few rows.
    """
    folder = Path(folder)
    runs = [load_run(folder)] if (folder / "config.json").is_file() else load_runs(folder)
    require_svag(runs)
    if not any(run.l == 1 for run in runs):
        raise ValueError(f"{folder}: no SGD run (l = 1) in it, and Theorem 5.6 is about SGD")
    return _from_sgd_runs(runs, C=C, last=last, tolerance=tolerance, confidence=confidence)


def measure_each(runs: Sequence[Run], *, last: float = 0.25, tolerance: float = 0.2) -> dict[int, Baseline | None]:
    """Return what SGD's runs measure at each batch size; None where they can't be measured, as when one diverged.

    Raises:
        ValueError: a batch size was run at two learning rates.
    """
    found: dict[int, Baseline | None] = {}
    for (batch_size, _), group in group_by_batch_size(run for run in runs if run.l == 1).items():
        if batch_size in found:
            raise ValueError(f"batch size {batch_size} must be run at one learning rate, got several")
        finite = all(run.diverged_at is None for run in group)
        found[batch_size] = _measure_if_possible(group, last, tolerance) if finite else None
    return found


def predict_if_possible(runs: Sequence[Run], *, C: float = SQRT2, confidence: float = 0.95) -> Prediction | str:
    """Return what :func:`from_runs` says of runs that are read already, or in words why nothing can be predicted.

    Give it all of them, also those that diverged: without these, the others are a biased sample.
    """
    if not any(run.l == 1 for run in runs):
        return "there is no SGD run (l = 1) to predict from"
    try:
        return _from_sgd_runs(runs, C=C, last=0.25, tolerance=0.2, confidence=confidence)
    except ValueError as error:
        return str(error)


def _from_sgd_runs(runs: Sequence[Run], *, C: float, last: float, tolerance: float, confidence: float) -> Prediction:
    groups = group_by_batch_size(run for run in runs if run.l == 1)
    (batch_size, lr), group = next(iter(groups.items()))
    _require_all_finite(group)
    baseline = measure([_series(run) for run in group], last=last, tolerance=tolerance)
    others: list[tuple[int, Baseline | None]] = []
    for (other_size, other_lr), other in groups.items():
        if other_size > batch_size and math.isclose(other_lr / lr, other_size / batch_size, rel_tol=1e-6):
            others.append((other_size, _measure_if_possible(other, last, tolerance)))
    return from_baseline(baseline, others, C=C, confidence=confidence)


def from_csv(
    path: str | os.PathLike[str],
    *,
    batch_size: int,
    lr: float,
    weight_decay: float = 0.0,
    population: int | None = None,
    C: float = SQRT2,
    last: float = 0.25,
    tolerance: float = 0.2,
    confidence: float = 0.95,
) -> Prediction:
    """Predict from another trainer's log: columns ``step,G,N`` and optionally ``R`` and ``lr``, a header line first.

    Args:
        path: the CSV file; empty cells are rows that did not measure the column.
        batch_size: B of that run.
        lr: its learning rate, for all rows unless the file has a column ``lr``.
        weight_decay: its L2 coefficient, added to the gradient as λx.
        population: n, where each batch was made of distinct samples of n; None for independent draws.

    Raises:
        FileNotFoundError, ValueError: no such file, a column missing, a cell that is not a number, steps that go back.
    """
    batch_size = integer("batch_size", batch_size, least=1)
    lr = number("lr", lr, above=0)
    weight_decay = number("weight_decay", weight_decay, least=0)
    require_drawable(batch_size, population)
    table = read_log(path)
    _require_finite(Path(path).name, None if table.diverged is None else table.values["step"][table.diverged])
    columns = table.values
    rates = columns.get("lr", np.full(len(columns["step"]), lr))
    series = Series(
        Path(path).name,
        batch_size,
        weight_decay,
        columns["step"],
        rates,
        columns["G"],
        columns["N"],
        columns.get("R"),
        population,
    )
    return from_baseline(measure([series], last=last, tolerance=tolerance), C=C, confidence=confidence)


def _verdict(interval: tuple[float, float], kappa: float) -> CertificateAnswer:
    """Return "fails" beyond κ*'s interval, "silent" below it (there the theorem says nothing), else "undecided"."""
    low, high = interval
    return "fails" if kappa > high else "silent" if kappa < low else "undecided"


def _require_finite(name: str, diverged_at: float | None) -> None:
    if diverged_at is not None:
        raise TooFewRowsError(f"{name} diverged: not finite from step {diverged_at:g} on, so it has no equilibrium")


def _require_all_finite(runs: Sequence[Run]) -> None:
    """Refuse runs of which some diverged: what the others measure is not what a run measures on average."""
    diverged = [run for run in runs if run.diverged_at is not None]
    if diverged and len(runs) > 1:
        names = ", ".join(run.name for run in diverged)
        left = "" if len(diverged) == len(runs) else ": those left are a biased sample, and predict nothing"
        raise TooFewRowsError(
            f"{len(diverged)} of {len(runs)} SGD runs at B = {runs[0].batch_size} diverged ({names}){left}"
        )


def _series(run: Run) -> Series:
    _require_finite(run.name, run.diverged_at)

    def column(name: str) -> Array:
        if name not in run.metrics:
            # A run that has only begun has no metrics yet.
            raise TooFewRowsError(
                f"{run.name}: nothing in column {name!r} of metrics.csv; it has {', '.join(run.metrics)}"
            )
        return run.metrics[name]

    return Series(
        run.name,
        run.batch_size,
        float(run.config["weight_decay"]),
        column("effective_step"),
        column("lr"),
        column("grad_sq_norm"),
        column("noise_trace"),
        column("weight_sq_norm"),
        run.population,
        run.unsized,
        run.met_its_batches,
    )


def _measure_if_possible(runs: Sequence[Run], last: float, tolerance: float) -> Baseline | None:
    """Return None where the runs can't be measured, as when they are short; they only stand beside the prediction."""
    try:
        return measure([_series(run) for run in runs], last=last, tolerance=tolerance)
    except ValueError:
        return None


def _measured_steps(series: Series) -> Array:
    columns = [series.lr, series.grad_sq_norm, series.noise_trace]
    if series.weight_sq_norm is not None:
        columns.append(series.weight_sq_norm)
    whole = np.isfinite(np.stack(columns)).all(axis=0)
    return series.step[whole]


def _at(series: Series, values: Array, steps: Array) -> Array:
    return values[np.searchsorted(series.step, steps)]


def _longest_phase(lr: Array, steps: Array) -> tuple[int, int]:
    """Return the rows [begin, end) of the stretch of constant learning rate that is the longest in steps."""
    stretches = constant_stretches(lr, steps)
    if not stretches:
        return 0, 0
    first, last, _, _ = max(stretches, key=lambda stretch: stretch[3] - stretch[2])
    return first, last + 1
