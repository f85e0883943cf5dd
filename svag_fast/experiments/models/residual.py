"""Residual nets for small images: PreResNet, the ordinary ResNet, and the wide ResNet."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from svag_fast.experiments.models.layers import conv, has_bias, norm_layer, scaled, with_head
from svag_fast.nn.fuse import FusedSequential, norm_then_relu


class PreActBlock(nn.Module):
    """norm, ReLU, 3x3, norm, ReLU, 3x3, added to the input; `project`: by a 1x1 convolution, normalised before."""

    def __init__(
        self, channels_in: int, channels_out: int, stride: int, norm: str, project: bool, plain: bool = False
    ) -> None:
        super().__init__()
        bias = has_bias(norm, plain)
        self.norm1 = norm_layer(norm, channels_in, plain=plain)
        self.conv1 = conv(channels_in, channels_out, 3, stride, bias=bias)
        self.norm2 = norm_layer(norm, channels_out, plain=plain)
        self.conv2 = conv(channels_out, channels_out, 3, bias=bias)
        # Its normalisation is the branch's first one, which sees the same.
        self.shortcut = conv(channels_in, channels_out, 1, stride, bias=bias) if project else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels_in, H, W] to [B, channels_out, H / stride, W / stride]."""
        if self.shortcut is None:
            shortcut, rectified = x, norm_then_relu(self.norm1, x)
        else:
            normalised = self.norm1(x)
            shortcut, rectified = self.shortcut(normalised), torch.relu(normalised)
        branch: Tensor = self.conv2(norm_then_relu(self.norm2, self.conv1(rectified)))
        return shortcut + branch


class BasicBlock(nn.Module):
    """3x3, norm, ReLU, 3x3, norm, added to the input, ReLU.

    Where the shape changes, the input is every other pixel of itself, with zeros for the channels that it lacks: the
    shortcut without parameters of He et al. (2016), option A.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int, norm: str, plain: bool = False) -> None:
        super().__init__()
        bias = has_bias(norm, plain)
        self.conv1 = conv(channels_in, channels_out, 3, stride, bias=bias)
        self.norm1 = norm_layer(norm, channels_out, plain=plain)
        self.conv2 = conv(channels_out, channels_out, 3, bias=bias)
        self.norm2 = norm_layer(norm, channels_out, plain=plain)
        self.stride, self.lacking = stride, channels_out - channels_in

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels_in, H, W] to [B, channels_out, H / stride, W / stride]."""
        branch = self.conv2(norm_then_relu(self.norm1, self.conv1(x)))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.lacking:
            x = F.pad(x, (0, 0, 0, 0, 0, self.lacking))
        return norm_then_relu(self.norm2, branch, residual=x)


def preresnet(
    depth: int = 32,
    norm: str = "gn",
    width: float = 1,
    *,
    plain: bool = False,
    in_channels: int = 3,
    num_classes: int = 10,
    generator: torch.Generator,
) -> nn.Module:
    """PreResNet-(6n+2): three stages of n pre-activation blocks of 16, 32 and 64 times `width` channels.

    Raises:
        ValueError: depth is not 6n + 2 with n >= 1, `width` leaves no whole number of channels, or an unknown norm.
    """
    blocks = _blocks("PreResNet", depth, 2)
    first = scaled(16, width)
    layers, channels = _pre_act_stages(in_channels, first, first, blocks, norm, plain)
    return with_head(FusedSequential(*layers), channels, num_classes, generator, plain=plain)


def wide_resnet(
    depth: int = 16,
    width: float = 4,
    norm: str = "bn",
    *,
    plain: bool = False,
    in_channels: int = 3,
    num_classes: int = 10,
    generator: torch.Generator,
) -> nn.Module:
    """WRN-(6n+4)-width of Zagoruyko and Komodakis (2016): three stages of n pre-activation blocks, without Dropout.

    A 3x3 convolution to 16 channels, the stages of 16, 32 and 64 times `width`, a last norm and ReLU. The first block
    of each stage takes its shortcut behind its norm, and before the ReLU; theirs takes it behind both.

    Raises:
        ValueError: depth is not 6n + 4 with n >= 1, `width` leaves no whole number of channels, or an unknown norm.
    """
    blocks = _blocks("WRN", depth, 4)
    layers, channels = _pre_act_stages(in_channels, 16, scaled(16, width), blocks, norm, plain)
    return with_head(FusedSequential(*layers, nn.ReLU()), channels, num_classes, generator, plain=plain)


def _pre_act_stages(
    in_channels: int, stem: int, first: int, blocks: int, norm: str, plain: bool
) -> tuple[list[nn.Module], int]:
    channels = stem
    layers: list[nn.Module] = [conv(in_channels, channels, 3, bias=has_bias(norm, plain))]
    for stage in range(3):
        channels_out = first * 2**stage
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(PreActBlock(channels, channels_out, stride, norm, block == 0, plain))
            channels = channels_out
    # The blocks end in a sum: without this norm the logits would grow with the weights.
    layers.append(norm_layer(norm, channels, plain=plain))
    return layers, channels


def resnet(
    depth: int = 32,
    norm: str = "bn",
    width: float = 1,
    *,
    plain: bool = False,
    in_channels: int = 3,
    num_classes: int = 10,
    generator: torch.Generator,
) -> nn.Module:
    """ResNet-(6n+2) of He et al. (2016) for small images: three stages of n blocks of 16, 32 and 64 times `width`.

    The paper's ResNet-32 is the plain form with BatchNorm. Without parameters in its norms and with a fixed head this
    net is scale-invariant too: what a block adds to its input is normalised.

    Raises:
        ValueError: depth is not 6n + 2 with n >= 1, `width` leaves no whole number of channels, or an unknown norm.
    """
    blocks = _blocks("ResNet", depth, 2)
    channels = scaled(16, width)
    layers: list[nn.Module] = [
        conv(in_channels, channels, 3, bias=has_bias(norm, plain)),
        norm_layer(norm, channels, plain=plain),
        nn.ReLU(),
    ]
    for stage in range(3):
        channels_out = scaled(16, width) * 2**stage
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(BasicBlock(channels, channels_out, stride, norm, plain))
            channels = channels_out
    return with_head(FusedSequential(*layers), channels, num_classes, generator, plain=plain)


def _blocks(family: str, depth: int, rest: int) -> int:
    """Blocks a stage of a net of 6n + rest layers."""
    blocks, remainder = divmod(depth - rest, 6)
    if remainder or blocks < 1:
        some = ", ".join(str(6 * n + rest) for n in (1, 2, 3))
        raise ValueError(f"{family}'s depth must be 6n + {rest} ({some}, ..., {30 + rest}, ...), got {depth}")
    return blocks
