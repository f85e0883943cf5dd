"""The GPU's ways to a layer's weight gradient with per-sample norms, and the one place that chooses between them.

| way     | what it does                                                               | multiply-adds a sample  |
| ------- | -------------------------------------------------------------------------- | ----------------------- |
| direct  | b_iᵀ a_i in tiles, squared and added (kernels/weight_grad.py)               | ⌈T⌉ ⌈p⌉ ⌈d⌉             |
| library | Σ_{s,t} (a_s·a_t)(b_s·b_t) beside PyTorch's weight gradient (cuBLAS, cuDNN) | S T p d + T² (p + d)    |

⌈ ⌉ is the next multiple of 16, the least tile; S is the number of segments, T the output positions, and for a
convolution p and d are one group's. Arithmetic on datasheet figures, not yet measured: bench/gpu/gpu_bench.py prints
both ways' times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from svag_fast.kernels.device_cache import DeviceCache, is_capturing
from svag_fast.ops.weight_grad.shapes import LayerProduct, grad_format, sum_dtype

# A100: 19.5 and 156 TFLOP/s, two operations a multiply-add, over 2039 GB/s.
_A_BYTE = {"ieee": 4.8, "tf32": 38.0}
# Six launches more of 3 µs each, at the rates above.
_LAUNCHES = {"ieee": 1.8e8, "tf32": 1.4e9}


def why_not(tensors: Sequence[Tensor]) -> str | None:
    """Say why Triton can't serve these inputs: its products are float32's."""
    if tensors[0].dtype == torch.float64:
        return "it has no float64 products"
    span = max(sum((n - 1) * s for n, s in zip(t.shape[1:], t.stride()[1:], strict=True)) for t in tensors)
    return f"a sample spans {span} elements of memory, and it counts them in 32 bits" if span >= 2**31 else None


def choose(
    weight_shape: Sequence[int], samples: int, positions: int, *, groups: int = 1, segments: int = 1, tf32: bool = False
) -> str:
    """Return "direct" or "library" for float32 inputs, by operations and bytes."""
    T, M, N = positions, weight_shape[0] // groups, math.prod(weight_shape[1:])
    precision = "tf32" if tf32 else "ieee"
    # Padding counts: with few positions on a wide layer (T = 1, or 512 channels at 2x2) it is most of a tile.
    direct = math.prod(math.ceil(n / 16) * 16 for n in (T, M, N))
    library = segments * T * M * N
    # A convolution's windows are unfolded into memory, written and read.
    moved = 0 if len(weight_shape) == 2 else 2 * 4 * T * N
    if T > 1:
        # So are the two T x T products of rows.
        library += T * T * (M + N)
        moved += 2 * 2 * 4 * T * T
    saved = groups * (direct - library - _A_BYTE[precision] * moved)
    return "library" if samples * saved > _LAUNCHES[precision] else "direct"


def serve(product: LayerProduct) -> tuple[Tensor, Tensor, Tensor]:
    """Serve the call in the way that :func:`choose` names; half precision directly: PyTorch would round to it."""
    return library(product) if _way(product, len(product.inputs)) == "library" else direct(product)


def _way(product: LayerProduct, samples: int) -> str:
    from svag_fast.kernels.weight_grad import tf32_allowed

    inputs, output_grads, shape = product.inputs, product.output_grads, product.weight_shape
    if inputs.dtype != torch.float32 or not inputs.numel() or not output_grads.numel():
        return "direct"
    return choose(
        shape,
        samples,
        math.prod(output_grads.shape[2:] if inputs.dim() == 4 else inputs.shape[1:2]),
        groups=product.geometry.groups,
        segments=max(1, product.num_segments),
        tf32=tf32_allowed(len(shape) == 2),
    )


def serve_halves(product: LayerProduct) -> tuple[list[Tensor], Tensor] | None:
    """Return the gradient of each half of the samples and all squared norms from one launch; None where :func:`choose`
    would rather have another way. The product has no weights and no segments."""
    if _way(product, len(product.inputs) // 2) == "library":
        return None
    grads = [_new_grad(product) for _ in range(2)]
    sq_norms, _ = _tiles(product, _ones(len(product.inputs), product.inputs.device), None, grads[0], target2=grads[1])
    return grads, sq_norms


def _new_grad(product: LayerProduct) -> Tensor:
    inputs, shape = product.inputs, product.weight_shape
    memory_format = grad_format(inputs, shape)
    return torch.empty(shape, dtype=sum_dtype(inputs), device=inputs.device, memory_format=memory_format)


def library(product: LayerProduct) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's own weight gradient, and the norms from the products of rows beside it. Float32 only."""
    inputs, output_grads, shape, weights, segments, num_segments, geometry = product
    B, G = len(inputs), geometry.groups
    if len(shape) == 2:
        a, b = inputs, output_grads
    else:
        windows = F.unfold(inputs, (shape[2], shape[3]), geometry.dilation, geometry.padding, geometry.stride)
        a = windows.reshape(B * G, -1, windows.shape[-1]).mT
        b = output_grads.reshape(B * G, -1, windows.shape[-1]).mT
    if a.shape[1] == 1:
        squares = a.square().sum((1, 2)).double() * b.square().sum((1, 2)).double()
    else:
        # Rounding may leave a sum of products a little below 0 where the gradient cancels.
        squares = (a @ a.mT * (b @ b.mT)).sum((1, 2), dtype=torch.float64)
    sq_norms = squares.view(B, -1).sum(1).clamp_(min=0)

    def grad(members: Tensor | None) -> Tensor:
        w = torch.ones(B, dtype=torch.float32, device=inputs.device) if weights is None else weights.float()
        weighted = output_grads * w.view(-1, *[1] * (output_grads.dim() - 1))
        if members is not None:  # not by a weight of 0: times inf that is nan
            weighted = torch.where(members.view(-1, *[1] * (output_grads.dim() - 1)), weighted, 0.0)
        if len(shape) == 2:
            return weighted.flatten(0, 1).T @ inputs.flatten(0, 1)
        options = (geometry.stride, geometry.padding, geometry.dilation, False, [0, 0], G, [False, True, False])
        result: Tensor = torch.ops.aten.convolution_backward(weighted, inputs, inputs.new_empty(shape), None, *options)[
            1
        ]
        return result

    members = [None] if segments is None else [segments == s for s in range(num_segments)]
    grads = torch.stack([grad(m) for m in members])
    flat = grads.flatten(1).double()
    gram = flat.new_empty((0, 0)) if segments is None else flat @ flat.T
    return grads.sum(0).contiguous(memory_format=grad_format(inputs, shape)), sq_norms, gram


