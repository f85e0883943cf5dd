"""The theorems as functions: derived from (11), simulated on a scale-invariant toy, errors compared with draws."""

from __future__ import annotations

import doctest
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from svag_fast.stats import estimate
from svag_fast.theory import (
    Closeness,
    Estimate,
    Norms,
    c_closeness,
    closeness,
    critical_batch_size,
    critical_kappa,
    equilibrium_equation,
    equilibrium_residual,
    linear_scaling_invariance,
    linear_scaling_rule,
    lsi_fails_certificate,
    nsr,
    scaling_rules,
    sde_fails_certificate,
    square_root_scaling_rule,
)

positive = st.floats(1e-3, 1e3)
constants = st.floats(1.05, 6.0)


@pytest.mark.parametrize("module", [estimate, scaling_rules, closeness, equilibrium_equation])
def test_doctests(module):
    results = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert results.attempted > 0
    assert results.failed == 0


# ---- the theorems, from equation (11) alone


def sgd_norm(G, N, lr, weight_decay):
    """R that equation (11) gives for G and N."""
    return lr * (G + N) / ((2 - lr * weight_decay) * weight_decay)


@given(G=positive, N=positive, lr=st.floats(1e-3, 1.0), weight_decay=st.floats(1e-4, 1.0), l=st.floats(1, 1e6))
def test_equilibrium_residual_vanishes_exactly_where_its_equation_holds(G, N, lr, weight_decay, l):
    R = (lr / l * G + lr * N) / ((2 - lr * weight_decay / l) * weight_decay)
    found = equilibrium_residual(R, G, N, lr=lr, weight_decay=weight_decay, l=l)
    assert found.ratio.value == pytest.approx(1, rel=1e-12)
    more = equilibrium_residual(1.25 * R, G, N, lr=lr, weight_decay=weight_decay, l=l)
    assert more.residual.value == pytest.approx(0.25, rel=1e-9)


def test_svag_equilibrium_tends_to_the_sdes_as_l_grows():
    """SVAG's ratio minus equation (12)'s, l = inf, falls as 1/l."""
    at = {
        l: equilibrium_residual(3.0, 1.0, 2.0, lr=0.4, weight_decay=0.3, l=l).ratio.value for l in (100, 200, math.inf)
    }
    assert (at[100] - at[math.inf]) / (at[200] - at[math.inf]) == pytest.approx(2, rel=0.02)
    assert at[math.inf] == pytest.approx(2 * 0.3 * 3.0 / (0.4 * 2.0))


@given(
    G=positive,
    N=positive,
    grad_ratio=st.floats(0.2, 5),
    noise_ratio=st.floats(0.2, 5),
    lr=st.floats(1e-3, 1),
    weight_decay=st.floats(1e-3, 1),
)
def test_theorem_5_2_never_accuses_a_close_pair(G, N, grad_ratio, noise_ratio, lr, weight_decay):
    """Any SGD at (11) and SDE at (12) are C-close for the C measured: at it neither form of the certificate fires."""
    g, n = G / grad_ratio, N / noise_ratio
    sgd = Norms(sgd_norm(G, N, lr, weight_decay), G, N)
    sde = Norms(lr * n / (2 * weight_decay), g, n)
    C = c_closeness(sgd, sde).constant.value * (1 + 1e-9)
    assert not sde_fails_certificate(G, N, C=C).fails
    assert not sde_fails_certificate(g, lr * n, lr=lr, C=C).fails


@given(C=constants, N=positive, weight_decay=st.floats(1e-3, 1))
def test_theorem_5_2_is_attained(C, N, weight_decay):
    """At N/G = 1/(C²-1), as ηλ → 0, an SDE that is exactly C-close exists: the threshold can't be raised."""
    lr = 1e-9
    G = N * (C**2 - 1)
    n = C * N
    sgd = Norms(sgd_norm(G, N, lr, weight_decay), G, N)
    close = c_closeness(sgd, Norms(lr * n / (2 * weight_decay), G, n))
    assert close.constant.value == pytest.approx(C, rel=1e-6)
    assert sde_fails_certificate(G, N, C=C).margin.value == pytest.approx(0, abs=1e-9 / (C**2 - 1))


