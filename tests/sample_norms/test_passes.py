"""Losses, passes and parameters: what the norms are of, and how passes add up."""

import pytest
import torch
import torch.nn.functional as F
from sample_norm_nets import image_batch, randn, small_net
from sample_norm_oracle import check
from torch import nn
from torch.utils.checkpoint import checkpoint

from svag_fast import per_sample_sq_norms
from svag_fast.noise import estimators as noise


def test_mean_and_sum_losses_give_the_same_norms():
    """Trap: a mean loss puts 1/B² into every squared norm."""
    x, y = image_batch()
    model = small_net()
    totals = []
    for reduction in ("mean", "sum"):
        with per_sample_sq_norms(model, loss_reduction=reduction) as norms:
            F.cross_entropy(model(x), y, reduction=reduction).backward()
        totals.append(norms.total)
    torch.testing.assert_close(*totals, rtol=1e-12, atol=0)


def test_a_weighted_loss_puts_its_weights_squared_into_the_norms():
    """Trap: with SVAG's weights c1/B and c2/B in the loss, divide by their squares (at l = 1, c2 = 0)."""
    model = small_net()
    x, y = image_batch()
    weights = torch.tensor([1.5, 1.5, -0.5, -0.5], dtype=torch.float64) / 2
    with per_sample_sq_norms(model, loss_reduction="sum") as weighted:
        (weights * F.cross_entropy(model(x), y, reduction="none")).sum().backward()
    with per_sample_sq_norms(model) as norms:
        F.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(weighted.total / weights**2, norms.total, rtol=1e-12, atol=0)


def test_noise_estimate_from_norms_and_gradient_equals_the_covariance():
    """Tr Σ₁ of the batch's own samples, as the estimators take it."""
    x, y = image_batch(5)
    model = small_net()
    with per_sample_sq_norms(model) as norms:
        F.cross_entropy(model(x), y).backward()
    batch = sum(p.grad.square().sum() for p in model.parameters())
    rows = [
        torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(F.cross_entropy(model(x[i, None]), y[i, None]), list(model.parameters()))
            ]
        )
        for i in range(5)
    ]
    expected = torch.stack(rows).var(0).sum()
    torch.testing.assert_close(
        noise.from_sample_norms(norms.total, batch).sample_noise_trace, expected, rtol=1e-10, atol=0
    )


def test_each_backward_pass_appends_its_rows_and_gradients_accumulate():
    model = small_net()
    x, y = image_batch(5)
    plain = small_net()
    for rows in (slice(0, 2), slice(2, 5)):
        F.cross_entropy(plain(x[rows]), y[rows]).backward()
    with per_sample_sq_norms(model) as norms:
        for rows in (slice(0, 2), slice(2, 5)):
            F.cross_entropy(model(x[rows]), y[rows]).backward()
        halves = norms.total
        norms.reset()
        with pytest.raises(RuntimeError, match="no backward pass"):
            _ = norms.total
        F.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(halves, norms.total, rtol=1e-12, atol=0)
    model.zero_grad()
    with per_sample_sq_norms(model):
        for rows in (slice(0, 2), slice(2, 5)):
            F.cross_entropy(model(x[rows]), y[rows]).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-14)


def test_two_forward_passes_before_two_backward_passes():
    """The uses of the other graph are alive, but not part of the pass."""
    model = small_net()
    x, y = image_batch(5)
    with per_sample_sq_norms(model) as norms:
        losses = [F.cross_entropy(model(x[rows]), y[rows]) for rows in (slice(0, 2), slice(2, 5))]
        for loss in losses:
            loss.backward()
        apart = norms.total
        norms.reset()
        F.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(apart, norms.total, rtol=1e-12, atol=0)


def test_frozen_parameters_cost_nothing_and_have_no_norms():
    model = small_net()
    model[0].weight.requires_grad_(False)
    model[1].requires_grad_(False)
    norms = check(model, image_batch()[0])
    assert "0.weight" not in norms
    assert "0.bias" in norms


def test_only_the_parameters_asked_for():
    model = small_net()
    x, y = image_batch()
    with per_sample_sq_norms(model) as everything:
        F.cross_entropy(model(x), y).backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with per_sample_sq_norms(model, parameters=[model[3].weight, model[1].bias]) as norms:
        F.cross_entropy(model(x), y).backward()
    assert list(norms) == ["1.bias", "3.weight"]
    torch.testing.assert_close(norms.total, everything["1.bias"] + everything["3.weight"], rtol=1e-12, atol=0)
    for p, expected in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-12, atol=1e-14)


def test_parts_without_gradient():
    """A part of the forward pass under no_grad, evaluation under no_grad in between, and an unused parameter."""
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 2), "unused": nn.Linear(3, 3)}).double()
    x = randn(4, 3)
    with per_sample_sq_norms(model) as norms:
        with torch.no_grad():
            hidden = model["a"](x)
        model["b"](hidden).square().mean().backward()
        with torch.no_grad():
            model["b"](model["a"](x))
    assert norms["a.weight"].tolist() == [0] * 4
    assert norms["unused.bias"].tolist() == [0] * 4
    torch.testing.assert_close(norms.total, norms["b.weight"] + norms["b.bias"])
    assert model["a"].weight.grad is None


def test_gradient_scaler_enters_squared():
    model = small_net()
    x, y = image_batch()
    totals = []
    for scale in (1.0, 256.0):
        with per_sample_sq_norms(model) as norms:
            (scale * F.cross_entropy(model(x), y)).backward()
        totals.append(norms.total / scale**2)
    torch.testing.assert_close(*totals, rtol=1e-12, atol=0)


def test_checkpointed_layers():
    """Recomputed layers are used once; the reentrant kind, which hides them in passes of its own, is refused."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 2)).double()
    x = randn(3, 4).requires_grad_()
    with per_sample_sq_norms(model) as norms:
        model(x).square().mean().backward()
    with per_sample_sq_norms(model) as again:
        checkpoint(model, x, use_reentrant=False).square().mean().backward()
    torch.testing.assert_close(again.total, norms.total, rtol=1e-12, atol=0)
    with per_sample_sq_norms(model) as reentrant:
        checkpoint(model, x, use_reentrant=True).square().mean().backward()
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            _ = reentrant.total


def test_autograd_grad_gives_norms_of_what_was_asked_for():
    model = small_net()
    x, y = image_batch()
    with per_sample_sq_norms(model) as norms:
        torch.autograd.grad(F.cross_entropy(model(x), y), [model[5].weight])
    with per_sample_sq_norms(model) as everything:
        F.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(norms.total, everything["5.weight"])


def test_norms_come_from_one_backward_pass_of_the_same_loss():
    """Each layer's backward runs once."""
    model = small_net()
    calls = []
    model[3].register_full_backward_hook(lambda *_: calls.append(1))
    model[2].inplace = False
    x, y = image_batch()
    with per_sample_sq_norms(model):
        F.cross_entropy(model(x), y).backward()
    assert calls == [1]
