"""Per-sample squared norms alone, on the CPU: products of rows and of pixels, each pair of positions once.

|b_iᵀ a_i|² = Σ_{t,s} (a_t·a_s)(b_t·b_s), symmetric in t and s. For a convolution a_t·a_s = Σ_k x_{t+k}·x_{s+k}: the
products of pixels, summed over the taps k (pixel-Gram). csrc/cpu/kernels/weight_gram.cpp forms both in float64, in
which a product of float32 is exact, or in float32 where nothing cancels: else the form would lose the digits that do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svag_fast.ops.layer_product import LayerProduct, sum_dtype


def gram_sq_norms(product: LayerProduct) -> Tensor:
    """Return |b_iᵀ a_i|² [B] in float64; neither dW nor windows nor all T² products at once are held in memory."""
    from svag_fast import _C

    inputs, output_grads, shape, *_, geometry = product
    dtype = sum_dtype(inputs)
    if len(shape) == 2:
        # A 1x1 convolution over an image of one row, channels last.
        inputs, output_grads = (t.movedim(-1, 1).unsqueeze(2) for t in (inputs, output_grads))
    x, dy = inputs.to(dtype), output_grads.to(dtype)
    B, G = x.shape[0], geometry.groups
    sizes = [B, G, shape[1], shape[0] // G, *x.shape[2:], *dy.shape[2:], *(shape[2:] or (1, 1))]
    sizes += [*geometry.stride, *geometry.padding, *geometry.dilation]
    sq_norms = torch.empty(B, dtype=torch.float64)
    _C.weight_gram(
        x.data_ptr(),
        dy.data_ptr(),
        dtype == torch.float64,
        x.stride(),
        dy.stride(),
        sizes,
        sq_norms.data_ptr(),
        torch.get_num_threads(),
    )
    return sq_norms
