"""What enters the product b_iᵀ a_i of a Linear or Conv2d layer: checked once, for every op that forms it."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from svag_fast.kernels.device_cache import DeviceCache
from svag_fast.ops.checks import PARAM_DTYPES, arithmetic, integer, integers, tensor
from svag_fast.ops.library import is_watched
from svag_fast.ops.memory import has_memory, resolved

MAX_SEGMENTS = 4096
"""The inner products of so many segments take 128 MiB."""


class Geometry(NamedTuple):
    """A convolution's options, each (vertical, horizontal), as in :func:`torch.nn.functional.conv2d`."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @classmethod
    def of(cls, stride: list[int], padding: list[int], dilation: list[int], groups: int) -> Geometry:
        """Return the options as the dispatcher passes them."""
        return cls((stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]), groups)


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
    """The dtype in which sums are formed and the gradient is returned.

    Raises:
        TypeError: not a real floating-point dtype that is served: to convert a complex one would drop a part of it.
    """
    if inputs.dtype not in PARAM_DTYPES:
        raise TypeError(f"inputs must be one of {', '.join(map(str, PARAM_DTYPES))}, got {inputs.dtype}")
    return arithmetic(inputs.dtype)


def in_sum_dtype(inputs: Tensor, output_grads: Tensor) -> tuple[Tensor, Tensor]:
    """Both operands in the dtype of the sums, their values in memory: themselves where they are so."""
    dtype = inputs.dtype
    if dtype == output_grads.dtype and dtype in (torch.float32, torch.float64):  # as a rule
        plain = not (inputs.is_neg() or inputs._is_zerotensor())
        if plain and not (output_grads.is_neg() or output_grads._is_zerotensor()):
            return inputs, output_grads
    dtype = sum_dtype(inputs)
    if output_grads.is_complex():
        raise TypeError(f"output_grads must be real, as inputs is ({inputs.dtype}), got {output_grads.dtype}")
    return (
        resolved(inputs if inputs.dtype == dtype else inputs.to(dtype)),
        resolved(output_grads if output_grads.dtype == dtype else output_grads.to(dtype)),
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
    both_batches: bool = False,
) -> LayerProduct:
    """Check the arguments of :func:`svag_fast.ops.weight_grad_and_sq_norms` and bring them into one form.

    Args:
        both_batches: whether segments that have no sample in segment 0, the first batch, are refused.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: shapes, devices or options that don't fit each other; the message names the argument.
    """
    shape = _check_tensors(inputs, output_grads, weight_shape)
    geometry = Geometry(
        _pair("stride", stride, 1),
        _padding(padding, shape, dilation),
        _pair("dilation", dilation, 1),
        integer("groups", groups),
    )
    if len(shape) == 2:
        if geometry != Geometry():
            raise ValueError(
                "weight_shape must be of 4 dimensions for stride, padding, dilation and groups, which belong to a "
                f"convolution, got {shape} (Linear)"
            )
        B, T = inputs.shape[0], math.prod(inputs.shape[1:-1])
        inputs, output_grads = inputs.reshape(B, T, shape[1]), output_grads.reshape(B, T, shape[0])
    else:
        if padding == "same":
            inputs, geometry = _pad_same(inputs, shape, geometry)
        geometry = _check_convolution(inputs, output_grads, shape, geometry)
    members = _check_segments(segments, inputs, both_batches)
    return LayerProduct(inputs, output_grads, shape, _check_weights(weights, inputs), *members, geometry)


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _check_tensors(inputs: Tensor, output_grads: Tensor, weight_shape: Sequence[int]) -> list[int]:
    for name, operand in (("inputs", inputs), ("output_grads", output_grads)):
        tensor(name, operand)
        if operand.layout != torch.strided:
            raise TypeError(f"{name} must be a dense (strided) tensor, got {operand.layout}")
        if operand.dtype not in PARAM_DTYPES:
            raise TypeError(f"{name} must be one of {', '.join(map(str, PARAM_DTYPES))}, got {operand.dtype}")
    if output_grads.dtype != inputs.dtype:
        raise TypeError(f"output_grads must be {inputs.dtype}, as inputs is, got {output_grads.dtype}")
    if output_grads.device != inputs.device:
        raise ValueError(f"output_grads must be on {inputs.device}, as inputs is, got one on {output_grads.device}")
    shape = integers("weight_shape", weight_shape)
    if len(shape) not in (2, 4) or min(shape) < (len(shape) == 4):
        raise ValueError(f"weight_shape must be [d, p] (Linear) or [O, C / groups, k_h, k_w] (Conv2d), got {shape}")
    if len(shape) == 2:
        if inputs.dim() < 2 or inputs.shape[-1] != shape[1]:
            raise ValueError(
                f"inputs must be of shape [B, *, {shape[1]}], as weight_shape says, got {list(inputs.shape)}"
            )
        if output_grads.shape != (*inputs.shape[:-1], shape[0]):
            raise ValueError(
                f"output_grads must be of shape {[*inputs.shape[:-1], shape[0]]}, got {list(output_grads.shape)}"
            )
    elif inputs.dim() != 4:
        raise ValueError(f"inputs must be of shape [B, C, H, W] for a 4-dimensional weight, got {list(inputs.shape)}")
    return shape


