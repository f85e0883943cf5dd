r"""Normalisation, an addition and ReLU as one op, with its backward pass.

    v = (x - mean) / sqrt(var + eps) * weight + bias + residual,    y = max(v, 0)

with mean and variance (the mean square about the mean) of each unit of values: a group of one sample's channels
(GroupNorm), or a channel of a segment of the samples (BatchNorm in training mode; two segments are both batches of a
step). With M values in a unit, g = dL/dv and z = (x - mean) / sqrt(var + eps), the backward pass is

    dL/dx = (w g - sum(w g)/M - z sum(w g z)/M) / sqrt(var + eps),    dL/dweight = sum(g z),    dL/dbias = sum(g).

The "cpu" backend reads x once or twice (a sample stays in the cache between its two walks), in both memory orders,
and gives the same bits for any number of threads and any SIMD level.

Sources: Ioffe, Szegedy, "Batch normalization", ICML 2015; Wu, He, "Group normalization", ECCV 2018.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from svag_fast.numeric import number
from svag_fast.ops.backends import implements, select
from svag_fast.ops.checks import integer, tensor
from svag_fast.ops.memory import address, has_memory, resolved


class NormReLU(NamedTuple):
    """What :func:`norm_relu_and_moments` returns.

    Attributes:
        y: as x.
        mean: float64, [B, groups] or [segments, C], of each unit; no gradient flows through it.
        var: the same of the mean square about the mean.
    """

    y: Tensor
    mean: Tensor
    var: Tensor


class NormOptions(NamedTuple):
    """What a norm is, checked."""

    groups: int  # 0: by segments
    segments: int
    eps: float
    relu: bool


def norm_relu(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    groups: int | None = None,
    segments: int | None = None,
    eps: float = 1e-5,
    relu: bool = True,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return ``relu(norm(x) + residual)``, differentiable in all tensors, twice too.

    Args:
        x: [B, C, ...], float32 or float64 on the "cpu" backend (contiguous or channels last, without copies; other
            strides are copied); any floating dtype and device by the reference, in float32 at least.
        weight, bias: [C] of x's dtype, or None.
        groups: a divisor of C: each group of a sample's channels has statistics of its own, as
            :class:`torch.nn.GroupNorm`.
        segments: a divisor of B: each channel of each of so many equal parts of the samples, one after the other, has;
            with 1 as :class:`torch.nn.BatchNorm2d` in training mode. Either this or `groups`.
        eps: at least 0. A unit with var + eps = 0 gives bias + residual, and its x the gradient 0.
        relu: False leaves the ReLU out.
        residual: as x, added before the ReLU.
        backend: "auto", "cpu" or "reference".

    Raises:
        TypeError, ValueError: an argument is none of these.
        BackendError: the backend can't serve the call.
    """
    return norm_relu_and_moments(
        x, weight, bias, groups=groups, segments=segments, eps=eps, relu=relu, residual=residual, backend=backend
    ).y


