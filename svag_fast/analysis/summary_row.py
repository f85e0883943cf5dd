"""What the runs of one l measured: a row of the report's table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from svag_fast.analysis.runs import Run, group_by_l
from svag_fast.analysis.verdict import Verdict
from svag_fast.stats.estimate import Estimate
from svag_fast.theory.closeness import Norms, c_closeness


@dataclass(frozen=True)
class SummaryRow:
    """One l of one batch size: means over the finished runs, with the standard deviation of one run where it says sd.

    ``grad_sq_norm``, ``noise_trace`` and ``weight_sq_norm`` are G, N and R: the mean over seeds, with its standard
    error. They and ``nsr`` are of the later half of the first phase. ``closeness`` is the least C for which this l and
    the largest are C-close there (Definition 5.1). None means that nothing was measured, or that seeds are too few.
    """

    l: float
    seeds: int
    unfinished: int
    final_accuracy: float | None
    final_accuracy_sd: float | None
    final_train_loss: float | None
    final_train_loss_sd: float | None
    grad_sq_norm: Estimate | None
    noise_trace: Estimate | None
    weight_sq_norm: Estimate | None
    nsr: float | None
    closeness: Estimate | None
    samples_per_second: float | None


def summary_rows(runs: Sequence[Run], verdict: Verdict) -> list[SummaryRow]:
    """Return a row for each l among the runs of one batch size."""
    groups = group_by_l(runs)
    finished = {l: [r for r in group if r.finished and r.diverged_at is None] for l, group in groups.items()}
    norms = {l: _norms(group) for l, group in finished.items()}
    largest = norms.get(verdict.largest_l) if verdict.largest_l is not None else None
    rows = []
    for l, group in groups.items():
        G, N, R = norms[l] or (None, None, None)
        accuracy, accuracy_sd = _mean_sd(_last(finished[l], "test_accuracy"))
        loss, loss_sd = _mean_sd(_last(finished[l], "train_loss"))
        rows.append(
            SummaryRow(
                l=l,
                seeds=len(finished[l]),
                unfinished=len(group) - len(finished[l]),
                final_accuracy=accuracy,
                final_accuracy_sd=accuracy_sd,
                final_train_loss=loss,
                final_train_loss_sd=loss_sd,
                grad_sq_norm=G,
                noise_trace=N,
                weight_sq_norm=R,
                nsr=N.value / G.value if G and N and G.value > 0 else None,
                closeness=_closeness(norms[l], largest) if l != verdict.largest_l else None,
                samples_per_second=_mean_sd([_median(run, "samples_per_second") for run in finished[l]])[0],
            )
        )
    return rows


def _norms(runs: Sequence[Run]) -> tuple[Estimate, Estimate, Estimate] | None:
    """G, N and R over the first phase, with standard errors from the seeds; None where one was never measured."""
    estimates = []
    for column in ("grad_sq_norm", "noise_trace", "weight_sq_norm"):
        mean, sd = _mean_sd([run.first_phase_mean(column) for run in runs if column in run.metrics])
        if mean is None:
            return None
        estimates.append(Estimate(mean, (sd or 0.0) / math.sqrt(len(runs))))
    G, N, R = estimates
    return G, N, R


def _closeness(
    a: tuple[Estimate, Estimate, Estimate] | None, b: tuple[Estimate, Estimate, Estimate] | None
) -> Estimate | None:
    # Estimates of G may fall below 0 by chance: there is no ratio of norms then.
    if a is None or b is None or min(estimate.value for estimate in (*a, *b)) <= 0:
        return None
    sgd, sde = (Norms(weight_sq_norm=R, grad_sq_norm=G, noise_trace=N) for G, N, R in (a, b))
    return c_closeness(sgd, sde).constant


def _last(runs: Sequence[Run], column: str) -> list[float]:
    """The value at the end of each run that measured it there."""
    finals = [run.final(column) for run in runs if column in run.metrics]
    return [value for value in finals if not math.isnan(value)]


def _median(run: Run, column: str) -> float:
    if column not in run.metrics:
        return math.nan
    values = run.series(column)[1]
    return float(np.median(values)) if len(values) else math.nan


def _mean_sd(values: Sequence[float]) -> tuple[float | None, float | None]:
    finite = np.array([value for value in values if math.isfinite(value)])
    # All or none: a mean over the runs that were measured is another mean than its row says.
    if len(finite) == 0 or len(finite) < len(values):
        return None, None
    return float(finite.mean()), float(finite.std(ddof=1)) if len(finite) > 1 else None
