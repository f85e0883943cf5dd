"""Exact moments against the closed forms of the paper's two scalar problems, and what the theorems say of them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svag_fast.sde import (
    NGD,
    EulerMaruyama,
    Gamma,
    Gaussian,
    GradientFlow,
    OneBatchSVAG,
    SGDProcess,
    SVAGProcess,
    additive_quadratic,
    constant_poisson_gradient,
    multiplicative_quadratic,
    process_moments,
    sde_moments,
)

positive = st.floats(0.05, 1.5)


@given(a=positive, s=positive, lr=st.floats(0.01, 0.5), l=st.floats(1, 50), k=st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_additive_noise_follows_the_closed_recursion(a, s, lr, l, k):
    problem, process = additive_quadratic(a, s, Gamma()), SVAGProcess(lr, l=l)
    mean, variance = 1.3, 0.0
    for _ in range(k):
        mean *= 1 - lr * a / l
        variance = (1 - lr * a / l) ** 2 * variance + lr**2 * a**2 * s**2 / l
    m = process_moments(process, problem, 1.3, [k * process.step_size])[0]
    assert m[1] == pytest.approx(mean, rel=1e-9)
    assert m[2] == pytest.approx(mean**2 + variance, rel=1e-9)


@given(a=positive, s=positive, lr=st.floats(0.01, 0.5), t=st.floats(0, 5))
@settings(max_examples=60, deadline=None)
def test_ornstein_uhlenbeck(a, s, lr, t):
    m = sde_moments(additive_quadratic(a, s), 1.3, [t], lr=lr)[0]
    mean = 1.3 * math.exp(-a * t)
    variance = lr * a * s**2 / 2 * (1 - math.exp(-2 * a * t))
    assert m[1] == pytest.approx(mean, rel=1e-9)
    assert m[2] == pytest.approx(mean**2 + variance, rel=1e-9)
    assert m[3] == pytest.approx(mean**3 + 3 * mean * variance, rel=1e-9)
    assert m[4] == pytest.approx(mean**4 + 6 * mean**2 * variance + 3 * variance**2, rel=1e-9)


@given(mu=positive, s=positive, lr=st.floats(0.01, 0.5), l=st.floats(1, 50), t=st.floats(0, 3))
@settings(max_examples=60, deadline=None)
def test_geometric_brownian_motion(mu, s, lr, l, t):
    problem = multiplicative_quadratic(mu, s, Gamma())
    m = sde_moments(problem, 1.3, [t], lr=lr)[0]
    for p in range(5):
        expected = 1.3**p * math.exp((-mu * p + lr * s**2 / 2 * p * (p - 1)) * t)
        assert m[p] == pytest.approx(expected, rel=1e-8)
    process = SVAGProcess(lr, l=l)
    factor = 1 - 2 * lr * mu / l + lr**2 / l**2 * (mu**2 + l * s**2)
    assert process_moments(process, problem, 1.3, [5 * process.step_size])[0, 2] == pytest.approx(1.3**2 * factor**5)


@given(l=st.floats(1, 100))
@settings(max_examples=30, deadline=None)
def test_svag_with_gaussian_noise_is_euler_maruyama_at_lr_over_l(l):
    problem = multiplicative_quadratic(0.8, 0.5, Gaussian())
    pair = [
        process_moments(p, problem, 1.0, [6 * 0.2 / l])[0]
        for p in (SVAGProcess(0.2, 0.1, l=l), EulerMaruyama(0.2, 0.1, h=0.2 / l))
    ]
    np.testing.assert_allclose(*pair, rtol=1e-11)


def test_svag_at_one_is_sgd_and_ngd_is_euler_maruyama_at_lr():
    problem = additive_quadratic(1.0, 0.7, Gamma())
    for a, b in ((SVAGProcess(0.25, 0.1), SGDProcess(0.25, 0.1)), (NGD(0.25, 0.1), EulerMaruyama(0.25, 0.1, h=0.25))):
        np.testing.assert_array_equal(*(process_moments(p, problem, 1.0, [1.0]) for p in (a, b)))


PROBLEMS = [
    additive_quadratic(1.0, 1.5, Gamma(0.5)),
    multiplicative_quadratic(1.0, 1.0, Gamma(0.5)),
    constant_poisson_gradient(0.5, 0.7),
]


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("batches", [2, 3])
def test_theorem_4_3_errors_of_all_moments_fall_as_one_over_l(problem, batches):
    """Doubling l halves each error; the skewed third moment doesn't matter in the limit."""
    times = [0.5, 1.0, 2.0]
    limit = sde_moments(problem, 1.0, times, lr=0.5, weight_decay=0.1)
    errors = [
        abs(process_moments(SVAGProcess(0.5, 0.1, l=l, batches=batches), problem, 1.0, times) - limit).max(0)[1:]
        for l in (512, 1024)
    ]
    assert all(1.97 < a / b < 2.03 for a, b in zip(*errors, strict=True) if a > 1e-9)


