"""What the families share: norms, convolutions, heads, and how initial weights are drawn.

Each net has two forms. Scale-invariant, the default, means L(c x) = L(x) for every c > 0 and trained weights x: every
layer with weights is followed by a normalisation before anything that is not homogeneous, no normalisation has
parameters, and the last linear layer keeps its initial value. That is the form that the paper's theory of weight decay
speaks of. The plain form is what practice trains: norms with parameters, and a trained last layer with a bias. With
`norm="none"` the same nets are built without normalisation, and neither form is scale-invariant.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

from svag_fast.nn.fuse import FusedSequential
from svag_fast.replicas.chain import FixedLinear, register_chain

NORMS = ("bn", "gn", "none")
FEATURE_NORMS = ("bn", "gn", "ln", "none")  # of nets whose features are vectors
NORM_EPS = 1e-12  # the theory wants 0; this only keeps a constant feature map from dividing by zero
NORM_GROUPS = 8


def norm_layer(kind: str, channels: int, *, plain: bool = False) -> nn.Module:
    """A normalisation of feature maps [B, channels, H, W]."""
    eps = 1e-5 if plain else NORM_EPS
    if kind == "bn":
        return nn.BatchNorm2d(channels, eps=eps, affine=plain)
    if kind == "gn":
        if channels % NORM_GROUPS:
            raise ValueError(f"channels must be a multiple of {NORM_GROUPS} for norm gn, got {channels}: see width")
        return nn.GroupNorm(NORM_GROUPS, channels, eps=eps, affine=plain)
    if kind == "none":
        return nn.Identity()
    raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {kind!r}")


def feature_norm_layer(kind: str, features: int, *, plain: bool = False) -> nn.Module:
    """A normalisation of vectors [B, features]."""
    eps = 1e-5 if plain else NORM_EPS
    if kind == "ln":
        return nn.LayerNorm(features, eps=eps, elementwise_affine=plain)
    if kind == "bn":
        return nn.BatchNorm1d(features, eps=eps, affine=plain)
    if kind in NORMS:
        return norm_layer(kind, features, plain=plain)
    raise ValueError(f"norm must be one of {', '.join(FEATURE_NORMS)}, got {kind!r}")


def has_bias(norm: str, plain: bool) -> bool:
    """Whether layers with weights have a bias: in the plain form where no norm behind them would take it out."""
    return plain and norm == "none"


def conv(channels_in: int, channels_out: int, kernel: int, stride: int = 1, *, bias: bool = False) -> nn.Conv2d:
    """A convolution that keeps the size, but for its stride."""
    return nn.Conv2d(channels_in, channels_out, kernel, stride=stride, padding=kernel // 2, bias=bias)


def scaled(channels: int, width: float) -> int:
    """Return `width` times as many channels.

    Raises:
        ValueError: that is no whole number, or none.
    """
    found = channels * width
    if found < 1 or found % 1:
        raise ValueError(f"width must be a factor that leaves a whole number of {channels} channels, got {width:g}")
    return int(found)


def draw_weights(module: nn.Module, generator: torch.Generator) -> None:
    """Draw the weights of linear layers and convolutions from N(0, 2 / fan_in), in their order; biases are zero."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            # He's initial variance, for the ReLU that halves it. Drawn from `generator`, not PyTorch's global stream.
            fan_in = layer.weight[0].numel()
            nn.init.normal_(layer.weight, std=math.sqrt(2 / fan_in), generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class FixedHeadNet(nn.Module):
    """Features, mean over the pixels, and a linear layer to the classes that is a buffer: drawn once, never trained.

    Args:
        features: from images [B, C, H, W] to feature maps [B, width, h, w].
        width: channels of the features.
        num_classes: number of classes.
        head_std: the head's weights are N(0, head_std^2 / width).
        generator: draws the initial weights, in the order of the layers, the head last.
    """

    head: Tensor

    def __init__(
        self, features: nn.Module, width: int, num_classes: int, head_std: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.features = features
        draw_weights(features, generator)
        # A trained head would not be scale-invariant: the logits grow with it.
        head = torch.empty(num_classes, width)
        nn.init.normal_(head, std=head_std / math.sqrt(width), generator=generator)
        self.register_buffer("head", head)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, C, H, W]."""
        # No bias, which would shift the logits by a weight that is not scaled away.
        return nn.functional.linear(self.features(images).mean((2, 3)), self.head)


register_chain(
    FixedHeadNet,
    lambda net: [
        ("features", net.features),
        ("mean", nn.AdaptiveAvgPool2d(1)),
        ("flatten", nn.Flatten()),
        ("head", FixedLinear("head")),
    ],
)


class FixedHeadMLP(FixedHeadNet):
    """The same for features that are vectors: from images [B, C, H, W] to [B, width]."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, C, H, W]."""
        return nn.functional.linear(self.features(images), self.head)


register_chain(FixedHeadMLP, lambda net: [("features", net.features), ("head", FixedLinear("head"))])


def with_head(
    features: nn.Module,
    width: int,
    num_classes: int,
    generator: torch.Generator,
    *,
    plain: bool,
    vectors: bool = False,
    head_std: float = math.sqrt(2),
) -> nn.Module:
    """Features with a head: fixed, or in the plain form a trained linear layer with a bias.

    Args:
        features, width, num_classes, generator, head_std: as of :class:`FixedHeadNet`.
        plain: the form.
        vectors: whether the features are [B, width], else [B, width, h, w].
    """
    if not plain:
        kind = FixedHeadMLP if vectors else FixedHeadNet
        return kind(features, width, num_classes, head_std, generator)
    draw_weights(features, generator)
    head = nn.Linear(width, num_classes)
    nn.init.normal_(head.weight, std=head_std / math.sqrt(width), generator=generator)
    nn.init.zeros_(head.bias)
    mean = [] if vectors else [("mean", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten())]
    layers: list[tuple[str, nn.Module]] = [("features", features), *mean, ("head", head)]
    return FusedSequential(OrderedDict(layers))
