"""What every op checks before it writes: lists of tensors and scalars, with the offender named in the error."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

PARAM_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_l(l: float) -> None:
    """Refuse an SVAG hyperparameter that is not a finite number of at least 1."""
    if not (math.isfinite(l) and l >= 1):
        raise ValueError(f"Invalid l: {l} (expected a finite number >= 1)")


def check_nonnegative(name: str, value: float) -> None:
    """Refuse a negative, infinite or nan ``value`` in torch.optim's own words."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"Invalid {name}: {value} (expected a finite number >= 0)")


def check_momentum(momentum: float, rule: str, l: float) -> None:
    """Refuse a momentum out of [0, 1), an unknown rule, or one that ``l`` brings so near to 1 that it rounds to 1."""
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"Invalid momentum value: {momentum} (expected a number in [0, 1))")
    if rule not in ("time", "fixed"):
        raise ValueError(f"Invalid momentum_rule: {rule!r} (expected 'time' or 'fixed')")
    if rule == "time" and momentum != 0 and 1 - (1 - momentum) / l >= 1:
        raise ValueError(f"Invalid l: {l} (with it momentum = {momentum} becomes 1 - (1 - momentum)/l, which is 1)")


def check_params(params: Sequence[Tensor]) -> None:
    """Refuse params of a wrong dtype, on several devices, sparse, not dense in memory, or overlapping."""
    for i, p in enumerate(params):
        if p.dtype not in PARAM_DTYPES:
            raise TypeError(f"params[{i}] is {p.dtype}: expected one of {', '.join(map(str, PARAM_DTYPES))}")
        if p.layout != torch.strided:
            raise TypeError(f"params[{i}] is {p.layout}: expected a dense (strided) tensor")
        if p.device != params[0].device:
            raise ValueError(f"params[{i}] is on {p.device}, but params[0] on {params[0].device}: expected one device")
        if not _is_dense(p):
            raise ValueError(
                f"params[{i}] (shape {list(p.shape)}, strides {list(p.stride())}) has gaps or repeated elements in "
                "memory: expected a tensor that is dense in some order of its dimensions"
            )
    check_apart({"params": params})


def check_like(name: str, tensors: Sequence[Tensor], params: Sequence[Tensor], dtypes: str = "same or float32") -> None:
    """Refuse a list that doesn't match ``params`` in length, shape, device or dtype.

    ``dtypes``: "same or float32" (gradients), "float32" (compensation buffers), "arithmetic" (float64 for float64, else
    float32) or "same".
    """
    if len(tensors) != len(params):
        raise ValueError(f"{name} has {len(tensors)} tensors, but params has {len(params)}")
    for i, (t, p) in enumerate(zip(tensors, params, strict=True)):
        if t.shape != p.shape:
            raise ValueError(f"{name}[{i}] has shape {list(t.shape)}, but params[{i}] has {list(p.shape)}")
        if t.device != p.device:
            raise ValueError(f"{name}[{i}] is on {t.device}, but params[{i}] on {p.device}")
        if t.layout != torch.strided:
            raise TypeError(f"{name}[{i}] is {t.layout}: expected a dense (strided) tensor")
        arithmetic = torch.float64 if p.dtype == torch.float64 else torch.float32
        allowed = {"float32": (torch.float32,), "arithmetic": (arithmetic,), "same": (p.dtype,)}.get(
            dtypes, (p.dtype, torch.float32)
        )
        if t.dtype not in allowed:
            raise TypeError(f"{name}[{i}] is {t.dtype}: expected {' or '.join(dict.fromkeys(map(str, allowed)))}")


def check_strides(name: str, tensors: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    """Refuse buffers that are updated in place and are not laid out as their params."""
    for i, (t, p) in enumerate(zip(tensors, params, strict=True)):
        if t.stride() != p.stride():
            raise ValueError(f"{name}[{i}] has strides {list(t.stride())}, but params[{i}] has {list(p.stride())}")


def laid_out_like(tensors: Sequence[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors in the params' memory order: themselves where they match, else a copy."""
    return [
        t if t.stride() == p.stride() or t.numel() <= 1 else torch.empty_like(p, dtype=t.dtype).copy_(t)
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


def check_apart(lists: Mapping[str, Sequence[Tensor] | None]) -> None:
    """Refuse tensors, dense in memory and to be written, that share some of it."""
    spans = sorted(
        (t.data_ptr(), t.data_ptr() + t.nbytes, k, i, name)
        for k, (name, tensors) in enumerate(lists.items())
        for i, t in enumerate(tensors or [])
        if t.numel()
    )
    for (_, end, *a), (start, _, *b) in itertools.pairwise(spans):
        if start < end:
            (_, i, first), (_, j, second) = sorted((a, b))
            raise ValueError(f"{first}[{i}] and {second}[{j}] share memory: each must have its own")
