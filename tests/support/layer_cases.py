"""Linear and Conv2d cases of every option, and what they are compared with: a loop of single-sample backward passes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from svag_fast.ops import StepStats, svag_step_, weight_grad_and_sq_norms

STEP: dict[str, Any] = {"lr": 0.3, "weight_decay": 0.1}


def forward(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
    return F.linear(x, weight) if weight.dim() == 2 else F.conv2d(x, weight, **options)


def loop(inputs: Tensor, output_grads: Tensor, shape: list[int], **options: Any) -> Tensor:
    """[B, *shape] by one backward pass a sample, in the inputs' dtype."""
    grads = []
    for x, dy in zip(inputs, output_grads, strict=True):
        weight = torch.zeros(shape, dtype=x.dtype, requires_grad=True)
        if dy.numel():
            forward(x[None], weight, **options).backward(dy[None])
        grads.append(torch.zeros(shape, dtype=x.dtype) if weight.grad is None else weight.grad)
    return torch.stack(grads) if grads else torch.zeros(0, *shape, dtype=inputs.dtype)


def make(
    input_shape: list[int], shape: list[int], *, seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(input_shape, generator=generator, dtype=torch.float64)
    y = forward(x, torch.zeros(shape, dtype=torch.float64), **options)
    return x.to(dtype), torch.randn(y.shape, generator=generator, dtype=torch.float64).to(dtype)


def bias_z(found: Tensor, exact: Tensor) -> float:
    """How many standard errors the mean relative error is from 0; the errors must be independent, as samples' are."""
    errors = ((found - exact) / exact).double()
    return float(errors.mean() / (errors.std() / len(errors) ** 0.5))


def step_by_two_ops(
    weight: Tensor, x: Tensor, dy: Tensor, segments: Tensor, *, l: float, **options: Any
) -> tuple[Tensor, StepStats]:
    """The gradient of each batch's mean, then the fused step, in plain PyTorch."""
    grads = []
    for s in range(int(segments.max()) + 1):
        rows = segments == s
        n = int(rows.sum())
        weights = torch.full((n,), 1 / n, dtype=weight.dtype, device=weight.device)
        product = weight_grad_and_sq_norms(
            x[rows], dy[rows], list(weight.shape), weights=weights, backend="reference", **options
        )
        grads.append([product.grad])
    norms = weight_grad_and_sq_norms(x, dy, list(weight.shape), backend="reference", **options).sq_norms
    second = grads[1] if len(grads) == 2 else None
    return norms, svag_step_([weight], grads[0], second, l=l, backend="reference", **STEP)


LINEAR = {
    "one row a sample": ([7, 5], [3, 5]),
    "rows": ([3, 11, 33], [17, 33]),
    "four dimensions": ([2, 3, 5, 8], [6, 8]),
    "one sample": ([1, 4, 5], [3, 5]),
    "no samples": ([0, 4, 5], [3, 5]),
    "no rows": ([3, 0, 5], [3, 5]),
    "no inputs": ([3, 2, 0], [4, 0]),
    "no outputs": ([3, 2, 5], [0, 5]),
    "wide": ([5, 3, 200], [130, 200]),
}

CONVOLUTION: dict[str, tuple[list[int], list[int], dict[str, Any]]] = {
    "3x3": ([4, 16, 8, 8], [16, 16, 3, 3], {"padding": 1}),
    "rows of taps, odd sizes": ([3, 16, 7, 9], [11, 16, 3, 3], {"padding": 1}),
    "rows of taps, no padding": ([3, 32, 7, 5], [18, 32, 3, 3], {}),
    "rows of taps, options": (
        [2, 32, 5, 11], [34, 16, 3, 3], {"padding": (2, 1), "stride": (1, 2), "dilation": (1, 2), "groups": 2}
    ),
    "odd channels": ([3, 5, 7, 9], [11, 5, 3, 3], {"padding": 1}),
    "one channel": ([3, 1, 8, 8], [16, 1, 3, 3], {"padding": 1}),
    "three channels": ([3, 3, 9, 9], [16, 3, 3, 3], {"padding": 1}),
    "stride 2": ([3, 16, 9, 8], [32, 16, 3, 3], {"padding": 1, "stride": 2}),
    "1x1 stride 2": ([3, 16, 8, 8], [32, 16, 1, 1], {"stride": 2}),
    "strides and kernel differ": ([2, 4, 11, 10], [6, 4, 3, 2], {"padding": (2, 1), "stride": (3, 2)}),
    "dilation": ([2, 6, 12, 11], [5, 6, 3, 3], {"padding": 2, "dilation": (2, 3)}),
    "groups": ([3, 8, 6, 6], [12, 2, 3, 3], {"padding": 1, "groups": 4}),
    "depthwise": ([3, 20, 7, 7], [20, 1, 3, 3], {"padding": 1, "groups": 20}),
    "depthwise with multiplier": ([3, 6, 7, 7], [18, 1, 3, 5], {"padding": 2, "groups": 6}),
    "depthwise, stride 2, dilation": ([2, 17, 9, 9], [17, 1, 3, 3], {"stride": 2, "dilation": 2, "groups": 17}),
    "kernel larger than the image": ([2, 3, 2, 2], [4, 3, 5, 5], {"padding": 2}),
    "a tap that never meets the image": ([2, 3, 1, 1], [4, 3, 3, 3], {"padding": 1}),
    "padding beyond the kernel": ([2, 3, 3, 3], [4, 3, 2, 2], {"padding": 3, "stride": 2}),
    "same, even kernel, even dilation": ([2, 3, 9, 9], [4, 3, 4, 2], {"padding": "same", "dilation": 2}),
    "same, even kernel": ([2, 3, 5, 5], [4, 3, 4, 2], {"padding": "same"}),
    "same, dilated": ([2, 3, 7, 7], [4, 3, 3, 3], {"padding": "same", "dilation": 2}),
    "valid": ([2, 3, 5, 5], [4, 3, 2, 2], {"padding": "valid"}),
    "wide and small": ([9, 70, 4, 4], [75, 70, 3, 3], {"padding": 1}),
    "one pixel": ([5, 33, 1, 1], [40, 33, 1, 1], {}),
    "no samples": ([0, 3, 5, 5], [4, 3, 3, 3], {}),
}  # fmt: skip
