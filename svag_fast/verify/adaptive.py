"""SVAGAdam and SVAGRMSprop: torch.optim's at l = 1, the square-root rule, and the SDE that they go to as l grows.

The SDE (Malladi et al. 2022) of ∇L_γ = a x + s ξ, with time in effective steps, m from 0 and the second moment u, in
units of the plain optimizer, from u0:

    RMSprop  dx = -lr (a x dt + s dW)/(√u + ε)                u = s² + (u0 - s²) e^(-(1-α)t)
    Adam     dx = -lr m/(1 - e^(-(1-β1)t))/(s + ε) dt         dm = (1-β1)((a x - m) dt + s dW)

Adam's bias correction makes of u/(1 - e^(-(1-β2)t)) the noise's s² at any time, though it starts from zero.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy.integrate
import torch
from numpy.typing import NDArray
from torch import nn

from svag_fast.optim.adaptive import SVAGAdam, SVAGRMSprop
from svag_fast.optim.initial_square_avg import MEASURED_STEPS
from svag_fast.sde import AffineProblem, Draws, Gamma, additive_quadratic, mean_and_error
from svag_fast.verify.check import Z_BOUND, Check, Outcome, SuiteSettings, exact_check, one_thread, z_check

SOURCE = "Malladi et al."
CURVATURE, NOISE, TIME, START = 1.0, 0.5, 8, 1.0
PROBLEM = additive_quadratic(CURVATURE, NOISE, Gamma())
RMSPROP: dict[str, Any] = {"lr": 0.1, "alpha": 0.8, "eps": 0.1, "initial_square_avg": 2 * NOISE**2}
ADAM: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 0.1}
KINDS: dict[type[SVAGAdam | SVAGRMSprop], dict[str, Any]] = {SVAGAdam: ADAM, SVAGRMSprop: RMSPROP}
TOLERANCE = 1e-12


@one_thread()
def checks(settings: SuiteSettings) -> Outcome:
    """One step by the formulas, torch's own at l = 1, RMSprop's start, and weak convergence from the defaults."""
    outcome = Outcome(data={"curves": []})
    for backend in ("reference", "cpu"):
        for l in (1.0, 2.5, 16.0):
            outcome.checks += [_formula(kind, l, backend) for kind in KINDS]
    outcome.checks += [_torch(SVAGAdam, torch.optim.Adam), _torch(SVAGRMSprop, torch.optim.RMSprop)]
    outcome.checks += _start(settings)
    for kind in KINDS:
        _convergence(outcome, kind, settings)
    return outcome


def _formula(kind: type[SVAGAdam | SVAGRMSprop], l: float, backend: str) -> Check:
    """Three steps with decay by the paper's rule written out: lr/√l, 1 - (1-β)/l, ε√l, on c1 g1 + c2 g2 + λx."""
    decay, root = 0.2, math.sqrt(2 * l - 1)
    c1, c2 = (1 + root) / 2, (1 - root) / 2
    grads = torch.linspace(-1, 1.5, 18, dtype=torch.float64, device="cpu").sin().view(3, 2, 3)
    x = torch.tensor([0.8, -1.1, 0.6], dtype=torch.float64, device="cpu")
    p = nn.Parameter(x.clone())
    options = KINDS[kind]
    # Decay makes g depend on x, so that a step that reads x too late is seen.
    optimizer = kind([p], l=l, weight_decay=decay, backend=backend, **options)
    rate, eps = options["lr"] / math.sqrt(l), options["eps"] * math.sqrt(l)
    keep1, keep2 = (1 - (1 - beta) / l for beta in options.get("betas", (0.0, options.get("alpha"))))
    m, v = torch.zeros_like(x), torch.full_like(x, l * options.get("initial_square_avg", 0.0))
    for k, (g1, g2) in enumerate(grads, start=1):
        p.grad = g1.clone()
        optimizer.hold_gradient()
        p.grad = g2.clone()
        optimizer.step()
        g = c1 * g1 + c2 * g2 + decay * x
        m, v = keep1 * m + (1 - keep1) * g, keep2 * v + (1 - keep2) * g**2
        if kind is SVAGAdam:
            x = x - rate * m / (1 - keep1**k) / ((v / (1 - keep2**k)).sqrt() + eps)
        else:
            x = x - rate * g / (v.sqrt() + eps)
    off = float((p.detach() - x).abs().max())
    return exact_check(SOURCE, f"{kind.__name__}, {backend}, l = {l:g}: three steps by the formulas", off, TOLERANCE)


