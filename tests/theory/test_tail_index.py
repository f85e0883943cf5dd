import doctest
import math
import sys

import pytest
import torch

from svag_fast.theory.tail_index import gaussian_tail_index, tail_index


def repeated(draw, block, repeats=20):
    """1/alpha over repetitions: mean and standard error."""
    torch.manual_seed(0)
    values = torch.tensor([1 / tail_index(draw(), block) for _ in range(repeats)])
    return values.mean().item(), values.std().item() / math.sqrt(repeats)


@pytest.mark.parametrize("block", [10, 100])
def test_gaussian_is_two_and_cauchy_is_one(block):
    for draw, expected in (
        (lambda: torch.randn(20_000), 0.5),
        (lambda: torch.randn(20_000) / torch.randn(20_000), 1.0),
    ):
        mean, error = repeated(draw, block)
        assert abs(mean - expected) < 4 * error


@pytest.mark.parametrize(("block", "alpha"), [(10, 1.220), (100, 1.419), (1000, 1.553)])
def test_gaussians_of_unequal_variances_look_heavy_tailed_as_the_formula_says(block, alpha):
    """Log-normal variances: the estimate is the formula's within 4 standard errors, the latter the known figures."""
    torch.manual_seed(1)
    pairs = []
    for _ in range(20):
        variances = torch.randn(50_000, dtype=torch.float64).mul(2).exp()
        values = torch.randn(50_000, dtype=torch.float64) * variances.sqrt()
        pairs.append((1 / tail_index(values, block), 1 / gaussian_tail_index(variances, block)))
    found, formula = torch.tensor(pairs, dtype=torch.float64).T
    assert abs((found - formula).mean()) < 4 * (found - formula).std() / math.sqrt(20)
    assert abs(formula.mean() - 1 / alpha) < 4 * formula.std() / math.sqrt(20) + 5e-4


def test_scale_and_rest_do_not_matter():
    torch.manual_seed(0)
    values = torch.randn(1000)
    assert tail_index(values, 10) == pytest.approx(tail_index(-3 * values, 10), rel=1e-5)
    assert tail_index(values, 10) == tail_index(torch.cat([values, torch.ones(9)]), 10)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="block must be at least 2, got 1"):
        tail_index(torch.ones(10), 1)
    with pytest.raises(ValueError, match=r"^values must be"):
        tail_index(torch.ones(10), 6)
    with pytest.raises(ValueError, match="values must be others than zeros alone"):
        tail_index(torch.zeros(10), 2)


def test_the_docstrings_example():
    results = doctest.testmod(sys.modules["svag_fast.theory.tail_index"])
    assert results.attempted == 2
    assert results.failed == 0
