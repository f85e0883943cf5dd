"""Small nets: those of the digits experiments, and MLPs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from svag_fast.experiments.models.layers import (
    NORM_GROUPS,
    FixedHeadMLP,
    FixedHeadNet,
    conv,
    feature_norm_layer,
    has_bias,
    norm_layer,
    with_head,
)
from svag_fast.nn.fuse import FusedSequential


def digits_mlp(*, inputs: int = 64, num_classes: int = 10, generator: torch.Generator) -> FixedHeadMLP:
    """The net of the default experiment: three linear layers of 64 without bias, each with LayerNorm and ReLU behind.

    12,288 trained parameters on 64 inputs.

    Args:
        inputs: values of an image.
        num_classes: number of classes.
        generator: draws the initial weights.
    """
    return FixedHeadMLP(nn.Sequential(*_mlp_layers(inputs, (64, 64, 64), "ln")), 64, num_classes, 4.0, generator)


def digits_net(*, in_channels: int = 1, num_classes: int = 10, generator: torch.Generator) -> FixedHeadNet:
    """A small convolutional net: three 3x3 convolutions (16, 32 with stride 2, 32), GroupNorm, ReLU.

    13,968 trained parameters on one-channel images.
    """
    layers: list[nn.Module] = []
    for channels_in, channels_out, stride in ((in_channels, 16, 1), (16, 32, 2), (32, 32, 1)):
        layers += [conv(channels_in, channels_out, 3, stride), norm_layer("gn", channels_out), nn.ReLU()]
    return FixedHeadNet(FusedSequential(*layers), 32, num_classes, 4.0, generator)


def mlp(
    widths: Sequence[int] = (64, 64, 64),
    norm: str = "ln",
    *,
    plain: bool = False,
    inputs: int = 64,
    num_classes: int = 10,
    generator: torch.Generator,
) -> nn.Module:
    """A fully connected net: for each width a linear layer, norm and ReLU; then the linear layer to the classes.

    Args:
        widths: features of each layer.
        norm: "ln", "bn", "gn" (eight groups of features) or "none".
        plain: the form.
        inputs: values of an image.
        num_classes: number of classes.
        generator: draws the initial weights.

    Raises:
        ValueError: no widths, an unknown norm, or a width that it can't have.
    """
    if not widths:
        raise ValueError("widths must be at least one, got none")
    for width in widths:
        # Two features, normalised, are 1 and -1 whatever the weights.
        if norm == "gn" and (width % NORM_GROUPS or width < 3 * NORM_GROUPS):
            raise ValueError(
                f"each width must be a multiple of {NORM_GROUPS}, at least {3 * NORM_GROUPS}, for norm gn, got {width}"
            )
        if norm == "ln" and width < 3:
            raise ValueError(f"each width must be at least 3 for norm ln, got {width}")
    layers = _mlp_layers(inputs, widths, norm, plain=plain)
    return with_head(FusedSequential(*layers), widths[-1], num_classes, generator, plain=plain, vectors=True)


def _mlp_layers(inputs: int, widths: Sequence[int], norm: str, *, plain: bool = False) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Flatten()]
    for size, width in zip((inputs, *widths), widths, strict=False):
        layers.append(nn.Linear(size, width, bias=has_bias(norm, plain)))
        layers += [feature_norm_layer(norm, width, plain=plain), nn.ReLU()]
    return layers
