"""The CPU's ways to a layer's weight gradient with per-sample norms, and the one place that chooses among them.

| way        | what it does                                              | cost a sample, in multiply-adds      |
| ---------- | --------------------------------------------------------- | ------------------------------------ |
| direct     | b_iᵀ a_i in register tiles, squared, then added           | (T + 4) p d                          |
| pixel-gram | tiles summed over samples; norms from products of pixels  | T p d + 8 (T(T+1)/2) (G (C + K) + d) |
| gram       | Linear: the library's product; norms from those of rows   | (T p d + 3 (T(T+1)/2) (p + d)) / 1.5 |

p = K C: K taps of C channels in each of G groups. The constants are ratios of times of bench/test_weight_grad.py,
listed in docs/per_sample_norms.md: squaring and adding a sample's tile costs as much as 4 positions; a product of
pixels (in float64, of small matrices) as much as 8 multiply-adds of a tile; one of rows as much as 3 of the library's,
whose matrix product is 1.5 times faster than tiles of a single tap. In that bench the library's weight gradient of a
convolution was faster than both other ways for small 1x1 kernels alone, so no convolution goes by it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor

from svag_fast.ops.cpu_layout import layer_operands
from svag_fast.ops.layer_product import Geometry, LayerProduct, grad_format, sum_dtype
from svag_fast.ops.weight_gram_cpu import gram_sq_norms

if TYPE_CHECKING:
    from svag_fast._C import LayerOperands

# svag::LoopOrder
SAMPLES_OUTSIDE, TILES_OUTSIDE = 1, 2
_LOOP_ORDERS = {"samples outside": SAMPLES_OUTSIDE, "tiles outside": TILES_OUTSIDE}

# With the samples outside each chunk of them has its own dW, which must stay in a core's cache.
_CACHED_GRAD_BYTES = 1 << 20

# What a way costs beside multiply-adds: see the table above.
_TILE_END, _PIXEL_PRODUCT, _ROW_PRODUCT, _LIBRARY_SPEED = 4, 8, 3, 1.5


@functools.lru_cache(maxsize=1024)
def choose(weight_shape: tuple[int, ...], positions: int, itemsize: int = 4, groups: int = 1) -> str:
    """Return how a layer with ``positions`` (T) output positions a sample is served, by operations and cache.

    "gram" (Linear alone), "pixel-gram" (convolutions alone), or the direct way with "samples outside" (narrow layers:
    dW in cache, a sample packed at a time) or with "tiles outside" (wide layers: a tile of dW in the first-level cache
    while all samples pass by).
    """
    T, pairs = positions, positions * (positions + 1) // 2
    elements = math.prod(weight_shape)
    d, C = weight_shape[:2]
    direct_cost = (T + _TILE_END) * elements
    if len(weight_shape) == 2:
        if T == 1 or T * elements + _ROW_PRODUCT * pairs * (C + d) < _LIBRARY_SPEED * direct_cost:
            return "gram"
    elif T * elements + _PIXEL_PRODUCT * pairs * (groups * (C + math.prod(weight_shape[2:])) + d) < direct_cost:
        return "pixel-gram"
    return "samples outside" if _stays_cached(weight_shape, itemsize) else "tiles outside"


def _stays_cached(weight_shape: Sequence[int], itemsize: int) -> bool:
    return math.prod(weight_shape) * itemsize <= _CACHED_GRAD_BYTES


class _Layer(NamedTuple):
    """What a layer's shapes and strides come to: to work it out each time would cost as much as a small product.

    Attributes:
        operands: for the compiled kernels.
        way: see :func:`choose`.
        grad_format: the gradient's memory format.
    """

    operands: LayerOperands
    way: str
    grad_format: torch.memory_format


@functools.lru_cache(maxsize=1024)
def _layer(
    dtype: torch.dtype,
    input_shape: tuple[int, ...],
    input_strides: tuple[int, ...],
    output_shape: tuple[int, ...],
    output_strides: tuple[int, ...],
    weight_shape: tuple[int, ...],
    geometry: Geometry,
) -> _Layer:
    operands = layer_operands(
        dtype == torch.float64, input_shape, input_strides, output_shape, output_strides, weight_shape, geometry
    )
    positions = math.prod(output_shape[2:] if len(weight_shape) == 4 else input_shape[1:2])
    way = choose(weight_shape, positions, dtype.itemsize, geometry.groups)
    inputs = torch.empty_strided(input_shape, input_strides, device="meta")
    return _Layer(operands, way, grad_format(inputs, weight_shape))


_Prepared: TypeAlias = tuple[Tensor, Tensor, _Layer]


def _prepare(product: LayerProduct) -> _Prepared:
    """The operands in the dtype of the sums, and what their shapes come to."""
    dtype = sum_dtype(product.inputs)
    x, dy = (t if t.dtype == dtype else t.to(dtype) for t in product[:2])
    shape, geometry = tuple(product.weight_shape), product.geometry
    return x, dy, _layer(dtype, x.shape, x.stride(), dy.shape, dy.stride(), shape, geometry)


def serve(product: LayerProduct) -> tuple[Tensor, Tensor, Tensor]:
    """Serve the call in the way that :func:`choose` names."""
    prepared = _prepare(product)
    way = prepared[2].way
    if way == "gram":
        return gram(product)
    if way == "pixel-gram":
        return pixel_gram(product)
    return direct(product, _LOOP_ORDERS[way], prepared)


def gram(product: LayerProduct) -> tuple[Tensor, Tensor, Tensor]:
    """Linear's norms from products of rows, its gradient by the library's matrix product."""
    inputs, output_grads, shape, weights, segments, num_segments, _ = product
    dtype = sum_dtype(inputs)
    a, b = inputs.to(dtype), output_grads.to(dtype)
    sq_norms = gram_sq_norms(product)
    if weights is not None:
        b = b * weights.to(dtype)[:, None, None]
    if segments is None:
        return b.flatten(0, 1).T @ a.flatten(0, 1), sq_norms, a.new_empty((0, 0), dtype=torch.float64)
    grads = torch.stack(
        [b[segments == s].flatten(0, 1).T @ a[segments == s].flatten(0, 1) for s in range(num_segments)]
    )
    flat = grads.flatten(1).double()
    return grads.sum(0).view(shape), sq_norms, flat @ flat.T


def pixel_gram(product: LayerProduct) -> tuple[Tensor, Tensor, Tensor]:
    """The norms from products of pixels; the gradient's tiles summed over samples without squaring each."""
    prepared = _prepare(product)
    grad = _new_grad(product, prepared)
    _, segment_gram, _ = _call(product, prepared, grad, TILES_OUTSIDE, norms=False)
    return grad, gram_sq_norms(product), segment_gram


