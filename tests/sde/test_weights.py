import doctest
import math
import sys

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from svag_fast.sde import svag_weights, vanishing_third_moment_l


def power_sum(weights, p):
    return math.fsum(w**p for w in weights)


@given(l=st.floats(1, 1e6), batches=st.integers(2, 8))
@settings(max_examples=200, deadline=None)
def test_sum_is_one_and_sum_of_squares_is_l(l, batches):
    weights = svag_weights(l, batches)
    assert len(weights) == batches
    assert power_sum(weights, 1) == pytest.approx(1, abs=1e-13 * math.sqrt(l) * batches)
    assert power_sum(weights, 2) == pytest.approx(l, rel=1e-12)


@given(l=st.floats(1, 1e6))
def test_two_batches_are_svag_coefficients(l):
    c1, c2 = svag_weights(l)
    assert c1 * c2 == pytest.approx((1 - l) / 2, rel=1e-12, abs=1e-12)
    assert power_sum((c1, c2), 3) == pytest.approx((3 * l - 1) / 2, rel=1e-9)


def test_l_one_is_sgd():
    assert svag_weights(1) == (1.0, 0.0)


@pytest.mark.parametrize("batches", [*range(6, 13), 20, 50])
@pytest.mark.parametrize("l", [1, 1 + 1e-12, 1 + 1e-9, 1.0001, 1.1])
def test_from_six_batches_on_the_third_moment_vanishes_at_l_one_already(l, batches):
    weights = svag_weights(l, batches)
    assert vanishing_third_moment_l(batches) == 1
    assert abs(power_sum(weights, 3)) <= 1e-10
    assert power_sum(weights, 1) == pytest.approx(1, abs=1e-12)
    assert power_sum(weights, 2) == pytest.approx(l, rel=1e-12)


@given(l=st.floats(1, 1e4), batches=st.integers(3, 8))
@settings(max_examples=100, deadline=None)
def test_third_moment_vanishes_exactly_from_the_threshold_on(l, batches):
    third = power_sum(svag_weights(l, batches), 3)
    threshold = vanishing_third_moment_l(batches)
    if l > threshold * (1 + 1e-6) or (threshold == 1 and batches >= 6):
        assert abs(third) <= 1e-10 * l**1.5
    elif l < vanishing_third_moment_l(batches) * (1 - 1e-6):
        assert 0 < third < (3 * l - 1) / 2


@pytest.mark.parametrize("batches", [3, 4, 5])
def test_threshold_itself_is_served(batches):
    at = vanishing_third_moment_l(batches)
    for factor in (1 - 1e-12, 1.0, 1 + 1e-12, 1 + 1e-9, 1 + 1e-8, 1 + 1e-6, 1 + 1e-4):
        weights = svag_weights(at * factor, batches)
        assert abs(power_sum(weights, 3)) <= 1e-4
        assert power_sum(weights, 2) == pytest.approx(at * factor, rel=1e-12)


def best_by_optimiser(l, batches, power, third=None, starts=12):
    """The least |sum w^power| that SLSQP finds from random starts, under the constraints."""
    rng = np.random.default_rng(0)
    constraints = [
        {"type": "eq", "fun": lambda w: w.sum() - 1},
        {"type": "eq", "fun": lambda w: (w**2).sum() - l},
    ]
    if third is not None:
        constraints.append({"type": "eq", "fun": lambda w: (w**3).sum() - third})
    best = math.inf
    for _ in range(starts):
        objective = (lambda w: (w**3).sum() ** 2) if power == 3 else (lambda w: (w**4).sum())
        found = scipy.optimize.minimize(
            objective, rng.normal(size=batches) * math.sqrt(l), constraints=constraints, method="SLSQP"
        )
        if found.success and all(abs(c["fun"](found.x)) < 1e-6 for c in constraints):
            best = min(best, float(found.fun))
    return best


@pytest.mark.parametrize(("l", "batches"), [(1, 3), (2, 3), (5.5, 3), (9, 3), (1.5, 4), (6, 4), (2, 5), (3, 6)])
def test_no_optimiser_finds_a_smaller_third_moment(l, batches):
    ours = power_sum(svag_weights(l, batches), 3) ** 2
    found = best_by_optimiser(l, batches, 3)
    assert math.isfinite(found)
    assert ours <= found + 1e-6 * l**3


@pytest.mark.parametrize(("l", "batches"), [(4, 4), (20, 4), (3, 5), (16, 5), (4, 6), (2, 7)])
def test_among_vanishing_third_moments_the_fourth_is_least(l, batches):
    ours = power_sum(svag_weights(l, batches), 4)
    found = best_by_optimiser(l, batches, 4, third=0.0)
    assert math.isfinite(found)
    assert ours <= found * (1 + 1e-6)


@pytest.mark.parametrize("bad", [0.5, -1, math.nan, math.inf])
def test_l_below_one_is_refused(bad):
    with pytest.raises(ValueError, match="l must be a finite number >= 1, got "):
        svag_weights(bad)


def test_one_batch_is_refused():
    with pytest.raises(ValueError, match="batches must be an integer >= 2, got 1"):
        svag_weights(2, 1)


def test_the_docstrings_examples():
    results = doctest.testmod(sys.modules["svag_fast.sde.weights"])
    assert results.attempted >= 5
    assert results.failed == 0
