"""The kernel alone against PyTorch's weight gradient alone, layer by layer; ours returns all per-sample norms too.

B = 128. Target: a ratio of at least 1.0 for both of PyTorch's memory formats (contender / ours: ours is no slower than
the better of the two). The other groups: the ways that the choice is between, for few pixels and for Linear, at B = 128
and 8; a layer's step in one pass against the product followed by the fused step; and the step on per-sample gradients
against plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CONVOLUTIONS
from torch import Tensor

from svag_fast.ops import svag_step_, svag_step_per_sample_, svag_weight_step_, weight_grad_and_sq_norms
from svag_fast.ops.weight_grad.cpu import SAMPLES_OUTSIDE, TILES_OUTSIDE, direct, gram, pixel_gram
from svag_fast.ops.weight_grad.shapes import layer_product

B = 128
# Where direct and pixel-gram cross, and direct and gram (T, p, d), is what the constants of the choice were fitted to.
FEW_PIXELS = {
    "512-512, 1x1": (512, 512, 1, 3, 1),
    "512-512, 2x2": (512, 512, 2, 3, 1),
    "512-512, 4x4": (512, 512, 4, 3, 1),
    "256-512, 8x8, stride 2": (256, 512, 8, 3, 2),
    "256-256, 8x8": (256, 256, 8, 3, 1),
    "128-128, 8x8": (128, 128, 8, 3, 1),
    "64-64, 8x8": (64, 64, 8, 3, 1),
    "64-64, 4x4": (64, 64, 4, 3, 1),
    "64-64, 2x2": (64, 64, 2, 3, 1),
    "32-32, 4x4": (32, 32, 4, 3, 1),
    "256-512, 1x1 kernel, stride 2": (256, 512, 8, 1, 2),
    "128-256, 1x1 kernel, 8x8": (128, 256, 8, 1, 1),
}
LINEARS = {
    f"{p}-{d}, T={T}": (T, p, d)
    for T, p, d in (
        *((1, 512, 512), (4, 512, 512), (16, 512, 512), (16, 128, 128), (32, 512, 512), (32, 64, 64)),
        *((64, 256, 512), (64, 512, 512), (64, 1024, 1024), (64, 64, 192)),
    )
}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Layer:
    """One convolution's rows in one memory format."""

    def __init__(self, name: str, memory_format: torch.memory_format = torch.contiguous_format, batch: int = B) -> None:
        inputs, outputs, size, kernel, stride = (CONVOLUTIONS | FEW_PIXELS)[name]
        generator = torch.Generator().manual_seed(0)
        out = (size - 1) // stride + 1
        self.stride, self.padding = stride, kernel // 2
        x, dy, weight = (
            torch.randn(shape, generator=generator).contiguous(memory_format=memory_format)
            for shape in ((batch, inputs, size, size), (batch, outputs, out, out), (outputs, inputs, kernel, kernel))
        )
        self.x, self.dy, self.weight = x, dy, weight

    def ours(self) -> Any:
        return weight_grad_and_sq_norms(
            self.x, self.dy, self.weight.shape, stride=self.stride, padding=self.padding, backend="cpu"
        )

    def library(self) -> Any:
        options = ([self.stride] * 2, [self.padding] * 2, [1, 1], False, [0, 0], 1, [False, True, False])
        return torch.ops.aten.convolution_backward(self.dy, self.x, self.weight, None, *options)

    def step_in_one_pass(self) -> Any:
        options = {"stride": self.stride, "padding": self.padding}
        segments = [0] * (B // 2) + [1] * (B // 2)
        return svag_weight_step_(self.weight, self.x, self.dy, segments=segments, lr=1e-9, l=4, **options)

    def product_then_step(self) -> Any:
        grads = [
            weight_grad_and_sq_norms(
                self.x[half], self.dy[half], self.weight.shape, stride=self.stride, padding=self.padding
            ).grad.div_(B // 2)
            for half in (slice(B // 2), slice(B // 2, B))
        ]
        return svag_step_([self.weight], grads[:1], grads[1:], lr=1e-9, l=4)


@pytest.mark.parametrize("contender", [*(f"library, {f}" for f in FORMATS), "ours, channels_last"])
@pytest.mark.parametrize("layer", CONVOLUTIONS)
def test_convolution(contest: Callable[..., None], benchmark: Any, layer: str, contender: str) -> None:
    benchmark.group = f"dW {layer}"
    who, memory_format = contender.split(", ")
    theirs = Layer(layer, FORMATS[memory_format])
    contest(theirs.library if who == "library" else theirs.ours, ours=Layer(layer).ours, rounds=25)


@pytest.mark.parametrize("contender", ["library", "direct", "pixel-gram"])
@pytest.mark.parametrize("batch", [128, 8])
@pytest.mark.parametrize("layer", FEW_PIXELS)
def test_few_pixels(contest: Callable[..., None], benchmark: Any, layer: str, batch: int, contender: str) -> None:
    benchmark.group = f"dW {layer}, B={batch}"
    rows = Layer(layer, batch=batch)
    shape = rows.weight.shape
    product = layer_product(rows.x, rows.dy, shape, stride=rows.stride, padding=rows.padding)
    order = SAMPLES_OUTSIDE if rows.weight.numel() <= 1 << 18 else TILES_OUTSIDE
    ways: dict[str, Callable[[], Any]] = {
        "library": rows.library,
        "direct": lambda: direct(product, order),
        "pixel-gram": lambda: pixel_gram(product),
    }
    contest(ways[contender], ours=rows.ours, rounds=9)


@pytest.mark.parametrize("contender", ["library", "direct", "gram"])
@pytest.mark.parametrize("batch", [128, 8])
@pytest.mark.parametrize("layer", LINEARS)
def test_linear(contest: Callable[..., None], benchmark: Any, layer: str, batch: int, contender: str) -> None:
    benchmark.group = f"dW linear {layer}, B={batch}"
    T, p, d = LINEARS[layer]
    rows, grads = torch.randn(batch, T, p), torch.randn(batch, T, d)
    product = layer_product(rows, grads, [d, p])
    ways: dict[str, Callable[[], Any]] = {
        "library": lambda: grads.flatten(0, 1).T @ rows.flatten(0, 1),
        "direct": lambda: direct(product, TILES_OUTSIDE),
        "gram": lambda: gram(product),
    }
    contest(ways[contender], ours=lambda: weight_grad_and_sq_norms(rows, grads, [d, p], backend="cpu"), rounds=9)


@pytest.mark.parametrize("contender", ["product then fused step"])
@pytest.mark.parametrize("layer", ["16-16, 32x32", "64-64, 8x8", "128-128, 16x16", "512-512, 4x4"])
def test_whole_step(contest: Callable[..., None], benchmark: Any, layer: str, contender: str) -> None:
    benchmark.group = f"step {layer}"
    rows = Layer(layer)
    contest(rows.product_then_step, ours=rows.step_in_one_pass, rounds=15)


@pytest.mark.parametrize("contender", ["plain PyTorch", "means then fused step, no norms"])
def test_step_per_sample(contest: Callable[..., None], benchmark: Any, contender: str) -> None:
    benchmark.group = "step on 2 x 32 gradients of 0.5 M"
    params = [torch.randn(64, 64, 3, 3) for _ in range(13)]
    grads1, grads2 = ([torch.randn(32, *p.shape) for p in params] for _ in range(2))

    def means() -> Any:
        return svag_step_(params, [g.mean(0) for g in grads1], [g.mean(0) for g in grads2], lr=1e-9, l=4)

    def plain() -> list[Tensor]:
        means()
        return [torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0) for grads in (grads1, grads2)]

    contest(
        plain if contender == "plain PyTorch" else means,
        ours=lambda: svag_step_per_sample_(params, grads1, grads2, lr=1e-9, l=4),
        rounds=15,
        bytes_moved=4 * sum(2 * 32 * p.numel() for p in params),
    )