@given(
    G=positive,
    N=positive,
    grad_ratio=st.floats(0.2, 5),
    noise_ratio=st.floats(0.2, 5),
    kappa=st.floats(1.2, 60),
    decay=st.floats(1e-6, 0.9),
)
def test_theorems_5_5_and_5_6_never_accuse_an_invariant_pair(G, N, grad_ratio, noise_ratio, kappa, decay):
    """Two runs at (11), (B, η) and (κB, κη), are (C, κ)-LSI for the C measured: at it nothing fires, and κ <= κ*."""
    lr, weight_decay = 1.0, decay * 2 / kappa
    g, n = G / grad_ratio, N / (kappa * noise_ratio)
    base = Norms(sgd_norm(G, N, lr, weight_decay), G, N)
    scaled = Norms(sgd_norm(g, n, kappa * lr, weight_decay), g, n)
    C = linear_scaling_invariance(base, scaled, kappa=kappa).constant.value * (1 + 1e-9)
    if math.sqrt(kappa) > C:
        assert not lsi_fails_certificate(g, n, kappa=kappa, C=C).fails
    assert kappa <= critical_kappa(G, N, C=C, form="tightened").value
    assert kappa <= critical_kappa(G, N, C=C).value


@given(ratio=positive, C=constants)
def test_the_tightened_kappa_is_attained_and_the_papers_is_not(ratio, C):
    """As ηλ → 0 a (C, κ)-LSI pair exists at κ = C² + (C²-1) N/G; the paper's κ* is N/G above it."""
    kappa = critical_kappa(1.0, ratio, C=C, form="tightened").value
    assert critical_kappa(1.0, ratio, C=C).value - kappa == pytest.approx(ratio, rel=1e-9)
    G, N, g, n = 1.0, ratio, 1 / C, ratio / (kappa * C)
    base, scaled = Norms(G + N, G, N), Norms(kappa * (g + n), g, n)
    assert linear_scaling_invariance(base, scaled, kappa=kappa).constant.value == pytest.approx(C, rel=1e-9)


@given(kappa=st.floats(1.2, 60), C=constants)
def test_theorem_5_5_is_attained(kappa, C):
    """As ηλ → 0 an exactly (C, κ)-LSI pair sits at the threshold of N/G."""
    assume(0.99 * math.sqrt(kappa) > C)
    n = lsi_fails_certificate(1.0, 0.0, kappa=kappa, C=C).threshold
    base = Norms(C * 1.0 + C * kappa * n, C * 1.0, C * kappa * n)
    close = linear_scaling_invariance(base, Norms(kappa * (1.0 + n), 1.0, n), kappa=kappa)
    assert close.constant.value == pytest.approx(C, rel=1e-9)


# ---- scaling laws


@given(G=positive, N=positive, unit=st.floats(1e-6, 1e6), batch_size=st.floats(1, 1e5), C=constants)
def test_ratios_do_not_depend_on_units(G, N, unit, batch_size, C):
    """G and N in other units: same nsr, same κ*; B* is proportional to B; κ* grows with C."""
    assert nsr(unit * G, unit * N).value == pytest.approx(nsr(G, N).value)
    for form in ("exact", "approximate", "tightened"):
        kappa = critical_kappa(G, N, C=C, form=form).value
        assert critical_kappa(unit * G, unit * N, C=C, form=form).value == pytest.approx(kappa)
        assert critical_batch_size(G, N, batch_size, C=C, form=form).value == pytest.approx(kappa * batch_size)
        assert critical_kappa(G, N, C=1.1 * C, form=form).value > kappa


@given(ratio=st.floats(10, 1e6))
def test_approximate_kappa_approaches_the_exact_one_for_large_noise(ratio):
    exact, approximate = (critical_kappa(1.0, ratio, form=form).value for form in ("exact", "approximate"))
    assert 0 < exact / approximate - 1 <= 1.0000001 / ratio


@given(a=st.floats(0.1, 10), b=st.floats(0.1, 10), lr=positive, batch_size=st.floats(1, 1e4))
def test_linear_scaling_composes(a, b, lr, batch_size):
    once = linear_scaling_rule(a * b, batch_size=batch_size, lr=lr)
    first = linear_scaling_rule(a, batch_size=batch_size, lr=lr)
    twice = linear_scaling_rule(b, batch_size=first.batch_size, lr=first.lr)
    assert (twice.batch_size, twice.lr) == pytest.approx((once.batch_size, once.lr))
    assert once.lr / once.batch_size == pytest.approx(lr / batch_size)


