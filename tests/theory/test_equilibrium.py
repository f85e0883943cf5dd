"""The equilibrium detector, calibrated on made series: how often it cries wolf, and what it sees."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from scipy.signal import lfilter

from svag_fast.stats.series import joint_means
from svag_fast.theory import equilibrium_residual, nsr
from svag_fast.theory.equilibrium import detect_equilibrium, stationarity


def ar1(rng, n, phi):
    """A stationary AR(1) series of variance 1."""
    settle = int(20 / (1 - phi))
    noise = rng.standard_normal(n + settle) * math.sqrt(1 - phi * phi)
    return lfilter([1.0], [1.0, -phi], noise)[settle:]


def several(rng, runs, n, phi):
    return np.array([ar1(rng, n, phi) for _ in range(runs)])


def alarms(make, draws, **options):
    return sum(stationarity(make(), **options).state == "drifting" for _ in range(draws))


@pytest.mark.parametrize(
    ("runs", "n", "phi", "most"),
    [
        (1, 60, 0.0, 0.02),
        (1, 300, 0.9, 0.02),
        (3, 60, 0.5, 0.02),
        (3, 240, 0.9, 0.02),
        (1, 114, 0.9, 0.04),
        (3, 18, 0.5, 0.04),
    ],
)
def test_false_alarms_stay_at_the_stated_rate(runs, n, phi, most):
    """At tolerance 0 and level 0.01: the count must be one that the stated rate makes likely (binomial, 1 in 10⁴)."""
    rng = np.random.default_rng(11)
    draws = 400
    count = alarms(lambda: 10 + several(rng, runs, n, phi), draws, level=0.01, tolerance=0.0)
    assert count <= stats.binom.ppf(1 - 1e-4, draws, most)


@pytest.mark.parametrize(("runs", "n", "phi"), [(1, 200, 0.5), (3, 100, 0.8), (8, 40, 0.0)])
def test_a_drift_as_large_as_the_tolerance_is_found_at_the_stated_power(runs, n, phi):
    """20 % over the window: called stationary in 1 of 40 at most; found in 80 % where its error is small enough."""
    rng = np.random.default_rng(12)
    draws, found, stationary, able = 200, 0, 0, 0
    shape = np.linspace(-0.1, 0.1, n)
    for _ in range(draws):
        test = stationarity(1 + shape + 0.12 * several(rng, runs, n, phi))
        enough = 0.2 / (stats.t.isf(0.005, test.drift.degrees_of_freedom) + 0.9)
        stationary += test.state == "stationary"
        if test.drift.standard_error <= enough:
            able += 1
            found += test.state == "drifting"
    assert able >= 40
    assert stationary <= stats.binom.ppf(1 - 1e-4, draws, 0.025)
    assert found >= stats.binom.ppf(1e-4, able, 0.8)


@pytest.mark.parametrize(
    ("runs", "n", "phi", "phi_R", "spread"),
    [(1, 12, 0.0, 0.5, 0.5), (1, 40, 0.6, 0.7, 0.1), (3, 40, 0.6, 0.7, 0.5), (3, 100, 0.8, 0.9, 0.1)],
)
def test_a_true_equilibrium_is_hardly_ever_denied(runs, n, phi, phi_R, spread):
    """ "not found" in at most 5 of 100, with few rows and with correlated ones (six independent values a run)."""
    rng = np.random.default_rng(13)

    def run():
        G, N, R = made_run(rng, n, phi=phi, phi_R=phi_R, spread=spread)
        return G, N, R

    denied = 0
    for _ in range(200):
        G, N, R = (np.array(s) for s in zip(*(run() for _ in range(runs)), strict=True))
        denied += detect_equilibrium(G, N, R, lr=0.1, weight_decay=0.02).state == "not found"
    assert denied <= stats.binom.ppf(1 - 1e-4, 200, 0.05)


def test_tolerance_passes_a_drift_that_is_certain_but_small():
    rng = np.random.default_rng(3)
    series = 100 + np.linspace(-5, 5, 400) + ar1(rng, 400, 0.5)
    strict, lenient = stationarity(series, tolerance=0.0), stationarity(series, tolerance=0.2)
    assert strict.p_value < 1e-6
    assert (strict.state, lenient.state) == ("drifting", "stationary")
    assert abs(strict.drift.value - 0.1) < 4 * strict.drift.standard_error


@pytest.mark.parametrize("time_constant", [60, 100, 300])
@pytest.mark.parametrize("phi", [0.0, 0.9])
def test_a_relaxing_series_is_detected(time_constant, phi):
    """An exponential approach, eight deviations high at the start, is seen in most draws, from above and below."""
    rng = np.random.default_rng(5)
    decay = np.exp(-np.arange(300) / time_constant)
    for sign in (1, -1):
        seen = alarms(lambda: 20 + sign * 8 * decay + ar1(rng, 300, phi), 40, tolerance=0.1)  # noqa: B023
        assert seen >= (40 if phi == 0 else 20)


def test_a_series_too_noisy_or_too_short_is_undecided_not_stationary():
    rng = np.random.default_rng(1)
    assert stationarity(1 + 3 * ar1(rng, 40, 0.0)).state == "undecided"
    assert stationarity(1 + 0.01 * ar1(rng, 40, 0.0)).state == "stationary"


def test_drift_and_its_error_have_the_right_scale():
    """z-scores of the fitted drift over draws: mean 0, spread 1 (the error is estimated: 30 % of slack above 1)."""
    rng = np.random.default_rng(8)
    z = []
    for _ in range(400):
        found = stationarity(10 + np.linspace(0, 2, 600) + ar1(rng, 600, 0.8))
        z.append((found.drift.value - 2 / 11) / found.drift.standard_error)
    assert abs(np.mean(z)) < 4 * np.std(z) / 20
    assert 0.85 < np.std(z) < 1.3


def test_a_constant_series_is_stationary():
    found = stationarity(np.full(30, 0.1))
    assert found.state == "stationary"
    assert found.drift.value == pytest.approx(0, abs=1e-12)


def made_run(rng, n=600, ratio=1.0, lr=0.1, weight_decay=0.02, *, phi=0.7, phi_R=0.95, spread=0.2):
    """G, N, R with cross-correlated AR(1) noise, whose means put (11)'s left side at ``ratio`` times its right side."""
    shared = ar1(rng, n, phi)
    G = 2.0 * (1 + spread * shared + spread / 2 * ar1(rng, n, 0.3))
    N = 3.0 * (1 + 1.5 * spread * shared + spread / 2 * ar1(rng, n, 0.3))
    R = ratio * lr * 5.0 / ((2 - lr * weight_decay) * weight_decay) * (1 + 0.02 * ar1(rng, n, phi_R))
    return G, N, R


