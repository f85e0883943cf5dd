"""Which rule each kind of layer of PyTorch has; importing this registers them."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from svag_fast.sample_norms.layers.activation import prelu
from svag_fast.sample_norms.layers.attention import AttentionRule
from svag_fast.sample_norms.layers.conv import ConvRule
from svag_fast.sample_norms.layers.embedding import EmbeddingRule
from svag_fast.sample_norms.layers.linear import LinearRule
from svag_fast.sample_norms.layers.normalization import (
    INSTANCE_NORMS,
    BatchNormRule,
    group_norm,
    instance_norm,
    instance_norm_dims,
    layer_norm,
    rms_norm,
)
from svag_fast.sample_norms.rule import FunctionRule, Rule, register

_OWN = frozenset({"weight", "bias"})

TABLE: dict[type[nn.Module], Rule] = {
    nn.Linear: LinearRule(),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), ConvRule()),
    nn.MultiheadAttention: AttentionRule(),
    nn.GroupNorm: FunctionRule(group_norm, _OWN, lambda module: 2),
    **dict.fromkeys(INSTANCE_NORMS, FunctionRule(instance_norm, _OWN, instance_norm_dims)),
    nn.LayerNorm: FunctionRule(layer_norm, _OWN, lambda module: 1 + len(module.normalized_shape), any_rows=True),
    nn.RMSNorm: FunctionRule(rms_norm, _OWN, lambda module: 1 + len(module.normalized_shape), any_rows=True),
    _BatchNorm: BatchNormRule(),
    nn.PReLU: FunctionRule(prelu, _OWN, lambda module: 1 if module.num_parameters == 1 else 2),
    nn.Embedding: EmbeddingRule(),
}

for kind, rule in TABLE.items():
    register(rule, kind)
