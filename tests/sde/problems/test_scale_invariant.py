"""The scale-invariant toy: invariance, norm dynamics (9) and (10), and the SDE's exact equilibrium."""

import math

import pytest
import torch

from svag_fast.sde import (
    SDE2,
    Draws,
    EulerMaruyama,
    Gamma,
    ScaleInvariantToy,
    SGDProcess,
    SVAGProcess,
    mean_and_error,
    simulate,
)

TOY = ScaleInvariantToy(6, signal=1.0, noise_std=1.5, law=Gamma())
LR, DECAY = 0.1, 0.2


def states(n=50, dim=6):
    return torch.randn(n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_gradient_and_hessian_are_the_derivatives_of_the_loss():
    def loss(x):
        return -TOY.signal * x[0] / x.norm()

    v = states().flip(0)
    for x, direction, grad, product in zip(
        states(), v, TOY.mean_grad(states()), TOY.hessian_product(states(), v), strict=True
    ):
        torch.testing.assert_close(torch.func.grad(loss)(x), grad)
        torch.testing.assert_close(torch.func.hessian(loss)(x) @ direction, product)


def test_scale_invariance_of_every_batch_gradient():
    """<g, x> = 0 and g(cx) = g(x)/c, batch by batch and for the Gaussian noise; Hessian x = -grad L (Remark 5.3)."""
    x = states()
    for grad in (
        lambda y: TOY.batch_grad(y, (2.0, -1.0), Draws(3)),
        lambda y: TOY.gaussian_grad(y, 0.7, Draws(3)),
    ):
        assert (grad(x) * x).sum(1).abs().max() < 1e-13
        torch.testing.assert_close(grad(3 * x), grad(x) / 3)
    torch.testing.assert_close(TOY.hessian_product(x, x), -TOY.mean_grad(x))


def test_statistics_are_those_of_the_gradients():
    x = states(1).expand(100_000, 6).contiguous()
    g, n, r = (s[0].item() for s in TOY.statistics(x[:1]))
    assert g == pytest.approx(TOY.mean_grad(x[:1]).square().sum().item())
    assert r == pytest.approx(x[0].square().sum().item())
    for noise in (
        TOY.batch_grad(x, (1.0,), Draws(1)) - TOY.mean_grad(x),
        TOY.mean_grad_and_noise(x, Draws(2))[1],
    ):
        mean, error = mean_and_error(noise.square().sum(1))
        assert abs(mean - n) < 4 * error


def test_equation_10_holds_in_every_step():
    """E|x_next|^2 - |x|^2 = lr decay (lr decay - 2) R + lr^2 G + lr^2 N from any x, |z| < 4, for SGD and SVAG."""
    x = states(1).expand(100_000, 6).contiguous()
    g, n, r = (s[0].item() for s in TOY.statistics(x[:1]))
    for process, l in ((SGDProcess(LR, DECAY), 1), (SVAGProcess(LR, DECAY, l=4), 4)):
        h = LR / l
        change = process.step_(TOY, x.clone(), Draws(9)).square().sum(1) - r
        mean, error = mean_and_error(change)
        assert abs(mean - (h * DECAY * (h * DECAY - 2) * r + h**2 * g + h**2 * l * n)) < 4 * error


@pytest.mark.parametrize("decay", [0.0, DECAY])
def test_sde_norm_is_not_random_and_follows_equation_9(decay):
    """Euler-Maruyama's R tends, with order one in h, to the solution of (9), and its variance to zero as h does."""
    x0 = states(1)[0]
    exact = TOY.sde_weight_sq_norm(x0.square().sum().item(), 2.0, lr=LR, weight_decay=decay)
    gaps, errors, variances = [], [], []
    for h in (0.04, 0.02):
        r = simulate(EulerMaruyama(LR, decay, h=h), TOY, x0, 2.0, trajectories=40_000, seed=3).square().sum(1)
        mean, error = mean_and_error(r)
        gaps.append(mean - exact)
        errors.append(error)
        variances.append(r.var().item())
    # A gap is b h + O(h^2): twice the finer less the coarser is zero within 4 standard errors and a tenth of the gap.
    assert abs(2 * gaps[1] - gaps[0]) < 4 * math.hypot(2 * errors[1], errors[0]) + 0.1 * abs(gaps[1])
    assert abs(gaps[1]) > 10 * errors[1]
    assert 1.8 < variances[0] / variances[1] < 2.2


def test_sde_equilibrium_is_what_euler_maruyama_reaches():
    """R, G and N of 12 000 trajectories after 4/lambda of time: within 4 standard errors plus the O(h) bias."""
    toy = ScaleInvariantToy(4, signal=0.6, noise_std=1.0)
    lr, decay = 0.5, 0.5
    exact = toy.sde_equilibrium(lr=lr, weight_decay=decay)
    assert 2 * decay * exact.weight_sq_norm == pytest.approx(lr * exact.noise_trace)
    x0 = torch.full((4,), math.sqrt(exact.weight_sq_norm / 4), dtype=torch.float64)
    extrapolated = []
    for h in (0.04, 0.02):
        x = simulate(EulerMaruyama(lr, decay, h=h), toy, x0, 8.0, trajectories=12_000, seed=4)
        extrapolated.append([mean_and_error(s) for s in toy.statistics(x)])
    limits = (exact.grad_sq_norm, exact.noise_trace, exact.weight_sq_norm)
    for coarse, fine, limit in zip(*extrapolated, limits, strict=True):
        mean = 2 * fine[0] - coarse[0]
        assert abs(mean - limit) < 4 * math.hypot(2 * fine[1], coarse[1]) + 2e-3 * limit


def test_order_two_sde_has_sgds_equilibrium_relation():
    """(2 + lr decay) decay R = lr G + lr N for SDE2, within 4 standard errors and the O(h) bias; the SDE's lacks G."""
    toy = ScaleInvariantToy(4, signal=2.0, noise_std=0.7)
    lr, decay = 0.4, 0.5
    x0 = torch.tensor([0.6, 0.6, 0.3, -0.3], dtype=torch.float64)
    x = simulate(SDE2(lr, decay, h=0.005), toy, x0, 8.0, trajectories=3000, seed=4)
    g, n, r = toy.statistics(x)
    mean, error = mean_and_error(((2 + lr * decay) * decay * r - lr * g - lr * n) / (lr * (g + n).mean()))
    assert abs(mean) < 4 * error + 0.01
    assert (g.mean() / n.mean()).item() > 0.05


def test_no_signal_and_bad_parameters():
    toy = ScaleInvariantToy(5, signal=0.0)
    assert toy.sde_equilibrium(lr=0.1, weight_decay=0.1).grad_sq_norm == 0
    with pytest.raises(ValueError, match="dim must be an integer >= 2, got 1"):
        ScaleInvariantToy(1)
    with pytest.raises(ValueError, match=r"^weight_decay must be"):
        toy.sde_equilibrium(lr=0.1, weight_decay=0.0)