@given(a=st.floats(0.01, 1), b=st.floats(0.01, 1), beta1=st.floats(0, 0.99), beta2=st.floats(0, 0.999))
def test_square_root_scaling_composes_and_keeps_the_time_constants(a, b, beta1, beta2):
    start = {"batch_size": 512.0, "lr": 0.02, "beta1": beta1, "beta2": beta2, "eps": 1e-8}
    once = square_root_scaling_rule(a * b, **start)
    first = square_root_scaling_rule(a, **start)
    twice = square_root_scaling_rule(b, **vars(first))
    for name, value in vars(once).items():
        assert getattr(twice, name) == pytest.approx(value, abs=1e-12), name
    for before, after in ((beta1, once.beta1), (beta2, once.beta2)):
        assert 1 - after == pytest.approx(a * b * (1 - before))  # time constant in samples B/(1-β): unchanged
    assert once.lr**2 / once.batch_size == pytest.approx(0.02**2 / 512)


@given(lr=positive, beta1=st.floats(0, 0.999), beta2=st.floats(0, 0.9999))
def test_square_root_scaling_by_one_changes_no_bit(lr, beta1, beta2):
    same = square_root_scaling_rule(1, batch_size=8, lr=lr, beta1=beta1, beta2=beta2, eps=1e-8)
    assert (same.lr, same.beta1, same.beta2, same.eps) == (lr, beta1, beta2, 1e-8)


# ---- standard errors against draws

DRAWS = 200_000
SPREAD_BOUND = 4.5 / math.sqrt(2 * DRAWS)  # z = 4.5 of a standard deviation's own relative standard error


def draws(means, covariance):
    return np.random.default_rng(7).multivariate_normal(means, covariance, DRAWS).T


@pytest.mark.parametrize("correlation", [-0.8, 0.0, 0.6])
def test_delta_method_gives_the_spread_of_the_ratio_and_of_kappa(correlation):
    errors = (0.01, 0.02)  # small beside the values: the neglected terms are a thousandth of the kept ones
    covariance = correlation * errors[0] * errors[1]
    G, N = draws((2.0, 3.0), [[errors[0] ** 2, covariance], [covariance, errors[1] ** 2]])
    estimates = {"grad_sq_norm": Estimate(2.0, errors[0]), "noise_trace": Estimate(3.0, errors[1])}
    predicted = nsr(**estimates, covariance=covariance)
    assert np.std(N / G) == pytest.approx(predicted.standard_error, rel=SPREAD_BOUND)
    kappa = critical_kappa(**estimates, covariance=covariance, form="tightened", C=2)
    assert np.std(4 + 3 * N / G) == pytest.approx(kappa.standard_error, rel=SPREAD_BOUND)
    size = critical_batch_size(**estimates, batch_size=32, covariance=covariance)
    assert np.std(32 * 2 * (1 + N / G)) == pytest.approx(size.standard_error, rel=SPREAD_BOUND)


def test_delta_method_gives_the_spread_of_the_equilibrium_ratio():
    means = np.array([4.0, 1.0, 2.0])
    root = np.array([[0.02, 0, 0], [0.01, 0.01, 0], [-0.01, 0.004, 0.008]])
    covariance = root @ root.T
    R, G, N = draws(means, covariance)
    rates = {"lr": 0.5, "weight_decay": 0.2}
    found = equilibrium_residual(*means, **rates, covariance=covariance.tolist())
    assert np.std(1.9 * 0.2 * R / (0.5 * (G + N))) == pytest.approx(found.ratio.standard_error, rel=SPREAD_BOUND)
    assert np.std(1.9 * 0.2 * R) == pytest.approx(found.left.standard_error, rel=SPREAD_BOUND)
    assert np.std(0.5 * (G + N)) == pytest.approx(found.right.standard_error, rel=SPREAD_BOUND)
    independent = equilibrium_residual(Estimate(4.0, 0.1), Estimate(1.0, 0.0), Estimate(2.0, 0.0), **rates)
    assert independent.ratio.standard_error == pytest.approx(0.1 * 1.9 * 0.2 / 1.5)


