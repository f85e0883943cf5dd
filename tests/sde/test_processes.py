"""One-step moments by enumeration (Lemma 4.7), and every process's ensemble against its exact moments."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from svag_fast.sde import (
    GD,
    NGD,
    SDE2,
    AffineProblem,
    Draws,
    EulerMaruyama,
    Gamma,
    Gaussian,
    GradientFlow,
    OneBatchSVAG,
    SGDProcess,
    SVAGProcess,
    additive_quadratic,
    constant_poisson_gradient,
    mean_and_error,
    multiplicative_quadratic,
    process_moments,
    sde_moments,
    simulate,
)

LR, DECAY = 0.3, 0.2


class Enumerated:
    """Every outcome of a problem with n equally likely batch gradients, K batches a step: n^K rows, one an outcome."""

    state_dim = 1

    def __init__(self, gradients: Tensor, batches: int) -> None:
        self.gradients = gradients
        outcomes = [torch.arange(len(gradients))] * batches
        self.rows = torch.cartesian_prod(*outcomes).view(-1, batches)

    def batch_grad(self, x: Tensor, weights: Sequence[float], draws: Draws) -> Tensor:
        assert len(weights) == self.rows.shape[1]
        return sum(w * self.gradients[self.rows[:, j]] for j, w in enumerate(weights))

    def start(self, x: Tensor) -> Tensor:
        return x.expand(len(self.rows), -1).clone()


def third(a, b, c):
    return torch.einsum("ni,nj,nk->nijk", a, b, c).mean(0)


def one_step(l, batches=2, decay=0.0):
    torch.manual_seed(1)
    gradients = torch.randn(4, 3, dtype=torch.float64) ** 2 + torch.tensor([1.0, -0.5, 0.2], dtype=torch.float64)
    process = SVAGProcess(LR, decay, l=l, batches=batches)
    problem = Enumerated(gradients, len(process.estimates[0].weights))
    x = problem.start(torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64))
    return gradients, process.step_(problem, x.clone(), Draws(0)) - x


@given(l=st.floats(1.001, 1e4))
@settings(max_examples=30, deadline=None)
def test_lemma_4_7_one_svag_step_by_enumeration(l):
    """Mean, second and third moment exactly as in the lemma (with its two slips mended), for every l."""
    gradients, delta = one_step(l)
    mean = gradients.mean(0)
    centred = gradients - mean
    sigma = centred.T @ centred / len(gradients)
    cumulant = third(centred, centred, centred)
    outer = torch.einsum("i,jk->ijk", mean, sigma)
    sym = (outer + outer.permute(1, 0, 2) + outer.permute(1, 2, 0)) / 3

    torch.testing.assert_close(delta.mean(0), -LR / l * mean, rtol=1e-9, atol=1e-12)
    second = delta.T @ delta / len(delta)
    expected = LR**2 / l * sigma + LR**2 / l**2 * torch.outer(mean, mean)
    torch.testing.assert_close(second, expected, rtol=1e-8, atol=1e-10 / l)
    expected = -(
        LR**3 / l**2 * (3 - 1 / l) / 2 * cumulant
        + LR**3 / l**2 * 3 * sym
        + LR**3 / l**3 * torch.einsum("i,j,k->ijk", mean, mean, mean)
    )
    torch.testing.assert_close(third(delta, delta, delta), expected, rtol=1e-8, atol=1e-9 / l)


def test_lemma_4_7_fourth_moment_is_of_order_l_to_minus_two():
    sizes = []
    for l in (1024.0, 2048.0, 4096.0):
        _, delta = one_step(l)
        sizes.append(torch.einsum("ni,nj,nk,nm->ijkm", delta, delta, delta, delta).div(len(delta)).norm().item() * l**2)
    assert max(sizes) < 1.02 * min(sizes)


def test_three_batches_of_least_third_moment_lose_the_noise_cumulant():
    """From the threshold on, only the term with the gradient is left of the third moment: Lambda's part is gone."""
    l = 9.0
    gradients, delta = one_step(l, batches=3)
    step = delta - delta.mean(0)
    torch.testing.assert_close(step.T @ step / len(step), LR**2 / l * torch.cov(gradients.T, correction=0))
    assert third(step, step, step).abs().max() < 1e-13
    _, two = one_step(l)
    two = two - two.mean(0)
    assert third(two, two, two).abs().max() > 1e-5


