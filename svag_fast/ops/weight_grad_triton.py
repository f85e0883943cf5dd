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
    inputs, shape, segments = product.inputs, product.weight_shape, product.segments
    w = torch.ones(len(inputs), device=inputs.device) if product.weights is None else product.weights.float()

    def products(weights: Tensor, which: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        memory_format = grad_format(inputs, shape)
        grad = torch.empty(shape, dtype=sum_dtype(inputs), device=inputs.device, memory_format=memory_format)
        return grad, *_tiles(product, weights, which, grad)

    if segments is None or product.num_segments <= 2:
        grad, sq_norms, stats = products(w, segments)
        gram = stats[[0, 2, 2, 1]].view(2, 2)[: product.num_segments, : product.num_segments]
        return grad, sq_norms, gram if segments is not None else gram[:0, :0]
    parts = [products(torch.where(segments == s, w, 0.0), None) for s in range(product.num_segments)]
    flat = torch.stack([grad.flatten() for grad, _, _ in parts]).double()
    total = torch.stack([grad for grad, _, _ in parts]).sum(0)
    return total.contiguous(memory_format=grad_format(inputs, shape)), parts[0][1], flat @ flat.T


def direct_step(product: LayerProduct, weight: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """The same, but a finished tile is not stored: the ``weight`` takes its step there.

    Args:
        product: its weights are those of the means of one or two segments.
        weight: float32, dense in memory; another order than contiguous or channels_last costs a copy.
        coefficients: [5] float64 on the device: lr, l, c1, c2, weight_decay.

    Returns:
        The samples' squared norms [B], and the step's raw statistics [5], float64.
    """
    in_order = weight.is_contiguous() or (weight.dim() == 4 and _channels_last(weight))
    target = weight if in_order else weight.contiguous()
    assert product.weights is not None
    segments = product.segments if product.num_segments == 2 else None
    sq_norms, stats = _tiles(product, product.weights.float(), segments, target, coefficients)
    if not in_order:
        weight.copy_(target)
    return sq_norms, stats


def _channels_last(weight: Tensor) -> bool:
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def _tiles(
    product: LayerProduct, weights: Tensor, segments: Tensor | None, target: Tensor, coefficients: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    from svag_fast.kernels.weight_grad import Convolution, product_tiles

    with torch.cuda.device_of(target):  # type: ignore[no-untyped-call]
        result: tuple[Tensor, Tensor] = product_tiles(
            product.inputs,
            product.output_grads,
            product.weight_shape,
            weights.contiguous(),
            segments,
            Convolution(*product.geometry),
            target=target,
            channels_fastest=target.dim() == 4 and _channels_last(target),
            coefficients=coefficients,
        )
    return result