def test_closeness_reports_the_worst_ratio_with_its_error_and_verdicts_respect_it():
    sgd = Norms(Estimate(1.0, 0.01), 1.0, Estimate(3.0, 0.3))
    sde = Norms(1.0, 1.1, Estimate(2.0, 0.1))
    found = c_closeness(sgd, sde)
    assert found.constant.value == 1.5
    assert found.constant.standard_error == pytest.approx(1.5 * math.hypot(0.1, 0.05))
    assert [found.verdict(C) for C in (1.15, 1.5, 2.0)] == ["fails", "undecided", "holds"]
    inverted = c_closeness(sde, sgd).constant
    assert (inverted.value, inverted.standard_error) == pytest.approx((1.5, 1.5 * math.hypot(0.1, 0.05)))


def test_certificate_verdict_is_undecided_within_its_error():
    assert sde_fails_certificate(1.0, Estimate(0.9, 0.01)).verdict() == "fails"
    assert sde_fails_certificate(1.0, Estimate(0.9, 0.2)).verdict() == "undecided"
    assert sde_fails_certificate(1.0, Estimate(1.2, 0.01)).verdict() == "silent"


# ---- the scale-invariant toy: L_γ(x) = a_γ·x/|x|, a_γ ~ N(μ, s²I/B)

MU = np.array([1.0, 0.5, 0.0, 0.0, 0.0])


def simulate(lr, batch_size, weight_decay, l=1, noise=6.0, trajectories=1000, settle=2500, keep=2500, seed=0):
    """Each trajectory's time averages of R, G, N at equilibrium, [trajectories, 3]; SVAG with l, SGD at l = 1."""
    rng = np.random.default_rng(seed)
    c1, c2 = (1 + math.sqrt(2 * l - 1)) / 2, (1 - math.sqrt(2 * l - 1)) / 2
    x = rng.standard_normal((trajectories, MU.size))
    total = np.zeros((trajectories, 3))
    sigma = math.sqrt(noise / batch_size)
    for step in range(settle + keep):
        R = (x * x).sum(1)
        unit = x / np.sqrt(R)[:, None]
        slope = (MU - (unit @ MU)[:, None] * unit) / np.sqrt(R)[:, None]
        if step >= settle:
            total += np.stack([R, (slope * slope).sum(1), sigma**2 * (MU.size - 1) / R], 1)
        z = rng.standard_normal(x.shape) * sigma
        if l > 1:
            z = c1 * z + c2 * sigma * rng.standard_normal(x.shape)
        kick = (z - (z * unit).sum(1)[:, None] * unit) / np.sqrt(R)[:, None]
        x = x - lr / l * (slope + kick + weight_decay * x)
    return total / keep


def norms(averages):
    """Mean and standard error over independent trajectories of R, G, N."""
    errors = averages.std(0, ddof=1) / math.sqrt(len(averages))
    return Norms(*(Estimate(float(m), float(e)) for m, e in zip(averages.mean(0), errors, strict=True)))


@pytest.mark.parametrize("l", [1, 4])
def test_toy_settles_on_equation_11_and_on_svags_form_of_it(l):
    averages = simulate(lr=0.4, batch_size=2, weight_decay=0.1, l=l, settle=400 * l, keep=300 * l)
    covariance = (np.cov(averages.T) / len(averages)).tolist()
    found = equilibrium_residual(*averages.mean(0), lr=0.4, weight_decay=0.1, l=l, covariance=covariance)
    assert abs(found.residual.value) < 4 * found.ratio.standard_error
    assert found.ratio.standard_error < 0.01
    # the other form of the equation is told apart
    other = equilibrium_residual(*averages.mean(0), lr=0.4, weight_decay=0.1, l=5 - l, covariance=covariance)
    assert abs(other.residual.value) > 4 * other.ratio.standard_error


