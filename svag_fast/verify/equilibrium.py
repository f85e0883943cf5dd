"""Norm dynamics (9), (10) and equilibrium (11), (12): on the scale-invariant toy and on a small scale-invariant net."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from svag_fast.experiments.data import load_dataset
from svag_fast.experiments.models import build_model
from svag_fast.noise.running_mean import mean_standard_error
from svag_fast.sde import (
    Draws,
    EulerMaruyama,
    Gamma,
    NetworkProblem,
    Process,
    ScaleInvariantToy,
    SGDProcess,
    SVAGProcess,
    mean_and_error,
    simulate,
)
from svag_fast.stats.estimate import Estimate
from svag_fast.theory.equilibrium_equation import equilibrium_residual
from svag_fast.verify.check import Check, Outcome, SuiteSettings, one_thread, z_check

LR, DECAY = 0.1, 0.2
TOY = ScaleInvariantToy(6, signal=1.0, noise_std=1.5, law=Gamma())


def toy_dynamics(settings: SuiteSettings) -> Outcome:
    """(10) in one step from a fixed x, and (9) along a path, where R is not random and has a closed form."""
    outcome = Outcome()
    n = settings.choose(100_000, 1_000_000)
    x0 = torch.linspace(-1, 1.5, TOY.dim, dtype=torch.float64, device="cpu")
    g, noise, r = (float(s) for s in TOY.statistics(x0[None]))
    # From a fixed x, so that G, N and R of the equation's right side are exact.
    for process, l in ((SGDProcess(LR, DECAY), 1.0), (SVAGProcess(LR, DECAY, l=4), 4.0)):
        h = LR / l
        change = simulate(process, TOY, x0, h, trajectories=n, seed=settings.seed).square().sum(1) - r
        mean, error = mean_and_error(change)
        expected = h * DECAY * (h * DECAY - 2) * r + h**2 * g + h**2 * l * noise
        outcome.checks.append(z_check("eq. 10", f"toy, one step at l = {l:g}: E|x'|² - |x|²", mean, error, expected))
    # Euler-Maruyama's mean R is off by b h + c h²: two steps extrapolate to the SDE, the change bounds the rest.
    exact = TOY.sde_weight_sq_norm(r, 2.0, lr=LR, weight_decay=DECAY)
    n = settings.choose(10_000, 100_000)
    means = []
    for h in (0.02, 0.01, 0.005):
        ends = simulate(EulerMaruyama(LR, DECAY, h=h), TOY, x0, 2.0, trajectories=n, seed=settings.seed)
        means.append(mean_and_error(ends.square().sum(1)))
    value = 2 * means[2][0] - means[1][0]
    error = math.hypot(2 * means[2][1], means[1][1]) + abs(value - (2 * means[1][0] - means[0][0])) / 3
    outcome.checks.append(z_check("eq. 9", "toy, Euler-Maruyama to h = 0: R at time 2", value, error, exact))
    return outcome


def toy_equilibrium(settings: SuiteSettings) -> Outcome:
    """(11) for SGD and SVAG and (12) for the SDE: both sides of the relation from one ensemble at equilibrium."""
    outcome = Outcome(data={"sides": []})
    n = settings.choose(10_000, 100_000)
    toy = ScaleInvariantToy(4, signal=0.6, noise_std=1.0, law=Gamma())
    lr, decay = 0.5, 0.5
    sde = toy.sde_equilibrium(lr=lr, weight_decay=decay)
    x0 = torch.full((4,), math.sqrt(float(_value(sde.weight_sq_norm)) / 4), dtype=torch.float64, device="cpu")
    runs: list[tuple[str, str, Process, float]] = [
        ("eq. 11", "toy, SGD", SGDProcess(lr, decay), 1),
        ("eq. 11", "toy, SVAG l = 4", SVAGProcess(lr, decay, l=4), 4),
        ("eq. 11", "toy, SVAG l = 32", SVAGProcess(lr, decay, l=32), 32),
        # Euler-Maruyama is what SVAG at l = lr/h becomes with Gaussian noise: (12) up to (lr/l)(G + ...).
        ("eq. 12", "toy, Euler-Maruyama h = lr/32", EulerMaruyama(lr, decay, h=lr / 32), 32),
    ]
    for source, name, process, l in runs:
        x = simulate(process, toy, x0, 12.0, trajectories=n, seed=settings.seed)
        g, noise, r = toy.statistics(x)
        found = equilibrium_residual(*(s.mean().item() for s in (r, g, noise)), lr=lr, weight_decay=decay, l=l)
        left = (2 - lr * decay / l) * decay * r
        right = lr / l * g + lr * noise
        # Trajectory by trajectory: G, N and R of one are correlated, and errors of three means would not add up.
        residual, error = mean_and_error((left - right) / found.right.value)
        outcome.data["sides"].append({"name": name, "ratio": found.ratio.value, "error": error})
        outcome.checks.append(
            z_check(source, f"{name}: relative difference of the sides of R, G, N", residual, error, 0.0)
        )
        if source == "eq. 12":
            mean, error = mean_and_error(2 * decay * r / (lr * noise.mean()))
            outcome.checks.append(
                Check(
                    source,
                    "toy, 2λR over η N (and the exact SDE's R)",
                    f"{mean:.4f} ± {error:.1g}, R {r.mean():.4f}",
                    f"1 to O(h), R {_value(sde.weight_sq_norm):.4f}",
                    abs(mean - 1) < 5 * error + 2 / l and abs(r.mean().item() / _value(sde.weight_sq_norm) - 1) < 2 / l,
                )
            )
    return outcome


def network(settings: SuiteSettings) -> Outcome:
    """The digits net (GroupNorm, scale-invariant): (10) in one step over random batches, and (11) along SGD's path."""
    outcome = Outcome(data={"sides": []})
    with one_thread():
        problem = digits_problem(settings, batch_size=8)
        outcome.checks.append(_network_step(problem, settings))
        outcome.checks += _network_equilibrium(outcome, problem, settings)
    return outcome