def direct(product: LayerProduct) -> tuple[Tensor, Tensor, Tensor]:
    """Each sample's product in tiles: squared, then added. Up to two segments take one pass, more one each."""
    inputs, shape, segments = product.inputs, product.weight_shape, product.segments
    w = _ones(len(inputs), inputs.device) if product.weights is None else product.weights.float()

    def products(weights: Tensor, which: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        grad = _new_grad(product)
        return grad, *_tiles(product, weights, which, grad)

    if segments is None or product.num_segments <= 2:
        grad, sq_norms, stats = products(w, segments)
        if stats is None:
            return grad, sq_norms, sq_norms.new_empty((0, 0))
        # Not stats[[0, 2, 2, 1]]: that index is a copy from the host, which waits, and which a capture forbids.
        gram = torch.stack([stats[0], stats[2], stats[2], stats[1]]).view(2, 2)
        return grad, sq_norms, gram[: product.num_segments, : product.num_segments]
    parts = [products(torch.where(segments == s, w, 0.0), None) for s in range(product.num_segments)]
    flat = torch.stack([grad.flatten() for grad, _, _ in parts]).double()
    total = torch.stack([grad for grad, _, _ in parts]).sum(0)
    return total.contiguous(memory_format=grad_format(inputs, shape)), parts[0][1], flat @ flat.T


_ONES: DeviceCache[Tensor] = DeviceCache(64)


def _ones(count: int, device: torch.device) -> Tensor:
    """Float32 ones that nobody may write to: kept, as each layer of a net would else launch a kernel to make them."""

    def make() -> Tensor:
        return torch.ones(count, dtype=torch.float32, device=device)

    if is_capturing(device):  # a launch costs a graph next to nothing
        return make()
    kept: Tensor = _ONES.get(device, count, make, "ones")
    return kept


def direct_step(product: LayerProduct, weight: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """The same, but a finished tile is not stored: the ``weight`` takes its step there.

    Args:
        product: its weights are those of the means of one or two segments.
        weight: float32, dense in memory; another order than contiguous or channels_last costs a copy.
        coefficients: float64 on the device, beginning with lr, its divisor, c1, c2, weight_decay.

    Returns:
        The samples' squared norms [B], and the step's raw statistics [5], float64.
    """
    in_order = weight.is_contiguous() or (weight.dim() == 4 and _channels_last(weight))
    target = weight if in_order else weight.contiguous()
    assert product.weights is not None
    segments = product.segments if product.num_segments == 2 else None
    sq_norms, stats = _tiles(product, product.weights.float(), segments, target, coefficients)
    assert stats is not None
    if not in_order:
        weight.copy_(target)
    return sq_norms, stats


def _channels_last(weight: Tensor) -> bool:
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def _tiles(
    product: LayerProduct,
    weights: Tensor,
    segments: Tensor | None,
    target: Tensor,
    coefficients: Tensor | None = None,
    target2: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    from svag_fast.kernels.weight_grad import Convolution, product_tiles

    with torch.cuda.device_of(target):  # type: ignore[no-untyped-call]
        result: tuple[Tensor, Tensor | None] = product_tiles(
            product.inputs,
            product.output_grads,
            product.weight_shape,
            weights.contiguous(),
            segments,
            Convolution(*product.geometry),
            target=target,
            target2=target2,
            channels_fastest=target.dim() == 4 and _channels_last(target),
            coefficients=coefficients,
        )
    return result