def test_weight_decay_enters_as_in_equation_7():
    _, plain = one_step(4.0)
    _, decayed = one_step(4.0, decay=DECAY)
    x = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(decayed, plain - LR / 4 * DECAY * x)


def test_one_batch_variant_keeps_a_covariance_that_does_not_vanish():
    """Cov of its estimate is l Sigma + (l - 1) grad grad^T: at step lr/l the second term is worth lr a unit of time."""
    gradients = torch.tensor([[2.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    l = 50.0
    process = OneBatchSVAG(LR, l=l)
    up, down = process.estimates
    both = torch.cat([sum(e.weights) * gradients for e in (up, down)])
    mean = gradients.mean(0)
    torch.testing.assert_close(both.mean(0), mean)
    expected = l * torch.cov(gradients.T, correction=0) + (l - 1) * torch.outer(mean, mean)
    torch.testing.assert_close(torch.cov(both.T, correction=0), expected)


PROBLEMS = {
    "additive": additive_quadratic(1.0, 0.7, Gamma()),
    "multiplicative": multiplicative_quadratic(1.0, 0.6, Gamma(2.0)),
    "poisson": constant_poisson_gradient(4.0, 0.5),
    "both": AffineProblem(1.1, 0.3, 0.4, -0.5, Gamma(2.5)),
}
PROCESSES = [
    SGDProcess(0.25, DECAY),
    SVAGProcess(0.25, DECAY, l=2.5),
    SVAGProcess(0.25, DECAY, l=4, batches=3),
    OneBatchSVAG(0.25, DECAY, l=4),
    NGD(0.25, DECAY),
    GD(0.25, DECAY),
    EulerMaruyama(0.25, DECAY, h=0.125),
    SDE2(0.25, DECAY, h=0.125),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PROBLEMS)
def test_ensembles_have_the_exact_moments(name, dtype):
    """Four moments of each process on each problem, |z| < 4.5: 128 comparisons of each precision."""
    for number, process in enumerate(PROCESSES):
        x = simulate(
            process, PROBLEMS[name], torch.tensor(1.0, dtype=dtype), 0.5, trajectories=40_000, seed=number
        ).double()
        exact = process_moments(process, PROBLEMS[name], 1.0, [0.5])[0]
        for power in range(1, 5):
            mean, error = mean_and_error(x**power)
            floor = 1e-6 if dtype == torch.float32 else 1e-12
            assert abs(mean - exact[power]) < 4.5 * error + floor, (process, power)


class Plain(AffineProblem):
    """A subclass, which the fused walk leaves alone: stepped by its own gradients."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("process", [p for p in PROCESSES if not isinstance(p, GD | OneBatchSVAG)])
def test_the_fused_walk_takes_the_same_steps_with_the_same_normals(process, dtype):
    """Path by path, not in law alone: what common random numbers need."""
    start = torch.tensor(1.0, dtype=dtype)
    parameters = {"curvature": 1.1, "offset": 0.3, "noise_slope": 0.4, "noise_offset": -0.5}
    fused, plain = (
        simulate(process, kind(**parameters), start, 0.5, trajectories=17_000, seed=5)
        for kind in (AffineProblem, Plain)
    )
    torch.testing.assert_close(fused, plain, rtol=0, atol=100 * torch.finfo(dtype).eps)


def test_skewed_noise_is_coupled_with_the_gaussian_twin():
    """The same seed gives both the same normals: the exponential law is an increasing function of them (0.90)."""
    problem, start = additive_quadratic(1.0, 0.7, Gamma()), torch.tensor(0.0, dtype=torch.float64)
    skewed, twin = (
        simulate(SGDProcess(0.25), p, start, 0.25, trajectories=20_000, seed=2)
        for p in (problem, problem.with_law(Gaussian()))
    )
    assert torch.corrcoef(torch.stack([skewed, twin]))[0, 1] == pytest.approx(0.903, abs=0.01)


def test_sde2_and_euler_maruyama_reach_their_sdes_as_h_shrinks():
    """Weak order 1 in h, by exact moments: halving h halves the distance."""
    problem = PROBLEMS["both"]
    for process, order in ((EulerMaruyama, 1), (SDE2, 2)):
        limit = sde_moments(problem, 1.0, [1.0], lr=0.25, weight_decay=DECAY, order=order)[0]
        gaps = [
            abs(process_moments(process(0.25, DECAY, h=h), problem, 1.0, [1.0])[0] - limit)[1:] for h in (2**-8, 2**-9)
        ]
        assert all(1.9 < a / b < 2.1 for a, b in zip(*gaps, strict=True))


def test_order_two_sde_is_nearer_to_sgd_by_an_order():
    """Thm E.4: the distance from SGD shrinks by 4 as lr is halved, the SDE's by 2 (first moments of two problems)."""
    for problem in (additive_quadratic(1.0, 0.7, Gamma()), multiplicative_quadratic(1.0, 0.6, Gamma())):
        for order, low, high in ((1, 1.8, 2.2), (2, 3.6, 4.4)):
            gaps = []
            for lr in (1 / 64, 1 / 128):
                limit = sde_moments(problem, 1.0, [1.0], lr=lr, order=order)[0]
                gaps.append(abs(process_moments(SGDProcess(lr), problem, 1.0, [1.0])[0] - limit)[1:3])
            assert all(low < a / b < high for a, b in zip(*gaps, strict=True)), (problem, order)


def test_gradient_flow_follows_the_closed_form_to_order_four():
    problem = additive_quadratic(2.0, 0.7)
    exact = sde_moments(problem, 1.0, [1.0], lr=0.1, weight_decay=DECAY, noise=False)[0, 1]
    gaps = []
    for h in (1 / 16, 1 / 32):
        x = simulate(
            GradientFlow(0.1, DECAY, h=h), problem, torch.tensor(1.0, dtype=torch.float64), 1.0, trajectories=1
        )
        gaps.append(abs(x.item() - exact))
    assert 15 < gaps[0] / gaps[1] < 18
    assert exact == pytest.approx(math.exp(-2.0 - DECAY))


def test_the_numbers_do_not_depend_on_the_thread_count():
    start = torch.tensor(1.0, dtype=torch.float64)
    runs = [
        simulate(SVAGProcess(0.25, l=2), PROBLEMS["both"], start, 0.5, trajectories=50_001, seed=7, threads=threads)
        for threads in (1, 3)
    ]
    assert torch.equal(*runs)
    assert start.item() == 1.0


def test_ensembles_of_one_and_of_odd_size():
    start = torch.tensor(1.0)
    for n in (1, 17):
        x = simulate(SGDProcess(0.25), PROBLEMS["additive"], start, 0.5, trajectories=n)
        assert start.item() == 1.0
        assert x.shape == (n,)
        assert x.isfinite().all()


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: SGDProcess(0.0), "lr"),
        (lambda: SGDProcess(math.nan), "lr"),
        (lambda: SGDProcess(0.1, -1e-3), "weight_decay"),
        (lambda: SVAGProcess(0.1, l=0.5), "l"),
        (lambda: EulerMaruyama(0.1), "step_size"),
        (lambda: SGDProcess(0.1).steps(0.25), "time"),
        (lambda: PROBLEMS["additive"].at_batch_size(0), "batch_size"),
        (lambda: Gamma(0.0), "shape"),
    ],
)
def test_bad_parameters_are_refused(make, name):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        make()
