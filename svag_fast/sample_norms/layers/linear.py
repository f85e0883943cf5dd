"""Linear layers: y_t = W a_t + c."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from svag_fast.ops.weight_grad.op import unchecked_weight_grad
from svag_fast.ops.weight_grad.shapes import Geometry
from svag_fast.sample_norms.layers.products import only_input, recorded
from svag_fast.sample_norms.rule import Rule, Scope
from svag_fast.sample_norms.tape import row_sq_norms


class LinearProduct:
    """y_t = W a_t + c: weight b_iᵀ a_i = Σ_t b_t a_tᵀ; bias Σ_t b_t (the norm of the sum, not the sum of norms)."""

    geometry: Geometry | None = None

    output = staticmethod(F.linear)

    def input_grad(self, b: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The gradient in the input x, of which only the shape matters."""
        return b @ weight

    def plain_weight_grad(self, b: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The gradient of the weight alone, by operations that can be differentiated."""
        return b.flatten(0, -2).T @ x.flatten(0, -2)

    def weight_grad(
        self, b: Tensor, x: Tensor, shape: torch.Size, bias_sq_norms: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The gradient of a weight of the given shape, and |g_i|² [B]; the bias's own are used where they are known."""
        if x.dim() == 2:  # one position: |b aᵀ|² = |b|²|a|², by fewer calls than the op's
            b_sq_norms = row_sq_norms(b) if bias_sq_norms is None else bias_sq_norms
            return b.T @ x, b_sq_norms * row_sq_norms(x)
        return unchecked_weight_grad(x.flatten(1, -2), b.flatten(1, -2), shape, Geometry())

    def sample_weight_grads(self, b: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        """The samples' own gradients of the weight, [B, *shape]."""
        return (
            torch.einsum("btd,btp->bdp", b.flatten(1, -2), x.flatten(1, -2))
            if b.dim() > 2
            else b[:, :, None] * x[:, None]
        )

    def sample_bias_grads(self, b: Tensor) -> Tensor:
        """The samples' own gradients of the bias, [B, d]."""
        return b.flatten(1, -2).sum(1) if b.dim() > 2 else b

    def bias_grad(self, b: Tensor, dtype: torch.dtype) -> Tensor:
        """The gradient of the bias."""
        return b.sum(list(range(b.dim() - 1)), dtype=dtype)


LINEAR = LinearProduct()


class LinearRule(Rule):
    """See LinearProduct."""

    knows = frozenset({"weight", "bias"})
    any_rows = True

    def run(self, scope: Scope, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's forward, such that the backward pass delivers to the scope's recorder."""
        x = args[0] if len(args) == 1 and not kwargs else only_input(*args, **kwargs)
        if x.dim() < 2:
            raise ValueError(
                f"the input of {scope.label} must be [B, ..., in_features] for per-sample norms, got {list(x.shape)}"
            )
        if x.dtype.is_complex or module.weight.dtype.is_complex:
            return super().run(scope, module, args, kwargs)
        return recorded(LINEAR, scope, x)

    def sample_grads(self, module: Any, inputs: tuple[Any, ...], output_grad: Tensor) -> Mapping[str, Tensor]:
        """Of complex layers, whose weight gradient stays PyTorch's: Σ_t b_t conj(a_t)ᵀ, and Σ_t b_t."""
        return {
            "weight": LINEAR.sample_weight_grads(output_grad, inputs[0].conj(), module.weight.shape),
            "bias": LINEAR.sample_bias_grads(output_grad),
        }
