"""The parts of a joint pass that autograd runs: a layer's weight gradient for each half of the rows."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from svag_fast.ops.weight_grad.op import unchecked_weight_grads
from svag_fast.sample_norms.layers.products import LinearProduct, Product
from svag_fast.sample_norms.rule import in_full_precision
from svag_fast.sample_norms.tape import row_sq_norms

LINEAR = LinearProduct()


class Taker(Protocol):
    """Who gets the two gradients: :class:`svag_fast.nn.joint.Joint`."""

    only_looks: bool

    @property
    def takes_norms(self) -> bool:
        """Whether each row's squared norm is wanted too."""

    def take(self, p: Tensor, grad1: Tensor, grad2: Tensor) -> None:
        """Two gradients of a parameter."""

    def take_norms(self, p: Tensor, sq_norms: Tensor) -> None:
        """Each row's squared norm."""


class Twin(torch.autograd.Function):
    """A parameter, once for each batch; the second's gradient reaches ``.grad``."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, joint: Taker) -> tuple[Tensor, Tensor]:
        """The parameter twice."""
        ctx.p, ctx.joint = p, joint
        return p.view_as(p), p.view_as(p)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Keep the first batch's gradient, pass on the second's."""
        grad1, grad2 = grads
        ctx.joint.take(ctx.p, grad1, grad2)
        return grad2, None


class LayerProduct(torch.autograd.Function):
    """A linear layer or convolution, whose weight gradient is formed for each half of the rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, product: Product, joint: Taker) -> Tensor:
        """The layer's output."""
        output = product.output(x, weight, bias)
        low = x if x.dtype == output.dtype else x.to(output.dtype)  # what the layer saw under autocast
        # Without a weight gradient nothing of x is needed but its shape.
        ctx.save_for_backward(low if ctx.needs_input_grad[1] else low.new_empty(1).expand(x.shape), weight)
        ctx.weight, ctx.bias = weight, bias  # the very parameters: they are keys
        ctx.product, ctx.joint, ctx.dtype = product, joint, x.dtype
        return output

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients; those of weight and bias for the second batch alone, the first's go to `joint`."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "second derivatives (a gradient penalty, create_graph=True) can't be told apart by batches in one "
                'pass: way="halves"'
            )
        with in_full_precision(b):
            return _product_grads(ctx, b)


def _product_grads(ctx: Any, b: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    product: Product = ctx.product
    joint: Taker = ctx.joint
    b, x = b.resolve_neg(), x.resolve_neg()  # the kernels read memory
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    low = _cast(weight, b.dtype)
    x_grad = _cast(product.input_grad(b, x, low), ctx.dtype) if wants_x else None
    weight_grad = bias_grad = None
    if wants_weight and not joint.only_looks:
        grads, sq_norms = _weight_grads(product, b, x, low, norms=joint.takes_norms)
        first, weight_grad = (_cast(g, weight.dtype) for g in grads)
        joint.take(ctx.weight, first, weight_grad)
        if sq_norms is not None:
            joint.take_norms(ctx.weight, sq_norms)
    if wants_bias and not joint.only_looks:
        summed = list(range(b.dim() - 1)) if product is LINEAR else [0, *range(2, b.dim())]
        first, bias_grad = (half.sum(summed, dtype=ctx.bias.dtype) for half in b.chunk(2))
        joint.take(ctx.bias, first, bias_grad)
        if joint.takes_norms:
            joint.take_norms(ctx.bias, row_sq_norms(product.sample_bias_grads(b)))
    return x_grad, weight_grad, bias_grad, None, None


OURS = (Twin._backward_cls, LayerProduct._backward_cls)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _weight_grads(
    product: Product, b: Tensor, x: Tensor, weight: Tensor, *, norms: bool
) -> tuple[list[Tensor], Tensor | None]:
    """The weight gradient of each half of the rows, and each row's squared norm if asked."""
    geometry = getattr(product, "_geometry", None)
    if geometry is not None and (norms or not b.is_cuda):
        grads, sq_norms = unchecked_weight_grads(x, b, weight.shape, geometry, 2)
        # Each in memory of its own, where a change to one alone shows.
        return [g.clone() for g in grads], sq_norms if norms else None
    halves = zip(b.chunk(2), x.chunk(2), strict=True)
    if not norms:
        return [product.plain_weight_grad(b_half, x_half, weight) for b_half, x_half in halves], None
    both = [product.weight_grad(b_half, x_half, weight.shape) for b_half, x_half in halves]
    return [grad for grad, _ in both], torch.cat([sq_norms for _, sq_norms in both])
