"""Embeddings: only the rows that are looked up have a gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from svag_fast.sample_norms import checks
from svag_fast.sample_norms.layers.sums import all_but_first, wide
from svag_fast.sample_norms.rule import Rule
from svag_fast.sample_norms.tape import row_sq_norms


class EmbeddingRule(Rule):
    """|g_i|² = Σ_v |Σ_{t: index_t = v} b_t|²: only rows that are looked up, padding_idx without."""

    knows = frozenset({"weight"})
    any_rows = True

    def refusal(self, module: Any) -> str | None:
        """Why this module can't be served with its present options, or None."""
        if module.scale_grad_by_freq:
            return "scale_grad_by_freq=True divides by counts over the batch, which couples the samples"
        if module.max_norm is not None:
            return "max_norm rewrites the weight in each forward pass: renormalise it between the steps instead"
        if module.sparse:
            return "sparse=True gives sparse gradients, which have no fused step: use sparse=False"
        return None

    def sample_grads(self, module: Any, inputs: tuple[Any, ...], output_grad: Tensor) -> Mapping[str, Tensor]:
        """Each sample's gradient [B, *shape] of weight and bias."""
        index, b = self._lookups(module, inputs[0], output_grad)
        grads = b.new_zeros(index.shape[0], module.num_embeddings, module.embedding_dim)
        samples = torch.arange(index.shape[0], device=index.device)[:, None].expand_as(index)
        return {"weight": grads.index_put_((samples, index), b, accumulate=True)}

    def sq_norms(
        self, module: Any, inputs: tuple[Any, ...], output_grad: Tensor, shapes: Mapping[str, torch.Size]
    ) -> Mapping[str, Tensor]:
        """|g_i|² [B], of the rows that are looked up alone."""
        index, b = self._lookups(module, inputs[0], output_grad)
        B = index.shape[0]
        samples = torch.arange(B, device=index.device)[:, None]
        keys, inverse = torch.unique(samples * module.num_embeddings + index, return_inverse=True)
        rows = b.new_zeros(keys.numel(), b.shape[-1]).index_add_(0, inverse.flatten(), b.flatten(0, 1))
        out = torch.zeros(B, dtype=torch.float64, device=b.device)
        return {"weight": out.index_add_(0, keys // module.num_embeddings, row_sq_norms(rows))}

    def total(
        self, module: Any, inputs: tuple[Any, ...], output_grad: Tensor, shapes: Mapping[str, torch.Size]
    ) -> dict[str, Tensor]:
        """Σ_i g_i, in double precision."""
        index, b = self._lookups(module, inputs[0], output_grad)
        sums = torch.zeros(shapes["weight"], dtype=checks.double(b).dtype, device=b.device)
        return {"weight": sums.index_add_(0, index.flatten(), checks.double(b).flatten(0, 1))}

    def _lookups(self, module: Any, index: Tensor, output_grad: Tensor) -> tuple[Tensor, Tensor]:
        """Indices [B, T] and their output gradients [B, T, d], zero at the padding index."""
        index = all_but_first(index)
        b = wide(output_grad).reshape(*index.shape, output_grad.shape[-1])
        if module.padding_idx is not None:
            b = b * (index != module.padding_idx)[..., None]
        return index, b
