"""Errors of means of correlated series: their intervals cover, over runs, correlations and offsets."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from scipy.signal import lfilter

from svag_fast.noise import mean_standard_error
from svag_fast.stats.estimate import Estimate, fieller_interval
from svag_fast.stats.series import autocorrelation_time, effective_samples, joint_means, mean_estimate


def ar1(rng, shape, phi):
    settle = int(20 / (1 - phi))
    noise = rng.standard_normal((*shape[:-1], shape[-1] + settle)) * math.sqrt(1 - phi * phi)
    return lfilter([1.0], [1.0, -phi], noise)[..., settle:]


def likely(count, draws, low, high):
    return stats.binom.ppf(1e-4, draws, low) <= count <= stats.binom.ppf(1 - 1e-4, draws, high)


@pytest.mark.parametrize(
    ("runs", "n", "phi"), [(1, 20, 0.0), (1, 60, 0.5), (3, 60, 0.5), (3, 380, 0.9), (16, 60, 0.5), (5, 150, 0.5)]
)
def test_the_95_percent_interval_covers_in_93_to_97_percent(runs, n, phi):
    """20 or more independent values a run (n (1 - phi)/(1 + phi)); binomial, 1 in 10⁴ on either side."""
    rng = np.random.default_rng(n + runs)
    draws = 600
    covered = 0
    for x in ar1(rng, (draws, runs, n), phi):
        low, high = joint_means(5 + x)[0].interval()
        covered += low <= 5 <= high
    assert likely(covered, draws, 0.93, 0.97)


@pytest.mark.parametrize("n", [2, 12, 60, 200, 2000])
@pytest.mark.parametrize("phi", [0.0, 0.5, 0.8, 0.9, 0.95])
def test_one_runs_interval_covers_or_is_not_trusted(n, phi):
    """93 to 97 % of draws where the series has 16 or more independent values (binomial, 1 in 10⁴ on either side); with
    fewer it falls to 70 %, and such errors are called trusted at most in one case of six."""
    draws = 250
    found = [mean_estimate(5 + x) for x in ar1(np.random.default_rng(n), (draws, n), phi)]
    covered = sum(low <= 5 <= high for low, high in (e.interval() for e in found))
    trusted = sum(e.trusted for e in found)
    independent = n * (1 - phi) / (1 + phi)
    if independent >= 16:
        assert likely(covered, draws, 0.93, 0.97), covered
    if independent <= 8:
        assert covered >= 0.7 * draws
        assert trusted <= draws / 6
    if independent >= 50:
        assert trusted >= 0.9 * draws


def test_intervals_from_the_autocorrelation_are_shorter_than_batch_means():
    """At 20 independent values, and cover no less: why batch means are not what a run's error comes from."""
    rng = np.random.default_rng(9)
    ours, theirs = [], []
    for x in ar1(rng, (200, 180), 0.8):
        ours.append(mean_estimate(x).half_width())
        means = x.reshape(4, 45).mean(axis=1)
        theirs.append(Estimate(means.mean(), means.std(ddof=1) / 2, 3.0).half_width())
    assert np.median(ours) < 0.95 * np.median(theirs)


@pytest.mark.parametrize("runs", [2, 3, 5])
@pytest.mark.parametrize("offset", [0.3, 0.5, 1.0])
def test_intervals_cover_whether_or_not_runs_have_levels_of_their_own(runs, offset):
    """Levels in units of a run's own standard deviation, 100 rows: a test for them first left 74 to 92 % covered
    (binomial, 1 in 10⁴ on either side)."""
    rng = np.random.default_rng(runs)
    draws, covered, trusted = 600, 0, 0
    for x in 5 + offset * rng.standard_normal((draws, runs, 1)) + ar1(rng, (draws, runs, 100), 0.5):
        found = joint_means(x)[0]
        low, high = found.interval()
        covered += low <= 5 <= high
        trusted += found.trusted
    assert likely(covered, draws, 0.94, 0.96)
    assert trusted > 0.99 * draws  # and not only where the levels happen to be close, where intervals are too narrow


def test_a_run_and_its_copies_are_one_run():
    """Between copies there is no scatter: an error of 0 would be made up."""
    x = ar1(np.random.default_rng(5), (1, 100), 0.5)
    assert joint_means(np.repeat(x, 3, axis=0)) == joint_means(x)


def test_the_covariance_is_that_of_means_of_the_same_rows():
    rng = np.random.default_rng(2)
    shared = ar1(rng, (4, 3000), 0.7)
    found = joint_means(shared, -2 * shared, ar1(rng, (4, 3000), 0.0))
    a, b, c = (found[i].standard_error for i in range(3))
    assert found.covariance[0][1] == pytest.approx(-a * b, rel=1e-9)
    assert abs(found.covariance[0][2]) < 4 * a * c / math.sqrt(found.degrees_of_freedom)


def test_the_autocorrelation_time_is_that_of_the_law_and_runs_are_pooled():
    rng = np.random.default_rng(3)
    x = ar1(rng, (8, 4000), 0.8)
    tau, variance = autocorrelation_time(x - x.mean())
    assert tau == pytest.approx(9.0, rel=0.1)
    assert variance == pytest.approx(1.0, rel=0.05)
    assert effective_samples(x) == pytest.approx(x.size / 9, rel=0.1)


def test_a_constant_series_has_no_error():
    found = joint_means(np.full((2, 12), 0.1))[0]
    assert (found.value, found.standard_error) == (pytest.approx(0.1), pytest.approx(0.0, abs=1e-17))


