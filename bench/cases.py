"""What several benches share: lists of params, nets with seeded weights, and convolutions."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from svag_fast.experiments import models

# Input channels, output channels, image, kernel, stride: those of docs/per_sample_norms.md, and PreResNet-32's others.
CONVOLUTIONS = {
    "3-16, 32x32": (3, 16, 32, 3, 1),
    "16-16, 32x32": (16, 16, 32, 3, 1),
    "16-32, 32x32, stride 2": (16, 32, 32, 3, 2),
    "16-32, 1x1, stride 2": (16, 32, 32, 1, 2),
    "32-32, 16x16": (32, 32, 16, 3, 1),
    "32-64, 16x16, stride 2": (32, 64, 16, 3, 2),
    "32-64, 1x1, stride 2": (32, 64, 16, 1, 2),
    "64-64, 8x8": (64, 64, 8, 3, 1),
    "3-64, 32x32": (3, 64, 32, 3, 1),
    "64-64, 32x32": (64, 64, 32, 3, 1),
    "128-128, 16x16": (128, 128, 16, 3, 1),
    "256-256, 8x8": (256, 256, 8, 3, 1),
    "512-512, 4x4": (512, 512, 4, 3, 1),
    "512-512, 2x2": (512, 512, 2, 3, 1),
}


def preresnet32_shapes() -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = [(16, 3, 3, 3)]
    for stage, width in enumerate((16, 32, 64)):
        shapes += [(width, width if stage == 0 else width // 2, 3, 3)] + [(width, width, 3, 3)] * 9
        shapes += [(width, width if stage == 0 else width // 2, 1, 1)]
    return shapes


def vgg16_shapes() -> list[tuple[int, ...]]:
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    return [(o, i, 3, 3) for i, o in pairwise(widths)]


def digits() -> nn.Module:
    return models.digits_net(generator=torch.Generator().manual_seed(0))


def preresnet32() -> nn.Module:
    return models.preresnet(32, "gn", generator=torch.Generator().manual_seed(0))


def vgg16() -> nn.Module:
    return models.vgg(16, "gn", generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    widths = [784, 1024, 1024, 1024, 10]
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
