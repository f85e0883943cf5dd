"""Theorem 4.3: SVAG's weak error falls as 1/l; and SGD at lr/l with scaled batches, whose error does not."""

from __future__ import annotations

import math

import numpy as np
import torch

from svag_fast.sde import (
    NGD,
    AffineProblem,
    CircleToy,
    Gamma,
    Gaussian,
    LinearRegression,
    ScaleInvariantToy,
    SGDProcess,
    SVAGProcess,
    additive_quadratic,
    controlled_mean,
    mean_and_error,
    multiplicative_quadratic,
    process_moments,
    sde_moments,
    simulate,
)
from svag_fast.verify.check import Check, Outcome, Slope, SuiteSettings, log_log_slope, z_check

LR, DECAY, START, TIME = 0.25, 0.1, 1.0, 1.0
TIMES = (0.25, 0.5, 0.75, 1.0)
SOURCE = "Theorem 4.3"
SCALAR = {
    "Ornstein-Uhlenbeck": additive_quadratic(1.0, 1.5, Gamma()),
    "geometric Brownian": multiplicative_quadratic(1.0, 1.0, Gamma()),
}
CIRCLE = CircleToy((-0.5, -0.5, 2.0, 0.4))  # skewed, with a mean
POWERS = {1: "x", 2: "x²", 3: "x³", 4: "x⁴"}


def exact(settings: SuiteSettings) -> Outcome:
    """Closed forms: the largest error over effective steps against l, on two scalar problems and a regression.

    On a scale-invariant toy, with weight decay, the error at the end.
    """
    outcome = Outcome(data={"curves": []})
    ls = [float(2**k) for k in range(3, 11)]
    for name, problem in SCALAR.items():
        limit = sde_moments(problem, START, TIMES, lr=LR, weight_decay=DECAY)
        gaps = np.stack(
            [np.abs(process_moments(SVAGProcess(LR, DECAY, l=l), problem, START, TIMES) - limit).max(0) for l in ls]
        )
        for power, label in POWERS.items():
            _slope_check(outcome, f"{name}, g = {label}, closed form", ls, gaps[:, power])
    regression, start = _regression()
    limit_2 = regression.sde_second_moment(start, TIMES, lr=LR, weight_decay=DECAY)
    paths = [regression.process_second_moment(SVAGProcess(LR, DECAY, l=l), start, TIMES) - limit_2 for l in ls]
    loss = torch.zeros(4, 4, dtype=torch.float64, device="cpu")
    loss[:3, :3] = regression.hessian / 2
    loss[:3, 3] = loss[3, :3] = -regression.features.T @ regression.targets / len(regression.targets) / 2
    for label, weights in (("the loss", loss), ("x₁²", _entry(0, 0)), ("x₂", _entry(1, 3))):
        errors = [float((gap * weights).sum((1, 2)).abs().max()) for gap in paths]
        _slope_check(outcome, f"linear regression in 3 dimensions, g = {label}, closed form", ls, np.array(errors))
    ls, start = ls[:-2], torch.tensor([0.8, 0.6], dtype=torch.float64, device="cpu")
    for label, function, frequency in (("|x|²", _identity, 0), ("x₁", np.sqrt, 1), ("cos 2θ", np.ones_like, 2)):
        limit_x = CIRCLE.sde_mean(start, TIME, function, lr=LR, weight_decay=DECAY, frequency=frequency)
        ends = [
            CIRCLE.process_mean(SVAGProcess(LR, DECAY, l=l), start, TIME, function, frequency=frequency) for l in ls
        ]
        errors = [(end - limit_x).real for end in ends]
        _slope_check(outcome, f"scale-invariant toy on the plane, g = {label}, closed form", ls, np.array(errors))
    return outcome


