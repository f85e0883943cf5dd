"""The order of weak convergence on made means: the fit is right, the intervals hold, and what can't be told isn't."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from svag_fast.stats.weak_order import WeakOrder, bootstrap_means, common_slope, weak_order

LS = np.array([1.0, 2, 4, 8, 16, 32, 64])
Curve = Callable[[np.ndarray], np.ndarray]


def made(curve: Curve, error: float, rng: np.random.Generator, draws: int = 200) -> WeakOrder:
    """One data set: normal means about a curve, and the bootstrap's means about these."""
    errors = np.full(len(LS), error)
    means = curve(LS) + errors * rng.standard_normal(len(LS))
    return weak_order(LS, means, errors, means + errors * rng.standard_normal((draws, len(LS))))


def order_one(a: float, b: float) -> Curve:
    return lambda l: 0.5 + a / l + b / l**2


def test_limit_and_coefficients_are_found_within_their_errors() -> None:
    rng = np.random.default_rng(0)
    scores = []
    for _ in range(200):
        order = made(order_one(1.0, 3.0), 0.01, rng, draws=20)
        if order.fitted.all():
            found = [
                (order.limit, order.limit_error, 0.5),
                (order.a, order.a_error, 1.0),
                (order.b, order.b_error, 3.0),
            ]
            scores.append([(value - true) / error for value, error, true in found])
    assert len(scores) > 150
    z = np.mean(scores, axis=0) * len(scores) ** 0.5
    assert (np.abs(z) < 4).all()
    assert (np.abs(np.std(scores, axis=0) - 1) < 0.25).all()


@pytest.mark.parametrize(
    "curves", [[(1.0, 3.0)], [(1.0, 0.0), (2.0, 4.0), (-1.0, 2.0), (1.0, -0.5)]], ids=["one", "four"]
)
def test_the_interval_of_the_slope_has_the_true_one_in_it(curves: list[tuple[float, float]]) -> None:
    """95 % intervals: more than 9 misses in 60 have a probability below 0.001."""
    rng = np.random.default_rng(1)
    missed = 0
    for _ in range(60):
        slope, low, high = common_slope([made(order_one(a, b), 0.01, rng) for a, b in curves])
        missed += not (np.isnan(slope) or low <= -1 <= high)
    assert missed <= 9


def test_another_order_is_seldom_taken_for_one() -> None:
    """Of a true 1/√l the interval has -1 in it, or is open, in fewer than half of the draws."""
    rng = np.random.default_rng(2)
    taken = 0
    for _ in range(40):
        slope, low, high = common_slope([made(lambda l, a=a: 0.5 + a * l**-0.5, 0.003, rng) for a in (1, 2, -1, 1.5)])
        taken += not np.isnan(slope) and low <= -1 <= high
    assert taken < 20


def test_differences_within_the_noise_cannot_be_told() -> None:
    order = made(lambda l: 0.5 + 0.001 / l, 0.01, np.random.default_rng(3))
    assert not order.told
    assert "more than the noise" in order.reason
    assert np.isnan([order.slope, order.low, order.high]).all()


def test_levels_that_the_formula_does_not_fit_are_left_out_and_those_with_a_large_second_term_named() -> None:
    order = made(lambda l: np.where(l < 4, 5.0, 0.5 + 1 / l + 2 / l**2), 0.003, np.random.default_rng(4))
    assert order.fitted.tolist() == [False, False, True, True, True, True, True]
    assert order.regime.tolist() == [False, False, False, False, True, True, True]  # 2/l <= 0.2 from l = 10 on


def test_a_level_without_a_mean_is_left_out_and_fewer_than_four_are_too_few() -> None:
    errors = np.full(len(LS), 0.01)
    means = 0.5 + 1 / LS
    means[0] = np.nan
    assert weak_order(LS, means, errors, np.tile(means, (50, 1))).fitted.tolist() == [False] + 6 * [True]
    means[:4] = np.nan
    assert weak_order(LS, means, errors, np.tile(means, (50, 1))).reason == "no four levels fit m_inf + a/l + b/l²"
    assert weak_order(LS, 0.5 + 1 / LS, 0 * errors, np.tile(means, (50, 1))).reason == "all runs agree at l = 1"


def test_the_bootstrap_draws_whole_runs_and_has_the_means_own_spread() -> None:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((2, 400))
    x[1] = -3 * x[0]
    drawn = bootstrap_means([x, x[:, :100]], 400, seed=0)
    assert drawn.shape == (400, 2, 2)
    assert np.allclose(drawn[:, 1], -3 * drawn[:, 0])  # what belongs to one run stays together
    for level, runs in enumerate((400, 100)):
        expected = x[0, :runs].std() / runs**0.5
        assert abs(drawn[:, 0, level].std() / expected - 1) < 4 / (2 * 400) ** 0.5
