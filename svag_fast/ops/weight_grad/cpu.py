"""The CPU's ways to a layer's weight gradient with per-sample norms, and the one place that chooses among them.

| way        | what it does                                              | cost a sample, in multiply-adds      |
| ---------- | --------------------------------------------------------- | ------------------------------------ |
| direct     | b_iᵀ a_i in register tiles, squared, then added           | (T + 4) p d                          |
| pixel-gram | tiles summed over samples; norms from products of pixels  | T p d + 8 (T(T+1)/2) (G (C + K) + d) |
| gram       | Linear: the library's product; norms from those of rows   | (T p d + 3 (T(T+1)/2) (p + d)) / 1.5 |

p = K C: K taps of C channels in each of G groups. The constants are ratios of times of bench/test_weight_grad.py,
listed in docs/per_sample_norms.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor

from svag_fast.ops.memory import address
from svag_fast.ops.weight_grad.cpu_layout import LayerShapes, layer_operands
from svag_fast.ops.weight_grad.gram_cpu import gram_sq_norms
from svag_fast.ops.weight_grad.shapes import Geometry, LayerProduct, grad_format, in_sum_dtype

if TYPE_CHECKING:
    from svag_fast._C import LayerOperands

# svag::LoopOrder
SAMPLES_OUTSIDE, TILES_OUTSIDE = 1, 2
_LOOP_ORDERS = {"samples outside": SAMPLES_OUTSIDE, "tiles outside": TILES_OUTSIDE}

# With the samples outside each chunk of them has its own dW, which must stay in a core's cache.
_CACHED_GRAD_BYTES = 1 << 20

# Squaring and adding a sample's tile costs as much as so many positions.
_TILE_END = 4
# A product of pixels (in float64, of small matrices) costs as much as so many multiply-adds of a tile.
_PIXEL_PRODUCT = 8
# A product of rows costs as much as so many of the library's, which is so much faster than tiles of a single tap.
_ROW_PRODUCT, _LIBRARY_SPEED = 3, 1.5


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
    # No convolution goes by the library's gradient: it was faster than both other ways for small 1x1 kernels alone.
    elif T * elements + _PIXEL_PRODUCT * pairs * (groups * (C + math.prod(weight_shape[2:])) + d) < direct_cost:
        return "pixel-gram"
    return "samples outside" if _stays_cached(weight_shape, itemsize) else "tiles outside"


def _stays_cached(weight_shape: Sequence[int], itemsize: int) -> bool:
    return math.prod(weight_shape) * itemsize <= _CACHED_GRAD_BYTES


class _Layer(NamedTuple):
    """What a layer's shapes and strides come to: to work it out each time would cost as much as a small product.

    Attributes:
        operands: the compiled kernels' own description.
        way: see :func:`choose`.
        loop_order: of the direct way, or 0 where another one serves the layer.
        grad_format, grad_strides: of a new gradient; strides of Linear's are filled up to four.
    """

    operands: LayerOperands
    way: str
    loop_order: int
    grad_format: torch.memory_format
    grad_strides: tuple[int, ...]


@functools.lru_cache(maxsize=1024)
def _layer(shapes: LayerShapes) -> _Layer:
    weight_shape = shapes.weight_shape
    positions = math.prod(shapes.output_shape[2:] if len(weight_shape) == 4 else shapes.input_shape[1:2])
    way = choose(weight_shape, positions, shapes.dtype.itemsize, shapes.geometry.groups)
    inputs = torch.empty_strided(shapes.input_shape, shapes.input_strides, dtype=shapes.dtype, device="meta")
    like = grad_format(inputs, weight_shape)
    grad = torch.empty(weight_shape, dtype=shapes.dtype, memory_format=like, device="meta")
    return _Layer(layer_operands(shapes), way, _LOOP_ORDERS.get(way, 0), like, _four(grad.stride()))


def _four(strides: tuple[int, ...]) -> tuple[int, ...]:
    return (*strides, 0, 0)[:4]


_Prepared: TypeAlias = tuple[Tensor, Tensor, _Layer]


def _prepared(product: LayerProduct) -> _Prepared:
    """The operands in the dtype of the sums, and what their shapes come to."""
    x, dy = in_sum_dtype(product.inputs, product.output_grads)
    return x, dy, _layer(LayerShapes.of(x, dy, product.weight_shape, product.geometry))


def serve(product: LayerProduct) -> tuple[Tensor, Tensor, Tensor]:
    """Serve the call in the way that :func:`choose` names."""
    x, dy, layer = _prepared(product)
    product = product._replace(inputs=x, output_grads=dy)  # converted once, whatever the way
    if layer.way == "gram":
        return gram(product)
    if layer.way == "pixel-gram":
        return pixel_gram(product)
    return direct(product, layer.loop_order)


def gram(product: LayerProduct) -> tuple[Tensor, Tensor, Tensor]:
    """Linear's norms from products of rows, its gradient by the library's matrix product."""
    inputs, output_grads, shape, weights, segments, num_segments, _ = product
    a, b = in_sum_dtype(inputs, output_grads)
    sq_norms = gram_sq_norms(product)
    if weights is not None:
        b = b * weights.to(b.dtype)[:, None, None]
    if segments is None:
        return b.flatten(0, 1).T @ a.flatten(0, 1), sq_norms, a.new_empty((0, 0), dtype=torch.float64)
    grads = torch.stack(
        [b[segments == s].flatten(0, 1).T @ a[segments == s].flatten(0, 1) for s in range(num_segments)]
    )
    flat = grads.flatten(1).double()
    return grads.sum(0).view(shape), sq_norms, flat @ flat.T


def pixel_gram(product: LayerProduct) -> tuple[Tensor, Tensor, Tensor]:
    """The norms from products of pixels; the gradient's tiles summed over samples without squaring each."""
    x, _, layer = prepared = _prepared(product)
    grad = torch.empty(product.weight_shape, dtype=x.dtype, device="cpu", memory_format=layer.grad_format)
    segment_gram = _by_segments(product, prepared, grad, TILES_OUTSIDE, sq_norms=None)
    return grad, gram_sq_norms(product), segment_gram


