"""What enters the product b_iᵀ a_i of a Linear or Conv2d layer: checked once, for every op that forms it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Geometry(NamedTuple):
    """A convolution's options, each (vertical, horizontal), as in :func:`torch.nn.functional.conv2d`."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


class LayerProduct(NamedTuple):
    """Checked arguments: Linear's tensors are [B, T, p] and [B, T, d], padding is equal on both sides."""

    inputs: Tensor
    output_grads: Tensor
    weight_shape: list[int]
    weights: Tensor | None
    segments: Tensor | None
    num_segments: int
    geometry: Geometry


def sum_dtype(inputs: Tensor) -> torch.dtype:
    """The dtype in which sums are formed and the gradient is returned."""
    return torch.float64 if inputs.dtype == torch.float64 else torch.float32


def in_sum_dtype(inputs: Tensor, output_grads: Tensor) -> tuple[Tensor, Tensor]:
    """Both operands in the dtype of the sums: themselves where they have it."""
    dtype = sum_dtype(inputs)
    return (
        inputs if inputs.dtype == dtype else inputs.to(dtype),
        output_grads if output_grads.dtype == dtype else output_grads.to(dtype),
    )


def grad_format(inputs: Tensor, weight_shape: Sequence[int]) -> torch.memory_format:
    """The memory format of the gradient: a convolution's follows its inputs, as in PyTorch."""
    last = (
        len(weight_shape) == 4
        and inputs.is_contiguous(memory_format=torch.channels_last)
        and not inputs.is_contiguous()
    )
    return torch.channels_last if last else torch.contiguous_format


def layer_product(
    inputs: Tensor,
    output_grads: Tensor,
    weight_shape: Sequence[int],
    weights: Tensor | None = None,
    segments: Tensor | Sequence[int] | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> LayerProduct:
    """Check the arguments of :func:`svag_fast.ops.weight_grad_and_sq_norms` and bring them into one form.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: shapes, devices or options that don't fit each other; the message names the argument.
    """
    shape = _check_tensors(inputs, output_grads, weight_shape)
    geometry = Geometry(
        _pair("stride", stride, 1), _padding(padding, shape, dilation), _pair("dilation", dilation, 1), int(groups)
    )
    if len(shape) == 2:
        if geometry != Geometry():
            raise ValueError(
                f"stride, padding, dilation and groups belong to a convolution, but weight_shape {shape} has 2 "
                "dimensions (Linear)"
            )
        B, T = inputs.shape[0], math.prod(inputs.shape[1:-1])
        inputs, output_grads = inputs.reshape(B, T, shape[1]), output_grads.reshape(B, T, shape[0])
    else:
        if padding == "same":
            inputs, geometry = _pad_same(inputs, shape, geometry)
        _check_convolution(inputs, output_grads, shape, geometry)
    return LayerProduct(
        inputs, output_grads, shape, _check_weights(weights, inputs), *_check_segments(segments, inputs), geometry
    )


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _check_tensors(inputs: Tensor, output_grads: Tensor, weight_shape: Sequence[int]) -> list[int]:
    for name, tensor in (("inputs", inputs), ("output_grads", output_grads)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}: expected a tensor")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} is {tensor.layout}: expected a dense (strided) tensor")
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name} is {tensor.dtype}: expected one of {', '.join(map(str, _DTYPES))}")
    if output_grads.dtype != inputs.dtype:
        raise TypeError(f"output_grads is {output_grads.dtype}, but inputs is {inputs.dtype}: expected one dtype")
    if output_grads.device != inputs.device:
        raise ValueError(f"output_grads is on {output_grads.device}, but inputs on {inputs.device}")
    shape = [int(n) for n in weight_shape]
    if len(shape) not in (2, 4) or min(shape) < (len(shape) == 4):
        raise ValueError(f"weight_shape is {shape}: expected [d, p] (Linear) or [O, C / groups, k_h, k_w] (Conv2d)")
    if len(shape) == 2:
        if inputs.dim() < 2 or inputs.shape[-1] != shape[1]:
            raise ValueError(
                f"inputs has shape {list(inputs.shape)}: expected [B, *, {shape[1]}], as weight_shape says"
            )
        if output_grads.shape != (*inputs.shape[:-1], shape[0]):
            raise ValueError(
                f"output_grads has shape {list(output_grads.shape)}: expected {[*inputs.shape[:-1], shape[0]]}"
            )
    elif inputs.dim() != 4:
        raise ValueError(f"inputs has shape {list(inputs.shape)}: expected [B, C, H, W] for a 4-dimensional weight")
    return shape


