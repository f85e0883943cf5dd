"""The fused SVAG step over lists of tensors, with the noise statistics of the same pass (paper, equation 5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from svag_fast.ops.backends import device_and_stream, implements
from svag_fast.ops.checks import check_like, tensor
from svag_fast.ops.memory import address
from svag_fast.ops.step_call import StepCall, StepKind, StepLists, reads_scale, take_step
from svag_fast.ops.step_options import (
    HostScalars,
    MomentumRule,
    StepOptions,
    StepScalars,
    check_coefficients,
    constant_coefficients,
    host_scalars,
    options_scalars,
    step_coefficients,
    step_scalars,
    svag_coefficients,
)
from svag_fast.ops.step_stats import FINITE, StepStats

__all__ = ["SVAG_STEP", "StepOptions", "step_coefficients", "svag_coefficients", "svag_step_"]


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
    momentum_buffers: Sequence[Tensor] | None = None,
    momentum: float = 0.0,
    momentum_rule: MomentumRule = "time",
    maximize: bool = False,
) -> StepStats:
    """Take one SVAG step in place, ``x -= (lr/l) * (c1*g1 + c2*g2 + weight_decay*x)``, and measure the noise.

    With ``c1, c2 = svag_coefficients(l)`` (paper, equation 5, with the weight decay of equation 7). At ``l = 1`` it is
    SGD on ``grads1``: ``grads2`` only serves the statistics, and an inf in it never reaches the params.
    The same bits come out for any number of threads. Autograd does not record the step.

    With momentum μ the bracket u moves a buffer, and the buffer the params (heavy ball, as in torch.optim.SGD):
    ``v = μ_l*v + u``, ``x -= rate*v``, with ``momentum_rule="time"``: μ_l = 1 - (1 - μ)/l and rate = lr/l²,
    ``"fixed"``: μ_l = μ and rate = lr/l (docs/theory.md says what each answers). μ counts in the params' arithmetic, as
    in torch: float32's neighbour of 0.9 for all but float64 params.

    Args:
        params: float32, float64, bfloat16 or float16 tensors on one device, dense in memory (any order of
            dimensions, so channels_last too), not overlapping. Updated in place, each rounded to its dtype from
            float32 arithmetic (float64 for float64).
        grads1: gradients on the first batch, shaped as the params, of the param's dtype or float32. One whose memory
            order is not its param's, or that is a negated view (as of a conjugate), is copied first. It may be its
            param itself, but not share memory with any otherwise.
        grads2: gradients on the second, independent batch, at the same params; None only at ``l = 1``.
        lr: the paper's eta; the step taken is ``lr / l``. One so small that it is 0 in the params' arithmetic moves
            nothing; a larger one that only ``l`` brings to 0 is refused.
        l: SVAG's hyperparameter, >= 1; integers are the paper's, fractions are meaningful. At most 2^126 for params
            whose arithmetic is float32 (2^1022 for float64): beyond it 1/l is no normal number there. The same bound
            holds for lr and weight_decay.
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
        momentum_buffers: v, updated in place, zero before the first step: float64 for float64 params, else float32,
            since in 16 bits a buffer loses gradients below 1/256 of it. Shaped and laid out as the params. Needed
            where ``momentum`` is not 0, refused where it is.
        momentum: μ, in [0, 1). At 0 the rule plays no part. By the time rule and for params that are not float64,
            (1 - μ)/l > 2^-25: else the buffer would never decay.
        momentum_rule: "time" or "fixed".
        maximize: turn the gradients' sign, not the decay's, as torch.optim.SGD does. The statistics stay.

    Returns:
        The statistics, from the same pass.

    Raises:
        ValueError, TypeError: something doesn't fit; the message names it, and nothing was written.
        BackendError: the backend can't serve the call.
    """
    if coefficients is not None:
        tensor("coefficients", coefficients)
    options = StepOptions.checked(lr, l, weight_decay, momentum, momentum_rule, maximize)
    if coefficients is None and (options.momentum != 0) != (momentum_buffers is not None):
        expected = "None" if options.momentum == 0 else "a buffer for each of the params"
        found = "None" if momentum_buffers is None else "buffers"
        raise ValueError(f"momentum_buffers must be {expected} where momentum is {momentum}, got {found}")
    if grads2 is None and options.l != 1:
        raise ValueError(f"grads2 must be the second batch's gradients at l = {l}, got None")
    lists = StepLists(params, grads1, grads2, compensation, momentum_buffers)  # type: ignore[arg-type]
    skip_nonfinite = bool(skip_nonfinite)
    return take_step(SVAG_STEP, lists, options, extra=coefficients, skip_nonfinite=skip_nonfinite, backend=backend)


def _unpacked(
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
    momentum_buffers: list[Tensor] | None = None,
    momentum: float = 0.0,
    momentum_rule: str = "time",
    maximize: bool = False,
) -> tuple[StepLists, StepOptions, Tensor | None, str, bool]:
    """Return what :func:`_dispatch` has given to the op."""
    lists = StepLists(params, grads1, grads2, compensation or None, momentum_buffers)
    options = StepOptions(lr, l, weight_decay, momentum, momentum_rule, maximize)
    return lists, options, coefficients, backend, skip_nonfinite


def _dispatch(
    lists: StepLists, options: StepOptions, coefficients: Tensor | None, backend: str, skip_nonfinite: bool
) -> Tensor:
    params, grads1, grads2, compensation, momentum_buffers = lists
    if compensation is not None and not compensation:  # which the op would take for none
        check_like("compensation", compensation, params)
    lr, l, weight_decay, *momentum = options
    scalars = lr, l, weight_decay, skip_nonfinite, coefficients, backend
    raw: Tensor = _op(params, grads1, grads2, compensation or [], *scalars, momentum_buffers, *momentum)
    return raw


SVAG_STEP = StepKind(
    op="svag_step_",
    code=0,
    kept=("compensation", "momentum_buffers"),
    kept_dtypes=("float32 beside no float64", "arithmetic"),
    grad_dtypes="same or float32",
    check_extra=lambda lists, coefficients: check_coefficients(coefficients, lists.params[0].device),
    dispatch=_dispatch,
)

_op = SVAG_STEP.register(
    "svag_step_(Tensor(a!)[] params, Tensor[] grads1, Tensor[]? grads2, Tensor(b!)[] compensation, float lr, float l, "
    "float weight_decay, bool skip_nonfinite, Tensor? coefficients, str backend, "
    'Tensor(c!)[]? momentum_buffers=None, float momentum=0.0, str momentum_rule="time", bool maximize=False) -> Tensor',
    _unpacked,
)


def _host_scalars(call: StepCall) -> HostScalars:
    """Return the call's scalars, from the coefficients if there are any: then it waits for them."""
    if call.extra is None:
        return options_scalars(call.options)
    return host_scalars(StepScalars(*call.extra.tolist()))


