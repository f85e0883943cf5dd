"""What every op checks before it writes: lists of tensors and scalars, with the offender named in the error."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from svag_fast.numeric import must_be, number, shown
from svag_fast.ops.memory import check_allocated, check_bits, resolved

PARAM_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def integer(name: str, value: Any) -> int:
    """Return ``value`` as an int: a Python or NumPy integer, or an integer tensor of one element."""
    try:
        return operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} must be an integer, got {shown(value)}") from error


def integers(name: str, values: Any) -> list[int]:
    """Return ``values`` as ints; see :func:`integer`."""
    try:
        listed = list(values)
    except TypeError as error:
        raise TypeError(f"{name} must be integers, got {shown(values)}") from error
    return [integer(f"{name}[{i}]", value) for i, value in enumerate(listed)]


def numbers(name: str, values: Any) -> list[float]:
    """Return ``values`` as floats; see :func:`svag_fast.numeric.number`."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be numbers, got {shown(values)}")
    return [number(f"{name}[{i}]", value) for i, value in enumerate(values)]


def check_l(l: float) -> float:
    """Refuse an SVAG hyperparameter that is not a finite number of at least 1, or too large for float64; return it."""
    value = number("l", l, least=1)
    if value > _LARGEST[torch.float64]:
        raise ValueError(f"l must be at most 2^1022, so that 2l is a number in float64, got {l}")
    return value


# The greatest power of two whose inverse is a normal number.
_LARGEST = {torch.float32: 2.0**126, torch.float64: 2.0**1022}
_LEAST = 2.0**-149  # of float32's numbers, above 0


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a step of params of this dtype is computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_step_scalars(lr: float, l: float, weight_decay: float) -> tuple[float, float, float]:
    """Return the step's ``lr, l, weight_decay`` as floats, refused where they are out of range."""
    lr, l = number("learning rate", lr, least=0), check_l(l)
    return lr, l, number("weight_decay value", weight_decay, least=0)


def check_held(lr: float, l: float, weight_decay: float, params: Sequence[Tensor]) -> None:
    """Refuse scalars that the params' arithmetic can't hold.

    All of them, 1/l and so c1 and c2 must be finite, normal numbers there; ``lr / l`` may not be 0 through ``l``.
    """
    largest = _LARGEST[torch.float32]
    if max(lr, l, weight_decay) > largest or (lr >= 1 / largest and lr / l < _LEAST):
        for i, p in enumerate(params):
            check_representable(p.dtype, f"params[{i}], which is {p.dtype}", lr, l, weight_decay)


def check_representable(dtype: torch.dtype, what: str, lr: float, l: float, weight_decay: float = 0.0) -> None:
    """Refuse a step's scalars that the arithmetic of tensors of ``dtype``, named ``what``, can't hold."""
    dtype = arithmetic(dtype)
    largest = _LARGEST[dtype]
    least = _LEAST if dtype == torch.float32 else 2.0**-1074
    steps = f"{dtype}, in which the step of {what}, is computed"
    for name, value in (("learning rate", lr), ("l", l), ("weight_decay value", weight_decay)):
        if value > largest:
            raise ValueError(must_be(name, f"at most {largest:.3g} in {steps}", value))
    if lr >= 1 / largest and lr / l < least:
        raise ValueError(f"l must be smaller, since lr / l = {lr} / {l} is 0 in {steps}, got {l}")


def tensor(name: str, value: Any, *, written: bool = False) -> Tensor:
    """Return ``value``, refused where it isn't a tensor, or one whose values are in others; see :func:`tensors`."""
    if type(value) is Tensor or type(value) is torch.nn.Parameter:
        if value.is_nested:
            raise TypeError(f"{name} must be a dense (strided) tensor, got a nested one")
    elif not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got a {type(value).__name__}")
    elif is_traceable_wrapper_subclass(value):  # type: ignore[unreachable]
        raise TypeError(
            f"{name} must be a plain tensor, got a {type(value).__name__}, whose values are in other tensors"
        )
    if not torch.compiler.is_compiling():  # what is traced has no memory yet; see `address`
        if written:
            check_bits(value, name)
            if value._is_zerotensor():
                raise ValueError(f"{name} must be a tensor with memory to be written to, got a zero tensor")
        if value.layout == torch.strided and not is_functorch_wrapped_tensor(value) and not value._is_zerotensor():
            check_allocated(value, name)
    return value


def tensors(name: str, values: Any, *, written: bool = False) -> list[Tensor]:
    """Return ``values`` as a list, refused where it isn't one of tensors with values of their own.

    ``written``: in place, so none may be a negated view. To be called before the dispatcher, which resolves those.
    """
    if isinstance(values, Tensor):
        raise TypeError(f"{name} must be a list of tensors, got a tensor")
    try:
        listed = list(values)
    except TypeError as error:
        raise TypeError(f"{name} must be a list of tensors, got a {type(values).__name__}") from error
    return [tensor(f"{name}[{i}]", t, written=written) for i, t in enumerate(listed)]


