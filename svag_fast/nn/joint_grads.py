"""The parts of a joint pass that autograd runs: a layer's weight gradient for each half of the rows."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from svag_fast.ops.backends import CHOICE
from svag_fast.optim.in_backward import StepsInBackward
from svag_fast.sample_norms.layers.linear import LINEAR
from svag_fast.sample_norms.layers.products import Product, ProductLayer, weight_grads_of_halves
from svag_fast.sample_norms.rule import in_full_precision
from svag_fast.sample_norms.tape import row_sq_norms


class NotJoint(Exception):  # noqa: N818  (a reason, not a fault)
    """Why a model can't take both batches at once; its two halves can still be run one after the other."""


class Taker(Protocol):
    """Who gets the two gradients: :class:`svag_fast.nn.joint.Joint`."""

    taking: bool
    """Whether the running backward pass is the one whose gradients are taken: others may go through the graph."""

    @property
    def met(self) -> Sized | None:
        """What is noted of a forward pass that will be looked at: every parameter must be in its graph."""

    takes_norms: bool
    """Whether each row's squared norm is wanted too."""

    steps: StepsInBackward | None
    """Takes weights' steps in the running backward pass, if that is wanted."""

    def later(self, call: PairCall, x: Tensor | None, b: Tensor, wants_bias: bool, backend: str | None) -> None:
        """Have `call.take` called on the others, with the forward pass's choice of a backend: at once or soon."""

    def step(self, weight: Tensor, product: Product, x: Tensor, b: Tensor) -> bool:
        """Have a weight take its step from a layer's input and the gradient of its output, at once, if it may."""

    def take(self, p: Tensor, grad1: Tensor, grad2: Tensor) -> None:
        """Two gradients of a parameter, in any dtype and order in memory."""

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
        if ctx.joint.taking:
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
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        x_grad = None
        if wants_x:
            with in_full_precision(b):
                b = b.resolve_neg()
                x_grad = _cast(self.product.input_grad(b, x, _cast(weight, b.dtype)), ctx.dtypes[0])
        if self.joint.taking:
            self.joint.later(self, x if wants_weight else None, b, wants_bias, ctx.backend)
        return x_grad, None, None, None

    def take(self, x: Tensor | None, b: Tensor, wants_bias: bool) -> None:
        """Each batch's gradients, and all norms if wanted, from the layer's input (None: not of the weight) and the
        gradient of its output."""
        joint, product, weight, bias = self
        norms = joint.takes_norms
        with in_full_precision(b):
            if b.is_neg():
                b = b.resolve_neg()  # the kernels read memory
            if x is not None:
                if x.is_neg():
                    x = x.resolve_neg()
                low = weight if weight.dtype == b.dtype else weight.to(b.dtype)  # as the layer saw it under autocast
                if joint.steps is None or not joint.step(weight, product, x, b):
                    (first, second), sq_norms = weight_grads_of_halves(product, b, x, low, norms=norms)
                    joint.take(weight, first, second)
                    if norms:
                        assert sq_norms is not None
                        joint.take_norms(weight, sq_norms)
            if wants_bias:
                assert bias is not None
                b1, b2 = torch.split(b, len(b) // 2)
                joint.take(bias, product.bias_grad(b1, bias.dtype), product.bias_grad(b2, bias.dtype))
                if norms:
                    joint.take_norms(bias, row_sq_norms(product.sample_bias_grads(b)))

    def run(self, x: Tensor) -> Tensor:
        """The layer's output from an input [2B, ...].

        Where the input has a gradient the graph stays PyTorch's own, which is faster than any function of ours, and
        the layer's gradients are formed where its output's comes by. Else it begins here. Where somebody keeps what is
        saved for the backward pass elsewhere (checkpoints, offloading), a function of ours saves the input.
        """
        _, product, weight, bias = self
        as_a_view = x.dim() == 3 or (
            x.dim() > 3 and product is LINEAR
        )  # of what PyTorch makes: its node may be replaced
        output: Tensor
        if as_a_view or self.joint.met is not None or _saved_elsewhere(True) is not None:
            output = ProductLayer.apply(x, weight, bias, self)  # type: ignore[no-untyped-call]
            return output
        wants_bias = bias is not None and bias.requires_grad
        wants_any = weight.requires_grad or wants_bias
        if wants_any and not x.requires_grad:
            output = _Begun.apply(x, self, _LEAF)  # type: ignore[no-untyped-call]
            return output
        output = product.output(x, weight.detach(), None if bias is None else bias.detach())
        assert not output._is_view()
        if wants_any:
            node: Any = output.grad_fn
            node.register_hook(_Passing(self, x, output))
        return output


def _perhaps(_: bool) -> object:
    return True


# What asks for the hooks that keep saved tensors elsewhere; an older PyTorch can't be asked.
_saved_elsewhere: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", _perhaps)


# What a graph begins with whose first layer's parameters are not in it.
_LEAF = torch.empty(0, dtype=torch.float32, device="cpu", requires_grad=True)


class _Begun(torch.autograd.Function):
    """The output of a layer whose input has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: PairCall, leaf: Tensor) -> Tensor:
        """See the class."""
        output = call.product.output(x, call.weight, call.bias)
        ctx.passing = _Passing(call, x, output)
        return output

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> tuple[None, None, None]:
        """Have the layer's gradients formed."""
        ctx.passing(None, (b,))
        return None, None, None


class _Passing:
    """Sees the gradient of a layer's output pass by, once, after the layer's input has got its own."""

    __slots__ = ("_backend", "_call", "_version", "_wants_bias", "_x")

    def __init__(self, call: PairCall, x: Tensor, output: Tensor) -> None:
        self._call, self._backend = call, CHOICE.get()
        self._wants_bias = call.bias is not None and call.bias.requires_grad
        low = x if x.dtype == output.dtype else x.detach().to(output.dtype)
        self._x = low if call.weight.requires_grad else None
        self._version: int | None = 0 if self._x is None else low._version

    def __call__(self, _: object, grads: tuple[Tensor | None, ...]) -> None:
        if torch.is_grad_enabled():
            raise second_derivatives()
        b, x = grads[0], self._x
        if b is None or not self._call.joint.taking:
            return
        if self._version is None:
            raise RuntimeError(
                "losses must be of one backward pass alone, got a layer's output that one has gone through already: "
                "call the model again"
            )
        if x is not None and x._version != self._version:
            raise RuntimeError(
                f"the input {list(x.shape)} of a layer was changed by an in-place operation before the backward pass, "
                "which needs it as it was"
            )
        if x is not None:
            self._x = self._version = None  # as PyTorch frees what a node has saved
        self._call.joint.later(self._call, x, b, self._wants_bias, self._backend)


OURS = (Twin._backward_cls, ProductLayer._backward_cls)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)
