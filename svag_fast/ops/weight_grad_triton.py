"""The GPU's way to a layer's weight gradient with per-sample norms: kernels/weight_grad.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from svag_fast.ops.layer_product import LayerProduct, grad_format, sum_dtype


def why_not(tensors: Sequence[Tensor]) -> str | None:
    """Say why Triton can't serve these inputs: its products are float32's."""
    if tensors[0].dtype == torch.float64:
        return "it has no float64 products"
    span = max(sum((n - 1) * s for n, s in zip(t.shape[1:], t.stride()[1:], strict=True)) for t in tensors)
    return f"a sample spans {span} elements of memory, and it counts them in 32 bits" if span >= 2**31 else None


def direct(product: LayerProduct) -> tuple[Tensor, Tensor, Tensor]:
    """Each sample's product in tiles: squared, then added. Up to two segments take one pass, more one each."""
    from svag_fast.kernels.weight_grad import Convolution, product_tiles

    inputs, shape, segments = product.inputs, product.weight_shape, product.segments
    B, device = inputs.shape[0], inputs.device
    w = torch.ones(B, device=device) if product.weights is None else product.weights.float()
    last = grad_format(inputs, shape) == torch.channels_last

    def products(weights: Tensor, which: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        grad = torch.empty(shape, dtype=sum_dtype(inputs), device=device, memory_format=grad_format(inputs, shape))
        with torch.cuda.device_of(inputs):  # type: ignore[no-untyped-call]
            sq_norms, stats = product_tiles(
                inputs,
                product.output_grads,
                shape,
                weights.contiguous(),
                which,
                Convolution(*product.geometry),
                target=grad,
                channels_fastest=last,
            )
        return grad, sq_norms, stats

    if segments is None or product.num_segments <= 2:
        grad, sq_norms, stats = products(w, segments)
        gram = stats[[0, 2, 2, 1]].view(2, 2)[: product.num_segments, : product.num_segments]
        return grad, sq_norms, gram if segments is not None else gram[:0, :0]
    parts = [products(torch.where(segments == s, w, 0.0), None) for s in range(product.num_segments)]
    flat = torch.stack([grad.flatten() for grad, _, _ in parts]).double()
    total = torch.stack([grad for grad, _, _ in parts]).sum(0)
    return total.contiguous(memory_format=grad_format(inputs, shape)), parts[0][1], flat @ flat.T
