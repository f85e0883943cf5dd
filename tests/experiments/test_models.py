"""The nets: sizes, initial weights, and the scale invariance that the theory of weight decay rests on."""

import math

import pytest
import torch
from torch import nn

from svag_fast.experiments.models import build_model, scale_invariance_report


def images(count, channels, size, dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(count, channels, size, size, generator=generator, dtype=dtype)
    return x, torch.randint(10, (count,), generator=generator)


def trained(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_digits_net_has_13968_trained_parameters_and_a_fixed_head():
    net = build_model("digits-net", in_channels=1, num_classes=10)
    assert trained(net) == 13_968
    assert [tuple(p.shape) for p in net.parameters()] == [(16, 1, 3, 3), (32, 16, 3, 3), (32, 32, 3, 3)]
    assert not net.head.requires_grad
    assert net.head.shape == (10, 32)


def test_digits_mlp_is_three_layers_of_64_without_bias_or_affine_norm_and_a_fixed_head():
    net = build_model("digits-mlp", in_channels=1, num_classes=10)
    assert [tuple(p.shape) for p in net.parameters()] == [(64, 64)] * 3
    assert (tuple(net.head.shape), net.head.requires_grad) == ((10, 64), False)
    x, w = torch.randn(5, 1, 8, 8), list(net.parameters())
    h = x.flatten(1)
    for weight in w:
        h = h @ weight.T
        h = torch.relu((h - h.mean(1, keepdim=True)) / h.std(1, unbiased=False, keepdim=True))
    torch.testing.assert_close(net(x), h @ net.head.T)
    large = build_model("digits-mlp", in_channels=3, num_classes=10, pixels=28 * 28)
    assert large(torch.randn(2, 3, 28, 28)).shape == (2, 10)


def test_preresnet32_has_the_paper_s_size():
    assert 0.46e6 < trained(build_model("preresnet32-gn", in_channels=3, num_classes=10)) < 0.47e6


def test_vgg16_has_13_convolutions_and_14_7_million_parameters():
    net = build_model("vgg16-gn", in_channels=3, num_classes=10)
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) == 13
    assert 14.7e6 < trained(net) < 14.72e6


@pytest.mark.parametrize("name", ["digits-mlp", "digits-net", "vgg11-gn", "preresnet20-bn"])
def test_initial_weights_are_normal_with_variance_two_over_fan_in(name):
    """Mean square over 2 / fan_in of n weights: 1 with standard error sqrt(2 / n); 4.5 standard errors allowed."""
    net = build_model(name, in_channels=1, num_classes=10, seed=3)
    for weight in net.parameters():
        relative = float(weight.detach().double().square().mean()) * weight[0].numel() / 2
        assert abs(relative - 1) < 4.5 * math.sqrt(2 / weight.numel())


def test_digits_head_is_normal_with_variance_16_over_32():
    squares = torch.cat(
        [build_model("digits-net", in_channels=1, num_classes=10, seed=s).head.flatten() for s in range(30)]
    ).square()
    assert abs(float(squares.mean()) / 0.5 - 1) < 4.5 * math.sqrt(2 / squares.numel())


def test_the_seed_alone_decides_the_initial_weights():
    torch.manual_seed(1)
    first = build_model("digits-net", in_channels=1, num_classes=10, seed=5).state_dict()
    torch.manual_seed(2)
    again = build_model("digits-net", in_channels=1, num_classes=10, seed=5).state_dict()
    other = build_model("digits-net", in_channels=1, num_classes=10, seed=6).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not any(torch.equal(first[k], other[k]) for k in first)


@pytest.mark.parametrize(
    ("name", "channels", "size"),
    [
        ("digits-mlp", 1, 8),
        ("digits-net", 1, 8),
        ("preresnet8-gn", 3, 32),
        ("preresnet14-bn", 3, 16),
        ("vgg11-gn", 3, 32),
        ("vgg11-bn", 1, 28),
    ],
)
def test_normalised_nets_are_scale_invariant_in_float64(name, channels, size):
    net = build_model(name, in_channels=channels, num_classes=10).double()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    report = scale_invariance_report(net, *images(3, channels, size))
    assert report.holds(1e-6), report
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items()), "the report changed the model"


@pytest.mark.parametrize("name", ["preresnet8-none"])
def test_without_normalisation_the_report_says_so(name):
    net = build_model(name, in_channels=3, num_classes=10).double()
    report = scale_invariance_report(net, *images(2, 3, 32))
    assert not report.holds(1e-3), report


def test_first_block_of_each_stage_projects_also_where_shapes_agree():
    blocks = [m for m in build_model("preresnet20-gn", in_channels=3, num_classes=10).features if hasattr(m, "conv2")]
    assert [b.shortcut is not None for b in blocks] == [True, False, False] * 3


def test_logits_have_a_row_a_sample_and_a_constant_image_gives_finite_ones():
    for name, channels, size in (
        ("digits-mlp", 1, 8),
        ("digits-net", 1, 8),
        ("preresnet8-gn", 3, 32),
        ("vgg11-gn", 3, 32),
    ):
        net = build_model(name, in_channels=channels, num_classes=7)
        logits = net(torch.zeros(2, channels, size, size))
        assert logits.shape == (2, 7)
        assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet", "model must be digits-mlp, digits-net, preresnet<depth>-<norm> or vgg<depth>-<norm>, with"),
        ("preresnet31-gn", "6n \\+ 2"),
        ("preresnet2-gn", "6n \\+ 2"),
        ("vgg12-bn", "11, 13, 16, 19"),
        ("vgg16-ln", "model must be digits-mlp, digits-net, preresnet<depth>-<norm> or vgg<depth>-<norm>, with"),
        ("vgg16-gn-w0", "width must be"),
    ],
)
def test_a_wrong_name_is_refused_with_what_was_expected(name, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, in_channels=3, num_classes=10)


def test_report_refuses_a_scale_that_is_not_positive_and_a_model_without_parameters():
    with pytest.raises(ValueError, match="scale must be positive"):
        scale_invariance_report(nn.Linear(4, 2), torch.ones(1, 4), torch.zeros(1, dtype=torch.long), scale=0)
    with pytest.raises(ValueError, match="the model must be one with a trained parameter to scale, got none"):
        scale_invariance_report(nn.Flatten(), torch.ones(1, 4), torch.zeros(1, dtype=torch.long))
