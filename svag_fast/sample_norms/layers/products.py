"""Layers whose weight gradient is replaced by one that brings the samples' norms along, or tells two batches apart.

Their weight gradient is a sum of products b_iᵀ a_i, and `svag_fast.ops.weight_grad_and_sq_norms` squares each on its
way into the sum: no second pass over the data, and no per-sample gradient is stored.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from svag_fast.ops.backends import CHOICE, as_chosen
from svag_fast.ops.weight_grad.op import unchecked_weight_grads
from svag_fast.ops.weight_grad.shapes import Geometry
from svag_fast.sample_norms import checks
from svag_fast.sample_norms.rule import Scope, in_full_precision
from svag_fast.sample_norms.tape import Use, row_sq_norms


class Product(Protocol):
    """What a layer's weight gradient is a sum of: products b_iᵀ a_i of its output's gradients and its inputs."""

    geometry: Geometry | None
    """Of the product of images that it is, if it is one."""

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's forward."""

    def input_grad(self, b: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The gradient in the input x, of which only shape and memory format matter."""

    def plain_weight_grad(self, b: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The gradient of the weight alone, by operations that can be differentiated."""

    def weight_grad(
        self, b: Tensor, x: Tensor, shape: torch.Size, bias_sq_norms: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The gradient of a weight of the given shape, and |g_i|² [B]; the bias's own are used where they are known."""

    def sample_weight_grads(self, b: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        """The samples' own gradients of the weight, [B, *shape]."""

    def sample_bias_grads(self, b: Tensor) -> Tensor:
        """The samples' own gradients of the bias, [B, d]."""

    def bias_grad(self, b: Tensor, dtype: torch.dtype) -> Tensor:
        """The gradient of the bias."""


def weight_grads_of_halves(
    product: Product, b: Tensor, x: Tensor, weight: Tensor, *, norms: bool
) -> tuple[Sequence[Tensor], Tensor | None]:
    """The weight's gradient of each half of the rows, and each row's squared norm if asked."""
    geometry = product.geometry
    if geometry is not None and (norms or not b.is_cuda):
        return unchecked_weight_grads(x, b, weight.shape, geometry, 2, norms=norms)
    rows = b.shape[0] // 2
    halves = zip(torch.split(b, rows), torch.split(x, rows), strict=True)
    if not norms:
        return [product.plain_weight_grad(b_half, x_half, weight) for b_half, x_half in halves], None
    both = [product.weight_grad(b_half, x_half, weight.shape) for b_half, x_half in halves]
    return [grad for grad, _ in both], torch.cat([sq_norms for _, sq_norms in both])


class Call(Protocol):
    """One use of a layer in a forward pass: what computes it, and who takes its gradients in the backward pass."""

    @property
    def product(self) -> Product:
        """What computes it."""

    def grads(self, ctx: Any, b: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of :class:`ProductLayer`'s four inputs, of which autograd passes on what is not None.

        ``ctx`` has the input and the weight as saved tensors, and ``dtypes``, of the input and the bias before casts.
        """


class ProductLayer(torch.autograd.Function):
    """A layer whose call forms its gradients: the one place where a product's weight gradient is replaced."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor:
        """The layer's output, of which `call` forms the gradients."""
        output = call.product.output(x, weight, bias)
        if output._is_view():  # of what PyTorch makes on the way: nobody could change it in place behind a function
            output = output.data
        low = x if x.dtype == output.dtype else x.to(output.dtype)  # what the layer saw under autocast
        # The input also where the weight is frozen: a checkpoint may give what this pass saved to a pass that needs it.
        ctx.save_for_backward(low, weight)
        ctx.call, ctx.backend = call, CHOICE.get()
        ctx.dtypes = x.dtype, None if bias is None else bias.dtype
        return output

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> tuple[Tensor | None, ...]:
        """What `call` says."""
        grads: tuple[Tensor | None, ...]
        grads = ctx.call.grads(ctx, b) if ctx.backend is None else as_chosen(ctx.backend, ctx.call.grads, ctx, b)
        return grads


class RecordedCall(NamedTuple):
    """One whose uses are delivered to the recorder; `direct`: weight and bias are the parameters themselves, not parts
    of an alias."""

    product: Product
    scope: Scope
    weight_use: Use | None
    bias_use: Use | None
    direct: bool

    def grads(self, ctx: Any, b: Tensor) -> tuple[Tensor | None, ...]:
        """See `Call`."""
        if torch.is_grad_enabled():
            return _grads_with_graph(ctx, b)
        with in_full_precision(b):
            x, weight = ctx.saved_tensors
            product, scope, weight_use, bias_use, direct = self
            x_dtype, bias_dtype = ctx.dtypes
            wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
            x_grad = weight_grad = bias_grad = bias_sq_norms = None
            if b.is_neg():
                b = b.resolve_neg()  # the kernels read memory
            if x.is_neg():
                x = x.resolve_neg()
            paused = scope.recorder.paused
            if wants_bias and not paused:
                sample_rows = product.sample_bias_grads(b)
                bias_sq_norms = row_sq_norms(sample_rows)
                bias_grad = sample_rows.sum(0, dtype=bias_dtype)
                if bias_use is not None:
                    bias_use.deliver(bias_sq_norms, sample_rows.__getitem__, bias_grad if direct else None)
            if wants_x:
                seen = weight if weight.dtype == b.dtype else weight.to(b.dtype)
                x_grad = product.input_grad(b, x, seen)
                if x_grad.dtype != x_dtype:
                    x_grad = x_grad.to(x_dtype)
            if wants_weight and not paused:
                shape = weight.shape
                weight_grad, sq_norms = product.weight_grad(b, x, shape, bias_sq_norms)
                if weight_grad.dtype != weight.dtype:
                    weight_grad = weight_grad.to(weight.dtype)
                if weight_use is not None:
                    own_grads = functools.partial(_own_grads, product, b, x, shape)
                    weight_use.deliver(sq_norms, own_grads, weight_grad if direct else None)
                    as_before = (weight_use.key[0], b.dtype, b.is_cuda) in scope.known.checked
                    if (scope.check or not as_before) and scope.to_check(weight_use.key[0], b):
                        checks.check_product(scope, product.output, weight_use.key[0], weight_grad, b, x)
                        if scope.check:
                            checks.check_norms(scope, weight_use.key[0], sq_norms, own_grads)
        return x_grad, weight_grad, bias_grad, None


def _own_grads(product: Product, b: Tensor, x: Tensor, shape: torch.Size, rows: slice) -> Tensor:
    return product.sample_weight_grads(b[rows], x[rows], shape)


def _grads_with_graph(ctx: Any, b: Tensor) -> tuple[Tensor | None, ...]:
    """The same with a graph of the backward pass (create_graph=True): the norms beside PyTorch's own gradients, which
    may be differentiated again."""
    with torch.no_grad():
        ours = ctx.call.grads(ctx, b)
    x_dtype, bias_dtype = ctx.dtypes
    x, weight = ctx.saved_tensors
    scope = ctx.call.scope
    if not x_dtype == x.dtype == b.dtype == weight.dtype:
        return _once(scope.label, ours)  # what autocast casts has no graph of its own
    b = scope.recorder.watch_second(b, scope.label)
    wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
    product = ctx.call.product
    rows = product.sample_bias_grads(b) if wants_bias else None
    return (
        product.input_grad(b, x, weight) if wants_x else None,
        _same_value(product.plain_weight_grad(b, x, weight), ours[1]) if wants_weight else None,
        None if rows is None else _same_value(rows.sum(0, dtype=bias_dtype), ours[2]),
        None,
    )


def _same_value(grad: Tensor, value: Tensor | None) -> Tensor:
    """A gradient by another way, with the bits of the one that was announced to the parameter's hook."""
    assert value is not None
    return _Valued.apply(grad, value)  # type: ignore[no-untyped-call, no-any-return]


class _Valued(torch.autograd.Function):
    """The second tensor, with the derivatives of the first."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None


class _Once(torch.autograd.Function):
    """Tensors that can't be differentiated. `anchor`: so that they always have a graph to say so."""

    @staticmethod
    def forward(ctx: Any, label: str, anchor: Tensor, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.label = label
        return grads

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            f"second derivatives through {ctx.label} under autocast can't be taken inside per_sample_sq_norms: take "
            "them outside of the context"
        )


def _once(label: str, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    leaf = torch.zeros((), dtype=torch.float32, device="cpu", requires_grad=True)
    return _Once.apply(label, leaf, *grads)  # type: ignore[no-untyped-call, no-any-return]


def recorded(product: Product, scope: Scope, x: Tensor) -> Tensor:
    """The output of the scope's layer, whose backward pass delivers to its recorder."""
    module: Any = scope.module
    names, recorder = scope.names, scope.recorder
    weight_use = Use(recorder, names["weight"]) if "weight" in names else None
    bias_use = Use(recorder, names["bias"]) if "bias" in names else None
    call = RecordedCall(product, scope, weight_use, bias_use, True)
    out: Tensor = ProductLayer.apply(x, module.weight, module.bias, call)  # type: ignore[no-untyped-call]
    return out


def only_input(input: Tensor) -> Tensor:
    """The input of a layer that takes one, by position or by name."""
    return input