def direct(product: LayerProduct, loop_order: int, prepared: _Prepared | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Each sample's product in register tiles: squared, then added (csrc/cpu/kernels/weight_grad.cpp)."""
    prepared = prepared or _prepare(product)
    grad = _new_grad(product, prepared)
    sq_norms, gram, _ = _call(product, prepared, grad, loop_order)
    return grad, sq_norms, gram


def direct_parts(product: LayerProduct, parts: int) -> tuple[Tensor, Tensor] | None:
    """The gradient of each of so many equal parts of the batch, [parts, *shape], and all norms, from one call.

    None where another way than the direct one serves the layer.
    """
    prepared = _prepare(product)
    loop_order = _LOOP_ORDERS.get(prepared[2].way)
    if loop_order is None:
        return None
    grads = torch.empty(parts, *product.weight_shape, dtype=prepared[0].dtype)
    sq_norms, _, _ = _call(product, prepared, grads[0], loop_order, parts=parts)
    return grads, sq_norms


def direct_step(product: LayerProduct, weight: Tensor, step: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """The same, but a finished tile is not stored: the ``weight`` takes its ``step`` (rate, c1, c2, weight decay).

    Returns:
        The samples' squared norms, the two segments' inner products, the weight's squared norm before the step.
    """
    prepared = _prepare(product)
    way = prepared[2].way
    cached = way == "pixel-gram" and _stays_cached(product.weight_shape, prepared[0].dtype.itemsize)
    loop_order = SAMPLES_OUTSIDE if cached or way == "samples outside" else TILES_OUTSIDE
    sq_norms, gram, weight_sq_norm = _call(product, prepared, weight, loop_order, step)
    assert weight_sq_norm is not None
    return sq_norms, gram, weight_sq_norm


def _new_grad(product: LayerProduct, prepared: _Prepared) -> Tensor:
    x, _, layer = prepared
    return torch.empty(product.weight_shape, dtype=x.dtype, memory_format=layer.grad_format)


def _call(
    product: LayerProduct,
    prepared: _Prepared,
    target: Tensor,
    loop_order: int,
    step: Sequence[float] = (),
    *,
    norms: bool = True,
    parts: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None]:
    from svag_fast import _C

    weights, segments, num_segments = product.weights, product.segments, product.num_segments
    x, dy, layer = prepared
    w = None if weights is None else weights.double().contiguous()
    rows = x.shape[0] // parts
    order, ends, S = None, [rows * (i + 1) for i in range(parts)], 0
    if segments is not None:
        S = num_segments
        order = torch.argsort(segments, stable=True)
        ends = torch.bincount(segments, minlength=S).cumsum(0).tolist()
    sq_norms = torch.empty(x.shape[0], dtype=torch.float64)
    gram = torch.empty((S, S), dtype=torch.float64)
    weight_sq_norm = torch.empty((), dtype=torch.float64) if step else None
    _C.weight_grad(
        layer.operands,
        x.data_ptr(),
        dy.data_ptr(),
        0 if w is None else w.data_ptr(),
        0 if order is None else order.data_ptr(),
        ends,
        target.data_ptr(),
        [*target.stride(), 0, 0][:4],
        target.numel() if parts > 1 else 0,
        sq_norms.data_ptr() if norms else 0,
        gram.data_ptr() if S else 0,
        loop_order,
        torch.get_num_threads(),
        step,
        0 if weight_sq_norm is None else weight_sq_norm.data_ptr(),
    )
    return sq_norms, gram, weight_sq_norm
