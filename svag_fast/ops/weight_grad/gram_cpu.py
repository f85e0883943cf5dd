"""Per-sample squared norms alone, on the CPU: products of rows and of pixels, each pair of positions once.

|b_iᵀ a_i|² = Σ_{t,s} (a_t·a_s)(b_t·b_s), symmetric in t and s. For a convolution a_t·a_s = Σ_k x_{t+k}·x_{s+k}: the
products of pixels, summed over the taps k (pixel-Gram). csrc/cpu/kernels/weight_grad/weight_gram.cpp forms both in
float64, in which a product of float32 is exact, or in float32 where nothing cancels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svag_fast.ops.memory import address
from svag_fast.ops.weight_grad.cpu_layout import LayerShapes, layer_operands
from svag_fast.ops.weight_grad.shapes import LayerProduct, in_sum_dtype


def gram_sq_norms(product: LayerProduct) -> Tensor:
    """Return |b_iᵀ a_i|² [B] in float64; neither dW nor windows nor all T² products at once are held in memory."""
    x, dy = in_sum_dtype(product.inputs, product.output_grads)
    operands = layer_operands(LayerShapes.of(x, dy, product.weight_shape, product.geometry))
    sq_norms = torch.empty(x.shape[0], dtype=torch.float64, device="cpu")
    operands.weight_gram(
        address(x, "inputs"), address(dy, "output_grads"), address(sq_norms, "sq_norms"), torch.get_num_threads()
    )
    return sq_norms
