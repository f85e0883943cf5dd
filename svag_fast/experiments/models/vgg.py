"""VGG for small images."""

from __future__ import annotations

import torch
from torch import nn

from svag_fast.experiments.models.layers import conv, has_bias, norm_layer, scaled, with_head
from svag_fast.nn.fuse import FusedSequential

VGG_WIDTHS: dict[int, tuple[tuple[int, ...], ...]] = {
    11: ((64,), (128,), (256,) * 2, (512,) * 2, (512,) * 2),
    13: ((64,) * 2, (128,) * 2, (256,) * 2, (512,) * 2, (512,) * 2),
    16: ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3),
    19: ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4),
}


def vgg(
    depth: int = 16,
    norm: str = "gn",
    width: float = 1,
    *,
    plain: bool = False,
    in_channels: int = 3,
    num_classes: int = 10,
    generator: torch.Generator,
) -> nn.Module:
    """VGG-11, 13, 16 or 19 for small images: 3x3 convolution, norm, ReLU; average pooling; one linear layer.

    Raises:
        ValueError: an unknown depth or norm, or `width` leaves no whole number of channels.
    """
    if depth not in VGG_WIDTHS:
        raise ValueError(f"VGG's depth must be one of {', '.join(map(str, VGG_WIDTHS))}, got {depth}")
    layers: list[nn.Module] = []
    channels = in_channels
    for stage, widths in enumerate(VGG_WIDTHS[depth]):
        # Before each stage but the first: the pooling behind the last one is part of the mean over all pixels.
        if stage:
            layers.append(nn.AvgPool2d(2))
        for channels_out in (scaled(w, width) for w in widths):
            layers.append(conv(channels, channels_out, 3, bias=has_bias(norm, plain)))
            layers += [norm_layer(norm, channels_out, plain=plain), nn.ReLU()]
            channels = channels_out
    return with_head(FusedSequential(*layers), channels, num_classes, generator, plain=plain)
