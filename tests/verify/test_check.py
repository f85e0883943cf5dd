"""The judges of the battery: what they pass, and that they fail what is wrong."""

import numpy as np
import pytest

from svag_fast.verify.check import Z_BOUND, log_log_slope, z_check


def test_z_check_passes_within_five_standard_errors_and_fails_beyond():
    assert z_check("s", "n", 1.04, 0.01, 1.0).passed
    assert not z_check("s", "n", 1.06, 0.01, 1.0).passed
    assert z_check("s", "n", 1.0, 0.0, 1.0).passed
    assert not z_check("s", "n", 1.1, 0.0, 1.0).passed
    assert not z_check("s", "n", float("nan"), 0.1, 1.0).passed


@pytest.mark.parametrize("order", [-1, -2, -0.5])
def test_slope_of_exact_errors_with_higher_orders(order):
    l = 2.0 ** np.arange(3, 11)
    slope = log_log_slope(l, 0.3 * l**order * (1 + 0.7 / l - 2 / l**2 + 1 / l**3))
    assert slope.covers(order)
    assert not slope.covers(order + 0.01)


def test_slope_interval_of_noisy_errors_covers():
    """Five standard errors: of 400 series all cover -1, and none mistakes it for -0.9; the spread is as stated."""
    rng = np.random.default_rng(0)
    l = 2.0 ** np.arange(1, 7)
    truth = 0.5 / l * (1 + 0.4 / l)
    error = np.full_like(l, 0.0005)
    slopes = [log_log_slope(l, truth + error * rng.normal(size=len(l)), error) for _ in range(400)]
    assert all(s.covers(-1) for s in slopes)
    assert not any(s.covers(-0.9) for s in slopes)
    spread = np.std([s.value for s in slopes])
    assert 0.8 * spread < np.median([s.half_width for s in slopes]) / Z_BOUND < 1.4 * spread
