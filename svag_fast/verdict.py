"""Has SVAG converged, and does SGD stay with its limit? Decided from the curves of runs with several seeds.

docs/verdict.md derives the criterion and gives its measured error rates. In short: two values of l *differ* where their
seed-mean curves, or their ends, lie apart by more than chance explains and by more than one run's own scatter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from svag_fast.curves import Array, Run, group_by_batch_size, group_by_l, window_means
from svag_fast.estimate import Estimate

Agreement: TypeAlias = Literal["agrees", "differs", "cannot tell"]
Curve: TypeAlias = tuple[Array, Array]  # one run's effective steps, and the metric there

WINDOWS = 20  # a curve is averaged over this many windows: milestones at multiples of 5 % fall between two of them


@dataclass(frozen=True)
class Difference:
    """How far apart two processes are in one respect (the whole curve, or its end).

    Attributes:
        size: Distance without what seed noise adds to it, and its standard error.
        low: Lower end of the interval of one standard error.
        high: Upper end of it. (The interval of a distance near 0 is not symmetric.)
        seed_noise: Standard deviation of one run about its process's mean.
        p_value: Probability of a distance this large from seed noise alone.
    """

    size: Estimate
    low: float
    high: float
    seed_noise: float
    p_value: float

    def agreement(self, alpha: float) -> Agreement:
        """Judge at significance ``alpha``; see the module's docstring."""
        if self.p_value < alpha:
            return "differs" if self.size.value > self.seed_noise else "agrees"
        return "agrees" if self.size.value <= 3 * self.seed_noise else "cannot tell"


@dataclass(frozen=True)
class Comparison:
    """One l held against the largest.

    ``curve`` is the distance over the whole run, ``end`` that of the last values; both None where a process has fewer
    than two finished seeds, since one run shows no noise. ``alpha`` is the significance asked of each.
    """

    l: float
    largest_l: float
    alpha: float
    curve: Difference | None
    end: Difference | None

    @property
    def agreement(self) -> Agreement:
        """Whether the two processes agree, in both respects."""
        if self.curve is None or self.end is None:
            return "cannot tell"
        found = {self.curve.agreement(self.alpha), self.end.agreement(self.alpha)}
        return "differs" if "differs" in found else "cannot tell" if "cannot tell" in found else "agrees"


@dataclass(frozen=True)
class Verdict:
    """What the runs of one batch size say.

    Attributes:
        batch_size: B.
        lr: SGD's learning rate.
        metric: The column that was compared.
        effective_steps: Length of the part that all finished runs cover; 0 where none has finished.
        largest_l: The largest l with a finished run, which stands for the limit; None where none has finished.
        comparisons: By l, each smaller l held against the largest.
        convergence: Whether SVAG's curves stop changing before the largest l.
        converged_by: The least l > 1 (or l = 1, where there is no other) that agrees with the largest, as do all l
            between the two; None unless "converged".
        sgd: Whether SGD (l = 1) matches or departs from the largest l; "not run" without l = 1.
    """

    batch_size: int
    lr: float
    metric: str
    effective_steps: float
    largest_l: float | None
    comparisons: Mapping[float, Comparison]
    convergence: Literal["converged", "not converged", "cannot tell"]
    converged_by: float | None
    sgd: Literal["matches", "departs", "cannot tell", "not run"]


