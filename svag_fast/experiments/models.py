"""The networks of the experiments, in the scale-invariant form that the paper's theory of weight decay speaks of.

Scale-invariant means L(c x) = L(x) for every c > 0 and trained weights x: every convolution is followed by a
normalisation before anything that is not homogeneous, no normalisation has parameters, and the last linear layer keeps
its initial value. With `norm="none"` the same nets are built without normalisation (not scale-invariant).
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svag_fast.experiments.config import check_range
from svag_fast.nn.fuse import FusedSequential, norm_then_relu
from svag_fast.replicas.chain import FixedLinear, register_chain

NORMS = ("bn", "gn", "none")
NORM_EPS = 1e-12  # the theory wants 0; this only keeps a constant feature map from dividing by zero
NORM_GROUPS = 8

VGG_WIDTHS: dict[int, tuple[tuple[int, ...], ...]] = {
    11: ((64,), (128,), (256,) * 2, (512,) * 2, (512,) * 2),
    13: ((64,) * 2, (128,) * 2, (256,) * 2, (512,) * 2, (512,) * 2),
    16: ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3),
    19: ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4),
}


def _norm(kind: str, channels: int) -> nn.Module:
    if kind == "bn":
        return nn.BatchNorm2d(channels, eps=NORM_EPS, affine=False)
    if kind == "gn":
        return nn.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPS, affine=False)
    if kind == "none":
        return nn.Identity()
    raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {kind!r}")


def _conv(channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, kernel, stride=stride, padding=kernel // 2, bias=False)


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
        for module in features.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                # He's initial variance, for the ReLU that halves it. Drawn from `generator`, not PyTorch's global
                # stream.
                fan_in = module.weight[0].numel()
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_in), generator=generator)
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


class PreActBlock(nn.Module):
    """norm, ReLU, 3x3, norm, ReLU, 3x3, added to the input; `project`: by a 1x1 convolution, normalised before."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, norm: str, project: bool) -> None:
        super().__init__()
        self.norm1 = _norm(norm, channels_in)
        self.conv1 = _conv(channels_in, channels_out, 3, stride)
        self.norm2 = _norm(norm, channels_out)
        self.conv2 = _conv(channels_out, channels_out, 3)
        # Its normalisation has no parameters and sees what the branch's first one sees, so they are one.
        self.shortcut = _conv(channels_in, channels_out, 1, stride) if project else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels_in, H, W] to [B, channels_out, H / stride, W / stride]."""
        if self.shortcut is None:
            shortcut, rectified = x, norm_then_relu(self.norm1, x)
        else:
            normalised = self.norm1(x)
            shortcut, rectified = self.shortcut(normalised), torch.relu(normalised)
        branch: Tensor = self.conv2(norm_then_relu(self.norm2, self.conv1(rectified)))
        return shortcut + branch


def digits_mlp(*, inputs: int = 64, num_classes: int = 10, generator: torch.Generator) -> FixedHeadMLP:
    """The net of the default experiment: three linear layers of 64 without bias, each with LayerNorm and ReLU behind.

    12,288 trained parameters on 64 inputs.

    Args:
        inputs: values of an image.
        num_classes: number of classes.
        generator: draws the initial weights.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for size in (inputs, 64, 64):
        norm = nn.LayerNorm(64, eps=NORM_EPS, elementwise_affine=False)
        layers += [nn.Linear(size, 64, bias=False), norm, nn.ReLU()]
    return FixedHeadMLP(nn.Sequential(*layers), 64, num_classes, 4.0, generator)


def digits_net(*, in_channels: int = 1, num_classes: int = 10, generator: torch.Generator) -> FixedHeadNet:
    """A small convolutional net: three 3x3 convolutions (16, 32 with stride 2, 32), GroupNorm, ReLU.

    13,968 trained parameters on one-channel images.
    """
    layers: list[nn.Module] = []
    for channels_in, channels_out, stride in ((in_channels, 16, 1), (16, 32, 2), (32, 32, 1)):
        layers += [_conv(channels_in, channels_out, 3, stride), _norm("gn", channels_out), nn.ReLU()]
    return FixedHeadNet(FusedSequential(*layers), 32, num_classes, 4.0, generator)