def contrast(settings: SuiteSettings) -> Outcome:
    """SGD at lr/l and batch B/l: mean and covariance are SVAG's, but (iii) fails and so E x³ does not converge."""
    outcome = Outcome(data={"curves": []})
    ls = [float(2**k) for k in range(3, 11)]
    for name, problem in SCALAR.items():
        limit = sde_moments(problem, START, [TIME], lr=LR)[0]
        gaps = np.stack(
            [
                abs(process_moments(SGDProcess(LR / l), problem.at_batch_size(1 / l), START, [TIME])[0] - limit)
                for l in ls
            ]
        )
        slope = log_log_slope(ls, list(gaps[:, 3]))
        outcome.data["curves"].append({"name": f"SGD, B/l: {name}, x³", "l": ls, "error": gaps[:, 3].tolist()})
        outcome.checks.append(
            Check(
                "Lemma 4.7 (iii)",
                f"{name}, g = x³, SGD at lr/l and B/l (contrast)",
                f"slope {slope.value:+.3f} ± {slope.half_width:.3f}, last error {gaps[-1, 3]:.2g}",
                "no convergence: slope 0, not -1",
                slope.value > -0.5 and not slope.covers(-1) and bool(gaps[-1, 3] > 0.5 * gaps[0, 3]),
            )
        )
    problem, l, n = SCALAR["Ornstein-Uhlenbeck"], 8.0, settings.choose(50_000, 500_000)
    scaled, process = problem.at_batch_size(1 / l), SGDProcess(LR / l)
    x = simulate(
        process,
        scaled,
        torch.tensor(START, dtype=torch.float64, device="cpu"),
        TIME,
        trajectories=n,
        seed=settings.seed,
    )
    mean, error = mean_and_error(x**3)
    expected = float(process_moments(process, scaled, START, [TIME])[0, 3])
    outcome.checks.append(z_check("Lemma 4.7 (iii)", "the same, simulated at l = 8: E x³", mean, error, expected))
    return outcome


def simulated(settings: SuiteSettings) -> Outcome:
    """Simulation with common random numbers: g = cos x on the scalar problems, g = |x|² on the scale-invariant toy."""
    outcome = Outcome(data={"curves": []})
    ls = [float(2**k) for k in range(1, settings.choose(5, 6) + 1)]
    n = settings.choose(20_000, 200_000)
    for name, problem in SCALAR.items():
        limit = _mean_cosine(problem)
        estimates = [_cosine(problem, l, n, settings.seed) for l in ls]
        errors = np.array([value - limit for value, _ in estimates])
        _slope_check(outcome, f"{name}, g = cos x, simulated", ls, errors, np.array([e for _, e in estimates]))
    toy = ScaleInvariantToy(4, signal=1.0, noise_std=1.5, law=Gamma())
    x0 = torch.tensor([0.5, 0.5, -0.5, 1.0], dtype=torch.float64, device="cpu")
    limit = toy.sde_weight_sq_norm(1.75, TIME, lr=LR, weight_decay=DECAY)
    estimates = []
    for l in ls:
        x = simulate(SVAGProcess(LR, DECAY, l=l), toy, x0, TIME, trajectories=2 * n, seed=settings.seed)
        estimates.append(mean_and_error(x.square().sum(1)))
    errors = np.array([value - limit for value, _ in estimates])
    _slope_check(outcome, "scale-invariant toy, g = |x|², simulated", ls, errors, np.array([e for _, e in estimates]))
    return outcome


def decomposition(settings: SuiteSettings) -> Outcome:
    """Equation 4: the error of SGD as discretisation plus non-Gaussianity, exact and by coupled simulation."""
    outcome = Outcome()
    n = settings.choose(100_000, 1_000_000)
    start = torch.tensor(START, dtype=torch.float64, device="cpu")
    for name, problem in SCALAR.items():
        # The same seed draws the same normals: SGD's gamma noise is an increasing function of NGD's Gaussian one.
        sgd = simulate(SGDProcess(LR), problem, start, TIME, trajectories=n, seed=settings.seed)
        twin = simulate(SGDProcess(LR), problem.with_law(Gaussian()), start, TIME, trajectories=n, seed=settings.seed)
        by_sgd, by_ngd = (process_moments(p, problem, START, [TIME])[0] for p in (SGDProcess(LR), NGD(LR)))
        sde = sde_moments(problem, START, [TIME], lr=LR)[0]
        for power in (2, 3):
            mean, error = mean_and_error(twin**power - sgd**power)
            discretisation, rest = sde[power] - by_ngd[power], by_ngd[power] - by_sgd[power]
            label = (
                f"{name}, g = {POWERS[power]}: non-Gaussianity (discretisation is {discretisation:+.3g}, "
                f"together {sde[power] - by_sgd[power]:+.3g})"
            )
            outcome.checks.append(z_check("eq. 4", label, mean, error, float(rest)))
    return outcome


