"""Where a layer's rows lie in memory, as the compiled kernels of its products are told; worked out once for a shape."""

from __future__ import annotations

import functools
from typing import NamedTuple

from svag_fast.ops.layer_product import Geometry


class CpuLayout(NamedTuple):
    """Both operands as images: Linear is a 1x1 convolution over an image of one row, channels last.

    Attributes:
        input_strides, output_strides: elements from a sample, channel, row, column to the next.
        sizes: of svag::WeightGradArgs, from ``batch`` to ``dilation_w``.
    """

    input_strides: tuple[int, int, int, int]
    output_strides: tuple[int, int, int, int]
    sizes: tuple[int, ...]


@functools.lru_cache(maxsize=1024)
def cpu_layout(
    input_shape: tuple[int, ...],
    input_strides: tuple[int, ...],
    output_shape: tuple[int, ...],
    output_strides: tuple[int, ...],
    weight_shape: tuple[int, ...],
    geometry: Geometry,
) -> CpuLayout:
    """Return the layout of inputs and output gradients of these shapes and strides; the addresses stay the tensors'."""
    if len(weight_shape) == 2:
        (B, T, p), d = input_shape, weight_shape[0]
        (xb, xt, xp), (yb, yt, yd) = input_strides, output_strides
        return CpuLayout((xb, xp, xt, xt), (yb, yd, yt, yt), (B, 1, p, d, 1, T, 1, T, 1, 1, 1, 1, 0, 0, 1, 1))
    B, C, height, width = input_shape
    xb, xc, xr, xw = input_strides
    yb, yc, yr, yw = output_strides
    (stride_h, stride_w), (pad_h, pad_w), dilation, G = geometry
    if weight_shape[2] == 1 and pad_h == 0:
        # Rows that the stride passes over need not be read.
        height, xr, stride_h = output_shape[2], xr * stride_h, 1
    sizes = (B, G, C // G, weight_shape[0] // G, height, width, *output_shape[2:], *weight_shape[2:])
    return CpuLayout(
        (xb, xc, xr, xw), (yb, yc, yr, yw), (*sizes, stride_h, stride_w, pad_h, pad_w, dilation[0], dilation[1])
    )