def test_certificates_on_the_toy_predict_failures_and_never_accuse_what_holds():
    """Over a grid of κ: no certificate fails where LSI was measured to hold, and beyond κ* it was measured to fail."""
    lr, batch_size, weight_decay = 0.05, 4, 0.1
    base = norms(simulate(lr, batch_size, weight_decay, settle=600, keep=400))
    star = critical_kappa(base.grad_sq_norm, base.noise_trace)
    measured = {}
    for kappa in (2.5, 8, 32, 128):
        rule = linear_scaling_rule(kappa, batch_size=batch_size, lr=lr)
        scaled = norms(simulate(rule.lr, rule.batch_size, weight_decay, settle=400, keep=200, seed=1))
        measured[kappa] = linear_scaling_invariance(base, scaled, kappa=kappa).verdict()
        certificate = lsi_fails_certificate(scaled.grad_sq_norm, scaled.noise_trace, kappa=kappa).verdict()
        if measured[kappa] == "holds":
            assert certificate != "fails"
            assert kappa <= star.interval(0.9999)[1]
        if certificate == "fails" or kappa > star.interval(0.9999)[1]:
            assert measured[kappa] == "fails"
    assert measured[2.5] == "holds"
    assert measured[128] == "fails"
    order = [measured[kappa] for kappa in sorted(measured)]
    assert all(not (a == "fails" and b == "holds") for a, b in pairwise(order))


# ---- refusals

REFUSED = [
    (lambda: nsr(0.0, 1.0), "grad_sq_norm"),
    (lambda: nsr(-1.0, 1.0), "grad_sq_norm"),
    (lambda: nsr(1.0, -1e-9), "noise_trace"),
    (lambda: nsr(1.0, math.nan), "noise_trace"),
    (lambda: nsr(math.inf, 1.0), "grad_sq_norm"),
    (lambda: nsr(Estimate(1.0, 0.1), Estimate(1.0, 0.1), covariance=0.02), "covariance"),
    (lambda: nsr(1.0, 1.0, covariance=math.nan), "covariance"),
    (lambda: nsr(Estimate(math.nan), 1.0), "grad_sq_norm"),
    (lambda: nsr(1.0, Estimate(1.0, math.nan)), "noise_trace.standard_error"),
    (lambda: Estimate(1.0, -0.1), "standard_error"),
    (lambda: estimate.fieller_interval(Estimate(1.0, math.inf), Estimate(1.0), 0.0), "numerator.standard_error"),
    (lambda: Estimate(1.0).interval(1.0), "confidence"),
    (lambda: sde_fails_certificate(1.0, 1.0, C=1.0), r"C \(ratios are in \[1/C, C\]\) must be a finite number > 1"),
    (lambda: sde_fails_certificate(1.0, 1.0, C=-2.0), r"C \(ratios are in \[1/C, C\]\) must be a finite number > 1"),
    (lambda: sde_fails_certificate(1.0, 1.0, lr=0.0), "lr"),
    (lambda: lsi_fails_certificate(1.0, 1.0, kappa=4, C=2.0), r"C must be in \(1, sqrt"),
    (lambda: lsi_fails_certificate(1.0, 1.0, kappa=4, C=0.0), r"C must be in \(1, sqrt"),
    (lambda: lsi_fails_certificate(1.0, 1.0, kappa=4, C=math.nan), r"C must be in \(1, sqrt"),
    (lambda: lsi_fails_certificate(1.0, 1.0, kappa=1.0), "kappa"),
    (lambda: lsi_fails_certificate(1.0, -1.0, kappa=4), "noise_trace"),
    (lambda: critical_kappa(1.0, 1.0, C=math.inf), r"C \(ratios are in \[1/C, C\]\) must be a finite number > 1 and"),
    (lambda: critical_kappa(1.0, 1.0, form="other"), "form"),
    (lambda: critical_batch_size(1.0, 1.0, 0), "batch_size"),
    (lambda: equilibrium_residual(-1.0, 1.0, 1.0, lr=0.1, weight_decay=0.1), "weight_sq_norm"),
    (lambda: equilibrium_residual(1.0, -1.0, 1.0, lr=0.1, weight_decay=0.1), "grad_sq_norm"),
    (lambda: equilibrium_residual(1.0, 1.0, -1.0, lr=0.1, weight_decay=0.1), "noise_trace"),
    (lambda: equilibrium_residual(1.0, 0.0, 0.0, lr=0.1, weight_decay=0.1), "grad_sq_norm and noise_trace"),
    (lambda: equilibrium_residual(1.0, 1.0, 1.0, lr=0.0, weight_decay=0.1), "lr"),
    (lambda: equilibrium_residual(1.0, 1.0, 1.0, lr=0.1, weight_decay=0.0), "weight_decay"),
    (lambda: equilibrium_residual(1.0, 1.0, 1.0, lr=4.0, weight_decay=0.5), "below 2"),
    (lambda: equilibrium_residual(1.0, 1.0, 1.0, lr=0.1, weight_decay=0.1, l=0.5), "l must"),
    (lambda: equilibrium_residual(1.0, 1.0, 1.0, lr=0.1, weight_decay=0.1, covariance=[[1.0]]), "3x3"),
    (lambda: c_closeness(Norms(1, 1, 1), Norms(1, 0, 1)), r"sde\.grad_sq_norm"),
    (lambda: linear_scaling_invariance(Norms(1, 1, -1), Norms(1, 1, 1), kappa=2), r"base\.noise_trace"),
    (lambda: linear_scaling_invariance(Norms(1, 1, 1), Norms(1, 1, 1), kappa=0.5), "kappa"),
    (lambda: c_closeness(Norms(1, 1, 1), Norms(1, 1, 1)).verdict(C=0.9), r"C \(ratios are in \[1/C, C\]\) must be a"),
    (lambda: linear_scaling_rule(0, batch_size=1, lr=1), "kappa"),
    (lambda: linear_scaling_rule(2, batch_size=1, lr=-1), "lr"),
    (lambda: square_root_scaling_rule(20, batch_size=1, lr=1, beta1=0.9, beta2=0.999, eps=0), "beta1"),
    (lambda: square_root_scaling_rule(2, batch_size=1, lr=1, beta2=1.0, eps=0), "beta2"),
    (lambda: square_root_scaling_rule(2, batch_size=1, lr=1, beta2=0.9, eps=-1), "eps"),
]