def check_momentum(momentum: float, rule: str, l: float) -> float:
    """Return a momentum as a float; refuse one out of [0, 1), or that ``l`` makes 1, and an unknown rule."""
    momentum = number("momentum value", momentum, least=0, below=1)
    if rule not in ("time", "fixed"):
        raise ValueError(f"momentum_rule must be 'time' or 'fixed', got {rule!r}")
    if rule == "time" and momentum != 0 and 1 - (1 - momentum) / l >= 1:
        raise ValueError(
            f"l must be smaller at momentum = {momentum}, which becomes 1 - (1 - momentum)/l and is 1, got {l}"
        )
    return momentum


def check_decay(name: str, rate: float, l: float, params: Sequence[Tensor]) -> None:
    """Refuse a decay rate that ``l`` brings to 1 in float32, for params computed in it: what it keeps would only grow.

    (1 - rate)/l of a float32 number is then less than half of its last place, so it is never taken off.
    """
    if (1 - rate) / l <= 2**-25:
        for i, p in enumerate(params):
            if p.dtype != torch.float64:
                raise ValueError(
                    f"l must be smaller at {name} = {rate}, which becomes 1 - {(1 - rate) / l:.3g} and is 1 in "
                    f"float32, in which params[{i}] of {p.dtype} is computed, got {l}"
                )


def check_params(params: Sequence[Tensor]) -> None:
    """Refuse params of a wrong dtype, on several devices, sparse, or not dense in memory."""
    for i, p in enumerate(params):
        if p.dtype not in PARAM_DTYPES:
            raise TypeError(f"params[{i}] must be one of {', '.join(map(str, PARAM_DTYPES))}, got {p.dtype}")
        if p.layout != torch.strided:
            raise TypeError(f"params[{i}] must be a dense (strided) tensor, got {p.layout}")
        if p.device != params[0].device:
            raise ValueError(f"params[{i}] must be on {params[0].device}, as params[0] is, got one on {p.device}")
        if not _is_dense(p):
            raise ValueError(
                f"params[{i}] must be dense in memory in some order of its dimensions, got gaps or repeated elements "
                f"(shape {list(p.shape)}, strides {list(p.stride())})"
            )


def check_like(
    name: str,
    tensors: Sequence[Tensor],
    params: Sequence[Tensor],
    dtypes: str = "same or float32",
    *,
    per_sample: bool = False,
) -> None:
    """Refuse a list that doesn't match ``params`` in length, shape, device or dtype.

    ``dtypes``: "same or float32" (gradients), "float32 beside no float64" (compensation), "arithmetic" (float64 for
    float64, else float32) or "same". ``per_sample``: [B, *param's shape], of as many samples B >= 1 each.
    """
    if len(tensors) != len(params):
        raise ValueError(f"{name} must be {len(params)} tensors, as params is, got {len(tensors)}")
    for i, (t, p) in enumerate(zip(tensors, params, strict=True)):
        if (t.shape[1:] if per_sample else t.shape) != p.shape or t.dim() < per_sample:
            expected = f"[{', '.join(map(str, ['B'] * per_sample + list(p.shape)))}]"
            raise ValueError(f"{name}[{i}] must be of shape {expected} to fit params[{i}], got {list(t.shape)}")
        if t.device != p.device:
            raise ValueError(f"{name}[{i}] must be on {p.device}, as params[{i}] is, got one on {t.device}")
        if t.layout != torch.strided:
            raise TypeError(f"{name}[{i}] must be a dense (strided) tensor, got {t.layout}")
        if dtypes == "float32 beside no float64" and p.dtype == torch.float64:
            raise TypeError(f"params[{i}] must be float32, bfloat16 or float16 for {name}, got torch.float64")
        allowed = {
            "same": (p.dtype,),
            "same or float32": (p.dtype, torch.float32),
            "arithmetic": (arithmetic(p.dtype),),
            "float32 beside no float64": (torch.float32,),
        }[dtypes]
        if t.dtype not in allowed:
            raise TypeError(f"{name}[{i}] must be {' or '.join(dict.fromkeys(map(str, allowed)))}, got {t.dtype}")
        if per_sample and not len(t) == len(tensors[0]) >= 1:
            raise ValueError(f"{name}[{i}] must be of as many samples as {name}[0] and at least 1, got {len(t)}")


def check_strides(name: str, tensors: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    """Refuse buffers that are updated in place and are not laid out as their params."""
    for i, (t, p) in enumerate(zip(tensors, params, strict=True)):
        if t.stride() != p.stride():
            raise ValueError(
                f"{name}[{i}] must be of strides {list(p.stride())}, as params[{i}] is, got {list(t.stride())}"
            )


def laid_out_like(tensors: Sequence[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors' values in the params' memory order: themselves where they match, else a copy."""
    return [
        resolved(t) if t.stride() == p.stride() or t.numel() <= 1 else torch.empty_like(p, dtype=t.dtype).copy_(t)
        for t, p in zip(tensors, params, strict=True)
    ]


def _is_dense(t: Tensor) -> bool:
    """Whether the elements fill an interval of memory, each once, in whatever order."""
    if t.is_contiguous() or t.numel() == 0:
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True
