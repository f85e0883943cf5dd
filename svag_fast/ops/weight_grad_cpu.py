"""The CPU's ways to a layer's weight gradient with per-sample norms."""

from __future__ import annotations

import torch
from torch import Tensor

from svag_fast.ops.layer_product import LayerProduct, grad_format, sum_dtype

# The loop order of svag::LoopOrder; the kernel chooses by the size of dW.
AUTOMATIC, SAMPLES_OUTSIDE, TILES_OUTSIDE = range(3)


def direct(product: LayerProduct, loop_order: int = AUTOMATIC) -> tuple[Tensor, Tensor, Tensor]:
    """Each sample's product in register tiles: squared, then added (csrc/cpu/kernels/weight_grad.cpp)."""
    from svag_fast import _C

    inputs, output_grads, shape, weights, segments, num_segments, geometry = product
    dtype = sum_dtype(inputs)
    grad = torch.empty(shape, dtype=dtype, memory_format=grad_format(inputs, shape))
    if len(shape) == 2:
        # A 1x1 convolution over an image of one row, channels last.
        inputs, output_grads = (t.movedim(-1, 1).unsqueeze(2) for t in (inputs, output_grads))
    x, dy = (t.to(dtype) for t in (inputs, output_grads))
    B, G = x.shape[0], geometry.groups
    kernel = (1, 1) if len(shape) == 2 else (shape[2], shape[3])
    sizes = [B, G, shape[1], shape[0] // G, *x.shape[2:], *dy.shape[2:], *kernel]
    sizes += [*geometry.stride, *geometry.padding, *geometry.dilation]
    w = torch.ones(B, dtype=torch.float64) if weights is None else weights.double().contiguous()
    if segments is None:
        order, ends = torch.arange(B), [B]
    else:
        order = torch.argsort(segments, stable=True)
        ends = torch.bincount(segments, minlength=num_segments).cumsum(0).tolist()
    sq_norms = torch.empty(B, dtype=torch.float64)
    gram = torch.empty((num_segments, num_segments) if segments is not None else (0, 0), dtype=torch.float64)
    _C.weight_grad(
        x.data_ptr(),
        dy.data_ptr(),
        dtype == torch.float64,
        x.stride(),
        dy.stride(),
        sizes,
        w.data_ptr(),
        order.data_ptr(),
        ends,
        grad.data_ptr(),
        [*grad.stride(), 0, 0][:4],
        sq_norms.data_ptr(),
        gram.data_ptr() if segments is not None else 0,
        loop_order,
        torch.get_num_threads(),
    )
    return grad, sq_norms, gram
