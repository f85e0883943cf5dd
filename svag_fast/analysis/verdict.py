"""Does SGD match its SDE limit, and has SVAG converged to it? Answers by a margin.

A distance *matches* where its interval is inside the margin, *departs* where it is outside, and is *open* else.
docs/verdict.md explains the method, states the level of each answer and gives its measured error rates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import numpy as np

from svag_fast.analysis.margins import METRICS, Margin, choose_margins
from svag_fast.analysis.phases import END, common_phases, part_mean, phase_rates, resolution
from svag_fast.analysis.runs import Run, group_by_batch_size, group_by_l
from svag_fast.stats.limit_fit import Figure, fit_limit, outside, t_quantile, within

Answer: TypeAlias = Literal["matches", "departs", "open"]
Interval: TypeAlias = tuple[float, float]

_MOST_SEEDS = 100_000  # a number beyond it settles nothing in practice


@dataclass(frozen=True)
class Decision:
    """A distance compared with a margin, all in the metric's units.

    ``seeds_needed``: runs for each l with which the interval would be short enough to settle an open question, if the
    estimates stay as they are. None where it is settled, and where no number of seeds would do: the distance is the
    margin itself, or the doubt is about the extrapolation, which only a larger l can end.
    """

    value: float
    interval: Interval
    margin: float
    answer: Answer
    seeds_needed: int | None


@dataclass(frozen=True)
class Mean:
    """The mean over ``runs`` runs, and its standard error (None for a single run)."""

    value: float
    standard_error: float | None
    runs: int


@dataclass(frozen=True)
class Cell:
    """One metric in one part of the run ("phase 1", ..., "end"), at one batch size.

    Attributes:
        means: By l, what the fit is made from.
        limit: m_inf; None where it could not be fitted, then ``missing`` says why.
        limit_interval: Its interval.
        slope: a of m_inf + a/l.
        fitted: The l that the line was fitted to.
        margin: The distance that does not matter, in the metric's units.
        distances: By l, m(l) - m_inf; 1 is SGD, and "matches" for the largest l means that SVAG has converged by it.
            Empty without a limit.
        regime_reached: Whether 1/l describes all l, SGD among them, and the largest l is within the margin of the
            limit; None where it could not be tested, with fewer than three l.
        missing: Why there is no answer, in words.
    """

    means: Mapping[float, Mean]
    margin: float | None = None
    limit: float | None = None
    limit_interval: Interval | None = None
    slope: float | None = None
    fitted: tuple[float, ...] = ()
    distances: Mapping[float, Decision] = field(default_factory=dict)
    regime_reached: bool | None = None
    missing: str | None = None
    figure: Figure | None = None
    """The limit as the comparison between batch sizes needs it."""

    @property
    def sgd(self) -> Decision | None:
        """SGD's distance from the limit; None without a limit or without two runs of SGD."""
        return self.distances.get(1)

    @property
    def answer(self) -> Answer:
        """Whether SGD matches the limit here."""
        return self.sgd.answer if self.sgd else "open"

    @property
    def converged_by(self) -> float | None:
        """The least l > 1 in the data from which on every l matches the limit."""
        by = None
        for l in sorted(self.distances, reverse=True):
            if l == 1 or self.distances[l].answer != "matches":
                break
            by = l
        return by


@dataclass(frozen=True)
class Verdict:
    """What the runs of one batch size say.

    Attributes:
        batch_size: B.
        lr: SGD's learning rate.
        answer: "matches" where SGD matches in every metric and part. "departs" where it departs in one of them, or
            where all of its runs diverged, and of the largest l's some finished and none diverged. "diverged" where all
            runs of all l diverged. Else "open".
        cells: By metric and part.
        total: Runs, by l.
        finished: Runs that came to their end, by l.
        diverged: By l, the effective steps at which runs were found to have diverged.
        confidence: Of each interval.
        sampling: How batches were drawn; None where the runs don't say.
        noise_factor: What that makes of the SDE's noise, over one sample's by B; None where n isn't known.
        times: Of each part, from when to when it is, as effective steps times lr.
        rates: Of each part, its learning rate.
    """

    batch_size: int
    lr: float
    answer: Literal["matches", "departs", "open", "diverged"]
    cells: Mapping[str, Mapping[str, Cell]]
    total: Mapping[float, int]
    finished: Mapping[float, int]
    diverged: Mapping[float, tuple[float, ...]]
    confidence: float
    sampling: str | None
    noise_factor: float | None
    times: Mapping[str, tuple[float, float]]
    rates: Mapping[str, float]

    @property
    def sgd_diverged(self) -> bool:
        """Whether every run of SGD diverged."""
        return 0 < self.total.get(1, 0) == len(self.diverged.get(1, ()))

    @property
    def largest_l(self) -> float | None:
        """The largest l with a finished run."""
        return max((l for l, count in self.finished.items() if count), default=None)


