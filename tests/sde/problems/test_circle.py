"""The toy on which SGD's and SVAG's expectations are exact: against every path, simulation, and the SDE."""

import itertools
import math

import numpy as np
import pytest
import torch

from svag_fast.sde import (
    GD,
    NGD,
    CircleToy,
    Draws,
    EulerMaruyama,
    OneBatchSVAG,
    SGDProcess,
    SVAGProcess,
    mean_and_error,
    simulate,
)

LR, DECAY = 0.25, 0.2
TOY = CircleToy((-0.5, -0.5, 2.0, 0.4))
START = torch.tensor([0.8, 0.6], dtype=torch.float64)
FUNCTIONS = {
    "R": (lambda r: r, 0),
    "cos(theta)": (np.ones_like, 1),
    "x_1": (np.sqrt, 1),
    "R cos(3 theta)": (lambda r: r, 3),
}


def brute_force(process, steps, function, frequency):
    """The mean over every path of batches, one by one."""
    (estimate,) = process.estimates
    total, count = 0.0, 0
    for path in itertools.product(itertools.product(TOY.slopes, repeat=len(estimate.weights)), repeat=steps):
        x = START.numpy().copy()
        for batches in path:
            xi = float(np.dot(estimate.weights, batches))
            grad = xi * np.array([-x[1], x[0]]) / (x @ x)
            x = (1 - process.step_size * DECAY) * x - process.step_size * grad
        total += function(np.array(x @ x)) * math.cos(frequency * math.atan2(x[1], x[0]))
        count += 1
    return total / count


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("process", "steps"), [(SGDProcess(LR, DECAY), 4), (SVAGProcess(LR, DECAY, l=2.5), 2)])
def test_exact_mean_is_that_over_every_path(process, steps, name):
    function, frequency = FUNCTIONS[name]
    exact = TOY.process_mean(process, START, steps * process.step_size, function, frequency=frequency)
    assert exact.real == pytest.approx(brute_force(process, steps, function, frequency), abs=1e-12)


@pytest.mark.parametrize(
    "process",
    [
        SGDProcess(LR, DECAY),
        SVAGProcess(LR, DECAY, l=8),
        SVAGProcess(LR, l=9, batches=3),
        OneBatchSVAG(LR, l=4),
        GD(LR, DECAY),
    ],
)
def test_ensembles_have_the_exact_means(process):
    """Four functions of each process at |z| < 4.5; GD's to rounding."""
    x = simulate(process, TOY, START, 1.0, trajectories=40_000, seed=3)
    r, theta = x.square().sum(1), torch.atan2(x[:, 1], x[:, 0])
    for name, (function, frequency) in FUNCTIONS.items():
        exact = TOY.process_mean(process, START, 1.0, function, frequency=frequency).real
        values = torch.from_numpy(np.asarray(function(r.numpy()))) * (frequency * theta).cos()
        mean, error = mean_and_error(values)
        assert abs(mean - exact) < 4.5 * error + 1e-12, name


def test_interpolants_are_exact_to_rounding():
    """On the widest interval here, 64 steps of SVAG: the degree makes no difference any more."""
    process = SVAGProcess(LR, DECAY, l=16)
    for function, frequency in FUNCTIONS.values():
        coarse, fine = (
            TOY.process_mean(process, START, 1.0, function, frequency=frequency, degree=d) for d in (24, 48)
        )
        assert coarse == pytest.approx(fine, abs=1e-11)


def test_sgds_norm_is_not_random_where_the_slopes_size_is_fixed():
    """E R^2 = (E R)^2 and R is equation (10)'s own recursion; SVAG's is random, as it must be."""
    toy = CircleToy((1.5, -1.5))
    r = 1.0
    for _ in range(8):
        r = (1 - LR * DECAY) ** 2 * r + LR**2 * 1.5**2 / r
    first, second = (toy.process_mean(SGDProcess(LR, DECAY), START, 2.0, lambda r, p=p: r**p).real for p in (1, 2))
    assert first == pytest.approx(r, rel=1e-13)
    assert second == pytest.approx(r**2, rel=1e-13)
    first, second = (
        toy.process_mean(SVAGProcess(LR, DECAY, l=4), START, 2.0, lambda r, p=p: r**p).real for p in (1, 2)
    )
    assert second > first**2 + 1e-3


@pytest.mark.parametrize("decay", [0.0, DECAY])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_svag_converges_to_the_sde_with_order_one(name, decay):
    """Theorem 4.3 in closed form on a scale-invariant loss with skewed noise: doubling l halves the error."""
    function, frequency = FUNCTIONS[name]
    limit = TOY.sde_mean(START, 1.0, function, lr=LR, weight_decay=decay, frequency=frequency)
    gaps = [
        abs((TOY.process_mean(SVAGProcess(LR, decay, l=l), START, 1.0, function, frequency=frequency) - limit).real)
        for l in (32.0, 64.0)
    ]
    assert 1.9 < gaps[0] / gaps[1] < 2.1


def test_sde_is_what_euler_maruyama_reaches():
    h = 1 / 128
    x = simulate(EulerMaruyama(LR, DECAY, h=h), TOY, START, 1.0, trajectories=40_000, seed=1)
    for values, function, frequency in (
        (x[:, 0], np.sqrt, 1),
        (x.square().sum(1), lambda r: r, 0),
        (torch.atan2(x[:, 1], x[:, 0]).mul(2).cos(), np.ones_like, 2),
    ):
        exact = TOY.sde_mean(START, 1.0, function, lr=LR, weight_decay=DECAY, frequency=frequency).real
        mean, error = mean_and_error(values)
        assert abs(mean - exact) < 4 * error + h


def test_gradients_have_the_stated_mean_covariance_and_hessian():
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    g, noise, r = TOY.statistics(x)
    many = x[:1].expand(200_000, 2)
    grads = TOY.batch_grad(many, (1.0,), Draws(0))
    mean, error = mean_and_error((grads - TOY.mean_grad(many)).square().sum(1))
    assert abs(mean - noise[0].item()) < 4 * error
    torch.testing.assert_close(TOY.mean_grad(x).square().sum(1), g)
    torch.testing.assert_close((TOY.mean_grad(x) * x).sum(1), torch.zeros(5, dtype=torch.float64))
    # Hessian x = -grad, as scale invariance demands, and against a difference quotient.
    torch.testing.assert_close(TOY.hessian_product(x, x), -TOY.mean_grad(x))
    v, step = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), 1e-6
    quotient = (TOY.mean_grad(x + step * v) - TOY.mean_grad(x - step * v)) / (2 * step)
    torch.testing.assert_close(TOY.hessian_product(x, v), quotient, rtol=1e-6, atol=1e-7)
    assert r.shape == (5,)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: CircleToy(()), "slopes"),
        (lambda: CircleToy((1.0, math.inf)), "slopes"),
        (lambda: TOY.process_mean(NGD(LR), START, 1.0), "process"),
        (lambda: TOY.process_mean(SGDProcess(1.0, 2.0), START, 1.0), "lr"),
        (lambda: TOY.process_mean(SGDProcess(LR), torch.zeros(2), 1.0), "x0"),
        (lambda: TOY.process_mean(SGDProcess(LR), START, 0.3), "time"),
    ],
)
def test_bad_arguments_are_refused(make, name):
    with pytest.raises(ValueError, match=f"^{name}.* must be"):
        make()
