"""The nets: sizes, initial weights, shapes, and that the library's ways through a model serve each."""

import math

import pytest
import torch
from sample_norm_oracle import check
from torch import nn
from torch.nn import functional as F

from svag_fast import SVAG, check_independence, pair_pass
from svag_fast.experiments.models import build_model, digits_mlp, gpt, mlp, preresnet

# Of each family, both forms and every norm, tiny.
IMAGES = (
    "preresnet8-gn", "preresnet8-bn-plain", "resnet8-bn", "resnet8-gn-plain", "resnet8-none-plain", "wrn10-1-gn",
    "wrn10-1-bn-plain", "mlp24x24-gn", "mlp8x6-bn", "mlp8-ln-plain", "mlp8x4-none-plain", "mlp8x4-bn-plain",
)  # fmt: skip
TOKENS = ("gpt1x12-ln", "gpt2x12-ln-plain", "gpt1x12-ln-plain-tied")


def images(count, channels, size, dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(count, channels, size, size, generator=generator, dtype=dtype)
    return x, torch.randint(10, (count,), generator=generator)


def net_and_batch(name, count):
    """A net in float64, for images of 3x8x8 and 10 classes or at most 6 of 11 tokens; and a batch for it."""
    if name in TOKENS:
        model = build_model(name, in_channels=None, num_classes=11, pixels=6)
        tokens = torch.randint(11, (count, 5), generator=torch.Generator().manual_seed(7))
        return model.double(), tokens, tokens.roll(-1, 1)
    model = build_model(name, in_channels=3, num_classes=10, pixels=64)
    return model.double(), *images(count, 3, 8)


def losses(outputs, targets):
    each = F.cross_entropy(outputs.movedim(-1, 1), targets, reduction="none")
    return each if each.dim() == 1 else each.mean(1)


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


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # Of the architectures' papers, to the parameter: 0.46 M, 0.27 M, 2.7 M.
        ("resnet32-bn-plain", 464_154),
        ("resnet20-bn-plain", 269_722),
        ("wrn16-4-bn-plain", 2_748_890),
        # The scale-invariant form has neither the norms' parameters nor the head's.
        ("resnet20-bn", 269_722 - 2 * (7 * 16 + 6 * 32 + 6 * 64) - 650),
        ("mlp128x64-ln", 3 * 64 * 128 + 128 * 64),
        ("mlp128x64-none-plain", 3 * 64 * 128 + 128 + 128 * 64 + 64 + 64 * 10 + 10),
    ],
)
def test_sizes(name, count):
    assert trained(build_model(name, in_channels=3, num_classes=10)) == count


def test_gpt_has_gpt_2_s_size():
    """124,439,808 parameters in 12 layers of 768 for 50,257 tokens and a context of 1,024: linear in the layers."""

    def size(layers):
        kinds = {"vocabulary": 67, "context": 4, "generator": torch.Generator().manual_seed(0)}
        return trained(gpt(layers, 768, plain=True, tied=True, **kinds))

    one = size(1)
    assert one + 11 * (size(2) - one) + 768 * (50_257 - 67 + 1_024 - 4) == 124_439_808


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


@pytest.mark.parametrize("name", ["digits-mlp", "digits-net", "vgg11-none-w2", "preresnet8-bn-w2"])
def test_weights_are_drawn_in_the_order_of_the_layers_and_the_head_last(name):
    """So that a name has the same initial weights, to the bit, in every version."""
    net = build_model(name, in_channels=1, num_classes=10, seed=3)
    generator = torch.Generator().manual_seed(3)
    for weight in net.parameters():
        std = math.sqrt(2 / weight[0].numel())
        assert torch.equal(weight, torch.empty(weight.shape).normal_(std=std, generator=generator))
    width = net.head.shape[1]
    std = (4.0 if "digits" in name else math.sqrt(2)) / math.sqrt(width)
    assert torch.equal(net.head, torch.empty(10, width).normal_(std=std, generator=generator))


@pytest.mark.parametrize("name", ["preresnet8-gn", "resnet8-bn", "vgg11-none", "mlp64x24-ln"])
def test_both_forms_have_the_same_initial_weights(name):
    invariant, plain = (build_model(n, in_channels=1, num_classes=10, seed=2) for n in (name, f"{name}-plain"))
    weights = dict(plain.named_parameters())
    for key, weight in invariant.named_parameters():
        assert torch.equal(weight, weights[key])
    assert torch.equal(invariant.head, plain.head.weight)


def test_gpt_s_initial_weights():
    """GPT-2's variances: mean square over std² of n weights is 1 with standard error sqrt(2 / n)."""
    net = gpt(3, 48, plain=True, vocabulary=50, context=20, generator=torch.Generator().manual_seed(0))
    for name, weight in net.named_parameters():
        if name.endswith("bias"):
            assert not weight.any(), name
        elif weight.dim() == 2:
            std = 0.02 / math.sqrt(6) if name.endswith(("out.weight", "down.weight")) else 0.02
            relative = float(weight.detach().double().square().mean()) / std**2
            assert abs(relative - 1) < 4.5 * math.sqrt(2 / weight.numel()), name
        else:
            assert (weight == 1).all()