def judge(
    runs: Sequence[Run],
    *,
    metrics: Sequence[str] = METRICS,
    margins: Mapping[str, Margin] | None = None,
    confidence: float = 0.95,
) -> list[Verdict]:
    """Return the verdict for each batch size and lr among ``runs``; only runs that came to their end give numbers.

    Args:
        runs: From :func:`svag_fast.analysis.runs.load_runs`.
        metrics: The columns of metrics.csv to judge by.
        margins: By metric; see :func:`svag_fast.analysis.margins.choose_margins` for what the others get.
        confidence: Of each interval.

    Raises:
        ValueError: ``confidence`` is out of range, a margin is for no judged metric, or runs of one batch size differ
            in length or schedule.
        KeyError: The runs have no such metric.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    chosen = choose_margins(metrics, margins or {})
    return [
        _judge_batch_size(batch_size, lr, group, chosen, confidence)
        for (batch_size, lr), group in group_by_batch_size(runs).items()
    ]


def combine(answers: Sequence[Answer]) -> Answer:
    """Return "departs" where one does, "matches" where all do, else "open"."""
    if "departs" in answers:
        return "departs"
    return "matches" if answers and set(answers) == {"matches"} else "open"


def decide(figure: Figure, margin: float, confidence: float) -> Decision:
    """Compare one figure with ``margin``."""
    ends = figure.interval(confidence)
    # An interval that crosses the margin says neither, so "open" is an answer of its own, not a weak "matches".
    answer: Answer = "matches" if within(ends, margin) else "departs" if outside(ends, margin) else "open"
    needed = _seeds_needed(figure, margin, confidence) if answer == "open" else None
    return Decision(float(figure.value), (float(ends[0]), float(ends[1])), margin, answer, needed)


def _judge_batch_size(
    batch_size: int, lr: float, runs: list[Run], margins: Mapping[str, Margin], confidence: float
) -> Verdict:
    groups = group_by_l(runs)
    diverged = {l: tuple(run.diverged_at for run in g if run.diverged_at is not None) for l, g in groups.items()}
    ended = {l: [run for run in group if run.finished and run.diverged_at is None] for l, group in groups.items()}
    # Survivors' means are no means: an l with a diverged run is left out, and so is every smaller one but SGD, which
    # is then only compared with the limit.
    worst = max((l for l, at in diverged.items() if at and l > 1), default=0.0)
    usable = {l: group for l, group in ended.items() if group and not diverged[l] and (l == 1 or l > worst)}
    lost = _lost(groups, ended, diverged, worst)
    cells: dict[str, dict[str, Cell]] = {metric: {} for metric in margins}
    times: dict[str, tuple[float, float]] = {}
    rates: dict[str, float] = {}
    if usable:
        parts = common_phases([run for group in usable.values() for run in group])
        # All have this length and schedule: `common_phases` refuses others.
        any_run = next(iter(usable.values()))[0]
        total, rates = any_run.effective_steps, phase_rates(any_run)
        times = {
            # In the SDE's own time, in which runs of different batch sizes can be compared.
            part: (lr * (total if part == END else b), lr * (total if part == END else e))
            for part, (b, e) in parts.items()
        }
        for metric, margin in margins.items():
            for part, window in parts.items():
                cells[metric][part] = _cell(usable, metric, margin, part, window, confidence, lost)
    verdict = Verdict(
        batch_size,
        lr,
        "open",
        cells,
        {l: len(group) for l, group in groups.items()},
        {l: len(group) for l, group in ended.items()},
        {l: at for l, at in diverged.items() if at},
        confidence,
        runs[0].config.get("sampling"),
        runs[0].noise_factor,
        times,
        rates,
    )
    return _answered(verdict)


def _answered(verdict: Verdict) -> Verdict:
    if sum(map(len, verdict.diverged.values())) == sum(verdict.total.values()):
        return replace(verdict, answer="diverged")
    # SGD that diverges where the largest l never does is no open question: the limit is finite, and SGD is not.
    largest = max(verdict.total)
    if verdict.sgd_diverged and largest > 1 and verdict.finished[largest] and largest not in verdict.diverged:
        return replace(verdict, answer="departs")
    return replace(verdict, answer=combine([c.answer for parts in verdict.cells.values() for c in parts.values()]))


def _cell(
    groups: Mapping[float, Sequence[Run]],
    metric: str,
    margin: Margin,
    part: str,
    window: tuple[float, float],
    confidence: float,
    lost: Mapping[str, str],
) -> Cell:
    measured = {l: [part_mean(run, metric, part, window) for run in group] for l, group in groups.items()}
    # A mean over the runs that happen to have been measured there would be of another part than the others'.
    if any(count == 0 for pairs in measured.values() for _, count in pairs):
        return Cell({}, missing="it was not measured there in every run: ask for more evaluations")
    values = {l: np.array([value for value, _ in pairs]) for l, pairs in measured.items()}
    # One infinite run makes a mean infinite, and every distance nan.
    if not all(np.isfinite(v).all() for v in values.values()):
        return Cell({}, missing="it is not finite there in every run")
    # Runs may end on the same value by chance, since an accuracy has few: a run's number has at least the variance
    # that rounding to the column's resolution gives. A mean over evaluations has no less: a converged run repeats one.
    step = resolution(np.concatenate([run.series(metric)[1] for group in groups.values() for run in group]))
    floor = step**2 / 12
    variances = {l: max(float(v.var(ddof=1)), floor) for l, v in values.items() if len(v) > 1}
    means = {
        l: Mean(float(v.mean()), math.sqrt(variances[l] / len(v)) if l in variances else None, len(v))
        for l, v in values.items()
    }
    ls = np.array(sorted(variances))
    if len(ls) < 2:
        return Cell(means, missing=lost["limit"])
    # A relative margin is a part of the largest l's mean, the nearest to the limit: the limit itself is not known yet.
    level = means[ls[-1]].value
    size = margin.at(level)
    # Nothing is inside a margin of 0, so every answer would be "departs" or "open" for no reason in the data.
    if size == 0:
        return Cell(means, missing=f"{margin} of a mean of 0 is no margin: give {metric} one of its own (--margin)")
    numbers = np.array([means[l].value for l in ls]), np.array([variances[l] for l in ls])
    counts = np.array([means[l].runs for l in ls])
    fit = fit_limit(ls, *numbers, counts, size)
    low, high = fit.limit.interval(confidence)
    return Cell(
        means=means,
        margin=size,
        limit=float(fit.limit.value),
        limit_interval=(float(low), float(high)),
        slope=float(fit.slope),
        fitted=tuple(float(l) for l in ls[int(fit.first) :]),
        distances={float(l): decide(fit.distances.at(i), size, confidence) for i, l in enumerate(ls)},
        regime_reached=bool(fit.regime_reached) if fit.testable else None,
        missing=None if ls[0] == 1 else lost["sgd"],
        figure=fit.limit,
    )


def _lost(
    groups: Mapping[float, Sequence[Run]],
    ended: Mapping[float, Sequence[Run]],
    diverged: Mapping[float, Sequence[float]],
    worst: float,
) -> dict[str, str]:
    """Say why there may be no limit, and why there may be no distance of SGD from it."""
    limit = f"runs diverged at l = {worst:g}" if worst else "two l with two finished runs each are needed"
    sgd = "two finished runs of SGD are needed" if 1 in groups else "there is no run at l = 1"
    if diverged.get(1):
        sgd = f"{len(diverged[1])} of {len(groups[1])} runs of SGD diverged"
        if not ended[largest := max(groups)] and not diverged[largest]:
            sgd += f", and none of l = {largest:g} has finished"
    return {"limit": limit, "sgd": sgd}


def _seeds_needed(figure: Figure, margin: float, confidence: float) -> int | None:
    """Return the least number of seeds for each l whose interval would clear the margin, were the estimates to stay."""
    # More seeds shorten the random part alone; the extrapolation's own length stays.
    gap = abs(abs(float(figure.value)) - margin) - float(figure.systematic)

    def enough(count: int) -> bool:
        error, df = figure.with_seeds(count)
        return bool(t_quantile(confidence, df) * error < gap)

    if not enough(_MOST_SEEDS):
        return None
    low, high = 1, _MOST_SEEDS  # one seed is never enough, high always is
    # By bisection, since more seeds never make the interval longer.
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
