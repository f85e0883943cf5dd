"""Gaussian noise on nets, from sample weights, against the explicit covariance of a batch's gradient."""

import itertools

import pytest
import torch
from torch import nn

from svag_fast.sde import (
    GD,
    NGD,
    SDE2,
    Draws,
    EulerMaruyama,
    GradientFlow,
    NetworkProblem,
    SGDProcess,
    SVAGProcess,
    simulate,
)

SAMPLES = 6


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    ).double()


def problem(batch_size=2, *, replacement=True, chunk_size=4, model=None):
    torch.manual_seed(1)
    inputs = torch.randn(SAMPLES, 1, 4, 4, dtype=torch.float64)
    targets = torch.arange(SAMPLES) % 3
    loss = nn.CrossEntropyLoss(reduction="none")
    return NetworkProblem(
        model or small_net(),
        loss,
        inputs,
        targets,
        batch_size=batch_size,
        replacement=replacement,
        chunk_size=chunk_size,
    )


def sample_grads(p, x):
    """The loop: each sample's gradient alone, [n, P]."""
    p.load(x)
    rows = []
    for i in range(len(p.inputs)):
        p.model.zero_grad()
        p.loss_fn(p.model(p.inputs[i : i + 1]), p.targets[i : i + 1]).sum().backward()
        rows.append(torch.cat([q.grad.flatten() for q in p.model.parameters()]))
    return torch.stack(rows)


class Unit(Draws):
    """'Normals' that are one unit vector, so that the noise is one column of its linear map."""

    def __init__(self, index):
        super().__init__(0)
        self.index = index

    def normal_(self, out):
        out.zero_()
        out[self.index] = 1
        return out


def noise_map(p, x):
    """The map J from the n normals to the noise: column i is the noise of the i-th unit vector, [P, n]."""
    grad = p.mean_grad(x)
    return torch.stack([p.gaussian_grad(x, 1.0, Unit(i)) - grad for i in range(len(p.inputs))], dim=1)


def covariance_by_enumeration(grads, batch_size, replacement):
    """Cov of the batch's mean gradient over all its equally likely batches."""
    n = range(len(grads))
    batches = itertools.product(n, repeat=batch_size) if replacement else itertools.combinations(n, batch_size)
    means = torch.stack([grads[list(batch)].mean(0) for batch in batches])
    centred = means - means.mean(0)
    return centred.T @ centred / len(means)


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_noise_covariance_is_exactly_that_of_the_batches(batch_size, replacement):
    """The noise is linear in i.i.d. normals, v = J xi, so Cov v = J J^T: equal to Sigma by enumeration, to rounding."""
    p = problem(batch_size, replacement=replacement)
    x = p.state()
    J = noise_map(p, x)
    torch.testing.assert_close(
        J @ J.T, covariance_by_enumeration(sample_grads(p, x), batch_size, replacement), rtol=1e-10, atol=1e-15
    )


def test_full_batch_without_replacement_has_no_noise():
    p = problem(SAMPLES, replacement=False)
    x = p.state()
    torch.testing.assert_close(p.gaussian_grad(x, 1.0, Draws(0)), p.mean_grad(x), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_full_gradient_and_noise_do_not_depend_on_the_chunks(chunk_size):
    p = problem(chunk_size=chunk_size)
    x = p.state()
    torch.testing.assert_close(p.mean_grad(x), sample_grads(p, x).mean(0), rtol=1e-10, atol=1e-14)
    grad, noise = p.mean_grad_and_noise(x, Draws(3))
    torch.testing.assert_close(grad, p.mean_grad(x), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(grad + 0.7 * noise, p.gaussian_grad(x, 0.7, Draws(3)), rtol=1e-10, atol=1e-14)


def test_hessian_product_is_the_derivative_of_the_gradient():
    p = problem()
    x = p.state()
    v = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(5))
    step = 1e-6
    expected = (p.mean_grad(x + step * v) - p.mean_grad(x - step * v)) / (2 * step)
    torch.testing.assert_close(p.hessian_product(x, v), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("replacement", [True, False])
def test_batch_gradients_are_weighted_sums_of_fresh_batches(replacement):
    p = problem(3, replacement=replacement)
    x = p.state()
    grads = sample_grads(p, x)
    draws = Draws(11)
    batches = [p._batch(draws) for _ in range(2)]
    got = p.batch_grad(x, (2.0, -1.0), Draws(11))
    torch.testing.assert_close(got, 2 * grads[batches[0]].mean(0) - grads[batches[1]].mean(0), rtol=1e-10, atol=1e-14)
    if not replacement:
        assert all(len(set(batch.tolist())) == 3 for batch in batches)


def test_every_process_runs_on_a_net_and_leaves_the_module_alone():
    p = problem()
    x = p.state()
    for process in (
        SGDProcess(0.1, 0.01),
        SVAGProcess(0.1, 0.01, l=2),
        SVAGProcess(0.1, 0.01, l=8, batches=3),
        NGD(0.1, 0.01),
        GD(0.1, 0.01),
        GradientFlow(0.1, 0.01, h=0.05),
        EulerMaruyama(0.1, 0.01, h=0.05),
        SDE2(0.1, 0.01, h=0.05),
    ):
        end = simulate(process, p, x, 0.2, seed=1)
        assert end.shape == x.shape
        assert end.isfinite().all()
        assert not torch.equal(end, x)
    torch.testing.assert_close(p.state(), x, rtol=0, atol=0)


def test_gd_step_is_torch_sgd_on_the_whole_data():
    p = problem()
    x = p.state()
    end = simulate(GD(0.1, 0.01), p, x, 0.1)
    optimizer = torch.optim.SGD(p.model.parameters(), lr=0.1, weight_decay=0.01)
    optimizer.zero_grad()
    p.loss_fn(p.model(p.inputs), p.targets).mean().backward()
    optimizer.step()
    torch.testing.assert_close(end, p.state(), rtol=1e-12, atol=1e-14)


def test_batchnorm_trains_by_svag_but_has_no_gaussian_noise():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    p = problem(4, model=net)
    x = p.state()
    assert simulate(SVAGProcess(0.1, l=2), p, x, 0.1).isfinite().all()
    assert net[2].num_batches_tracked == 4
    with pytest.raises(ValueError, match="BatchNorm"):
        simulate(NGD(0.1), p, x, 0.1)
    net.eval()
    assert simulate(NGD(0.1), p, x, 0.1).isfinite().all()


def test_batchnorm_batches_use_their_own_statistics():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    p = problem(4, model=net)
    x = p.state()
    draws = Draws(2)
    batches = [p._batch(draws) for _ in range(2)]
    alone = [p._weighted_grad(x, batch, torch.full((4,), 0.25, dtype=torch.float64)) for batch in batches]
    torch.testing.assert_close(p.batch_grad(x, (1.5, -0.5), Draws(2)), 1.5 * alone[0] - 0.5 * alone[1])


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 7, "replacement": False}, "batch_size"),
        ({"chunk_size": 0}, "chunk_size"),
    ],
)
def test_bad_sizes_are_refused(change, name):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        problem(**change)


def test_a_reduced_loss_is_refused():
    p = problem()
    p.loss_fn = nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match=r"loss_fn's result must be a loss a sample \(4,\), got shape \(\)"):
        p.mean_grad(p.state())
