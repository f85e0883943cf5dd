"""Linear regression over a finite data set: exact second moments against enumeration and simulation."""

import itertools

import pytest
import torch

from svag_fast.sde import (
    GD,
    NGD,
    SDE2,
    EulerMaruyama,
    GradientFlow,
    LinearRegression,
    OneBatchSVAG,
    SGDProcess,
    SVAGProcess,
    simulate,
)

LR, DECAY = 0.2, 0.1
START = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)


def problem(batch_size=1, *, replacement=True):
    generator = torch.Generator().manual_seed(4)
    features = torch.randn(7, 3, dtype=torch.float64, generator=generator) * torch.tensor([1.0, 0.7, 0.4])
    targets = features @ torch.tensor([0.3, 1.0, -1.0], dtype=torch.float64)
    targets += 0.5 * torch.randn(7, dtype=torch.float64, generator=generator)
    return LinearRegression(features, targets, batch_size=batch_size, replacement=replacement)


@pytest.mark.parametrize(("batch_size", "replacement"), [(1, True), (2, True), (2, False), (3, False)])
def test_one_sgd_step_by_enumeration_of_all_batches(batch_size, replacement):
    p = problem(batch_size, replacement=replacement)
    rows = range(7)
    batches = itertools.product(rows, repeat=batch_size) if replacement else itertools.combinations(rows, batch_size)
    grads = p.features * (p.features @ START - p.targets)[:, None]
    ends = torch.stack([START - LR * (grads[list(b)].mean(0) + DECAY * START) for b in batches])
    z = torch.cat([ends, torch.ones(len(ends), 1, dtype=torch.float64)], dim=1)
    got = p.process_second_moment(SGDProcess(LR, DECAY), START, [LR])[0]
    torch.testing.assert_close(got, z.T @ z / len(z), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize(
    "process",
    [
        SGDProcess(LR, DECAY),
        SVAGProcess(LR, DECAY, l=2.5),
        SVAGProcess(LR, DECAY, l=4, batches=3),
        OneBatchSVAG(LR, DECAY, l=4),
        NGD(LR, DECAY),
        GD(LR, DECAY),
        EulerMaruyama(LR, DECAY, h=0.1),
        SDE2(LR, DECAY, h=0.1),
    ],
    ids=lambda p: type(p).__name__,
)
def test_ensembles_have_the_exact_second_moments(process, replacement):
    """All nine first and second moments, |z| < 4.5."""
    p = problem(2, replacement=replacement)
    x = simulate(process, p, START, 0.4, trajectories=20_000, seed=5)
    z = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    exact = p.process_second_moment(process, START, [0.4])[0]
    products = z[:, :, None] * z[:, None, :]
    error = products.std(0) / len(x) ** 0.5
    assert ((products.mean(0) - exact).abs() <= 4.5 * error + 1e-12).all()


@pytest.mark.parametrize(("order", "process"), [(1, EulerMaruyama), (2, SDE2)])
def test_euler_maruyama_tends_to_the_sde_with_order_one(order, process):
    p = problem()
    limit = p.sde_second_moment(START, [1.0], lr=LR, weight_decay=DECAY, order=order)
    gaps = [(p.process_second_moment(process(LR, DECAY, h=h), START, [1.0]) - limit).norm() for h in (2**-8, 2**-9)]
    assert 1.95 < gaps[0] / gaps[1] < 2.05


def test_svag_tends_to_the_sde_with_order_one_and_the_one_batch_variant_does_not():
    p = problem()
    limit = p.sde_second_moment(START, [1.0], lr=LR, weight_decay=DECAY)
    gaps = [(p.process_second_moment(SVAGProcess(LR, DECAY, l=l), START, [1.0]) - limit).norm() for l in (256, 512)]
    assert 1.95 < gaps[0] / gaps[1] < 2.05
    stuck = [(p.process_second_moment(OneBatchSVAG(LR, DECAY, l=l), START, [1.0]) - limit).norm() for l in (256, 512)]
    assert min(stuck) > 20 * max(gaps)


def test_order_two_sde_is_second_order_near_sgd():
    p = problem()
    gaps = []
    for lr in (1 / 32, 1 / 64):
        limit = p.sde_second_moment(START, [1.0], lr=lr, weight_decay=DECAY, order=2)
        gaps.append((p.process_second_moment(SGDProcess(lr, DECAY), START, [1.0]) - limit).norm())
    assert 3.6 < gaps[0] / gaps[1] < 4.4


def test_gradient_flow_is_the_sde_without_noise():
    p = problem()
    end = simulate(GradientFlow(LR, DECAY, h=0.01), p, START, 1.0, trajectories=1)[0]
    exact = p.sde_second_moment(START, [1.0], lr=LR, weight_decay=DECAY, noise=False)[0]
    torch.testing.assert_close(end, exact[:3, 3], rtol=1e-9, atol=1e-10)
    with pytest.raises(ValueError, match="GradientFlow"):
        p.process_second_moment(GradientFlow(LR, h=0.1), START, [1.0])


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match=r"targets must be \[n\] for features \[n, d\], n at least 2, got shapes"):
        LinearRegression(torch.ones(4, 2), torch.ones(3), batch_size=1)
    with pytest.raises(ValueError, match=r"^batch_size must be"):
        LinearRegression(torch.ones(4, 2), torch.ones(4), batch_size=5, replacement=False)
