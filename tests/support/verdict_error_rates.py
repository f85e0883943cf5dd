"""How often the verdict errs, on made curves with known answers: prints the tables of docs/verdict.md.

python tests/support/verdict_error_rates.py [REPETITIONS]
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from svag_fast.stats.limit_fit import LimitFit, fit_limit, outside, within

LS = (1.0, 2.0, 4.0, 8.0)
SEEDS = (3, 5, 12, 20)
DISTANCES = (0.0, 0.5, 1.0, 2.0, 3.0)  # true distance of SGD from the limit, in margins: the margin is the unit here
ROWS = 24  # evaluations in the last half of a phase, as in the default run
SD = 0.5  # of one run's mean over them
_CHUNK = 1000

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def _independent(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.sqrt(ROWS) * rng.standard_normal(shape)


def _autocorrelated(rng: np.random.Generator, shape: tuple[int, ...], rho: float = 0.9) -> np.ndarray:
    noise = rng.standard_normal(shape)
    for i in range(1, ROWS):
        noise[..., i] = rho * noise[..., i - 1] + np.sqrt(1 - rho**2) * noise[..., i]
    lags = np.abs(np.subtract.outer(np.arange(ROWS), np.arange(ROWS)))
    return noise / np.sqrt((rho**lags).mean())


def _own_offset(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """A level of each run's own, and as much again from row to row."""
    return (rng.standard_normal((*shape[:-1], 1)) + _independent(rng, shape)) / np.sqrt(2)


def _heavy_tailed(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Student's t with 3 degrees of freedom, for the run's level (averaging would hide the tails) and its rows."""
    level, rows = rng.standard_t(3, (*shape[:-1], 1)), rng.standard_t(3, shape)
    return (level + np.sqrt(ROWS) * rows / 4) / np.sqrt(3 * (1 + 1 / 16))


@dataclass(frozen=True)
class Noise:
    """Rows of a run about its mean, scaled so that the run's mean over them has variance 1, and sd by l."""

    name: str
    draw: Draw
    scale: tuple[float, ...] = (1, 1, 1, 1)


NOISES = (
    Noise("independent", _independent),
    Noise("autocorrelated", _autocorrelated),
    Noise("a run's own offset", _own_offset),
    Noise("SGD 3 times l = 8's", _own_offset, tuple(3 ** np.array([0.5, 1 / 6, -1 / 6, -0.5]))),
    Noise("l = 8 3 times SGD's", _own_offset, tuple(3 ** np.array([-0.5, -1 / 6, 1 / 6, 0.5]))),
    Noise("heavy-tailed", _heavy_tailed),
)


def run_means(
    rng: np.random.Generator, noise: Noise, seeds: int, repetitions: int, sd: float = SD
) -> tuple[np.ndarray, np.ndarray]:
    """Means over runs and variances of one run, [repetitions, l], of curves whose true mean is 0 at every l."""
    means, variances = [], []
    for start in range(0, repetitions, _CHUNK):
        shape = (min(_CHUNK, repetitions - start), len(noise.scale), seeds, ROWS)
        runs = noise.draw(rng, shape).mean(-1) * sd * np.array(noise.scale)[:, None]
        means.append(runs.mean(-1))
        variances.append(runs.var(-1, ddof=1))
    return np.concatenate(means), np.concatenate(variances)


def fitted(means: np.ndarray, variances: np.ndarray, seeds: int, ls: Sequence[float] = LS) -> LimitFit:
    return fit_limit(np.array(ls), means, variances, np.full(len(ls), seeds), 1.0)


def rates(fit: LimitFit, truth: float) -> tuple[float, float, float]:
    """Fractions: the interval of SGD's distance holds the truth; "matches"; "departs"."""
    low, high = ends = fit.distances.at(0).interval()
    holds = (low <= truth) & (truth <= high)
    return float(holds.mean()), float(within(ends, 1.0).mean()), float(outside(ends, 1.0).mean())


def main_table(repetitions: int) -> Iterator[str]:
    yield "| noise | seeds | " + " | ".join(f"D = {d:g} δ" for d in DISTANCES) + " |"
    yield "| --- | --- |" + " --- |" * len(DISTANCES)
    for i, noise in enumerate(NOISES):
        for seeds in SEEDS:
            means, variances = run_means(np.random.default_rng([i, seeds]), noise, seeds, repetitions)
            cells = []
            for distance in DISTANCES:
                found = rates(fitted(means + distance / np.array(LS), variances, seeds), distance)
                cells.append(" / ".join(f"{100 * rate:.1f}" for rate in found))
            yield f"| {noise.name} | {seeds} | " + " | ".join(cells) + " |"


# Curves that 1/l does not describe: l, their means less the limit, in margins, and the sd of one run. The last two are
# a net's test accuracy at a batch size far beyond the limit of linear scaling, with a margin of two points.
_L5 = (*LS, 16.0)
CURVED = {
    "2/l + 5/l²": (LS, [2 / l + 5 / l**2 for l in LS], [0.5] * 4),
    "1.5/l - 0.5/l²": (LS, [1.5 / l - 0.5 / l**2 for l in LS], [0.5] * 4),
    "3/l - 2/l²": (LS, [3 / l - 2 / l**2 for l in LS], [0.5] * 4),
    "5/l - 4/l²": (LS, [5 / l - 4 / l**2 for l in LS], [0.5] * 4),
    "saturates, l to 8": (LS, [-39.0, -26.2, -8.7, -2.1], [1.8, 7.0, 4.4, 0.8]),
    "saturates, l to 16": (_L5, [-39.0, -26.2, -8.7, -2.1, -0.8], [1.8, 7.0, 4.4, 0.8, 0.4]),
}


def curved_table(repetitions: int) -> Iterator[str]:
    yield "| mean of l, in margins | seeds | limit held | D held | regime not reached | matches | departs |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for i, (name, (ls, truth, sd)) in enumerate(CURVED.items()):
        for seeds in SEEDS:
            noise = Noise(name, _own_offset, tuple(sd))
            means, variances = run_means(np.random.default_rng([100 + i, seeds]), noise, seeds, repetitions, sd=1.0)
            fit = fitted(means + truth, variances, seeds, ls)
            low, high = fit.limit.interval()
            figures = [((low <= 0) & (high >= 0)).mean(), rates(fit, truth[0])[0], (~fit.regime_reached).mean()]
            figures += rates(fit, truth[0])[1:]
            yield f"| {name} (D = {truth[0]:.3g} δ) | {seeds} | " + " | ".join(f"{100 * f:.1f}" for f in figures) + " |"


@dataclass(frozen=True)
class Trap:
    """What runs can't show: the true D in margins, the means by l less the limit, and SGD's noise if it is odd."""

    name: str
    distance: float
    truth: Sequence[float]
    sgd: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray] | None = None