def test_equilibrium_is_found_on_stationary_series_that_obey_equation_11():
    G, N, R = made_run(np.random.default_rng(2))
    found = detect_equilibrium(G, N, R, lr=0.1, weight_decay=0.02)
    assert (found.state, found.reasons) == ("found", ())
    assert abs(found.residual.residual.value) < 4 * found.residual.ratio.standard_error


def test_errors_of_nsr_and_of_the_residual_cover_their_truth():
    """Of 400 made runs the 95 % intervals of nsr and of the ratio of (11)'s sides hold it in 93 to 97 %, G and N
    correlated (binomial, 1 in 10⁴ on either side)."""
    rng = np.random.default_rng(4)
    held, draws = {"nsr": 0, "ratio": 0}, 400
    for draw in range(draws):
        G, N, R = made_run(rng, phi_R=0.8)
        pair, all_three = joint_means(G, N), joint_means(R, G, N)
        ratio = nsr(pair[0], pair[1], covariance=pair.covariance[0][1])
        residual = equilibrium_residual(*(all_three[i] for i in range(3)), lr=0.1, weight_decay=0.02,
                                        covariance=all_three.covariance)  # fmt: skip
        if draw == 0:  # the detector's own, which tests for drift as well: that takes twice as long as all of this
            found = detect_equilibrium(G, N, R, lr=0.1, weight_decay=0.02)
            assert (found.nsr, found.residual) == (ratio, residual)
        held["nsr"] += covers(ratio.interval(), 1.5)
        held["ratio"] += covers(residual.ratio.interval(), 1.0)
    for count in held.values():
        assert stats.binom.ppf(1e-4, draws, 0.93) <= count <= stats.binom.ppf(1 - 1e-4, draws, 0.97)


