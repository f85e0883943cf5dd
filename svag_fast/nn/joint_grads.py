"""The parts of a joint pass that autograd runs: a layer's weight gradient for each half of the rows."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from svag_fast.sample_norms.layers.products import LINEAR, Product, ProductLayer, weight_grads_of_halves
from svag_fast.sample_norms.rule import in_full_precision
from svag_fast.sample_norms.tape import row_sq_norms


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
    """A parameter, once for each batch; autograd takes nothing to ``.grad``."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, joint: Taker) -> tuple[Tensor, Tensor]:
        """The parameter twice."""
        ctx.p, ctx.joint = p, joint
        return p.view_as(p), p.view_as(p)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        """Hand over both batches' gradients, copied: another tensor's may be the same memory."""
        if torch.is_grad_enabled():
            raise second_derivatives()
        if not ctx.joint.only_looks:
            ctx.joint.take(ctx.p, *(torch.empty_like(ctx.p).copy_(grad) for grad in grads))
        return None, None


def second_derivatives() -> RuntimeError:
    """What is raised where somebody asks for them."""
    return RuntimeError(
        "second derivatives (a gradient penalty, create_graph=True) can't be told apart by batches in one pass: "
        'way="halves"'
    )


class PairCall(NamedTuple):
    """A use of a Linear layer or a convolution in a joint pass: a ``Call`` of a ``ProductLayer``.

    It keeps nothing of the use itself, so one serves every pass in which the layer is as it was.
    """

    joint: Taker
    product: Product
    weight: Tensor  # the very parameters: they are keys
    bias: Tensor | None

    def grads(self, ctx: Any, b: Tensor) -> tuple[Tensor | None, ...]:
        """The input's gradient to autograd; each batch's of weight and bias to `joint`."""
        if torch.is_grad_enabled():
            raise second_derivatives()
        with in_full_precision(b):
            joint, product, parameter, bias = self
            x, weight = ctx.saved_tensors
            wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
            if b.is_neg():
                b = b.resolve_neg()  # the kernels read memory
            if x.is_neg():
                x = x.resolve_neg()
            x_grad = None
            if wants_x:
                x_grad = _cast(product.input_grad(b, x, _cast(weight, b.dtype)), ctx.dtypes[0])
            if joint.only_looks:
                return x_grad, None, None, None
            if wants_weight:
                (first, second), sq_norms = weight_grads_of_halves(product, b, x, weight, norms=joint.takes_norms)
                joint.take(parameter, _cast(first, weight.dtype), _cast(second, weight.dtype))
                if joint.takes_norms:
                    assert sq_norms is not None
                    joint.take_norms(parameter, sq_norms)
            if wants_bias:
                assert bias is not None
                summed = list(range(b.dim() - 1)) if product is LINEAR else [0, *range(2, b.dim())]
                first, second = (half.sum(summed, dtype=bias.dtype) for half in torch.split(b, len(b) // 2))
                joint.take(bias, first, second)
                if joint.takes_norms:
                    joint.take_norms(bias, row_sq_norms(product.sample_bias_grads(b)))
        return x_grad, None, None, None


OURS = (Twin._backward_cls, ProductLayer._backward_cls)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)