def _slope_check(
    outcome: Outcome, name: str, ls: list[float], errors: np.ndarray, standard_errors: np.ndarray | None = None
) -> None:
    slope: Slope = log_log_slope(ls, list(errors), None if standard_errors is None else list(standard_errors))
    outcome.data["curves"].append(
        {
            "name": name,
            "l": ls,
            "error": np.abs(errors).tolist(),
            "standard_error": None if standard_errors is None else standard_errors.tolist(),
        }
    )
    outcome.checks.append(
        Check(
            SOURCE,
            name,
            f"slope {slope.value:+.5f} ± {slope.half_width:.1g}",
            "-1",
            slope.covers(-1) and slope.half_width < 0.9,
        )
    )


def _cosine(problem: AffineProblem, l: float, n: int, seed: int) -> tuple[float, float]:
    """E cos x of SVAG: x..x⁴ and the Gaussian twin's cosine, all of known mean, take most of the noise away."""
    process, start = SVAGProcess(LR, l=l), torch.tensor(START, dtype=torch.float64, device="cpu")
    x = simulate(process, problem, start, TIME, trajectories=n, seed=seed)
    controls = [x**p for p in POWERS]
    expectations = list(process_moments(process, problem, START, [TIME])[0, 1:])
    if problem.noise_slope == 0:
        twin = simulate(process, problem.with_law(Gaussian()), start, TIME, trajectories=n, seed=seed)
        moments = process_moments(process, problem.with_law(Gaussian()), START, [TIME])[0]
        controls.append(twin.cos())
        expectations.append(_gaussian_mean_of_cosine(moments[1], moments[2] - moments[1] ** 2))
    else:
        # The Brownian path of the same normals: a problem without drift, whose SVAG steps add them up.
        path = simulate(process, AffineProblem(0.0, noise_offset=1.0), start, TIME, trajectories=n, seed=seed)
        spread = problem.noise_slope
        noise = (path - START) * spread
        solution = START * torch.exp(-(problem.curvature + LR * spread**2 / 2) * TIME + noise)
        controls.append(solution.cos())
        expectations.append(_mean_cosine(problem))
    return controlled_mean(x.cos(), torch.stack(controls, dim=1), expectations)


def _mean_cosine(problem: AffineProblem) -> float:
    """Exact E cos X_t of the SDE without weight decay: a Gaussian's, or a log-normal's by quadrature."""
    if problem.noise_slope == 0:
        moments = sde_moments(problem, START, [TIME], lr=LR)[0]
        return _gaussian_mean_of_cosine(moments[1], moments[2] - moments[1] ** 2)
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    variance = LR * problem.noise_slope**2 * TIME
    ends = START * np.exp(-problem.curvature * TIME - variance / 2 + math.sqrt(variance) * nodes)
    return float(weights @ np.cos(ends) / weights.sum())


def _gaussian_mean_of_cosine(mean: float, variance: float) -> float:
    return math.cos(mean) * math.exp(-variance / 2)


def _regression() -> tuple[LinearRegression, torch.Tensor]:
    generator = torch.Generator("cpu").manual_seed(4)
    features = torch.randn(8, 3, dtype=torch.float64, device="cpu", generator=generator)
    targets = features.sum(1) + torch.randn(8, dtype=torch.float64, device="cpu", generator=generator)
    return LinearRegression(features, targets, batch_size=1), torch.tensor(
        [1.0, -0.5, 2.0], dtype=torch.float64, device="cpu"
    )


def _identity(r: np.ndarray) -> np.ndarray:
    return r


def _entry(row: int, column: int) -> torch.Tensor:
    weights = torch.zeros(4, 4, dtype=torch.float64, device="cpu")
    weights[row, column] = 1
    return weights
