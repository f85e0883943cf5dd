"""The product's own steps against Lemma 4.7 and Theorem 4.3: `SVAG.step` and the ops, on every backend that is here.

Lemma 4.7 by enumeration: the loss has three batches, so a step has nine outcomes, and its moments are sums, not means
of simulations. Theorem 4.3 on one tensor whose elements are independent one-dimensional problems.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from svag_fast.ops import backends, svag_step_, svag_weight_step_
from svag_fast.optim.svag import SVAG, svag_loss
from svag_fast.sde import AffineProblem, Draws, Gamma, process_moments, processes, sde_moments
from svag_fast.verify.check import Check, Outcome, SuiteSettings, exact_check, log_log_slope, z_check

LR, DECAY = 0.3, 0.2
LS = (1.0, 2.5, 8.0, 64.0)
# The gradients of the loss's three batches at START, their probabilities, and START: no symmetry among them.
GRADS = torch.tensor([[1.0, -0.4, 0.3], [-0.7, 0.9, 0.2], [0.1, 0.5, -1.6]], dtype=torch.float64, device="cpu")
PROBABILITIES = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64, device="cpu")
START = torch.tensor([0.8, -1.1, 0.6], dtype=torch.float64, device="cpu")
TOLERANCE = 1e-12
"""Of enumerated moments in float64, relative to the largest entry."""

# Takes x, g1, g2, l; returns the x that a step leads to.
Stepper: TypeAlias = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def lemma_4_7(settings: SuiteSettings) -> Outcome:
    """EΔ, EΔΔᵀ, EΔ⊗³ of one step, enumerated, through every way to take it; and the statistics it brings along."""
    outcome = Outcome()
    for name, step in _ways().items():
        for l in LS:
            outcome.checks += [_formula_check(name, step, l), *_moment_checks(name, step, l)]
    for name in _backends("svag_step_"):
        outcome.checks += _statistics_checks(name)
    return outcome


def theorem_4_3(settings: SuiteSettings) -> Outcome:
    """E x..x⁴ after l T steps of `SVAG.step` against the exact moments, and the slope of its distance from the SDE."""
    outcome = Outcome(data={"curves": []})
    problem, time = AffineProblem(1.0, 0.2, 0.1, 0.4, Gamma()), 4
    limit = sde_moments(problem, 1.0, [LR * time], lr=LR, weight_decay=DECAY)[0]
    n = settings.choose(40_000, 1_000_000)
    ls = [1.0, 2.0, 4.0, 8.0]
    for name in _backends("svag_step_"):
        if name == "triton" and not torch.cuda.is_available():
            continue  # the interpreter takes minutes for this; the enumeration above serves it
        gaps, errors = [], []
        for l in ls:
            x = _path(problem, l, round(l * time), n, settings.seed, name)
            exact = process_moments(processes.SVAGProcess(LR, DECAY, l=l), problem, 1.0, [LR * time])[0]
            for power in (1, 2, 3, 4):
                values = x**power
                mean, error = values.mean().item(), values.std().item() / math.sqrt(n)
                label = f"SVAG.step, {name}, l = {l:g}, {time} effective steps: E x^{power}"
                outcome.checks.append(z_check("Theorem 4.3", label, mean, error, float(exact[power])))
                if power == 1:
                    gaps.append(mean - limit[1])
                    errors.append(error)
        slope = log_log_slope(ls, gaps, errors)
        outcome.data["curves"].append(
            {"name": f"SVAG.step, {name}, x", "l": ls, "error": np.abs(gaps).tolist(), "standard_error": errors}
        )
        outcome.checks.append(
            Check(
                "Theorem 4.3",
                f"SVAG.step, {name}: slope of |E x - the SDE's| in l",
                f"{slope.value:+.3f} ± {slope.half_width:.1g}",
                "-1",
                slope.covers(-1) and slope.half_width < 0.9,
            )
        )
    return outcome


def _ways() -> dict[str, Stepper]:
    """Every way to take one step of SVAG that this machine has."""
    ways: dict[str, Stepper] = {}
    for name in _backends("svag_step_"):
        ways[f"svag_step_, {name}"] = _by_op(name)
        ways[f"SVAG.step, {name}"] = _by_optimizer(name)
    for name in _backends("svag_weight_step_"):
        ways[f"svag_weight_step_, {name}"] = _by_weight_step(name)
    ways["svag_loss and torch.optim.SGD"] = _by_loss
    return ways


def _by_op(backend: str) -> Stepper:
    def step(x: Tensor, g1: Tensor, g2: Tensor, l: float) -> Tensor:
        moved = _placed(x, backend)
        svag_step_(
            [moved],
            [_placed(g1, backend)],
            [_placed(g2, backend)],
            lr=LR,
            l=l,
            weight_decay=DECAY,
            backend=backend,
        )
        return moved.cpu()

    return step


def _by_optimizer(backend: str) -> Stepper:
    def step(x: Tensor, g1: Tensor, g2: Tensor, l: float) -> Tensor:
        parameter = nn.Parameter(_placed(x, backend))
        optimizer = SVAG([parameter], lr=LR, l=l, weight_decay=DECAY, backend=backend)
        parameter.grad = _placed(g1, backend)
        optimizer.hold_gradient()
        parameter.grad = _placed(g2, backend)
        optimizer.step()
        return parameter.detach().cpu()

    return step


def _by_weight_step(backend: str) -> Stepper:
    """A Linear layer of one output whose rows are the gradients themselves."""

    def step(x: Tensor, g1: Tensor, g2: Tensor, l: float) -> Tensor:
        weight = _placed(x, backend)[None]
        rows = torch.stack([g1, g2])
        ones = torch.ones(2, 1, dtype=torch.float64, device="cpu")
        svag_weight_step_(
            weight,
            _placed(rows, backend),
            _placed(ones, backend),
            segments=[0, 1],
            lr=LR,
            l=l,
            weight_decay=DECAY,
            backend=backend,
        )
        return weight[0].cpu()

    return step


def _by_loss(x: Tensor, g1: Tensor, g2: Tensor, l: float) -> Tensor:
    parameter = nn.Parameter(x.clone())
    optimizer = torch.optim.SGD([parameter], lr=LR / l, weight_decay=DECAY)
    svag_loss(parameter @ g1, parameter @ g2, l).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return parameter.detach()


def _formula_check(name: str, step: Stepper, l: float) -> Check:
    """One step by equation 5 itself: the moments can't tell the two batches from each other."""
    g1, g2 = GRADS[0], GRADS[1]
    c1, c2 = (1 + math.sqrt(2 * l - 1)) / 2, (1 - math.sqrt(2 * l - 1)) / 2
    expected = START - LR / l * (c1 * g1 + c2 * g2 + DECAY * START)
    off = float((step(START.clone(), g1.clone(), g2.clone(), l) - expected).abs().max())
    return exact_check("eq. 5", f"{name}, l = {l:g}: one step", off, TOLERANCE)