def norm_relu_and_moments(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    groups: int | None = None,
    segments: int | None = None,
    eps: float = 1e-5,
    relu: bool = True,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> NormReLU:
    """As :func:`norm_relu`, with each unit's mean and variance, for running statistics."""
    options = _checked(x, weight, bias, groups, segments, eps, relu, residual)
    run = select("norm_relu", backend, [x])
    return NormReLU(*run(x, weight, bias, residual, options))


def _checked(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int | None,
    segments: int | None,
    eps: float,
    relu: bool,
    residual: Tensor | None,
) -> NormOptions:
    tensor("x", x)
    if not x.is_floating_point():
        raise TypeError(f"x must be of a floating dtype, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"x must be a dense (strided) tensor, got {x.layout}")
    if x.dim() < 2:
        raise ValueError(f"x must be [B, C, ...], got {list(x.shape)}")
    if (groups is None) == (segments is None):
        raise ValueError(f"either groups or segments must be given, got groups={groups} and segments={segments}")
    for name, count, size, of in (("groups", groups, x.shape[1], "C"), ("segments", segments, x.shape[0], "B")):
        if count is not None and (integer(name, count) < 1 or size % integer(name, count)):
            raise ValueError(f"{name} must be a divisor of {of} = {size}, got {count}")
    for name, t, shape in (
        ("weight", weight, x.shape[1:2]),
        ("bias", bias, x.shape[1:2]),
        ("residual", residual, x.shape),
    ):
        if t is None:
            continue
        tensor(name, t)
        if t.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(t.shape)}")
        if t.dtype != x.dtype or t.layout != torch.strided:
            raise TypeError(f"{name} must be {x.dtype} as x, strided, got {t.dtype}, {t.layout}")
        if t.device != x.device:
            raise ValueError(f"{name} must be on {x.device} as x, got {t.device}")
    return NormOptions(
        0 if groups is None else integer("groups", groups),
        1 if segments is None else integer("segments", segments),
        number("eps", eps, least=0),
        bool(relu),
    )


@implements("norm_relu", "reference")
def _reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, options: NormOptions
) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rows, channels, pixels = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    if options.groups:
        units, over = wide.reshape(rows, options.groups, channels // options.groups, pixels), [2, 3]
    else:
        units, over = wide.reshape(options.segments, rows // options.segments, channels, pixels), [1, 3]
    mean = units.mean(over, keepdim=True)
    centred = units - mean
    var = centred.square().mean(over, keepdim=True)
    flat = var + options.eps == 0
    inverse = (var + options.eps).masked_fill(flat, 1).rsqrt().masked_fill(flat, 0)
    v = (centred * inverse).reshape(x.shape)
    shape = (1, -1, *(1,) * (x.dim() - 2))
    if weight is not None:
        v = v * weight.view(shape)
    if bias is not None:
        v = v + bias.view(shape)
    if residual is not None:
        v = v + residual
    y = (torch.relu(v) if options.relu else v).to(x.dtype)
    return y, mean.detach().double().squeeze(over), var.detach().double().squeeze(over)


def _not_served(tensors: Sequence[Tensor]) -> str | None:
    x = tensors[0]
    if x.dtype not in (torch.float32, torch.float64):
        return f"x is {x.dtype}: it serves float32 and float64"
    if x.numel() == 0:
        return f"x has no elements: {list(x.shape)}"
    if (
        not has_memory(x)
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
        return "PyTorch traces or transforms the call"
    return None


@implements("norm_relu", "cpu", why_not=_not_served)
def norm_relu_cpu(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, options: NormOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and var of :class:`NormReLU`, of arguments that are checked and served (`why_not`)."""
    out: tuple[Tensor, Tensor, Tensor] = _NormReLU.apply(x, weight, bias, residual, options)  # type: ignore[no-untyped-call]
    return out


class _NormReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, options: NormOptions
    ) -> tuple[Tensor, Tensor, Tensor]:
        from svag_fast import _C

        own, weight_, bias_ = _dense(x), _dense(weight), _dense(bias)
        added = _dense_like(own, residual)
        y = torch.empty_like(own)
        units = (x.shape[0], options.groups) if options.groups else (options.segments, x.shape[1])
        mean, var = (torch.empty(units, dtype=torch.float64, device="cpu") for _ in range(2))
        arrays = _places(x=own, weight=weight_, bias=bias_, residual=added, y=y, mean=mean, var=var)
        _C.norm_relu(_shape(own, options, affine=weight is not None or bias is not None), arrays)
        ctx.save_for_backward(x, weight, bias, residual, mean, var, None if residual is None else y)
        ctx.options = options
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        y_grad = grads[0]
        if y_grad is None:
            return None, None, None, None, None
        x, weight, bias, residual, mean, var, y = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph: the gradient has a gradient of its own, by the reference
            inputs = (x, weight, bias, residual)
            found = torch.autograd.grad(
                _reference(*inputs, ctx.options)[0],
                [t for t, want in zip(inputs, wanted, strict=False) if want],
                y_grad,
                create_graph=True,
            )
            each = iter(found)
            return *(next(each) if want else None for want in wanted[:4]), None
        from svag_fast import _C

        own, weight_, bias_ = _dense(x), _dense(weight), _dense(bias)
        y_grad = _dense_like(own, y_grad)
        x_grad = torch.empty_like(own)
        residual_grad = None if residual is None else torch.empty_like(own)
        weight_grad, bias_grad = (
            torch.empty(x.shape[1], dtype=torch.float64, device="cpu") if want else None for want in wanted[1:3]
        )
        _C.norm_relu_grad(
            _shape(own, ctx.options, affine=weight is not None or bias is not None),
            _places(
                x=own,
                weight=weight_,
                bias=bias_,
                mean=mean,
                var=var,
                y=y,
                y_grad=y_grad,
                x_grad=x_grad,
                residual_grad=residual_grad,
                weight_grad=weight_grad,
                bias_grad=bias_grad,
            ),
        )
        return (
            x_grad if wanted[0] else None,
            None if weight_grad is None else weight_grad.to(x.dtype),
            None if bias_grad is None else bias_grad.to(x.dtype),
            residual_grad if wanted[3] else None,
            None,
        )


def _channels_last(x: Tensor) -> bool | None:
    """Whether channels are innermost in memory; None where x is dense in neither order."""
    if x.is_contiguous():
        return x.dim() == 2 or math.prod(x.shape[2:]) == 1  # both: channels side by side are quicker
    return True if x.permute(0, *range(2, x.dim()), 1).is_contiguous() else None


@overload
def _dense(t: Tensor) -> Tensor: ...
@overload
def _dense(t: None) -> None: ...
def _dense(t: Tensor | None) -> Tensor | None:
    """The values in one of the memory orders: the tensor itself where it is, else a copy."""
    if t is None:
        return None
    t = resolved(t.detach())
    return t if t.is_contiguous() or (t.dim() > 2 and _channels_last(t)) else t.contiguous()


def _dense_like(x: Tensor, t: Tensor | None) -> Tensor | None:
    """The values of `t` in the memory order of `x`."""
    if t is None:
        return None
    t = resolved(t.detach())
    return t if _channels_last(t) is _channels_last(x) else torch.empty_like(x).copy_(t)


def _shape(x: Tensor, options: NormOptions, *, affine: bool) -> Any:
    from svag_fast import _C

    last, groups = _channels_last(x) is True, options.groups
    channels, pixels = x.shape[1], math.prod(x.shape[2:])
    if groups and not last and not affine:  # a group is one run of memory, so one long channel
        channels, pixels = groups, channels // groups * pixels
    is_double, threads = x.dtype == torch.float64, torch.get_num_threads()
    sizes = [x.shape[0], channels, pixels, groups, options.segments]
    return _C.NormShape(sizes, last, is_double, options.relu, options.eps, threads)


def _places(**arrays: Tensor | None) -> list[int]:
    """Where the arrays are. The caller keeps them alive."""
    return [0 if t is None else address(t, name) for name, t in arrays.items()]