def preresnet(
    depth: int = 32,
    norm: str = "gn",
    width: int = 1,
    *,
    in_channels: int = 3,
    num_classes: int = 10,
    generator: torch.Generator,
) -> FixedHeadNet:
    """PreResNet-(6n+2): three stages of n pre-activation blocks of 16, 32 and 64 times `width` channels.

    Raises:
        ValueError: depth is not 6n + 2 with n >= 1, width < 1, or an unknown norm.
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ValueError(f"PreResNet's depth must be 6n + 2 (8, 14, 20, ..., 32, ...), got {depth}")
    if width < 1:
        raise ValueError(f"width must be a positive integer, got {width}")
    channels = 16 * width
    layers: list[nn.Module] = [_conv(in_channels, channels, 3)]
    for stage in range(3):
        channels_out = 16 * width * 2**stage
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(PreActBlock(channels, channels_out, stride, norm, project=block == 0))
            channels = channels_out
    # The blocks end in a sum: without this norm the logits would grow with the weights.
    layers.append(_norm(norm, channels))
    return FixedHeadNet(FusedSequential(*layers), channels, num_classes, math.sqrt(2), generator)


def vgg(
    depth: int = 16,
    norm: str = "gn",
    width: int = 1,
    *,
    in_channels: int = 3,
    num_classes: int = 10,
    generator: torch.Generator,
) -> FixedHeadNet:
    """VGG-11, 13, 16 or 19 for small images: 3x3 convolution, norm, ReLU; average pooling; one fixed linear layer.

    Raises:
        ValueError: an unknown depth or norm, or width < 1.
    """
    if depth not in VGG_WIDTHS:
        raise ValueError(f"VGG's depth must be one of {', '.join(map(str, VGG_WIDTHS))}, got {depth}")
    if width < 1:
        raise ValueError(f"width must be a positive integer, got {width}")
    layers: list[nn.Module] = []
    channels = in_channels
    for stage, widths in enumerate(VGG_WIDTHS[depth]):
        # Before each stage but the first: the pooling behind the last one is part of the mean over all pixels.
        if stage:
            layers.append(nn.AvgPool2d(2))
        for channels_out in (width * w for w in widths):
            layers += [_conv(channels, channels_out, 3), _norm(norm, channels_out), nn.ReLU()]
            channels = channels_out
    return FixedHeadNet(FusedSequential(*layers), channels, num_classes, math.sqrt(2), generator)


_MODEL_NAME = re.compile(r"(?P<family>preresnet|vgg)(?P<depth>\d+)-(?P<norm>bn|gn|none)(?:-w(?P<width>\d+))?")


def build_model(name: str, *, in_channels: int, num_classes: int, seed: int = 0, pixels: int = 64) -> FixedHeadNet:
    """Build a net by its name, with initial weights that depend on the name, the shapes and `seed` alone.

    Args:
        name: "digits-mlp", "digits-net", or "preresnet<depth>-<norm>[-w<width>]", or "vgg<depth>-<norm>[-w<width>]",
            with norm bn, gn or none: "preresnet32-gn", "vgg16-bn", "preresnet32-bn-w4".
        in_channels: channels of the images.
        num_classes: number of classes.
        seed: of the initial weights.
        pixels: of an image's channel; it matters to "digits-mlp" alone.

    Raises:
        ValueError: no net has that name.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    if name == "digits-mlp":
        return digits_mlp(inputs=in_channels * pixels, num_classes=num_classes, generator=generator)
    if name == "digits-net":
        return digits_net(in_channels=in_channels, num_classes=num_classes, generator=generator)
    match = _MODEL_NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            "model must be digits-mlp, digits-net, preresnet<depth>-<norm> or vgg<depth>-<norm>, with norm bn, gn or "
            f"none and optionally -w<width>, such as preresnet32-gn or vgg16-bn-w2, got {name!r}"
        )
    for part in ("depth", "width"):
        check_range(part, int(match[part] or 1))
    build: Callable[..., FixedHeadNet] = preresnet if match["family"] == "preresnet" else vgg
    return build(
        int(match["depth"]),
        match["norm"],
        int(match["width"] or 1),
        in_channels=in_channels,
        num_classes=num_classes,
        generator=generator,
    )


@dataclass(frozen=True)
class ScaleInvarianceReport:
    """How far a net's loss is from scale-invariant; each figure is relative, and rounding alone leaves some 1e-6.

    Attributes:
        loss_change: |L(c x) - L(x)| / |L(x)|.
        radial_gradient: |<grad L(x), x>| / (|grad L(x)| |x|).
        gradient_change: |c grad L(c x) - grad L(x)| / |grad L(x)|.
    """

    loss_change: float
    radial_gradient: float
    gradient_change: float

    def holds(self, tolerance: float = 1e-3) -> bool:
        """Whether all three are within `tolerance` (False where one is not a number)."""
        return max(self.loss_change, self.radial_gradient) <= tolerance and self.gradient_change <= tolerance


def scale_invariance_report(
    model: nn.Module, inputs: Tensor, targets: Tensor, *, scale: float = 3.0
) -> ScaleInvarianceReport:
    """Measure L(c x) = L(x), <grad L(x), x> = 0 and grad L(c x) = grad L(x) / c on one batch of cross-entropy.

    Args:
        model: maps `inputs` to logits; its trained parameters are x. It is copied, not changed.
        inputs: [B, ...] one batch.
        targets: [B] class indices.
        scale: c > 0.

    Raises:
        ValueError: scale is not positive, or the model has no trained parameter.
    """
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    model = copy.deepcopy(model)
    weights = [p for p in model.parameters() if p.requires_grad]
    if not weights:
        raise ValueError("the model must be one with a trained parameter to scale, got none")

    def loss_and_gradient() -> tuple[Tensor, Tensor]:
        loss = nn.functional.cross_entropy(model(inputs), targets)
        # A weight that the loss doesn't use has the gradient 0, and is scale-invariant.
        gradients = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        return loss.detach().double(), torch.cat([g.flatten() for g in gradients]).double()

    loss, gradient = loss_and_gradient()
    flat = torch.cat([w.detach().flatten() for w in weights]).double()
    with torch.no_grad():
        for weight in weights:
            weight.mul_(scale)
    scaled_loss, scaled_gradient = loss_and_gradient()
    return ScaleInvarianceReport(
        loss_change=float((scaled_loss - loss).abs() / loss.abs()),
        radial_gradient=float((gradient @ flat).abs() / (gradient.norm() * flat.norm())),
        gradient_change=float((scale * scaled_gradient - gradient).norm() / gradient.norm()),
    )