def _check_convolution(inputs: Tensor, output_grads: Tensor, shape: list[int], geometry: Geometry) -> Geometry:
    """Refuse shapes that don't fit; return the geometry with what makes no difference brought into range.

    Python's integers don't overflow, the kernels' do: after this no position in the padded images exceeds 2^62 bytes.
    """
    stride, padding, dilation, groups = geometry
    if groups < 1 or shape[0] % groups:
        raise ValueError(f"groups must be a divisor of the {shape[0]} output channels in weight_shape, got {groups}")
    B, C, H, W = inputs.shape
    if shape[1] * groups != C:
        raise ValueError(
            f"inputs must be of {shape[1] * groups} channels (weight_shape {shape}, groups {groups}), got {C}"
        )
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip((H, W), padding, dilation, shape[2:], stride, strict=True)
    ]
    if min(size) < 1:
        raise ValueError(
            f"weight_shape must be that of a kernel no larger than the padded inputs {list(inputs.shape)}, got {shape}"
        )
    if output_grads.shape != (B, shape[0], *size):
        raise ValueError(
            f"output_grads must be of shape {[B, shape[0], *size]} for inputs {list(inputs.shape)}, stride {stride}, "
            f"padding {padding}, dilation {dilation}, got {list(output_grads.shape)}"
        )
    rows, columns = H + 2 * padding[0], W + 2 * padding[1]
    if max(B, 1) * max(C, 1) * rows * columns >= 2**59:
        raise ValueError(
            f"padding must be smaller, since the padded inputs {list(inputs.shape)} would have 2^59 elements or more, "
            f"got {padding}"
        )
    return geometry._replace(
        stride=(min(stride[0], rows), min(stride[1], columns)),  # a longer one has a single position too
        dilation=(dilation[0] if shape[2] > 1 else 1, dilation[1] if shape[3] > 1 else 1),
    )


def _check_weights(weights: Tensor | None, inputs: Tensor) -> Tensor | None:
    if weights is None:
        return None
    if tensor("weights", weights).dtype not in PARAM_DTYPES or weights.layout != torch.strided:
        raise TypeError(
            f"weights must be a dense floating-point tensor, one value a sample, got {weights.dtype}, {weights.layout}"
        )
    if weights.shape != inputs.shape[:1]:
        raise ValueError(f"weights must be of shape [{inputs.shape[0]}], one a sample, got {list(weights.shape)}")
    if weights.device != inputs.device:
        raise ValueError(f"weights must be on {inputs.device}, as inputs is, got one on {weights.device}")
    return weights