def _network_step(problem: NetworkProblem, settings: SuiteSettings) -> Check:
    x = problem.state()
    draws = Draws(settings.seed, 1)
    h = LR
    # float64 from here: R's change is small beside R.
    grads = torch.stack([problem.batch_grad(x, (1.0,), draws) for _ in range(settings.choose(200, 2000))]).double()
    x64 = x.double()
    change = ((1 - h * DECAY) * x64 - h * grads).square().sum(1) - x64.square().sum()
    grad = problem.mean_grad(x).double()
    g, noise = grad.square().sum().item(), sample_noise_trace(problem, x, grad)
    expected = h * DECAY * (h * DECAY - 2) * x64.square().sum().item() + h**2 * (g + noise)
    mean, error = mean_and_error(change)
    name = "digits net, one step: E|x'|² - |x|², G and N from per-sample gradients"
    return z_check("eq. 10", name, mean, error, expected)


def _network_equilibrium(outcome: Outcome, problem: NetworkProblem, settings: SuiteSettings) -> list[Check]:
    lr, decay = 0.4, 0.1
    draws, x = Draws(settings.seed, 2), problem.state()
    steps, burn_in = settings.choose(400, 4000), 100
    rows = []
    for step in range(burn_in + steps):
        g1 = problem.batch_grad(x, (1.0,), draws)
        # A second batch, which moves nothing: its product with the first estimates G without bias.
        if step >= burn_in:
            g2 = problem.batch_grad(x, (1.0,), draws)
            rows.append((float(x @ x), float(g1 @ g2), float((g1 - g2) @ (g1 - g2)) / 2))
        x.mul_(1 - lr * decay).sub_(g1, alpha=lr)
    r, g, noise = np.array(rows).T
    # Over a window (10) sums to R's change: left - right + drift is zero in expectation, whatever the equilibrium.
    drift = (float(x @ x) - r[0]) / (steps * lr)
    left, right = (2 - lr * decay) * decay * r, lr * (g + noise)
    off = mean_standard_error((left - right) / right.mean())
    ratio = float(left.mean() / right.mean())
    outcome.data["sides"].append({"name": "digits net, SGD", "ratio": ratio, "error": off.standard_error})
    relative_drift = drift / right.mean()
    return [
        z_check(
            "eq. 10",
            f"digits net, SGD over {steps} steps: relative difference of the sides, R's own change counted",
            off.mean + relative_drift,
            off.standard_error,
            0.0,
        ),
        Check(
            "eq. 11",
            f"digits net, SGD at lr {lr}, weight decay {decay}: relative difference of the sides",
            f"{off} (R's change {relative_drift:+.3f})",
            "0 within 5 standard errors and R's change",
            abs(off.mean) < 5 * off.standard_error + abs(relative_drift) and abs(relative_drift) < 0.1,
        ),
    ]


def digits_problem(settings: SuiteSettings, *, batch_size: int) -> NetworkProblem:
    """The digits net on 256 of the digits that `svag-fast run` trains on, batches drawn with replacement."""
    digits = load_dataset("digits")
    model = build_model("digits-net", in_channels=1, num_classes=digits.num_classes, seed=settings.seed)
    images, labels = digits.train_images[:256], digits.train_labels[:256]
    loss = nn.CrossEntropyLoss(reduction="none")
    return NetworkProblem(model, loss, images, labels, batch_size=batch_size, chunk_size=256)


def sample_noise_trace(problem: NetworkProblem, x: Tensor, mean_grad: Tensor) -> float:
    """N of a batch, from every sample's gradient by a plain loop: (mean |g_i|² - |mean g|²)/B."""
    total = 0.0
    for i in range(len(problem.inputs)):
        # By a plain loop: the product's own norms are what is being checked elsewhere.
        total += problem.sample_grad(x, i).double().square().sum().item()
    return (total / len(problem.inputs) - mean_grad.square().sum().item()) / problem.batch_size


def _value(number: float | Estimate) -> float:
    return number.value if isinstance(number, Estimate) else number
