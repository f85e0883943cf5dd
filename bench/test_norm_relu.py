"""Normalisation and ReLU, forward and backward, on the activations of PreResNet-32 at B = 64: the fused kernel,
PyTorch's two modules, and what the memory alone would take.

The floor moves what must be moved: x and y forward; x, y's gradient and x's backward. That is twenty bytes an element,
by a triad of as many. On a shared machine: `--benchmark-timer=time.process_time`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from svag_fast.ops import norm_relu

# Samples, channels, height, width; the last are the digits net's, where calls are what counts.
SHAPES = {
    "16x32x32": (64, 16, 32, 32),
    "32x16x16": (64, 32, 16, 16),
    "64x8x8": (64, 64, 8, 8),
    "16x8x8, B = 128": (128, 16, 8, 8),
    "16x8x8, B = 8": (8, 16, 8, 8),
}
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
EPS = 1e-12


def torchs(x: Tensor, norm: str) -> Tensor:
    return torch.relu(
        F.group_norm(x, 8, eps=EPS) if norm == "gn" else F.batch_norm(x, None, None, training=True, eps=EPS)
    )


def fused(x: Tensor, norm: str) -> Tensor:
    return norm_relu(x, groups=8, eps=EPS) if norm == "gn" else norm_relu(x, segments=1, eps=EPS)


@pytest.mark.parametrize("contender", ["torch's two", "memory"])
@pytest.mark.parametrize("norm", ["gn", "bn"])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_relu(benchmark: Any, contest: Any, shape: str, memory_format: str, norm: str, contender: str) -> None:
    benchmark.group = f"{shape}, {norm}, {memory_format.replace('channels_last', 'cl')}"
    generator = torch.Generator().manual_seed(0)
    x, y_grad = (
        torch.randn(SHAPES[shape], generator=generator).to(memory_format=FORMATS[memory_format]) for _ in range(2)
    )
    x.requires_grad_()
    times = 1 if x.numel() >= 131072 else 50

    def both_passes(forward: Callable[[Tensor, str], Tensor]) -> None:
        for _ in range(times):
            torch.autograd.grad(forward(x, norm), x, y_grad)

    triad = 5 * x.numel() // 3
    a, b, c = (torch.ones(triad) for _ in range(3))

    def memory() -> None:
        for _ in range(times):
            torch.add(a, b, alpha=0.5, out=c)

    targets: dict[str, Callable[[], None]] = {"torch's two": lambda: both_passes(torchs), "memory": memory}
    torch.set_num_threads(1)
    contest(targets[contender], ours=lambda: both_passes(fused), rounds=25, bytes_moved=20 * x.numel() * times)
