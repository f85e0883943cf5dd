"""SGD at one batch size, measured: G, N and R near the end of its longest phase, and whether they are at equilibrium.

R, G and N are averaged over the last part of the longest phase of constant learning rate (the paper: epochs 200 to 250,
before the decay at 250), over all runs that differ in the seed alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from svag_fast.analysis.phases import constant_stretches, same_rate
from svag_fast.experiments.run_folder import Array
from svag_fast.stats.sampling import noise_factor
from svag_fast.stats.series import LEAST
from svag_fast.theory.equilibrium import Equilibrium, detect_equilibrium

_LEAST_MEAN = 1e-100  # below it squares vanish


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
