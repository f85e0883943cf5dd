"""A net's name: one grammar, whose message lists it; what it says is what is built."""

import pytest
import torch

from svag_fast.experiments.models import FAMILIES, build_model, grammar

EVERY = "model must be digits-mlp, digits-net, preresnet<depth>-<norm>.*resnet<depth>.*vgg<.*wrn<.*mlp<.*gpt<.*, got "


def options(name):
    found = [(family.build.__name__, o) for family in FAMILIES if (o := family.options(name)) is not None]
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("digits-mlp", ("digits_mlp", {})),
        ("preresnet32-bn-w4", ("preresnet", {"depth": 32, "norm": "bn", "width": 4, "plain": False})),
        ("resnet32-bn-plain", ("resnet", {"depth": 32, "norm": "bn", "width": 1, "plain": True})),
        ("vgg16-none-w2-plain", ("vgg", {"depth": 16, "norm": "none", "width": 2, "plain": True})),
        ("preresnet8-bn-w0.5", ("preresnet", {"depth": 8, "norm": "bn", "width": 0.5, "plain": False})),
        ("wrn16-4-gn", ("wide_resnet", {"depth": 16, "width": 4, "norm": "gn", "plain": False})),
        ("mlp128x64-ln", ("mlp", {"widths": [128, 64], "norm": "ln", "plain": False})),
        ("mlp8-none-plain", ("mlp", {"widths": [8], "norm": "none", "plain": True})),
        ("gpt2x32-ln", ("gpt", {"layers": 2, "width": 32, "plain": False, "tied": False})),
        ("gpt2x768-ln-plain-tied", ("gpt", {"layers": 2, "width": 768, "plain": True, "tied": True})),
    ],
)
def test_a_name_says_what_is_built(name, expected):
    assert options(name) == expected


def test_the_examples_of_the_message_are_names():
    for example in grammar().rpartition("such as ")[2].split(", "):
        options(example)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", EVERY),
        ("resnet", EVERY),
        ("vgg16-ln", EVERY),
        ("preresnet32", EVERY),
        ("preresnet32-gn-plain-w2", EVERY),
        ("preresnet32-gn-tied", EVERY),
        ("digits-mlp-plain", EVERY),
        ("preresnet32-gn\n", EVERY),
        ("preresnet" + "9" * 5000 + "-gn", EVERY),
        ("wrn16-bn", EVERY),
        ("mlp-ln", EVERY),
        ("gpt2x32-ln-tied", EVERY),
        ("preresnet31-gn", r"PreResNet's depth must be 6n \+ 2 \(8, 14, 20, ..., 32, ...\), got 31"),
        ("preresnet2-gn", r"6n \+ 2"),
        ("resnet9-bn", r"ResNet's depth must be 6n \+ 2"),
        ("wrn14-2-bn", r"WRN's depth must be 6n \+ 4 \(10, 16, 22, ..., 34, ...\), got 14"),
        ("vgg12-bn", "11, 13, 16, 19"),
        ("vgg16-gn-w0", "width must be"),
        ("vgg16-gn-w101", "width must be a number from 0.1 to 100, got 101"),
        ("vgg11-bn-w0.3", "width must be a factor that leaves a whole number of 64 channels, got 0.3"),
        ("preresnet8-gn-w0.25", "channels must be a multiple of 8 for norm gn, got 4"),
        ("gpt2x3.5-ln", EVERY),
        ("mlp0-ln", "each width must be an integer >= 1"),
        ("mlp99999999-ln", "each width must be an integer .*<= 65536, got 99999999"),
        ("gpt2x32-ln", "model must be one for images, got 'gpt2x32-ln', which takes tokens"),
    ],
)
def test_a_wrong_name_is_refused_with_what_was_expected(name, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, in_channels=3, num_classes=10)


def test_a_net_for_images_is_refused_for_tokens():
    with pytest.raises(ValueError, match="model must be one for tokens, got 'mlp8-ln', which takes images"):
        build_model("mlp8-ln", in_channels=None, num_classes=10)


def test_the_shapes_reach_the_net():
    mlp = build_model("mlp8-ln", in_channels=3, num_classes=4, pixels=5)
    assert mlp(torch.zeros(2, 3, 1, 5)).shape == (2, 4)
    gpt = build_model("gpt1x12-ln", in_channels=None, num_classes=4, pixels=5)
    assert gpt(torch.zeros(2, 5, dtype=torch.long)).shape == (2, 5, 4)
