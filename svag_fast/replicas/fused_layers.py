"""A chain for inputs of one shape, as the fused kernel takes it: a row of numbers a layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from svag_fast.replicas.chain import Chain, ChainLayer

# svag::LayerKind's numbers.
_KINDS = {"affine": 0, "norm": 1, "relu": 2, "tanh": 3, "gelu": 4, "gelu_tanh": 5, "pool": 6, "flatten": 7}
# svag::LayerSpec's fields.
_FIELDS = (
    *("kind", "in_channels", "in_height", "in_width", "out_channels", "out_height", "out_width"),
    *("kernel_h", "kernel_w", "stride_h", "stride_w", "groups", "relu", "per_element"),
    *("weight", "weight_trained", "bias", "bias_trained"),
)
_LARGEST = 2**24  # values of one sample in one layer
_LARGEST_WEIGHT = 2**30


@dataclass(frozen=True)
class FusedLayers:
    """What the kernel is told.

    Attributes:
        fields: a row a layer, in the order of ``svag::LayerSpec``.
        eps: of each layer, 0 where it is no norm.
        input_shape: [channels, height, width]; a vector has one pixel.
        outputs: how many numbers the net gives for a sample.
        operations: multiply-adds of one sample's forward pass, a layer.
    """

    fields: list[list[int]]
    eps: list[float]
    input_shape: tuple[int, int, int]
    outputs: int
    operations: list[int]


def fused_layers(chain: Chain, sample_shape: tuple[int, ...]) -> FusedLayers:
    """Plan a chain for samples of one shape.

    Raises:
        ValueError: the shapes don't fit; the message names the layer.
    """
    layers = list(chain.layers)
    if layers and layers[0].kind == "flatten":
        layers, sample_shape = layers[1:], (math.prod(sample_shape),)
    if len(sample_shape) not in (1, 3) or not all(sample_shape):
        raise ValueError(
            "inputs must be vectors [features] or images [channels, height, width], none of them empty (or a chain "
            f"that begins with Flatten), got samples of {list(sample_shape)}"
        )
    shape = sample_shape
    rows: list[dict[str, int]] = []
    eps: list[float] = []
    operations: list[int] = []
    for layer in layers:
        if layer.kind == "flatten" and (len(shape) == 1 or shape[1:] == (1, 1)):
            shape = (math.prod(shape),)
            continue
        if layer.kind == "relu" and rows and rows[-1]["kind"] == _KINDS["norm"]:
            rows[-1]["relu"] = 1
            continue
        options, out = _lowered(layer, shape)
        image_in, image_out = _image(shape), _image(out)
        if math.prod(image_out) > _LARGEST or math.prod(image_in) > _LARGEST:
            raise ValueError(
                f"{layer.path}'s images must be of at most {_LARGEST} values a sample, got "
                f"{max(image_in, image_out, key=math.prod)}"
            )
        row = dict.fromkeys(_FIELDS, 0)
        row |= dict(zip(("in_channels", "in_height", "in_width"), image_in, strict=True))
        row |= dict(zip(("out_channels", "out_height", "out_width"), image_out, strict=True))
        row |= {"kernel_h": 1, "kernel_w": 1, "stride_h": 1, "stride_w": 1, "groups": 1} | options
        for name, parameter in (("weight", layer.weight), ("bias", layer.bias)):
            slot = None if parameter is None else chain.parameter(parameter)
            row |= {
                name: -1 if slot is None else slot.offset,
                f"{name}_trained": int(slot is not None and slot.trained),
            }
        rows.append(row)
        eps.append(layer.eps)
        taps = row["kernel_h"] * row["kernel_w"] * row["in_channels"] if row["kind"] == _KINDS["affine"] else 1
        if taps * row["out_channels"] > _LARGEST_WEIGHT:
            raise ValueError(
                f"{layer.path}'s weight must be of at most {_LARGEST_WEIGHT} values for this kernel, got "
                f"{taps * row['out_channels']}"
            )
        operations.append(taps * math.prod(image_out))
        shape = out
    if len(shape) != 1 and shape[1:] != (1, 1):
        raise ValueError(f"the chain's output must be a vector a sample, got the shape {list(shape)}")
    if not rows:
        raise ValueError("the chain must be one layer or more, got none")
    return FusedLayers(
        [[row[name] for name in _FIELDS] for row in rows], eps, _image(sample_shape), shape[0], operations
    )


def _image(shape: tuple[int, ...]) -> tuple[int, int, int]:
    return (shape[0], 1, 1) if len(shape) == 1 else (shape[0], shape[1], shape[2])


def _lowered(layer: ChainLayer, shape: tuple[int, ...]) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Return a layer's options, and the shape of what it gives for samples of ``shape``."""

    def expect(fits: bool, expected: str) -> None:
        if not fits:
            raise ValueError(f"{layer.path}'s samples must be {expected}, got {list(shape)}")

    def pooled(kernel: tuple[int, int], stride: tuple[int, int]) -> tuple[dict[str, Any], tuple[int, ...]]:
        expect(
            len(shape) == 3 and shape[1] >= kernel[0] and shape[2] >= kernel[1],
            f"images of at least {kernel[0]}x{kernel[1]}",
        )
        height, width = ((n - k) // s + 1 for n, k, s in zip(shape[1:], kernel, stride, strict=True))
        options = {"kernel_h": kernel[0], "kernel_w": kernel[1], "stride_h": stride[0], "stride_w": stride[1]}
        return {"kind": _KINDS["pool"], **options}, (shape[0], height, width)

    sizes = layer.sizes
    if layer.kind == "linear":
        expect(shape == sizes[:1], f"[{sizes[0]}]")
        return {"kind": _KINDS["affine"]}, (sizes[1],)
    if layer.kind == "conv":
        channels, outputs, kernel, *strides = sizes
        expect(len(shape) == 3 and shape[0] == channels, f"[{channels}, height, width]")
        height, width = ((n - 1) // s + 1 for n, s in zip(shape[1:], strides, strict=True))
        options = {"kernel_h": kernel, "kernel_w": kernel, "stride_h": strides[0], "stride_w": strides[1]}
        return {"kind": _KINDS["affine"], **options}, (outputs, height, width)
    if layer.kind == "group_norm":
        groups, channels = sizes
        expect(shape[0] == channels, f"{channels} channels")
        return {"kind": _KINDS["norm"], "groups": groups}, shape
    if layer.kind == "layer_norm":
        expect(shape == sizes, f"{list(sizes)}")
        return {"kind": _KINDS["norm"], "per_element": int(len(shape) == 3)}, shape
    if layer.kind == "pool":
        return pooled((sizes[0], sizes[1]), (sizes[2], sizes[3]))
    if layer.kind == "global_pool":
        return pooled((shape[-2], shape[-1]) if len(shape) == 3 else (1, 1), (1, 1))
    if layer.kind == "flatten":
        return {"kind": _KINDS["flatten"]}, (math.prod(shape),)
    return {"kind": _KINDS[layer.kind]}, shape
