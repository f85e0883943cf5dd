"""Multi-head attention: its projections are linear layers."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from svag_fast.sample_norms.layers.linear import LINEAR
from svag_fast.sample_norms.layers.products import ProductLayer, RecordedCall
from svag_fast.sample_norms.rule import Rule, Scope


class AttentionRule(Rule):
    """softmax(q kᵀ/√d + mask) v between projections that are linear layers, each with its own rows of the weight."""

    knows = frozenset({"in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight"})

    def refusal(self, module: Any) -> str | None:
        """Why this module can't be served with its present options, or None."""
        if not module.batch_first:
            return "the samples must come first: build it with batch_first=True"
        if module.bias_k is not None or module.add_zero_attn:
            return "add_bias_kv and add_zero_attn are not supported"
        return None

    def run(self, scope: Scope, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's forward, such that the backward pass delivers to the scope's recorder."""
        return self._attend(scope, module, *args, **kwargs)

    def _attend(
        self,
        scope: Scope,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if query.dim() != 3:
            raise ValueError(
                f"the query of {scope.label} must be [B, T, embed_dim] for per-sample norms, got {list(query.shape)}"
            )
        if not query.shape[0] == key.shape[0] == value.shape[0]:
            rows = [x.shape[0] for x in (query, key, value)]
            raise ValueError(
                f"query, key and value of {scope.label} must be with the samples first, got {rows} of them"
            )
        if query.dtype.is_complex:
            raise TypeError(f"the inputs of {scope.label} must be real, got {query.dtype}")
        if is_causal and attn_mask is None:
            raise ValueError(
                f"attn_mask of {scope.label} must be given with is_causal, as in torch.nn.MultiheadAttention, got None"
            )
        q, k, v = (self._heads(module, x) for x in self._projections(scope, module, (query, key, value)))
        mask = _merged_mask(attn_mask, key_padding_mask, q.dtype, module.num_heads)
        dropout = module.dropout if module.training else 0.0
        weights = None
        if need_weights:
            scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            weights = F.dropout(weights, dropout) if dropout > 0 else weights
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        return module.out_proj(mixed.transpose(1, 2).flatten(2)), weights

    def _projections(self, scope: Scope, module: Any, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        E = module.embed_dim
        parts = [(0, E), (E, 2 * E), (2 * E, 3 * E)]
        packed = None if module.in_proj_weight is None else scope.alias(module, "in_proj_weight")
        bias = None if module.in_proj_bias is None else scope.alias(module, "in_proj_bias")
        out = []
        for x, part, name in zip(inputs, parts, ("q_proj_weight", "k_proj_weight", "v_proj_weight"), strict=True):
            rows = slice(*part)
            if packed is not None:
                weight, weight_use = packed[rows], scope.use("in_proj_weight", part)
            else:
                weight, weight_use = scope.alias(module, name), scope.use(name)
            bias_use = scope.use("in_proj_bias", part)
            part_bias = None if bias is None else bias[rows]
            call = RecordedCall(LINEAR, scope, weight_use, bias_use, False)
            out.append(ProductLayer.apply(x, weight, part_bias, call))  # type: ignore[no-untyped-call]
        return out

    def _heads(self, module: Any, x: Tensor) -> Tensor:
        """[B, T, E] -> [B, heads, T, E/heads]."""
        return x.reshape(*x.shape[:2], module.num_heads, x.shape[2] // module.num_heads).transpose(1, 2)


def _merged_mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, dtype: torch.dtype, heads: int
) -> Tensor | None:
    """One additive mask that broadcasts to [B, heads, L, S]: -inf where a boolean mask is True."""

    def additive(mask: Tensor) -> Tensor:
        return (
            mask.new_zeros(mask.shape, dtype=dtype).masked_fill_(mask, -math.inf) if mask.dtype == torch.bool else mask
        )

    merged = None
    if attn_mask is not None:
        merged = additive(attn_mask)
        if merged.dim() == 3:
            merged = merged.reshape(-1, heads, *merged.shape[1:])
    if key_padding_mask is not None:
        padding = additive(key_padding_mask)[:, None, None, :]
        merged = padding if merged is None else merged + padding
    return merged