def covers(interval, truth):
    return interval[0] <= truth <= interval[1]


def test_svags_equation_is_used_for_svags_l():
    G, N, R = made_run(np.random.default_rng(2))
    at_8 = detect_equilibrium(G, N, R, lr=0.1, weight_decay=0.02, l=8).residual.ratio.value
    means = R.mean(), G.mean(), N.mean()
    by_hand = (2 - 0.1 * 0.02 / 8) * 0.02 * means[0] / (0.1 / 8 * means[1] + 0.1 * means[2])
    assert at_8 == pytest.approx(by_hand, rel=1e-12)


def test_a_run_off_equation_11_or_drifting_is_not_at_equilibrium_and_says_why():
    rng = np.random.default_rng(6)
    G, N, R = made_run(rng, ratio=1.5)
    off = detect_equilibrium(G, N, R, lr=0.1, weight_decay=0.02)
    assert off.state == "not found"
    assert "equation (11)" in off.reasons[0]
    G, N, R = made_run(rng)
    drifting = detect_equilibrium(G * np.linspace(2, 0.5, len(G)), N, R, lr=0.1, weight_decay=0.02)
    assert drifting.state == "not found"
    assert drifting.reasons[0].startswith("grad_sq_norm drifts: -")


def test_without_weight_norms_or_weight_decay_only_stationarity_is_judged():
    G, N, R = made_run(np.random.default_rng(2), ratio=3.0)
    assert detect_equilibrium(G, N, lr=0.1, weight_decay=0.02).state == "found"
    no_decay = detect_equilibrium(G, N, R, lr=0.1)
    assert (no_decay.residual, no_decay.state) == (None, "found")


def test_a_gradient_that_the_noise_hides_is_undecided():
    G, N, R = made_run(np.random.default_rng(2))
    hidden = detect_equilibrium(G - G.mean() - 0.01, N, R, lr=0.1, weight_decay=0.02)
    assert (hidden.nsr, hidden.residual) == (None, None)
    assert "average over more steps" in hidden.reasons[-1]


@pytest.mark.parametrize(
    ("call", "offender"),
    [
        (lambda: stationarity(np.ones(11)), "series must be .n. or .runs, n. with n at least 12"),
        (lambda: stationarity(np.ones((12, 2))), r"got shape \[12, 2\]"),
        (lambda: stationarity([1.0] * 12 + [math.nan]), "row 12 of run 0"),
        (lambda: stationarity(np.zeros(12)), "series must be of a mean other than 0, to which a drift is relative,"),
        (lambda: stationarity(np.ones(12), level=0.0), "level"),
        (lambda: stationarity(np.ones(12), tolerance=-1.0), "tolerance"),
        (lambda: detect_equilibrium(np.ones(12), np.ones(13), lr=0.1), "same length"),
        (lambda: detect_equilibrium(np.ones(12), np.ones(12), np.ones(14), lr=0.1), "same length"),
        (lambda: detect_equilibrium(np.ones((2, 12)), np.ones((3, 12)), lr=0.1), "as many runs"),
        (lambda: detect_equilibrium(np.ones(12), np.ones(12), lr=0.0), "lr"),
        (lambda: detect_equilibrium(np.ones(12), np.ones(12), np.ones(12), lr=3.0, weight_decay=1.0), "below 2"),
    ],
)
def test_bad_input_is_refused_by_name(call, offender):
    with pytest.raises(ValueError, match=offender):
        call()