def _moment_checks(name: str, step: Stepper, l: float) -> list[Check]:
    moves, weights = [], []
    for i, j in itertools.product(range(3), repeat=2):
        moves.append(step(START.clone(), GRADS[i].clone(), GRADS[j].clone(), l) - START)
        weights.append(PROBABILITIES[i] * PROBABILITIES[j])
    delta, p = torch.stack(moves), torch.stack(weights)
    found = (
        torch.einsum("k,ka->a", p, delta),
        torch.einsum("k,ka,kb->ab", p, delta, delta),
        torch.einsum("k,ka,kb,kc->abc", p, delta, delta, delta),
    )
    checks = []
    for part, mine, formula in zip(("i", "ii", "iii"), found, _formulas(l), strict=True):
        off = float((mine - formula).abs().max() / formula.abs().max())
        checks.append(exact_check(f"Lemma 4.7 ({part})", f"{name}, l = {l:g}, enumerated", off, TOLERANCE))
    return checks


def _formulas(l: float) -> tuple[Tensor, Tensor, Tensor]:
    """The lemma's right sides, with weight decay's λx in the mean gradient."""
    mean = PROBABILITIES @ GRADS
    centred = GRADS - mean
    sigma = torch.einsum("k,ka,kb->ab", PROBABILITIES, centred, centred)
    third = torch.einsum("k,ka,kb,kc->abc", PROBABILITIES, centred, centred, centred)
    drift = mean + DECAY * START
    mixed = torch.einsum("a,bc->abc", drift, sigma)
    mixed = mixed + mixed.permute(1, 0, 2) + mixed.permute(1, 2, 0)
    return (
        -LR / l * drift,
        LR**2 / l * sigma + LR**2 / l**2 * torch.outer(drift, drift),
        -(
            LR**3 / l**2 * (3 - 1 / l) / 2 * third
            + LR**3 / l**2 * mixed
            + LR**3 / l**3 * torch.einsum("a,b,c->abc", drift, drift, drift)
        ),
    )


def _statistics_checks(name: str) -> list[Check]:
    """G, N and R of a step: means over all pairs of batches, against |∇L|², Tr Σ and |x|²."""
    G = N = 0.0
    R = set()
    for i, j in itertools.product(range(3), repeat=2):
        x, g1, g2 = (_placed(t, name) for t in (START, GRADS[i], GRADS[j]))
        stats = svag_step_([x], [g1], [g2], lr=LR, l=4, weight_decay=DECAY, backend=name)
        assert stats.grad_sq_norm is not None
        assert stats.noise_trace is not None
        p = float(PROBABILITIES[i] * PROBABILITIES[j])
        G += p * float(stats.grad_sq_norm)
        N += p * float(stats.noise_trace)
        R.add(float(stats.weight_sq_norm))
    mean = PROBABILITIES @ GRADS
    truth = {
        "G": (G, float(mean @ mean)),
        "N": (N, float(PROBABILITIES @ (GRADS - mean).square().sum(1))),
        "R": (max(R), float(START @ START)),
    }
    return [
        exact_check("Section 5", f"StepStats' {which}, {name}, over all pairs of batches", abs(a / b - 1), TOLERANCE)
        for which, (a, b) in truth.items()
    ]


def _path(problem: AffineProblem, l: float, steps: int, n: int, seed: int, backend: str) -> Tensor:
    """n independent paths of the problem in one parameter, by `SVAG.step`."""
    draws = Draws(seed, round(100 * l))
    parameter = nn.Parameter(_placed(torch.ones(n, dtype=torch.float64, device="cpu"), backend))
    optimizer = SVAG([parameter], lr=LR, l=l, weight_decay=DECAY, backend=backend)
    for _ in range(steps):
        x = parameter.detach().cpu()
        parameter.grad = _placed(problem.batch_grad(x, (1.0,), draws), backend)
        optimizer.hold_gradient()
        parameter.grad = _placed(problem.batch_grad(x, (1.0,), draws), backend)
        optimizer.step()
    return parameter.detach().cpu()


def _backends(op: str) -> Sequence[str]:
    """The backends that can serve the op here, on float64."""
    return [name for name in backends.BACKENDS if backends.why_not(op, name, [_placed(START, name)]) is None]


def _placed(t: Tensor, backend: str) -> Tensor:
    """A copy where the backend can work on it."""
    on_gpu = backend in ("cuda", "triton") and torch.cuda.is_available()
    return t.to("cuda", copy=True) if on_gpu else t.clone()
