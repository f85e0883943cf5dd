"""The networks of the experiments, by family; each in a scale-invariant and in a plain form (see `layers`)."""

from __future__ import annotations

from svag_fast.experiments.models.gpt import gpt
from svag_fast.experiments.models.invariance import ScaleInvarianceReport, scale_invariance_report
from svag_fast.experiments.models.layers import NORM_EPS, NORM_GROUPS, NORMS, FixedHeadMLP, FixedHeadNet
from svag_fast.experiments.models.names import FAMILIES, build_model, grammar
from svag_fast.experiments.models.residual import BasicBlock, PreActBlock, preresnet, resnet, wide_resnet
from svag_fast.experiments.models.small import digits_mlp, digits_net, mlp
from svag_fast.experiments.models.vgg import VGG_WIDTHS, vgg

__all__ = [
    "FAMILIES",
    "NORMS",
    "NORM_EPS",
    "NORM_GROUPS",
    "VGG_WIDTHS",
    "BasicBlock",
    "FixedHeadMLP",
    "FixedHeadNet",
    "PreActBlock",
    "ScaleInvarianceReport",
    "build_model",
    "digits_mlp",
    "digits_net",
    "gpt",
    "grammar",
    "mlp",
    "preresnet",
    "resnet",
    "scale_invariance_report",
    "vgg",
    "wide_resnet",
]
