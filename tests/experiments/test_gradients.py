"""Both batches in one pass give the gradients of two passes, and models where they wouldn't take two."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from svag_fast.experiments import gradients as two_batches
from svag_fast.experiments.gradients import TwoBatchGradients
from svag_fast.experiments.models import build_model


def batches(count, channels, size):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, channels, size, size, generator=generator, dtype=torch.float64)
    return images, torch.randint(10, (count,), generator=generator)


def one_by_one(model, images, labels):
    params = [p for p in model.parameters() if p.requires_grad]
    half = len(labels) // 2
    losses, grads = [], []
    for part in (slice(half), slice(half, None)):
        loss = F.cross_entropy(model(images[part]), labels[part])
        losses.append(loss.detach())
        grads.append(torch.autograd.grad(loss, params))
    return torch.stack(losses), *grads


@pytest.mark.parametrize(
    ("name", "channels", "size", "count"),
    [("digits-net", 1, 8, 16), ("digits-net", 1, 8, 2), ("preresnet8-gn", 3, 8, 6), ("preresnet8-none", 1, 9, 4)],
)
def test_one_pass_gives_the_gradients_of_two(monkeypatch, name, channels, size, count):
    monkeypatch.setattr(two_batches, "ONE_PASS_ELEMENTS", 10**9)
    model = build_model(name, in_channels=channels, num_classes=10).double()
    images, labels = batches(count, channels, size)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    losses, grads1, grads2, _ = TwoBatchGradients(model)(images, labels)
    assert len(calls) == 1
    expected_losses, expected1, expected2 = one_by_one(model, images, labels)
    assert torch.allclose(losses, expected_losses, rtol=1e-12)
    for got, expected in zip([*grads1, *grads2], [*expected1, *expected2], strict=True):
        assert (got - expected).norm() <= 1e-11 * expected.norm()


@pytest.mark.parametrize("limit", [0, 10**9])
def test_norms_are_those_of_each_samples_own_gradient(monkeypatch, limit):
    monkeypatch.setattr(two_batches, "ONE_PASS_ELEMENTS", limit)
    model = build_model("preresnet8-gn", in_channels=3, num_classes=10).double()
    params = [p for p in model.parameters() if p.requires_grad]
    images, labels = batches(6, 3, 8)
    expected = []
    for image, label in zip(images, labels, strict=True):
        grads = torch.autograd.grad(F.cross_entropy(model(image[None]), label[None]), params)
        expected.append(sum(g.square().sum() for g in grads))
    got = TwoBatchGradients(model)(images, labels)
    assert torch.allclose(got.sq_norms, torch.stack(expected), rtol=1e-10)
    assert all(p.grad is None for p in params)
    _, expected1, expected2 = one_by_one(model, images, labels)
    for grad, plain in zip([*got.grads1, *got.grads2], [*expected1, *expected2], strict=True):
        assert (grad - plain).norm() <= 1e-11 * plain.norm()


def test_the_model_is_left_as_it_was_also_after_an_error(monkeypatch):
    monkeypatch.setattr(two_batches, "ONE_PASS_ELEMENTS", 10**9)
    model = build_model("digits-net", in_channels=1, num_classes=10).double()
    gradients = TwoBatchGradients(model)
    images, labels = batches(4, 1, 8)
    before = model(images)
    gradients(images, labels)
    with pytest.raises(RuntimeError):
        gradients(torch.randn(4, 3, 8, 8, dtype=torch.float64), labels)
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(model(images), before)


@pytest.mark.parametrize(
    "model",
    [
        build_model("preresnet8-bn", in_channels=1, num_classes=10),
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten()),
        nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.GroupNorm(2, 8)),
        nn.Sequential(nn.Conv2d(1, 4, 3, bias=False, padding=1, padding_mode="circular")),
        nn.Sequential(shared := nn.Conv2d(4, 4, 3, bias=False), nn.Sequential(shared), nn.Conv2d(4, 4, 3, bias=True)),
    ],
    ids=["BatchNorm", "bias", "affine norm", "circular padding", "bias elsewhere"],
)
def test_a_model_whose_halves_are_not_plainly_separable_takes_two_passes(model):
    assert not TwoBatchGradients(model).separable


def test_batchnorm_sees_each_batch_alone_and_a_measuring_batch_leaves_no_trace():
    images, labels = batches(8, 1, 8)
    model, first_only = (build_model("preresnet8-bn", in_channels=1, num_classes=10).double() for _ in range(2))
    losses, grads1, grads2, sq_norms = TwoBatchGradients(model)(images, labels, freeze_statistics=True)
    first_only(images[:4])
    for name, value in first_only.named_buffers():
        if "num_batches" not in name:
            assert torch.equal(model.get_buffer(name), value), name
    assert all(m.momentum == 0.1 for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    expected = one_by_one(first_only, images, labels)
    assert torch.equal(losses, expected[0])
    assert sq_norms is None
    assert all(torch.equal(a, b) for a, b in zip([*grads1, *grads2], [*expected[1], *expected[2]], strict=True))