def _check_convolution(inputs: Tensor, output_grads: Tensor, shape: list[int], geometry: Geometry) -> None:
    stride, padding, dilation, groups = geometry
    if groups < 1 or shape[0] % groups:
        raise ValueError(f"groups is {groups}: expected a divisor of the {shape[0]} output channels in weight_shape")
    B, C, H, W = inputs.shape
    if shape[1] * groups != C:
        raise ValueError(
            f"inputs has {C} channels: expected {shape[1] * groups} (weight_shape {shape}, groups {groups})"
        )
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip((H, W), padding, dilation, shape[2:], stride, strict=True)
    ]
    if min(size) < 1:
        raise ValueError(f"the kernel of weight_shape {shape} is larger than the padded inputs {list(inputs.shape)}")
    if output_grads.shape != (B, shape[0], *size):
        raise ValueError(
            f"output_grads has shape {list(output_grads.shape)}: expected {[B, shape[0], *size]} for inputs "
            f"{list(inputs.shape)}, stride {stride}, padding {padding}, dilation {dilation}"
        )


def _check_weights(weights: Tensor | None, inputs: Tensor) -> Tensor | None:
    if weights is None:
        return None
    if not isinstance(weights, Tensor) or weights.dtype not in _DTYPES:
        raise TypeError("weights must be a floating-point tensor, one value a sample")
    if weights.shape != inputs.shape[:1]:
        raise ValueError(f"weights has shape {list(weights.shape)}: expected [{inputs.shape[0]}], one a sample")
    if weights.device != inputs.device:
        raise ValueError(f"weights is on {weights.device}, but inputs on {inputs.device}")
    return weights


def _check_segments(segments: Tensor | Sequence[int] | None, inputs: Tensor) -> tuple[Tensor | None, int]:
    if segments is None:
        return None, 0
    if isinstance(segments, Tensor):
        if segments.dtype not in _INTEGERS:
            raise TypeError(f"segments is {segments.dtype}: expected integers")
        low, high = (int(segments.min()), int(segments.max())) if segments.numel() else (0, -1)
    else:
        if not all(isinstance(s, int) for s in segments):
            raise TypeError(f"segments is {segments!r}: expected integers")
        # Bounds from the list itself: torch.compile then knows the number of segments.
        low, high = min(segments, default=0), max(segments, default=-1)
        segments = torch.tensor(segments, dtype=torch.int64)
    if segments.shape != inputs.shape[:1]:
        raise ValueError(f"segments has shape {list(segments.shape)}: expected [{inputs.shape[0]}], one a sample")
    if low < 0:
        raise ValueError(f"segments holds {low}: expected integers >= 0")
    return segments.to(inputs.device, torch.int64), high + 1


def _pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(v, int) and v >= least for v in pair):
        raise ValueError(f"{name} is {value!r}: expected an integer >= {least} or two of them")
    return (pair[0], pair[1])


def _padding(padding: int | str | Sequence[int], shape: list[int], dilation: int | Sequence[int]) -> tuple[int, int]:
    if not isinstance(padding, str):
        return _pair("padding", padding, 0)
    if padding not in ("same", "valid"):
        raise ValueError(f"padding is {padding!r}: expected integers, 'valid' or 'same'")
    if padding == "valid" or len(shape) == 2:
        return (0, 0)
    dv, dh = _pair("dilation", dilation, 1)
    return (dv * (shape[2] - 1) // 2, dh * (shape[3] - 1) // 2)


def _pad_same(inputs: Tensor, shape: list[int], geometry: Geometry) -> tuple[Tensor, Geometry]:
    """An even kernel needs one more row or column of zeros at the end than at the start, as in PyTorch."""
    if geometry.stride != (1, 1):
        raise ValueError(f"padding='same' needs stride 1, not {geometry.stride}")
    bottom, right = (
        d * (k - 1) - 2 * p for d, k, p in zip(geometry.dilation, shape[2:], geometry.padding, strict=True)
    )
    if bottom == right == 0:
        return inputs, geometry
    # Padding on both sides must be equal from here on: the whole of it goes into the tensor.
    (top, left) = geometry.padding
    padded = F.pad(inputs, (left, left + right, top, top + bottom))
    return padded, geometry._replace(padding=(0, 0))