def _lognormal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Of mean 0 and standard deviation SD, with a long tail upwards."""
    return SD * (np.exp(rng.standard_normal(shape)) - np.exp(0.5)) / np.sqrt((np.e - 1) * np.e)


def _rare(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Of mean 0 and standard deviation SD: one run in ten is above by 3 SD, the others below by SD/3."""
    return SD * ((rng.random(shape) < 0.1) - 0.1) / 0.3


def _failing(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """About a mean of -1.5: one run in ten ends 15 margins below the limit, the others at it."""
    return 1.5 - 15.0 * (rng.random(shape) < 0.1)


TRAPS = (
    Trap("D tanh(4/l)/tanh 4", 1.0, [np.tanh(4 / l) / np.tanh(4) for l in LS]),
    Trap("SGD lognormal, away from the limit", 1.0, [1 / l for l in LS], _lognormal),
    Trap("SGD lognormal, towards the limit", -1.0, [-1 / l for l in LS], _lognormal),
    Trap("SGD off in 1 run of 10, away", 1.0, [1 / l for l in LS], _rare),
    Trap("SGD off in 1 run of 10, towards", -1.0, [-1 / l for l in LS], _rare),
    Trap("SGD fails in 1 run of 10", -1.5, [-1.5, 0.0, 0.0, 0.0], _failing),
)


def trap_rates(trap: Trap, seeds: int, repetitions: int, seed: Sequence[int]) -> tuple[float, float, float]:
    """:func:`rates` with normal noise of SD at every l; where SGD's own is odd, of SD/5 at the others."""
    rng = np.random.default_rng(seed)
    runs = (SD if trap.sgd is None else SD / 5) * rng.standard_normal((repetitions, len(LS), seeds))
    if trap.sgd is not None:
        runs[:, 0] = 0.01 * SD * rng.standard_normal((repetitions, seeds)) + trap.sgd(rng, (repetitions, seeds))
    means = runs.mean(-1) + np.array(trap.truth)
    return rates(fitted(means, runs.var(-1, ddof=1), seeds), trap.distance)


def traps_table(repetitions: int) -> Iterator[str]:
    yield "| what is not seen | seeds | D held | matches | departs |"
    yield "| --- | --- | --- | --- | --- |"
    for i, trap in enumerate(TRAPS):
        for seeds in SEEDS:
            found = trap_rates(trap, seeds, repetitions, [300 + i, seeds])
            name = f"{trap.name} (D = {trap.distance:g} δ)"
            yield f"| {name} | {seeds} | " + " | ".join(f"{100 * f:.1f}" for f in found) + " |"


def others_table(repetitions: int) -> Iterator[str]:
    """What else the distance could be estimated by: the slope of the line through all l, own and pooled variances."""
    from svag_fast.stats.limit_fit import t_quantile

    yield "| noise | seeds | SGD minus the limit of the others | slope over all l | slope, pooled variance |"
    yield "| --- | --- | --- | --- | --- |"
    x = 1 / np.array(LS)
    slope = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    for i in (2, 3, 4):
        for seeds in SEEDS:
            means, variances = run_means(np.random.default_rng([i, seeds]), NOISES[i], seeds, repetitions)
            direct = rates(fitted(means, variances, seeds), 0.0)[0]
            parts = slope**2 * variances / seeds
            variance = parts.sum(-1)
            df = variance**2 / (parts**2 / (seeds - 1)).sum(-1)
            own = np.abs(means @ slope) <= t_quantile(0.95, df) * np.sqrt(variance)
            pooled_variance = variances.mean(-1) * (slope**2).sum() / seeds
            pooled = np.abs(means @ slope) <= t_quantile(0.95, np.array(len(LS) * (seeds - 1.0))) * np.sqrt(
                pooled_variance
            )
            figures = [direct, own.mean(), pooled.mean()]
            yield f"| {NOISES[i].name} | {seeds} | " + " | ".join(f"{100 * f:.1f}" for f in figures) + " |"


@dataclass(frozen=True)
class Questions:
    """Fractions of wrong "matches", each where the truth is exactly at the margin, and of intervals that hold it."""

    relative: float  # SGD's distance, margin 10 % of the metric's level
    converged: float  # the largest l's distance
    shared: float  # the difference of two limits
    shared_held: float


def questions(noise: Noise, seeds: int, repetitions: int, seed: Sequence[int]) -> Questions:
    rng, x = np.random.default_rng(seed), 1 / np.array(LS)
    counts = np.full(len(LS), seeds)
    (means, variances), (others, other_variances) = (run_means(rng, noise, seeds, repetitions) for _ in range(2))
    level = means + x + 10  # the limit is 10 margins
    margin = 0.1 * level[:, -1]
    relative = fit_limit(np.array(LS), level, variances, counts, margin).distances.at(0).interval()
    converged = fitted(means + LS[-1] * x, variances, seeds).distances.at(-1).interval()
    difference = fitted(means + x + 1, variances, seeds).limit.minus(
        fitted(others - 2 * x, other_variances, seeds).limit
    )
    low, high = shared = difference.interval()
    return Questions(
        float(within(relative, margin).mean()),
        float(within(converged, 1.0).mean()),
        float(within(shared, 1.0).mean()),
        float(((low <= 1) & (high >= 1)).mean()),
    )


def questions_table(repetitions: int) -> Iterator[str]:
    yield "| noise | seeds | SGD matches, δ = 10 % | SVAG has converged | limits are shared | their difference held |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for i, noise in enumerate(NOISES):
        for seeds in SEEDS:
            found = questions(noise, seeds, repetitions, [200 + i, seeds])
            figures = [found.relative, found.converged, found.shared, found.shared_held]
            yield f"| {noise.name} | {seeds} | " + " | ".join(f"{100 * f:.1f}" for f in figures) + " |"


if __name__ == "__main__":
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    for table in (main_table, questions_table, curved_table, traps_table, others_table):
        for line in table(repetitions):
            print(line, flush=True)
        print()
