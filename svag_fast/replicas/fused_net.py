"""A chain compiled for samples of one shape, and samples as the fused kernel reads them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from svag_fast.ops.memory import address
from svag_fast.replicas.chain import Chain
from svag_fast.replicas.fused_layers import fused_layers

Loss: TypeAlias = Literal["cross_entropy", "squared_error"]


class FusedNet:
    """A chain laid out for samples of one shape."""

    def __init__(self, chain: Chain, sample_shape: tuple[int, ...], loss: Loss) -> None:
        from svag_fast import _C

        self.layers = fused_layers(chain, sample_shape)
        self.sample_shape = sample_shape
        self.loss = loss
        self.compiled = _C.ReplicaNet(self.layers.fields, self.layers.eps, loss == "squared_error")
        self.scratch: int = self.compiled.scratch
        self.operations = 3.0 * sum(self.layers.operations)  # of one sample's step
        self.chain = chain

    def __reduce__(self) -> tuple[Any, ...]:
        return FusedNet, (self.chain, self.sample_shape, self.loss)

    def memory(self, replicas: int, frozen: int, threads: int, samples: int) -> int:
        """Return the bytes of so many replicas' weights, the frozen values, work space and samples."""
        values = replicas * self.chain.weight_count + frozen + threads * self.scratch
        return 4 * (values + samples * (math.prod(self.sample_shape) + self.layers.outputs))

    def check(self, inputs: Tensor, targets: Tensor) -> None:
        """Refuse samples that the net can't take."""
        shape, outputs = self.sample_shape, self.layers.outputs
        count = max(1, len(inputs)) if isinstance(inputs, Tensor) and inputs.dim() else 1
        check_floats("inputs", inputs, f"[n, {', '.join(map(str, shape))}] with n >= 1", (count, *shape))
        if self.loss == "squared_error":
            return check_floats("targets", targets, str([count, outputs]), (count, outputs))
        if not isinstance(targets, Tensor):
            raise TypeError(f"targets must be a tensor, got a {type(targets).__name__}")
        if targets.dtype != torch.int64 or targets.shape != (len(inputs),) or targets.device.type != "cpu":
            raise ValueError(
                f"targets must be torch.int64 [{len(inputs)}] on cpu, got {targets.dtype} {list(targets.shape)} on "
                f"{targets.device}"
            )
        least, most = (int(end) for end in torch.aminmax(targets))
        if least < 0 or most >= outputs:
            raise ValueError(f"targets must be classes from 0 to {outputs - 1}, got {least} to {most}")
        return None

    def samples(self, inputs: Tensor, targets: Tensor) -> Samples:
        """Return checked samples as the kernel reads them: images channels last."""
        channels, height, width = self.layers.input_shape
        inputs = inputs.detach()
        if inputs.dim() == 4 and inputs.shape[1:] == (channels, height, width):
            inputs = inputs.permute(0, 2, 3, 1)
        return Samples(inputs.contiguous(), targets.detach().contiguous())


@dataclass(frozen=True)
class Samples:
    """Data as the kernel reads them."""

    inputs: Tensor
    targets: Tensor

    @property
    def addresses(self) -> tuple[int, int, int]:
        """Of the inputs, of classes or 0, of values or 0."""
        targets = address(self.targets, "targets")
        classes = self.targets.dtype == torch.int64
        return (address(self.inputs, "inputs"), targets if classes else 0, 0 if classes else targets)

    @property
    def count(self) -> int:
        """How many they are."""
        return len(self.inputs)


def sample_shape(name: str, inputs: Tensor) -> tuple[int, ...]:
    """Return the shape of one of the samples [n, ...]."""
    if not isinstance(inputs, Tensor):
        raise TypeError(f"{name} must be a tensor, got a {type(inputs).__name__}")
    if inputs.dim() < 2:
        raise ValueError(f"{name} must be [n, ...], a sample a row, got shape {list(inputs.shape)}")
    return tuple(inputs.shape[1:])


def check_floats(name: str, value: Any, shape: str, *shapes: tuple[int, ...]) -> None:
    """Refuse what is no dense float32 tensor on the CPU of one of the shapes, of which ``shape`` is the text."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got a {type(value).__name__}")
    fits = tuple(value.shape) in shapes and value.layout == torch.strided
    if value.dtype != torch.float32 or value.device.type != "cpu" or not fits:
        raise ValueError(
            f"{name} must be a dense torch.float32 {shape} on cpu, got {value.dtype} {list(value.shape)} on "
            f"{value.device}"
        )
