"""Convolutions in 1, 2 or 3 dimensions: their rows a_i are windows of the input."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from svag_fast.ops.weight_grad.op import unchecked_weight_grad
from svag_fast.ops.weight_grad.shapes import Geometry
from svag_fast.sample_norms.layers.products import only_input, recorded
from svag_fast.sample_norms.rule import Rule, Scope

_convolution_backward = torch.ops.aten.convolution_backward.default


class ConvProduct:
    """Convolution in 1, 2 or 3 dimensions with zero padding: a_i are the windows, group by group; bias Σ_t b_t.

    In 1 dimension: a 2-D convolution of height 1. In 3: a 2-D product for each depth tap k; the slices of depth that
    tap k meets are laid one below the other with zeros between, so that a sample's slices are summed before squaring.
    """

    def __init__(
        self, stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...], groups: int
    ) -> None:
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.groups = groups
        self.geometry: Geometry | None = (
            Geometry(stride, padding, dilation, groups) if len(stride) == 2 else None  # type: ignore[arg-type]
        )
        convolution: Any = (F.conv1d, F.conv2d, F.conv3d)[len(stride) - 1]
        self.output: Callable[[Tensor, Tensor, Tensor | None], Tensor] = functools.partial(
            convolution, stride=stride, padding=padding, dilation=dilation, groups=groups
        )

    def input_grad(self, b: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The gradient in the input x, of which only shape and memory format matter."""
        return self._backward(b, x, weight, 0)

    def plain_weight_grad(self, b: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The gradient of the weight alone, by operations that can be differentiated."""
        return self._backward(b, x, weight, 1)

    def weight_grad(
        self, b: Tensor, x: Tensor, shape: torch.Size, bias_sq_norms: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The gradient of a weight of the given shape, and |g_i|² [B]."""
        if self.geometry is not None:
            return unchecked_weight_grad(x, b, shape, self.geometry)
        if len(self.stride) == 3:
            return self._by_depth_taps(b, x, shape)
        flat = ConvProduct((1, *self.stride), (0, *self.padding), (1, *self.dilation), self.groups)
        grad, sq_norms = flat.weight_grad(b[:, :, None], x[:, :, None], torch.Size((*shape[:2], 1, shape[2])))
        return grad.reshape(shape), sq_norms

    def sample_weight_grads(self, b: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        """The samples' own gradients of the weight, [B, *shape]."""
        weight = b.new_empty(1).expand(shape)
        rows = [self._one_weight_grad(b[i : i + 1], x[i : i + 1], weight) for i in range(b.shape[0])]
        return torch.stack(rows) if rows else b.new_zeros(0, *shape)

    def _one_weight_grad(self, b: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        if not b.is_complex():
            return self._backward(b, x, weight, 1)
        # b = p + iq and x = u + iv: (p + iq)(u − iv), as the gradient is linear in b and in the conjugate of x.
        one = weight.real
        pu, qv, qu, pv = (
            self._backward(left, right, one, 1)
            for left, right in ((b.real, x.real), (b.imag, x.imag), (b.imag, x.real), (b.real, x.imag))
        )
        return torch.complex(pu + qv, qu - pv)

    def sample_bias_grads(self, b: Tensor) -> Tensor:
        """The samples' own gradients of the bias, [B, d]."""
        return b.flatten(2).sum(2)

    def bias_grad(self, b: Tensor, dtype: torch.dtype) -> Tensor:
        """The gradient of the bias."""
        return b.sum([0, *range(2, b.dim())], dtype=dtype)

    def _backward(self, b: Tensor, x: Tensor, weight: Tensor, which: int) -> Tensor:
        """PyTorch's own gradient in the input (0) or the weight (1)."""
        no_output_padding = (0,) * len(self.stride)
        grads: list[Tensor] = _convolution_backward(
            b,
            x,
            weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            no_output_padding,
            self.groups,
            (which == 0, which == 1, False),
        )
        return grads[which]

    def _by_depth_taps(self, b: Tensor, x: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
        B, O, depth, height, width = b.shape
        (stride_d, stride_h, _), (dilation_d, dilation_h, _) = self.stride, self.dilation
        rows = x.shape[3] + 2 * self.padding[1]
        slot = -(-rows // stride_h)  # output rows that one slice of depth takes up, a few of them empty
        bottom = self.padding[1] + slot * stride_h - rows
        x = F.pad(x, (0, 0, self.padding[1], bottom, self.padding[0], self.padding[0]))
        b = F.pad(b, (0, 0, 0, slot - height)).reshape(B, O, depth * slot, width)
        b = b[:, :, : (depth * slot * stride_h - dilation_h * (shape[3] - 1) - 1) // stride_h + 1]
        flat = ConvProduct(self.stride[1:], (0, self.padding[2]), self.dilation[1:], self.groups)
        planes, total = [], torch.zeros(B, dtype=torch.float64, device=b.device)
        for tap in range(shape[2]):
            first = tap * dilation_d
            met = x[:, :, first : first + (depth - 1) * stride_d + 1 : stride_d].flatten(2, 3)
            grad, sq_norms = flat.weight_grad(b, met, torch.Size((*shape[:2], *shape[3:])))
            planes.append(grad)
            total = total + sq_norms
        return torch.stack(planes, 2), total


class ConvRule(Rule):
    """See ConvProduct; other padding than with zeros is made first, and autograd takes it back."""

    knows = frozenset({"weight", "bias"})

    def run(self, scope: Scope, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's forward, such that the backward pass delivers to the scope's recorder."""
        x = args[0] if len(args) == 1 and not kwargs else only_input(*args, **kwargs)
        dims = len(module.kernel_size)
        if x.dim() != dims + 2:
            raise ValueError(
                f"the input of {scope.label} must be [B, C, ...], batched, for per-sample norms, got {list(x.shape)}"
            )
        weight = module.weight
        try:
            plan = conv_plan(module, weight)
        except ValueError as error:
            raise ValueError(f"{scope.label}: {error}") from None
        if x.dtype.is_complex or weight.dtype.is_complex:
            return super().run(scope, module, args, kwargs)
        return recorded(plan.product, scope, x if plan.pad is None else plan.padded(x))

    def sample_grads(self, module: Any, inputs: tuple[Any, ...], output_grad: Tensor) -> Mapping[str, Tensor]:
        """Each sample's gradient [B, *shape] of weight and bias."""
        plan = conv_plan(module, module.weight)
        product, shape = plan.product, module.weight.shape
        return {
            "weight": product.sample_weight_grads(output_grad, plan.padded(inputs[0]), shape),
            "bias": product.sample_bias_grads(output_grad),
        }


def conv_plan(module: Any, weight: Tensor) -> ConvPlan:
    """Return how a convolution, with its options as they are now and this weight, is a product.

    Raises:
        ValueError: PyTorch's forward takes no such padding.
    """
    mode = module.padding_mode
    pad = None if mode == "zeros" else tuple(module._reversed_padding_repeated_twice)
    # What PyTorch's forward of a convolution reads.
    options: tuple[Any, ...] = (
        weight.shape, module.stride, module.padding, module.dilation, module.groups, mode, pad
    )  # fmt: skip
    if list in map(type, options):
        options = tuple(tuple(option) if isinstance(option, list) else option for option in options)
    return ConvPlan.of(options)


class ConvPlan(NamedTuple):
    """The product, and what F.pad has to do before it, if anything."""

    product: ConvProduct
    pad: tuple[int, ...] | None = None
    mode: str = "constant"

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def of(options: tuple[Any, ...]) -> ConvPlan:
        """For these options of a convolution."""
        shape, stride, padding, dilation, groups, mode, pad = options
        kernel = shape[2:]
        stride, dilation, nothing = _each(stride, kernel), _each(dilation, kernel), (0,) * len(kernel)
        if pad is not None:
            return ConvPlan(ConvProduct(stride, nothing, dilation, groups), pad, mode)
        if padding == "valid":
            padding = nothing
        if not isinstance(padding, str):
            return ConvPlan(ConvProduct(stride, _each(padding, kernel), dilation, groups))
        if padding != "same" or max(stride) > 1:
            raise ValueError(f"padding must be one that PyTorch's forward takes with stride {stride}, got {padding!r}")
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if all(t % 2 == 0 for t in total):
            return ConvPlan(ConvProduct(stride, tuple(t // 2 for t in total), dilation, groups))
        both = tuple(side for t in reversed(total) for side in (t // 2, t - t // 2))
        return ConvPlan(ConvProduct(stride, nothing, dilation, groups), both)

    def padded(self, x: Tensor) -> Tensor:
        """The input with the padding that the product does not make."""
        return x if self.pad is None else F.pad(x, self.pad, mode=self.mode)


def _each(option: Any, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """An option for each dimension, given as one number or as many."""
    values = (option,) if isinstance(option, int) else tuple(option)
    return values * len(kernel) if len(values) == 1 else values