def _torch(ours: type[SVAGAdam | SVAGRMSprop], theirs: type[torch.optim.Optimizer]) -> Check:
    grads = torch.linspace(-1, 1.5, 60, dtype=torch.float64, device="cpu").sin().view(20, 3)
    p, q = (nn.Parameter(torch.tensor([0.8, -1.1, 0.6], dtype=torch.float64, device="cpu")) for _ in range(2))
    # At torch's own defaults, which ours must share.
    mine, plain = ours([p], weight_decay=0.2), theirs([q], weight_decay=0.2)  # type: ignore[call-arg]
    worst = 0.0
    for g in grads:
        p.grad, q.grad = g.clone(), g.clone()
        mine.step()
        plain.step()
        worst = max(worst, float((p - q).abs().max().detach()))
    return exact_check(SOURCE, f"{ours.__name__} at l = 1 is torch's over 20 steps", worst, TOLERANCE)


def _start(settings: SuiteSettings) -> list[Check]:
    """ "measure" has the mean (∇L)² + l s² and moves nothing; from it and from a number one effective step has lr²."""
    n = settings.choose(10_000, 40_000)
    found = []
    for l in (1.0, 4.0):
        p, optimizer = _particles(SVAGRMSprop, n, l, initial_square_avg="measure")
        _steps(p, optimizer, PROBLEM, MEASURED_STEPS, Draws(settings.seed, round(100 * l) + 7))
        moved = float((p.detach() - START).abs().max()) + optimizer.effective_steps
        mean, error = mean_and_error(optimizer.state[p]["square_avg"])
        name = f"SVAGRMSprop, l = {l:g}: mean of the measured square_avg"
        found.append(z_check(SOURCE, name, mean, error, (CURVATURE * START) ** 2 + l * NOISE**2))
        found.append(exact_check(SOURCE, f"SVAGRMSprop, l = {l:g}: nothing moves while measured", moved, TOLERANCE))
    # Its noise is curvature times spread: at a curvature of 0 there would be none.
    noise = additive_quadratic(1e-9, NOISE * 1e9)  # no drift: the gradients are noise alone
    for start in (NOISE**2, "measure"):
        for l in (1.0, 16.0, 64.0):
            p, optimizer = _particles(SVAGRMSprop, n, l, initial_square_avg=start, alpha=0.99, eps=0.0)
            rest = MEASURED_STEPS if start == "measure" else 0
            _steps(p, optimizer, noise, rest + round(l), Draws(settings.seed, round(100 * l) + 8))
            variance, error = mean_and_error(((p.detach() - START) / RMSPROP["lr"]).square())
            # E 1/v of a mean of at least 100 squares is at most 100/98; and α keeps 99 % of it.
            found.append(
                Check(
                    SOURCE,
                    f"SVAGRMSprop from {start}, l = {l:g}: variance after one effective step, in lr²",
                    f"{variance:.4f} ± {error:.1g}",
                    "1 to 3 % and 5 standard errors",
                    optimizer.effective_steps == 1 and abs(variance - 1) < 0.03 + Z_BOUND * error,
                )
            )
    return found


def _convergence(outcome: Outcome, kind: type[SVAGAdam | SVAGRMSprop], settings: SuiteSettings) -> None:
    """Mean and variance of x after `TIME` effective steps by ``step``: their distance from the SDE's falls as 1/l."""
    n, ls = settings.choose(40_000, 100_000), [float(2**k) for k in range(1, 6)]
    gaps, errors = [], []
    limit = np.array(_sde_moments(kind))
    for l in ls:
        p, optimizer = _particles(kind, n, l)
        _steps(p, optimizer, PROBLEM, round(TIME * l), Draws(settings.seed, round(100 * l)))
        x = p.detach()
        moments = [mean_and_error(x), mean_and_error((x - x.mean()).square())]
        gaps.append(np.array([value for value, _ in moments]) - limit)
        errors.append([error for _, error in moments])
    off = abs(optimizer.time / (KINDS[kind]["lr"] ** 2 * TIME) - 1)
    outcome.checks.append(exact_check(SOURCE, f"{kind.__name__}.time is lr² an effective step", off, TOLERANCE))
    for i, moment in enumerate(("mean", "variance")):
        mine, standard_errors = [gap[i] for gap in gaps], [row[i] for row in errors]
        name = f"{kind.__name__}.step, {moment} of x"
        outcome.data["curves"].append(
            {"name": name, "l": ls, "error": np.abs(mine).tolist(), "standard_error": standard_errors}
        )
        # A slope would say that the distance falls; the constant says that it falls to 0.
        value, error = _extrapolated(ls, mine, standard_errors, logarithm=kind is SVAGAdam)
        outcome.checks += [
            Check(
                SOURCE,
                f"{name}: distance from the SDE's, extrapolated to 1/l = 0",
                f"{value:+.5f} ± {error:.1g}",
                "0 within 5 standard errors and 5 % of the distance at the least l, for the terms left out",
                abs(value) < Z_BOUND * error + abs(mine[0]) / 20,
            ),
            Check(
                SOURCE,
                f"{name}: distance from the SDE's at l = {ls[-1]:g} over that at {ls[0]:g}",
                f"{abs(mine[-1] / mine[0]):.3f} ± {standard_errors[-1] / abs(mine[0]):.1g}",
                "below 1/4, and the extrapolation's error below 1/10",
                abs(mine[-1]) + Z_BOUND * standard_errors[-1] < abs(mine[0]) / 4 and error < abs(mine[0]) / 10,
            ),
        ]