def test_third_moment_minimal_batches_are_nearer_in_the_third_cumulant():
    """Where only the third cumulant is wrong (constant gradient), three batches have no error left."""
    problem = constant_poisson_gradient(0.5)
    limit = sde_moments(problem, 0.0, [1.0], lr=0.5)[0, 3]
    two, three = (process_moments(SVAGProcess(0.5, l=16, batches=b), problem, 0.0, [1.0])[0, 3] for b in (2, 3))
    assert abs(two - limit) > 1e-3
    assert abs(three - limit) < 1e-12


def test_sgd_at_scaled_batch_does_not_converge_in_the_third_moment():
    """lr/l at batch B/l has SVAG's mean and covariance, but keeps Lambda/l^1 a step: E x^3 stays away."""
    problem = additive_quadratic(1.0, 1.5, Gamma(0.5))
    limit = sde_moments(problem, 1.0, [1.0], lr=0.5)[0]
    errors = []
    for l in (64, 1024):
        scaled = problem.at_batch_size(1 / l)
        moments = process_moments(SGDProcess(0.5 / l), scaled, 1.0, [1.0])[0]
        errors.append(abs(moments - limit))
    assert errors[1][2] < errors[0][2] / 10
    assert errors[1][3] > 0.9 * errors[0][3] > 1e-3


def test_one_batch_variant_converges_to_another_sde():
    """Its limit has lr grad grad^T added to the covariance: on a noiseless quadratic it still diffuses."""
    problem = multiplicative_quadratic(1.0, 0.6)
    lr = 0.25
    limit = sde_moments(problem, 1.0, [1.0], lr=lr)[0, 2]
    got = process_moments(OneBatchSVAG(lr, l=4096), problem, 1.0, [1.0])[0, 2]
    assert got == pytest.approx(math.exp((-2 + lr * (0.36 + 1)) * 1.0), rel=1e-3)
    assert abs(got - limit) > 0.2 * limit


@pytest.mark.parametrize("scale", [2.0, 4.0, 8.0])
def test_linear_scaling_is_exact_for_infinitely_divisible_noise_while_the_sde_fails(scale):
    """Appendix B.1, our instance: all four moments at T agree for (B, lr) and (scale B, scale lr), for every lr."""
    base = process_moments(SGDProcess(0.25), constant_poisson_gradient(1.0), 0.0, [4.0])[0]
    scaled = process_moments(SGDProcess(0.25 * scale), constant_poisson_gradient(scale), 0.0, [4.0])[0]
    np.testing.assert_allclose(base, scaled, rtol=1e-12, atol=1e-12)
    # Exact cumulants: (-lr/B)^j (T/lr) B.
    assert base[2] == pytest.approx(0.25 * 4)
    assert base[3] == pytest.approx(-(0.25**2) * 4)
    assert base[4] - 3 * base[2] ** 2 == pytest.approx(0.25**3 * 4)
    assert sde_moments(constant_poisson_gradient(scale), 0.0, [4.0], lr=0.25 * scale)[0, 3] == 0
    svag = process_moments(SVAGProcess(0.25 * scale, l=1024), constant_poisson_gradient(scale), 0.0, [4.0])[0, 3]
    assert abs(svag) < abs(base[3]) / 500


def test_gradient_flow_is_refused_where_its_step_is_not_affine():
    with pytest.raises(ValueError, match="GradientFlow"):
        process_moments(GradientFlow(0.1, h=0.1), PROBLEMS[0], 1.0, [1.0])
    with pytest.raises(ValueError, match="order must be 1 or 2, got 3"):
        sde_moments(PROBLEMS[0], 1.0, [1.0], lr=0.1, order=3)
