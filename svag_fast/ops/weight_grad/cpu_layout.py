"""Where a layer's rows are in memory, as the compiled kernels of its products are told; worked out once for a shape."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from svag_fast.ops.weight_grad.shapes import Geometry

if TYPE_CHECKING:
    from svag_fast._C import LayerOperands


class LayerShapes(NamedTuple):
    """What the layout follows from: a key. Both operands are of one dtype, float32 or float64."""

    dtype: torch.dtype
    input_shape: tuple[int, ...]
    input_strides: tuple[int, ...]
    output_shape: tuple[int, ...]
    output_strides: tuple[int, ...]
    weight_shape: tuple[int, ...]
    geometry: Geometry

    @staticmethod
    def of(inputs: Tensor, output_grads: Tensor, weight_shape: Sequence[int], geometry: Geometry) -> LayerShapes:
        """Read the tensors' shapes and strides."""
        return LayerShapes(
            inputs.dtype,
            inputs.shape,
            inputs.stride(),
            output_grads.shape,
            output_grads.stride(),
            tuple(weight_shape),
            geometry,
        )


@functools.lru_cache(maxsize=1024)
def layer_operands(shapes: LayerShapes) -> LayerOperands:
    """Return inputs and output gradients of these shapes and strides as images; the addresses stay the tensors'.

    Linear is a 1x1 convolution over an image of one row, channels last.
    """
    from svag_fast import _C

    dtype, input_shape, input_strides, output_shape, output_strides, weight_shape, geometry = shapes
    is_double = dtype == torch.float64
    if len(weight_shape) == 2:
        (B, T, p), d = input_shape, weight_shape[0]
        (xb, xt, xp), (yb, yt, yd) = input_strides, output_strides
        linear = (B, 1, p, d, 1, T, 1, T, 1, 1, 1, 1, 0, 0, 1, 1)
        return _C.LayerOperands(is_double, (xb, xp, xt, xt), (yb, yd, yt, yt), linear)
    B, C, height, width = input_shape
    xb, xc, xr, xw = input_strides
    (stride_h, stride_w), (pad_h, pad_w), dilation, G = geometry
    if weight_shape[2] == 1 and pad_h == 0:
        # Rows that the stride passes over need not be read.
        height, xr, stride_h = output_shape[2], xr * stride_h, 1
    sizes = (B, G, C // G, weight_shape[0] // G, height, width, *output_shape[2:], *weight_shape[2:])
    geometry_sizes = (stride_h, stride_w, pad_h, pad_w, *dilation)
    return _C.LayerOperands(is_double, (xb, xc, xr, xw), output_strides, (*sizes, *geometry_sizes))