# Lists of segments on a GPU: the same ones come with every batch, and a copy from the host would wait.
_LISTED: DeviceCache[Tensor] = DeviceCache(64)


def _check_segments(
    segments: Tensor | Sequence[int] | None, inputs: Tensor, both_batches: bool
) -> tuple[Tensor | None, int]:
    if segments is None:
        if both_batches:
            raise ValueError("segments must be 0 or 1 for each sample, got None")
        return None, 0
    listed: list[int] | None = None
    if isinstance(segments, Tensor):
        tensor("segments", segments)
        if segments.dtype not in _INTEGERS or segments.layout != torch.strided:
            raise TypeError(f"segments must be integers in a dense tensor, got {segments.dtype}, {segments.layout}")
        if not has_memory(segments):
            raise ValueError(
                "segments must be a list of integers where a tensor has no values, got one on meta or fake"
            )
        low, high = torch.stack(segments.aminmax()).tolist() if segments.numel() else (0, -1)  # one wait, not two
    else:
        listed = integers("segments", segments)
        # Bounds from the list itself: torch.compile then knows the number of segments.
        low, high = min(listed, default=0), max(listed, default=-1)
        _check_segment_range(low, high)
        segments = torch.tensor(listed, dtype=torch.int64, device="cpu")
    _check_segment_range(low, high)
    if both_batches and low != 0:
        raise ValueError("segments must be 0 for some sample, the first batch, got none")
    if segments.shape != inputs.shape[:1]:
        raise ValueError(f"segments must be of shape [{inputs.shape[0]}], one a sample, got {list(segments.shape)}")
    if not has_memory(inputs):
        return inputs.new_empty(segments.shape, dtype=torch.int64), high + 1
    if listed is None or inputs.is_cpu or is_watched():
        return segments.to(inputs.device, torch.int64), high + 1
    return _LISTED.get(inputs.device, tuple(listed), lambda: segments.to(inputs.device), "segments"), high + 1


def _check_segment_range(low: int, high: int) -> None:
    if low < 0 or high >= MAX_SEGMENTS:
        raise ValueError(f"segments must be integers >= 0 and below {MAX_SEGMENTS}, got {low if low < 0 else high}")


def _pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    try:
        pair = 2 * [operator.index(value)]  # type: ignore[arg-type]
    except TypeError:
        pair = integers(name, value)
    if len(pair) != 2 or min(pair) < least:
        raise ValueError(f"{name} must be an integer >= {least} or two of them, got {value!r}")
    return (pair[0], pair[1])


def _padding(padding: int | str | Sequence[int], shape: list[int], dilation: int | Sequence[int]) -> tuple[int, int]:
    if not isinstance(padding, str):
        return _pair("padding", padding, 0)
    if padding not in ("same", "valid"):
        raise ValueError(f"padding must be integers, 'valid' or 'same', got {padding!r}")
    if padding == "valid" or len(shape) == 2:
        return (0, 0)
    dv, dh = _pair("dilation", dilation, 1)
    return (dv * (shape[2] - 1) // 2, dh * (shape[3] - 1) // 2)


def _pad_same(inputs: Tensor, shape: list[int], geometry: Geometry) -> tuple[Tensor, Geometry]:
    """An even kernel needs one more row or column of zeros at the end than at the start, as in PyTorch."""
    if geometry.stride != (1, 1):
        raise ValueError(f"stride must be 1 for padding='same', got {geometry.stride}")
    bottom, right = (
        d * (k - 1) - 2 * p for d, k, p in zip(geometry.dilation, shape[2:], geometry.padding, strict=True)
    )
    if bottom == right == 0:
        return inputs, geometry
    # Padding on both sides must be equal from here on: the whole of it goes into the tensor.
    (top, left) = geometry.padding
    padded = F.pad(inputs, (left, left + right, top, top + bottom))
    return padded, geometry._replace(padding=(0, 0))
