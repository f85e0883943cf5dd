"""The SDE side compared with torchsde: an independent integrator of the same equations."""

import pytest
import torch
import torchsde

from svag_fast.sde import (
    EulerMaruyama,
    additive_quadratic,
    mean_and_error,
    multiplicative_quadratic,
    sde_moments,
    simulate,
)

LR = 0.25


class ItoSDE(torch.nn.Module):
    """dX = -grad L dt + (lr Sigma)^(1/2) dW of an affine problem, in torchsde's form."""

    noise_type, sde_type = "diagonal", "ito"

    def __init__(self, problem):
        super().__init__()
        self.problem = problem

    def f(self, t, y):
        return -(self.problem.curvature * y - self.problem.offset)

    def g(self, t, y):
        return LR**0.5 * (self.problem.noise_slope * y + self.problem.noise_offset)


@pytest.mark.parametrize("problem", [additive_quadratic(1.0, 0.8), multiplicative_quadratic(1.0, 0.9)])
def test_torchsde_and_ours_agree_with_the_exact_moments(problem):
    """torchsde's Milstein scheme at h = 1/32: both within 4 standard errors plus the O(h) bias of the closed form."""
    n, h = 10_000, 1 / 32
    torch.manual_seed(0)
    with torch.no_grad():
        ends = torchsde.sdeint(
            ItoSDE(problem), torch.ones(n, 1, dtype=torch.float64), torch.tensor([0.0, 1.0]), dt=h, method="milstein"
        )[-1, :, 0]
    ours = simulate(
        EulerMaruyama(LR, h=h), problem, torch.tensor(1.0, dtype=torch.float64), 1.0, trajectories=n, seed=1
    )
    exact = sde_moments(problem, 1.0, [1.0], lr=LR)[0]
    for power in range(1, 5):
        for x in (ends, ours):
            mean, error = mean_and_error(x**power)
            assert abs(mean - exact[power]) < 4 * error + h * power * abs(exact[power])
        gap = mean_and_error(ends**power)[0] - mean_and_error(ours**power)[0]
        error = (2 * (ours**power).var().item() / n) ** 0.5
        assert abs(gap) < 4 * error + h * power * abs(exact[power])
