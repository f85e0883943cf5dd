"""The fused SVAG step over lists of tensors, with the noise statistics of the same pass (paper, equation 5)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from svag_fast.kernels.device_cache import DeviceCache
from svag_fast.ops.backends import device_and_stream, implements, select
from svag_fast.ops.checks import check_l, check_like, check_nonnegative, check_params, laid_out_like
from svag_fast.ops.library import register_op
from svag_fast.ops.step_stats import FINITE, StepStats, raw_statistics

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def svag_coefficients(l: float) -> tuple[float, float]:
    """Return SVAG's ``(c1, c2) = (1 ± sqrt(2l - 1)) / 2``: they sum to 1, and their squares to ``l``.

    Source: Li, Malladi, Arora (NeurIPS 2021), equation 5.

    Raises:
        ValueError: ``l`` is not a finite number >= 1.

    >>> svag_coefficients(1)
    (1.0, 0.0)
    >>> svag_coefficients(5)
    (2.0, -1.0)
    """
    check_l(l)
    root = math.sqrt(2 * l - 1)
    return (1 + root) / 2, (1 - root) / 2


def svag_step_(
    params: Sequence[Tensor],
    grads1: Sequence[Tensor],
    grads2: Sequence[Tensor] | None,
    *,
    lr: float,
    l: float,
    weight_decay: float = 0.0,
    compensation: Sequence[Tensor] | None = None,
    skip_nonfinite: bool = False,
    coefficients: Tensor | None = None,
    backend: str = "auto",
) -> StepStats:
    """Take one SVAG step in place, ``x -= (lr/l) * (c1*g1 + c2*g2 + weight_decay*x)``, and measure the noise.

    With ``c1, c2 = svag_coefficients(l)`` (paper, equation 5, with the weight decay of equation 7). At ``l = 1`` it is
    SGD on ``grads1``: ``grads2`` only serves the statistics, and an inf in it never reaches the params.
    The same bits come out for any number of threads. Autograd does not record the step.

    Args:
        params: float32, float64, bfloat16 or float16 tensors on one device, dense in memory (any order of
            dimensions, so channels_last too), not overlapping. Updated in place, each rounded to its dtype from
            float32 arithmetic (float64 for float64).
        grads1: gradients on the first batch, shaped as the params, of the param's dtype or float32. One whose memory
            order is not its param's is copied first.
        grads2: gradients on the second, independent batch, at the same params; None only at ``l = 1``.
        lr: the paper's eta; the step taken is ``lr / l``.
        l: SVAG's hyperparameter, >= 1; integers are the paper's, fractions are meaningful.
        weight_decay: the paper's lambda.
        compensation: float32 tensors shaped as the params, zero at first, that keep what rounding the params loses
            (Kahan). Without them drift and decay vanish below one ulp of the params when ``lr / l`` is small: at
            ``l = 65536`` a float32 parameter hardly decays. Not for float64 params.
        skip_nonfinite: leave all params (and compensation) as they are when any gradient entry is inf or nan; decided
            on the device, without synchronising. Costs a second pass over the gradients.
        coefficients: from :func:`step_coefficients`, on the params' device: the kernel reads lr, l and weight_decay
            there when it runs instead of the arguments, so that a captured CUDA graph follows what is written there.
            ``cpu`` and ``reference`` read it at once (on a GPU ``reference`` synchronises for it).
        backend: "auto" or a row of :mod:`svag_fast.ops.backends`.

    Returns:
        The statistics, from the same pass.

    Raises:
        ValueError, TypeError: something doesn't fit; the message names it, and nothing was written.
        BackendError: the backend can't serve the call.
    """
    check_nonnegative("learning rate", lr)
    check_l(l)
    check_nonnegative("weight_decay", weight_decay)
    if grads2 is None and l != 1:
        raise ValueError(f"grads2 is None, but at l = {l} a step needs the gradients of two batches")
    if not params:
        _check_lists(params, grads1, grads2, compensation)
        return StepStats(torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0], dtype=torch.float64), grads2 is not None)
    with torch.no_grad():
        raw = _op(
            list(params),
            list(grads1),
            None if grads2 is None else list(grads2),
            [] if compensation is None else list(compensation),
            lr,
            l,
            weight_decay,
            skip_nonfinite,
            coefficients,
            backend,
        )
    return StepStats(raw, grads2 is not None)


def check_step(
    params: list[Tensor],
    grads1: list[Tensor],
    grads2: list[Tensor] | None,
    *,
    lr: float,
    l: float,
    weight_decay: float,
    compensation: list[Tensor] | None = None,
    coefficients: Tensor | None = None,
    backend: str,
) -> None:
    """Refuse what :func:`svag_step_` would, without a step: before the first of several is taken."""
    check_nonnegative("learning rate", lr)
    check_l(l)
    check_nonnegative("weight_decay", weight_decay)
    _check_lists(params, grads1, grads2, compensation)
    if coefficients is not None:
        _check_coefficients(coefficients, params[0].device)
    select("svag_step_", backend, params)


def _check_lists(
    params: Sequence[Tensor],
    grads1: Sequence[Tensor],
    grads2: Sequence[Tensor] | None,
    compensation: Sequence[Tensor] | None,
) -> None:
    check_params(params)
    check_like("grads1", grads1, params)
    if grads2 is not None:
        check_like("grads2", grads2, params)
        for i, (g1, g2) in enumerate(zip(grads1, grads2, strict=True)):
            if g1.dtype != g2.dtype:
                raise TypeError(f"grads2[{i}] is {g2.dtype}, but grads1[{i}] is {g1.dtype}: expected the same dtype")
    if compensation:
        check_like("compensation", compensation, params, dtypes="float32")
        for i, (e, p) in enumerate(zip(compensation, params, strict=True)):
            if p.dtype == torch.float64:
                raise TypeError(f"params[{i}] is torch.float64: compensation serves float32, bfloat16 and float16")
            if e.stride() != p.stride():
                raise ValueError(
                    f"compensation[{i}] has strides {list(e.stride())}, but params[{i}] has {list(p.stride())}"
                )


def step_coefficients(lr: float, l: float, weight_decay: float, device: torch.device) -> Tensor:
    """Return ``[lr, l, c1, c2, weight_decay]``, float64 on ``device``, for ``svag_step_(coefficients=...)``."""
    return torch.tensor([lr, l, *svag_coefficients(l), weight_decay], dtype=torch.float64, device=device)


def _check_coefficients(coefficients: Tensor, device: torch.device) -> None:
    if coefficients.dtype != torch.float64 or coefficients.shape != (5,) or not coefficients.is_contiguous():
        raise ValueError(
            f"coefficients is {coefficients.dtype} of shape {list(coefficients.shape)}: expected what "
            "step_coefficients returns"
        )
    if coefficients.device != device:
        raise ValueError(f"coefficients is on {coefficients.device}, but params[0] on {device}")


def _run(
    params: list[Tensor],
    grads1: list[Tensor],
    grads2: list[Tensor] | None,
    compensation: list[Tensor],
    lr: float,
    l: float,
    weight_decay: float,
    skip_nonfinite: bool,
    coefficients: Tensor | None,
    backend: str,
) -> Tensor:
    _check_lists(params, grads1, grads2, compensation)
    if coefficients is not None:
        _check_coefficients(coefficients, params[0].device)
    step = select("svag_step_", backend, params)
    grads1 = laid_out_like(grads1, params)
    grads2 = None if grads2 is None else laid_out_like(grads2, params)
    raw: Tensor = step(params, grads1, grads2, compensation, lr, l, weight_decay, skip_nonfinite, coefficients)
    torch.autograd.graph.increment_version(params)
    return raw


def _fake(params: list[Tensor], *rest: object) -> Tensor:
    return params[0].new_empty(5, dtype=torch.float64)


_op = register_op(
    "svag_step_(Tensor(a!)[] params, Tensor[] grads1, Tensor[]? grads2, Tensor(b!)[] compensation, float lr, float l, "
    "float weight_decay, bool skip_nonfinite, Tensor? coefficients, str backend) -> Tensor",
    _run,
    _fake,
)


def host_coefficients(
    lr: float, l: float, weight_decay: float, coefficients: Tensor | None = None
) -> tuple[float, float, float, float]:
    """Return ``lr / l, c1, c2, weight_decay``, from the tensor if there is one."""
    if coefficients is None:
        return lr / l, *svag_coefficients(l), weight_decay
    lr, l, c1, c2, weight_decay = coefficients.tolist()
    return lr / l, c1, c2, weight_decay


@implements("svag_step_", "reference")
def _reference(
    params: list[Tensor],
    grads1: list[Tensor],
    grads2: list[Tensor] | None,
    compensation: list[Tensor],
    lr: float,
    l: float,
    weight_decay: float,
    skip_nonfinite: bool,
    coefficients: Tensor | None,
) -> Tensor:
    raw = raw_statistics(params, grads1, grads2)
    finite = raw[FINITE] != 0
    rate, c1, c2, weight_decay = host_coefficients(lr, l, weight_decay, coefficients)
    for i, x in enumerate(params):
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        combined = c1 * grads1[i].to(dtype)
        if c2 != 0 and grads2 is not None:
            combined = combined + c2 * grads2[i].to(dtype)
        if compensation:
            e = compensation[i]
            step = e - rate * (combined + weight_decay * (x.to(dtype) + e))
            value, error = two_sum(x.to(dtype), step)
            rounded = value.to(x.dtype)
            lost = (value - rounded.to(dtype)) + error
            e.copy_(torch.where(finite, lost, e) if skip_nonfinite else lost)
        else:
            rounded = (x.to(dtype) - rate * (combined + weight_decay * x.to(dtype))).to(x.dtype)
        x.copy_(torch.where(finite, rounded, x) if skip_nonfinite else rounded)
    return raw


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(sum, error)`` with ``sum + error == a + b`` exactly (Knuth, TAOCP 2, 4.2.2)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


@implements("svag_step_", "cpu")
def _cpu(
    params: list[Tensor],
    grads1: list[Tensor],
    grads2: list[Tensor] | None,
    compensation: list[Tensor],
    lr: float,
    l: float,
    weight_decay: float,
    skip_nonfinite: bool,
    coefficients: Tensor | None,
) -> Tensor:
    from svag_fast import _C

    raw = torch.empty(5, dtype=torch.float64)
    _C.step(
        *_descriptors(params, grads1, grads2, compensation),
        *host_coefficients(lr, l, weight_decay, coefficients),
        skip_nonfinite,
        torch.get_num_threads(),
        raw.data_ptr(),
    )
    return raw


@implements("svag_step_", "cuda")
def _cuda(
    params: list[Tensor],
    grads1: list[Tensor],
    grads2: list[Tensor] | None,
    compensation: list[Tensor],
    lr: float,
    l: float,
    weight_decay: float,
    skip_nonfinite: bool,
    coefficients: Tensor | None,
) -> Tensor:
    from svag_fast import _C

    described = _descriptors(params, grads1, grads2, compensation)
    raw = params[0].new_empty(5, dtype=torch.float64)
    workspace = params[0].new_empty(_C.cuda_step_workspace(described[4]), dtype=torch.float64)
    _C.cuda_step(
        *described,
        *host_coefficients(lr, l, weight_decay),
        0 if coefficients is None else coefficients.data_ptr(),
        skip_nonfinite,
        *device_and_stream(params[0].device),
        workspace.data_ptr(),
        raw.data_ptr(),
    )
    return raw


_COEFFICIENTS: DeviceCache[Tensor] = DeviceCache(64)


def constant_coefficients(lr: float, l: float, weight_decay: float, device: torch.device) -> Tensor:
    """Return what :func:`step_coefficients` does, kept on the device: a schedule sets each rate many steps long."""
    kept: Tensor = _COEFFICIENTS.get(
        device, (lr, l, weight_decay), lambda: step_coefficients(lr, l, weight_decay, device), "coefficients"
    )
    return kept


@implements("svag_step_", "triton")
def _triton(
    params: list[Tensor],
    grads1: list[Tensor],
    grads2: list[Tensor] | None,
    compensation: list[Tensor],
    lr: float,
    l: float,
    weight_decay: float,
    skip_nonfinite: bool,
    coefficients: Tensor | None,
) -> Tensor:
    from svag_fast.kernels.step import svag_step

    if coefficients is None:
        coefficients = constant_coefficients(lr, l, weight_decay, params[0].device)
    with torch.cuda.device_of(params[0]):  # type: ignore[no-untyped-call]
        raw: Tensor = svag_step(params, grads1, grads2, compensation, coefficients, skip_nonfinite)
    return raw


def _descriptors(
    params: list[Tensor], grads1: list[Tensor], grads2: list[Tensor] | None, compensation: list[Tensor]
) -> tuple[list[int], list[int], list[int], list[int], list[int], list[int], list[int]]:
    """What the compiled kernels are told of the tensors: addresses, sizes and dtypes."""
    return (
        list(map(Tensor.data_ptr, params)),
        list(map(Tensor.data_ptr, grads1)),
        list(map(Tensor.data_ptr, grads2 or [])),
        list(map(Tensor.data_ptr, compensation)),
        list(map(Tensor.numel, params)),
        [DTYPE_CODES[p.dtype] for p in params],
        [DTYPE_CODES[g.dtype] for g in grads1],
    )