@pytest.mark.parametrize(("call", "offender"), REFUSED)
def test_inputs_out_of_range_are_refused_by_name(call, offender):
    with pytest.raises(ValueError, match=offender):
        call()


def test_the_interval_of_the_least_c_covers_although_it_is_a_maximum():
    """Three ratios, two of them alike and 2 % away from deciding: 95 % at least (binomial, 1 in 10⁴)."""
    rng = np.random.default_rng(7)
    truth, draws, covered, low_too_high = (1.30, 1.28, 0.80), 2000, 0, 0
    for _ in range(draws):
        ratios = [Estimate(float(r * np.exp(0.05 * rng.normal())), 0.05 * r) for r in truth]
        low, high = Closeness(*ratios).constant_interval()
        covered += low <= 1.30 <= high
        low_too_high += low > 1.30
    assert covered >= stats.binom.ppf(1e-4, draws, 0.95)
    assert low_too_high <= stats.binom.ppf(1 - 1e-4, draws, 0.025)


@pytest.mark.parametrize("C", [math.sqrt(2), 1.1, 3.0, 1 + 1e-9])
def test_a_ratio_that_is_c_itself_is_close_and_rounding_does_not_decide(C):
    """Definition 5.1 says <=."""
    for ratio in (C, 1 / C, C * (1 + 2e-16), 1 / C * (1 - 2e-16)):
        assert c_closeness(Norms(ratio, 1.0, 1.0), Norms(1.0, 1.0, 1.0)).verdict(C) == "holds"
    assert c_closeness(Norms(C * 1.0001, 1.0, 1.0), Norms(1.0, 1.0, 1.0)).verdict(C) == "fails"


def test_degrees_of_freedom_and_effective_samples_go_through():
    G, N = Estimate(2.0, 0.1, 7.0, 40.0), Estimate(3.0, 0.2, 11.0, 12.0)
    for found in (nsr(G, N), critical_kappa(G, N), critical_batch_size(G, N, 8), sde_fails_certificate(G, N).margin):
        assert (found.degrees_of_freedom, found.effective_samples, found.trusted) == (7.0, 12.0, False)
    assert nsr(2.0, N).degrees_of_freedom == 11.0