@pytest.mark.parametrize("noise", [0.02, 0.3, 1.0])
def test_fieller_covers_however_noisy_the_denominator(noise):
    """A ratio of 1.5 from 12 pairs of means: 95 % (binomial, 1 in 10⁴), where the delta method covers less."""
    rng = np.random.default_rng(4)
    draws, covered, bounded = 800, 0, 0
    for _ in range(draws):
        pair = rng.multivariate_normal([3.0, 2.0], noise**2 * 12 * np.array([[1.0, 0.4], [0.4, 1.0]]), size=12)
        (n, g), c = pair.mean(axis=0), np.cov(pair.T) / 12
        low, high = fieller_interval(
            Estimate(n, math.sqrt(c[0, 0]), 11), Estimate(g, math.sqrt(c[1, 1]), 11), float(c[0, 1])
        )
        covered += low <= 1.5 <= high
        bounded += math.isfinite(high)
    assert likely(covered, draws, 0.95, 0.95)
    assert (bounded < draws) == (noise == 1.0)


@pytest.mark.parametrize(
    ("numerator", "denominator"), [((3.0, 0.1), (2.0, 0.05)), ((3.0, 0.1), (0.05, 0.1)), ((3.0, 0.1), (-0.05, 0.1))]
)
def test_fiellers_ends_are_where_the_t_test_turns(numerator, denominator):
    n, g = Estimate(*numerator, 9), Estimate(*denominator, 9)
    low, high = fieller_interval(n, g, 0.002)
    for theta in (low, high):
        if 0 < theta < math.inf:
            error = math.sqrt(n.standard_error**2 - 2 * theta * 0.002 + theta**2 * g.standard_error**2)
            assert abs(n.value - theta * g.value) / error == pytest.approx(stats.t.isf(0.025, 9), rel=1e-9)


def test_a_ratio_that_nothing_bounds():
    assert fieller_interval(Estimate(0.1, 1.0), Estimate(0.1, 1.0), 0.0) == (0.0, math.inf)


def test_an_estimate_says_how_far_its_error_can_be_trusted():
    assert Estimate(1.0, 0.1).trusted
    assert Estimate(1.0, 0.1, 5.0, 16.0).trusted
    assert not Estimate(1.0, 0.1, 5.0, 15.0).trusted
    scaled = Estimate(1.0, 0.1, 5.0, 15.0).affine(-2.0, 1.0)
    assert scaled == Estimate(-1.0, 0.2, 5.0, 15.0)


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(6.6213, 0.6281), "6.62 ± 0.63"),
        (Estimate(-123456.0, 7890.0), "-123456 ± 7890"),
        (Estimate(0.0, 2.0), "0.0 ± 2.0"),
        (Estimate(1.5), "1.5"),
        (Estimate(0.1 + 0.2, 1e-17), "0.3"),  # the error is that of rounding
        (Estimate(1.0, 1e-6), "1.0000000 ± 0.0000010"),
        (Estimate(3.14159e12, 2e10), "(3.142 ± 0.020)e+12"),
        (Estimate(1e-300, 1e-301), "1e-300 ± 1e-301"),
        (Estimate(-2e-200, 1e-201), "(-2.00 ± 0.10)e-200"),
        (Estimate(5e-324, 5e-324), "4.941e-324 ± 4.9e-324"),
        (Estimate(1.7e308, 1.7e308), "(1.7 ± 1.7)e+308"),
        (Estimate(5.0, math.nan), "5 ± nan"),
        (Estimate(math.nan, math.nan), "nan ± nan"),
        (Estimate(math.inf, math.nan), "inf ± nan"),
    ],
)
def test_an_estimate_is_printed_to_two_digits_of_its_error(estimate: Estimate, text: str) -> None:
    assert str(estimate) == text


@pytest.mark.parametrize(
    ("call", "offender"),
    [
        (lambda: joint_means(np.ones(11)), "n at least 12"),
        (lambda: joint_means(np.ones((2, 2, 12))), r"got shape \[2, 2, 12\]"),
        (lambda: joint_means([[1.0] * 12, [1.0] * 11 + [math.inf]]), "row 11 of run 1"),
        (lambda: Estimate(1.0, 0.1).interval(1.0), "confidence"),
    ],
)
def test_bad_input_is_refused_by_name(call, offender):
    with pytest.raises(ValueError, match=offender):
        call()


@pytest.mark.parametrize("scale", [1e-250, 1e-200, 1e200])
def test_an_error_does_not_vanish_or_overflow_with_the_scale(scale):
    """Squares of 1e-200 are 0 in float64: the error was 0, that of a value that is exact."""
    x = np.random.default_rng(4).standard_normal(40) + 3
    here, there = mean_estimate(x), mean_estimate(scale * x)
    assert there.standard_error == pytest.approx(scale * here.standard_error, rel=1e-9)
    assert there.effective_samples == pytest.approx(here.effective_samples, rel=1e-9)
    with pytest.raises(ValueError, match="whose squares are numbers too"):
        joint_means(scale * x)


@pytest.mark.parametrize("scale", [1e-200, 1e-160, 1e160])
def test_fiellers_interval_does_not_depend_on_the_unit(scale):
    ours = fieller_interval(Estimate(3 * scale, 0.3 * scale), Estimate(scale, 0.1 * scale), 0.0)
    assert ours == pytest.approx(fieller_interval(Estimate(3, 0.3), Estimate(1, 0.1), 0.0), rel=1e-9)


def test_masked_values_are_refused():
    x = np.ma.masked_array(np.arange(20.0), mask=[True] + [False] * 19)
    with pytest.raises(TypeError, match="series 0 must be without masked values, got some: give those that are"):
        joint_means(x)
    with pytest.raises(TypeError, match="series must be without masked values, got some: give those that are"):
        mean_standard_error(x)
    assert mean_standard_error(x.compressed()).value == 10