@implements("svag_step_", "reference")
@torch.no_grad()
def _reference(call: StepCall, skip_nonfinite: bool) -> Tensor:
    params, grads1, grads2, compensation, momentum_buffers = call.lists
    raw = call.statistics()
    finite = raw[FINITE] != 0
    rate, c1, c2, weight_decay, momentum64, momentum32 = _host_scalars(call)

    def write(old: Tensor, new: Tensor) -> None:
        old.copy_(torch.where(finite, new, old) if skip_nonfinite else new)

    for i, x in enumerate(params):
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        combined = c1 * grads1[i].to(dtype)
        if c2 != 0 and grads2 is not None:
            combined = combined + c2 * grads2[i].to(dtype)
        value = x.to(dtype) + compensation[i] if compensation else x.to(dtype)
        direction = combined + weight_decay * value
        if momentum_buffers:
            v = momentum_buffers[i]
            mu = momentum64 if dtype == torch.float64 else momentum32
            kept = float(torch.tensor(mu, dtype=dtype, device="cpu"))
            direction = kept * v + (direction + (mu - kept) * v)  # mu * v + direction
            write(v, direction)
        if compensation:
            e = compensation[i]
            total, error = two_sum(x.to(dtype), e - rate * direction)
            rounded = total.to(x.dtype)
            write(e, (total - rounded.to(dtype)) + error)
        else:
            rounded = (x.to(dtype) - rate * direction).to(x.dtype)
        write(x, rounded)
    return raw


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(sum, error)`` with ``sum + error == a + b`` exactly (Knuth, TAOCP 2, 4.2.2)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


@implements("svag_step_", "cpu")
def _cpu(call: StepCall, skip_nonfinite: bool) -> Tensor:
    if call.scaler is not None and bool(call.scaler.found_inf):
        return call.statistics()
    scalars = options_scalars(call.options) if call.extra is None else _host_scalars(call)
    raw = torch.empty(5, dtype=torch.float64, device="cpu")
    place = raw.data_ptr() if type(raw) is Tensor else address(raw, "raw")
    tensors = call.described() if call.read is None else call.read
    tensors.step(*scalars, skip_nonfinite, torch.get_num_threads(), place)
    return raw


@implements("svag_step_", "cuda")
@reads_scale
def _cuda(call: StepCall, skip_nonfinite: bool) -> Tensor:
    raw = call.lists.params[0].new_empty(5, dtype=torch.float64)
    cuda_step(call, options_scalars(call.options) if call.extra is None else call.extra, skip_nonfinite, raw)
    return raw


def cuda_step(
    call: StepCall, scalars: HostScalars | Tensor, skip_nonfinite: bool, raw: Tensor, replicas: int = 1
) -> None:
    """Take the step of replicas by ``csrc/cuda/step.cu``, and write the statistics to ``raw``.

    ``scalars``: of one replica, or on the device, :class:`StepScalars` of each.
    """
    from svag_fast import _C

    tensors, like = call.described() if call.read is None else call.read, call.lists.params[0]
    on_host, on_device = ((0.0,) * 6, address(scalars, "coefficients")) if isinstance(scalars, Tensor) else (scalars, 0)
    found_inf, scale = [0 if t is None else address(t, "a GradScaler's") for t in call.scaler or (None, None)]
    workspace = like.new_empty(_C.cuda_step_workspace(tensors, replicas), dtype=torch.float64)
    _C.cuda_step(
        tensors,
        *on_host,
        on_device,
        skip_nonfinite,
        scale,
        found_inf,
        replicas,
        *device_and_stream(like.device),
        address(workspace, "workspace"),
        address(raw, "raw"),
    )


@implements("svag_step_", "triton")
@reads_scale
def _triton(call: StepCall, skip_nonfinite: bool) -> Tensor:
    coefficients = call.extra
    if coefficients is None:
        coefficients = constant_coefficients(step_scalars(*call.options), call.lists.params[0].device)
    return triton_step(call, coefficients, skip_nonfinite, 1)[0]


def triton_step(call: StepCall, coefficients: Tensor, skip_nonfinite: bool, replicas: int) -> Tensor:
    """Take the step of replicas by Triton's kernels, as :func:`svag_fast.kernels.step.svag_step` does."""
    from svag_fast.kernels.step import svag_step

    params, grads1, grads2, compensation, momentum_buffers = call.lists
    kept = compensation or [], momentum_buffers or []
    with torch.cuda.device_of(params[0]):  # type: ignore[no-untyped-call]
        raw: Tensor = svag_step(
            params, grads1, grads2, *kept, coefficients, skip_nonfinite, *(call.scaler or ()), replicas=replicas
        )
    return raw
