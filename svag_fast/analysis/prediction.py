"""From which batch size on must linear scaling fail? Predicted from SGD runs at one batch size (Theorem 5.6)."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from svag_fast.analysis.baseline import Baseline, Series, TooFewRowsError, measure
from svag_fast.analysis.runs import Run, group_by_batch_size, load_run, load_runs, require_svag
from svag_fast.experiments.run_folder import Array, read_log
from svag_fast.numeric import integer, number
from svag_fast.stats.estimate import Estimate
from svag_fast.stats.sampling import require_drawable
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

__all__ = [
    "Baseline",
    "Outlook",
    "Prediction",
    "Series",
    "TooFewRowsError",
    "from_baseline",
    "from_csv",
    "from_runs",
    "measure",
    "measure_each",
    "predict_if_possible",
]

FORMS: tuple[KappaForm, ...] = ("exact", "approximate", "tightened")


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