def _extrapolated(ls: list[float], gaps: list[float], errors: list[float], *, logarithm: bool) -> tuple[float, float]:
    """The constant and its standard error of c0 + c1/l + c2/l², for Adam also (log l)/l, by weighted least squares.

    Adam's second moment after k steps has a relative variance of order 1/k, and so Σ_k (1/l)(1/k) goes like (log l)/l.
    """
    l = np.array(ls)
    design = np.stack([np.ones_like(l), 1 / l, 1 / l**2, *([np.log(l) / l] if logarithm else [])], axis=1)
    weights = 1 / np.array(errors)
    weighted = design * weights[:, None]
    covariance = np.linalg.inv(weighted.T @ weighted)
    return float((covariance @ weighted.T @ (weights * np.array(gaps)))[0]), math.sqrt(covariance[0, 0])


def _sde_moments(kind: type[SVAGAdam | SVAGRMSprop]) -> tuple[float, float]:
    """Mean and variance of x at `TIME`, by integrating the linear SDE's equations for the moments to 1e-10."""

    def rmsprop(t: float, y: NDArray[np.float64]) -> list[float]:
        mean, variance = y
        start, memory = RMSPROP["initial_square_avg"], 1 - RMSPROP["alpha"]
        u = NOISE**2 + (start - NOISE**2) * math.exp(-memory * t)
        pace = RMSPROP["lr"] / (math.sqrt(u) + RMSPROP["eps"])
        return [-pace * CURVATURE * mean, -2 * pace * CURVATURE * variance + (pace * NOISE) ** 2]

    def adam(t: float, y: NDArray[np.float64]) -> list[float]:
        x, m, xx, xm, mm = y  # the means, then the covariances
        b = 1 - ADAM["betas"][0]
        pace = ADAM["lr"] / (NOISE + ADAM["eps"]) / -math.expm1(-b * t)
        return [
            -pace * m,
            b * (CURVATURE * x - m),
            -2 * pace * xm,
            -pace * mm + b * (CURVATURE * xx - xm),
            2 * b * (CURVATURE * xm - mm) + (b * NOISE) ** 2,
        ]

    rate, start, second = (adam, [START, 0.0, 0.0, 0.0, 0.0], 2) if kind is SVAGAdam else (rmsprop, [START, 0.0], 1)
    end = scipy.integrate.solve_ivp(rate, (1e-9, TIME), start, rtol=1e-10, atol=1e-12).y[:, -1]
    return float(end[0]), float(end[second])


def _particles(kind: type[SVAGAdam | SVAGRMSprop], n: int, l: float, **options: Any) -> tuple[nn.Parameter, Any]:
    """A parameter whose entries are n independent paths, and its optimizer."""
    p = nn.Parameter(torch.full((n,), START, dtype=torch.float64, device="cpu"))
    return p, kind([p], l=l, **(KINDS[kind] | options))


def _steps(p: nn.Parameter, optimizer: Any, problem: AffineProblem, count: int, draws: Draws) -> None:
    for _ in range(count):
        x = p.detach().clone()
        p.grad = problem.batch_grad(x, (1.0,), draws)
        optimizer.hold_gradient()
        p.grad = problem.batch_grad(x, (1.0,), draws)
        optimizer.step()
