"""A run's step gets both batches' gradients as two plain passes give them, and every sample's norm where it has one."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from svag_fast import SVAG
from svag_fast.experiments.gradients import has_sample_norms, measuring_cost, pair_gradients
from svag_fast.experiments.models import build_model
from svag_fast.nn import pair_run


def made(name, channels, l=2):
    model = build_model(name, in_channels=channels, num_classes=10).double()
    return model, SVAG(model.parameters(), lr=0.1, l=l)


def batches(count, channels, size):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, channels, size, size, generator=generator, dtype=torch.float64)
    return images, torch.randint(10, (count,), generator=generator)


def one_by_one(model, images, labels):
    half = len(labels) // 2
    losses, grads = [], []
    for part in (slice(half), slice(half, None)):
        loss = F.cross_entropy(model(images[part]), labels[part])
        losses.append(loss.detach())
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    return torch.stack(losses), *grads


def assert_gradients(model, optimizer, *expected):
    first, second = optimizer._pair.first(), [p.grad for p in model.parameters()]
    for got, plain in zip([first, second], expected, strict=True):
        for a, b in zip(got, plain, strict=True):
            assert (a - b).norm() <= 1e-11 * b.norm()


@pytest.mark.parametrize(
    ("name", "channels", "size", "count"),
    [("digits-net", 1, 8, 16), ("digits-net", 1, 8, 2), ("preresnet8-none", 1, 9, 4), ("preresnet8-bn", 3, 8, 6)],
)
@pytest.mark.parametrize("limit", [0, 10**9])
def test_gradients_are_those_of_two_plain_passes_in_as_many_calls_as_the_rule_says(
    monkeypatch, name, channels, size, count, limit
):
    monkeypatch.setattr(pair_run, "JOINT_ELEMENTS", limit)
    model, optimizer = made(name, channels)
    images, labels = batches(count, channels, size)
    expected = one_by_one(model, images, labels)
    calls = []
    model.features.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):  # the first looks at the model more often
        calls.clear()
        result = pair_gradients(model, optimizer, (images, labels), norms=False)
        assert torch.allclose(result.losses, expected[0], rtol=1e-12)
        assert_gradients(model, optimizer, *expected[1:])
        optimizer.discard_gradient()
    assert len(calls) == (1 if limit else 2)
    assert result.way == ("joint" if limit else "halves")
    assert result.sq_norms is None


def test_norms_are_those_of_each_samples_own_gradient():
    model, optimizer = made("preresnet8-gn", 3)
    params = list(model.parameters())
    images, labels = batches(6, 3, 8)
    expected = []
    for image, label in zip(images, labels, strict=True):
        grads = torch.autograd.grad(F.cross_entropy(model(image[None]), label[None]), params)
        expected.append(sum(g.square().sum() for g in grads))
    result = pair_gradients(model, optimizer, (images, labels), norms=True)
    assert result.way == "joint"
    assert torch.allclose(result.sq_norms, torch.stack(expected), rtol=1e-10)
    assert_gradients(model, optimizer, *one_by_one(model, images, labels)[1:])


def test_the_model_is_left_as_it_was_also_after_an_error():
    model, optimizer = made("digits-net", 1)
    images, labels = batches(4, 1, 8)
    before = model(images)
    pair_gradients(model, optimizer, (images, labels), norms=True)
    optimizer.discard_gradient()
    with pytest.raises(RuntimeError):
        pair_gradients(model, optimizer, (torch.randn(4, 3, 8, 8, dtype=torch.float64), labels), norms=True)
    assert all("forward" not in vars(module) for module in model.modules())
    assert torch.equal(model(images), before)


def test_models_whose_samples_have_gradients_of_their_own():
    assert has_sample_norms(build_model("preresnet8-gn", in_channels=1, num_classes=10))
    assert has_sample_norms(nn.Sequential(nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.LayerNorm(32)))
    assert not has_sample_norms(build_model("preresnet8-bn", in_channels=1, num_classes=10))
    assert not has_sample_norms(nn.ConvTranspose2d(1, 1, 3))


def test_batchnorm_sees_each_batch_alone_and_at_l_1_the_measuring_batch_leaves_no_trace():
    images, labels = batches(8, 1, 8)
    (model, optimizer), (first_only, _), (plain, _) = (made("preresnet8-bn", 1, l=1) for _ in range(3))
    expected = one_by_one(plain, images, labels)
    result = pair_gradients(model, optimizer, (images, labels), norms=False)
    first_only(images[:4])
    for name, value in first_only.named_buffers():
        assert torch.equal(model.get_buffer(name), value), name
    assert torch.allclose(result.losses, expected[0], rtol=1e-12)
    assert_gradients(model, optimizer, *expected[1:])


@pytest.mark.parametrize("both", [False, True])
def test_measuring_the_cost_leaves_the_model_and_the_optimizer_as_they_were(both):
    model, optimizer = made("digits-net", 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cost = measuring_cost(model, optimizer, batches(4, 1, 8), both=both, repeats=1)
    assert -1 < cost < 100
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert optimizer._pair.grads is None