def test_digits_mlp_is_an_mlp():
    plain = mlp((64, 64, 64), "ln", generator=torch.Generator().manual_seed(1))
    digits = digits_mlp(generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(plain.parameters(), digits.parameters(), strict=True):
        assert torch.equal(ours, theirs)


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


@pytest.mark.parametrize("name", [*IMAGES, "vgg11-bn-plain", "vgg13-none-plain"])
def test_logits_of_images(name):
    model = build_model(name, in_channels=3, num_classes=7, pixels=32 * 32)
    assert model(torch.randn(3, 3, 32, 32)).shape == (3, 7)


@pytest.mark.parametrize("name", TOKENS)
def test_gpt_s_logits_depend_on_no_later_token(name):
    model, tokens, _ = net_and_batch(name, 2)
    logits = model(tokens)
    assert logits.shape == (2, 5, 11)
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 11
    torch.testing.assert_close(model(changed)[:, :3], logits[:, :3])
    assert not torch.allclose(model(changed)[:, 3:], logits[:, 3:])
    torch.testing.assert_close(model(tokens[:, :2]), logits[:, :2])


def test_tied_embeddings_are_one_parameter():
    model, *_ = net_and_batch("gpt1x12-ln-plain-tied", 1)
    assert model.head.weight is model.token.weight
    untied, *_ = net_and_batch("gpt2x12-ln-plain", 1)
    assert untied.head.weight.shape == (11, 12)
    assert untied.head.weight is not untied.token.weight


def test_a_shortcut_that_changes_the_shape_takes_every_other_pixel_and_adds_zero_channels():
    block = build_model("resnet8-bn", in_channels=3, num_classes=10).double().features[4]
    x = images(2, 16, 8)[0]
    with torch.no_grad():
        block.conv2.weight.zero_()
    expected = torch.zeros(2, 32, 4, 4, dtype=torch.float64)
    expected[:, :16] = x[:, :, ::2, ::2]
    torch.testing.assert_close(block(x), expected.relu())


@pytest.mark.parametrize("name", [n for n in (*IMAGES, *TOKENS) if "-bn" not in n])
def test_per_sample_norms_are_those_of_single_passes(name):
    model, inputs, _ = net_and_batch(name, 3)
    # The first layers' gradients cancel behind a norm.
    check(model, inputs, rtol=1e-8)
    assert check_independence(model, inputs)


@pytest.mark.parametrize("name", [*IMAGES, *TOKENS])
def test_pair_pass_gives_the_gradients_of_two_passes(name):
    model, inputs, targets = net_and_batch(name, 8)
    trained = list(model.parameters())
    expected = []
    for half in (slice(4), slice(4, None)):
        expected.append(torch.autograd.grad(losses(model(inputs[half]), targets[half]).mean(), trained))
    optimizer = SVAG(trained, lr=0.1, l=2)
    way = "halves" if "tied" in name else "joint"
    with pair_pass(model, optimizer, way=way) as pair:
        pair.backward(losses(model(inputs), targets))
    for got, plain in zip([optimizer._pair.first(), [p.grad for p in trained]], expected, strict=True):
        size = max(float(g.norm()) for g in plain)
        for ours, theirs in zip(got, plain, strict=True):
            assert (ours - theirs).norm() <= 1e-10 * size


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda g: mlp((), generator=g), "widths must be at least one, got none"),
        (
            lambda g: mlp((16,), "gn", generator=g),
            "each width must be a multiple of 8, at least 24, .*got 16",
        ),
        (lambda g: mlp((2,), "ln", generator=g), "each width must be at least 3 for norm ln, got 2"),
        (lambda g: mlp((8,), "rms", generator=g), "norm must be one of bn, gn, ln, none, got 'rms'"),
        (lambda g: preresnet(8, "ln", generator=g), "norm must be one of bn, gn, none, got 'ln'"),
        (
            lambda g: gpt(1, 10, vocabulary=3, context=4, generator=g),
            "width must be a multiple of 4, at least 12",
        ),
        (lambda g: gpt(1, 12, vocabulary=3, context=0, generator=g), "context must be a positive integer, got 0"),
        (lambda g: gpt(1, 12, tied=True, vocabulary=3, context=4, generator=g), "tied must be of the plain form, got"),
    ],
)
def test_what_no_net_can_be_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build(torch.Generator().manual_seed(0))


def test_gpt_refuses_a_sequence_that_is_too_long():
    model, *_ = net_and_batch("gpt1x12-ln", 1)
    with pytest.raises(ValueError, match=r"tokens must be \[B, T\] with T at most 6, got \[1, 7\]"):
        model(torch.zeros(1, 7, dtype=torch.long))