def direct(product: LayerProduct, loop_order: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each sample's product in register tiles: squared, then added (csrc/cpu/kernels/weight_grad/weight_grad.cpp)."""
    x, _, layer = prepared = _prepared(product)
    grad = torch.empty(product.weight_shape, dtype=x.dtype, device="cpu", memory_format=layer.grad_format)
    sq_norms = torch.empty(x.shape[0], dtype=torch.float64, device="cpu")
    return grad, sq_norms, _by_segments(product, prepared, grad, loop_order, sq_norms=sq_norms)


def direct_parts(
    inputs: Tensor,
    output_grads: Tensor,
    weight_shape: Sequence[int],
    geometry: Geometry,
    parts: int,
    *,
    norms: bool = True,
) -> tuple[Sequence[Tensor], Tensor | None] | None:
    """The gradient of each of so many equal parts of the batch, and all norms if asked, in few steps from Python.

    None where another way than the direct one serves the layer, there are more than two parts, or nothing to sum.
    """
    x, dy = in_sum_dtype(inputs, output_grads)
    layer = _layer(LayerShapes(x.dtype, x.shape, x.stride(), dy.shape, dy.stride(), tuple(weight_shape), geometry))
    # Without norms a tile's sum runs on over the samples, so that they may all pass by it.
    batch, loop_order = x.shape[0], layer.loop_order if norms or layer.way == "gram" else TILES_OUTSIDE
    if loop_order == 0 or parts > 2 or x.numel() == 0 or dy.numel() == 0:
        return None
    sq_norms = torch.empty(batch, dtype=torch.float64, device="cpu") if norms else None
    # Each in memory of its own, so that a change in place to one alone shows: one is as far from another as it happens.
    grads = [torch.empty(weight_shape, dtype=x.dtype, device="cpu", memory_format=layer.grad_format)]
    if parts == 2:
        grads.append(torch.empty_like(grads[0]))
    first = address(grads[0], "grad")  # where this one has memory, the other that was made here has it too
    apart = (grads[1].data_ptr() - first) // x.itemsize if parts > 1 else 0
    layer.operands.weight_grad(
        address(x, "inputs"),
        address(dy, "output_grads"),
        [batch] if parts == 1 else [batch // 2, batch],
        first,
        layer.grad_strides,
        0 if sq_norms is None else sq_norms.data_ptr(),
        loop_order,
        torch.get_num_threads(),
        apart,
    )
    return grads, sq_norms


def direct_step(product: LayerProduct, weight: Tensor, step: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """The same, but a finished tile is not stored: the ``weight`` takes its ``step`` (rate, c1, c2, weight decay).

    Returns:
        The samples' squared norms, the two segments' inner products, the weight's squared norm before the step.
    """
    x, _, layer = prepared = _prepared(product)
    cached = layer.way == "pixel-gram" and _stays_cached(product.weight_shape, x.dtype.itemsize)
    loop_order = SAMPLES_OUTSIDE if cached or layer.way == "samples outside" else TILES_OUTSIDE
    sq_norms, weight_sq_norm = (torch.empty(shape, dtype=torch.float64, device="cpu") for shape in (x.shape[:1], ()))
    gram = _by_segments(
        product, prepared, weight, loop_order, sq_norms=sq_norms, step=step, weight_sq_norm=weight_sq_norm
    )
    return sq_norms, gram, weight_sq_norm


def step_of_halves(
    inputs: Tensor, output_grads: Tensor, geometry: Geometry, weight: Tensor, step: Sequence[float], *, norms: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """:func:`direct_step` of two equal halves, in few steps from Python; all norms only if asked."""
    x, dy = in_sum_dtype(inputs, output_grads)
    layer = _layer(LayerShapes(x.dtype, x.shape, x.stride(), dy.shape, dy.stride(), tuple(weight.shape), geometry))
    batch, loop_order = x.shape[0], layer.loop_order if norms and layer.loop_order else TILES_OUTSIDE
    sq_norms = torch.empty(batch, dtype=torch.float64, device="cpu") if norms else None
    gram, weight_sq_norm = (torch.empty(shape, dtype=torch.float64, device="cpu") for shape in ((2, 2), ()))
    layer.operands.weight_grad(
        address(x, "inputs"),
        address(dy, "output_grads"),
        [batch // 2, batch],
        address(weight, "weight"),
        _four(weight.stride()),
        _address(sq_norms, "sq_norms"),
        loop_order,
        torch.get_num_threads(),
        segment_gram=gram.data_ptr(),
        step=step,
        weight_sq_norm=weight_sq_norm.data_ptr(),
    )
    return sq_norms, gram, weight_sq_norm


def _by_segments(
    product: LayerProduct,
    prepared: _Prepared,
    target: Tensor,
    loop_order: int,
    *,
    sq_norms: Tensor | None,
    step: Sequence[float] = (),
    weight_sq_norm: Tensor | None = None,
) -> Tensor:
    """Run the kernel, for weighted samples in any segments; return the segments' inner products [S, S]."""
    weights, segments = product.weights, product.segments
    x, dy, layer = prepared
    # What is made here must live as long as the call.
    w = None if weights is None else weights.double().contiguous()
    order, ends, S = None, [x.shape[0]], 0
    if segments is not None:
        S = product.num_segments
        order = torch.argsort(segments, stable=True)
        ends = torch.bincount(segments, minlength=S).cumsum(0).tolist()
    gram = torch.empty((S, S), dtype=torch.float64, device="cpu")
    layer.operands.weight_grad(
        address(x, "inputs"),
        address(dy, "output_grads"),
        ends,
        address(target, "weight"),
        _four(target.stride()),
        _address(sq_norms, "sq_norms"),
        loop_order,
        torch.get_num_threads(),
        weights=_address(w, "weights"),
        order=_address(order, "segments"),
        segment_gram=address(gram, "segment_gram") if S else 0,
        step=step,
        weight_sq_norm=_address(weight_sq_norm, "weight_sq_norm"),
    )
    return gram


def _address(tensor: Tensor | None, name: str) -> int:
    return 0 if tensor is None else address(tensor, name)