def judge(
    runs: Sequence[Run], *, metric: str = "test_accuracy", confidence: float = 0.95, windows: int = WINDOWS
) -> list[Verdict]:
    """Return the verdict for each batch size and lr among ``runs``; runs that have not finished are left out.

    Args:
        runs: From :func:`svag_fast.curves.load_runs`.
        metric: The column of metrics.csv whose curves are compared.
        confidence: Probability that no difference is stated for a batch size where there is none (over all its l).
        windows: Number of windows that each curve is averaged over.

    Raises:
        ValueError: ``confidence`` or ``windows`` is out of range.
        KeyError: The runs have no such ``metric``.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    if windows < 1:
        raise ValueError(f"windows must be at least 1, got {windows}")
    return [
        _judge_batch_size(batch_size, lr, group, metric, 1 - confidence, windows)
        for (batch_size, lr), group in group_by_batch_size(runs).items()
    ]


def compare(processes: Mapping[float, Sequence[Curve]], *, alpha: float, windows: int = WINDOWS) -> list[Comparison]:
    """Hold each process, keyed by l, against that of the largest l, with a significance of ``alpha`` in all.

    ``processes[l]`` has one curve a seed. The seeds of different l count as independent, which makes the test cautious
    where they are not. Curves are compared over the range that all of them cover.
    """
    *smaller, largest = sorted(processes)
    if not smaller:
        return []
    share = alpha / (2 * len(smaller))  # Bonferroni: two respects of each smaller l
    edges, points = _grid([curve for curves in processes.values() for curve in curves], windows)
    averaged = {l: np.array([window_means(x, y, edges) for x, y in curves]) for l, curves in processes.items()}
    ends = {l: np.array([np.interp(edges[-1], x, y) for x, y in curves]) for l, curves in processes.items()}
    scatter = {l: _scatter(curves, points) for l, curves in processes.items() if len(curves) > 1}
    dimension = _noise_dimension(list(averaged.values()))
    found = []
    for l in smaller:
        curve = end = None
        if min(len(processes[l]), len(processes[largest])) > 1:
            noise = math.sqrt((scatter[l] + scatter[largest]) / 2)
            curve = _curve_difference(averaged[l], averaged[largest], noise, dimension)
            end = _end_difference(ends[l], ends[largest], random=noise > 0)
        found.append(Comparison(l, largest, share, curve, end))
    return found


def _judge_batch_size(batch_size: int, lr: float, runs: list[Run], metric: str, alpha: float, windows: int) -> Verdict:
    finished = group_by_l(run for run in runs if run.finished)
    if not finished:
        return Verdict(batch_size, lr, metric, 0.0, None, {}, "cannot tell", None, _sgd(group_by_l(runs), {}))
    processes = {l: [_curve(run, metric) for run in group] for l, group in finished.items()}
    comparisons = {found.l: found for found in compare(processes, alpha=alpha, windows=windows)}
    convergence, converged_by = _convergence(list(comparisons.values()))
    return Verdict(
        batch_size,
        lr,
        metric,
        min(float(x[-1]) for curves in processes.values() for x, _ in curves),
        max(finished),
        comparisons,
        convergence,
        converged_by,
        _sgd(group_by_l(runs), comparisons),
    )


def _curve(run: Run, metric: str) -> Curve:
    x, y = run.series(metric)
    if len(x) < 2:
        raise ValueError(f"{run.name}: {metric} was measured {len(x)} times in the whole run, a curve needs 2 points")
    return x, y


def _convergence(
    ascending: list[Comparison],
) -> tuple[Literal["converged", "not converged", "cannot tell"], float | None]:
    steps = [comparison for comparison in ascending if comparison.l > 1] or ascending  # l = 1 is SGD, judged apart
    by = None
    for comparison in reversed(steps):
        if comparison.agreement != "agrees":
            break
        by = comparison.l
    if by is not None:
        return "converged", by
    return "not converged" if steps and steps[-1].agreement == "differs" else "cannot tell", None


def _sgd(
    started: Mapping[float, object], comparisons: Mapping[float, Comparison]
) -> Literal["matches", "departs", "cannot tell", "not run"]:
    if 1 not in started:
        return "not run"
    if 1 not in comparisons:
        return "cannot tell"
    found = comparisons[1].agreement
    return "matches" if found == "agrees" else "departs" if found == "differs" else "cannot tell"


def _grid(curves: Sequence[Curve], windows: int) -> tuple[Array, Array]:
    """Edges of the windows, and the points of the coarsest curve, over the range that all curves cover."""
    low, high = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    coarsest = min((x for x, _ in curves), key=lambda x: np.count_nonzero((x >= low) & (x <= high)))
    points = np.unique(coarsest[(coarsest >= low) & (coarsest <= high)])
    return np.linspace(low, high, max(1, min(windows, len(points) - 1)) + 1), points


def _scatter(curves: Sequence[Curve], points: Array) -> float:
    """Variance over seeds of a single evaluation, averaged over the run."""
    variance = np.array([np.interp(points, x, y) for x, y in curves]).var(axis=0, ddof=1)
    if len(points) < 2:
        return float(variance.mean())
    return float(window_means(points, variance, points[[0, -1]])[0])


def _noise_dimension(processes: Sequence[Array]) -> float:
    """Effective number of independent directions of the seed noise, (tr Γ)²/tr Γ², Γ its covariance over the windows.

    Γ is pooled over all processes, each scaled to the same trace: the noise may grow or shrink with l, its correlation
    over the run counts as common. Few seeds make the number too small, which errs towards "agrees".
    """
    scaled = []
    for curves in processes:
        if len(curves) > 1:
            centred = curves - curves.mean(axis=0)
            trace = (centred**2).sum() / (len(curves) - 1)
            if trace > 0:
                scaled.append(centred / math.sqrt(trace))
    if not scaled:
        return 1.0
    rows = np.concatenate(scaled)
    gram = rows @ rows.T
    return float(np.trace(gram) ** 2 / (gram**2).sum())


def _curve_difference(a: Array, b: Array, seed_noise: float, dimension: float) -> Difference:
    """Root mean square over the run of the difference between two processes' mean curves.

    |mean a - mean b|² has the seed noise of both means in it; their variance, estimated from the seeds, is taken out,
    which leaves an unbiased estimate of the squared distance. Its null distribution is Box's F with ``dimension`` and,
    for the denominator, Welch's degrees of freedom times it (the ANOVA-type statistic of Brunner, Dette, Munk 1997).
    """
    gap = a.mean(axis=0) - b.mean(axis=0)
    parts = [(c.var(axis=0, ddof=1).mean() / len(c), len(c) - 1) for c in (a, b)]
    noise = float(sum(part for part, _ in parts))
    raw = float((gap**2).mean())
    if noise == 0:
        size = math.sqrt(raw)
        return Difference(Estimate(size), size, size, seed_noise, 0.0 if size > 0 else 1.0)
    welch = noise**2 / sum(part**2 / df for part, df in parts)
    # variance of |gap|² for Gaussian noise: 4 gapᵀ Γ gap + 2 tr Γ², and that of the correction, 2 tr Γ²/df
    along = sum(float((c @ gap / len(gap)).var(ddof=1)) / len(c) for c in (a, b))
    error = math.sqrt(4 * along + 2 * noise**2 / dimension * (1 + 1 / welch))
    squared = raw - noise
    low, size, high = (math.sqrt(max(value, 0.0)) for value in (squared - error, squared, squared + error))
    return Difference(
        Estimate(size, (high - low) / 2), low, high, seed_noise, _f_tail(raw / noise, dimension, dimension * welch)
    )


def _end_difference(a: Array, b: Array, *, random: bool) -> Difference:
    """Distance of two processes' mean last values, by Welch's t test.

    Seeds of a ``random`` process that end on the same value do so by chance (an accuracy has few values), not for lack
    of noise: where all do, a distance is not significant.
    """
    gap = abs(float(a.mean() - b.mean()))
    variances = [float(c.var(ddof=1)) for c in (a, b)]
    parts = [(variance / len(c), len(c) - 1) for variance, c in zip(variances, (a, b), strict=True)]
    error = math.sqrt(sum(part for part, _ in parts))
    seed_noise = math.sqrt(sum(variances) / 2)
    if error == 0:
        p_value = 1.0 if random or gap == 0 else 0.0
    else:
        welch = error**4 / sum(part**2 / df for part, df in parts)
        p_value = _f_tail((gap / error) ** 2, 1.0, welch)
    return Difference(Estimate(gap, error), max(gap - error, 0.0), gap + error, seed_noise, p_value)


def _f_tail(value: float, df1: float, df2: float) -> float:
    from scipy.special import fdtrc

    return float(fdtrc(df1, df2, value))
