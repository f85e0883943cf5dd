"""The fused SVAG step over lists of tensors, with the noise statistics of the same pass (paper, equation 5)."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from svag_fast.kernels.device_cache import DeviceCache
from svag_fast.ops.backends import device_and_stream, implements, select
from svag_fast.ops.checks import (
    check_decay,
    check_held,
    check_l,
    check_like,
    check_momentum,
    check_params,
    check_step_scalars,
    check_strides,
    laid_out_like,
    tensor,
    tensors,
)
from svag_fast.ops.library import register_op
from svag_fast.ops.memory import Spans, address, addresses, check_apart, has_memory, mark_written, spans
from svag_fast.ops.step_stats import FINITE, StepStats, nothing_stepped, raw_statistics, rounding

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def svag_coefficients(l: float) -> tuple[float, float]:
    """Return SVAG's ``(c1, c2) = (1 ± sqrt(2l - 1)) / 2``: they sum to 1, and their squares to ``l``.

    Source: Li, Malladi, Arora (NeurIPS 2021), equation 5.

    Raises:
        TypeError: ``l`` is not a number.
        ValueError: ``l`` is not a finite number >= 1, or above 2^1022.

    >>> svag_coefficients(1)
    (1.0, 0.0)
    >>> svag_coefficients(5)
    (2.0, -1.0)
    """
    root = math.sqrt(2 * check_l(l) - 1)
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
    momentum_buffers: Sequence[Tensor] | None = None,
    momentum: float = 0.0,
    momentum_rule: str = "time",
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
    params = tensors("params", params, written=True)
    grads1 = tensors("grads1", grads1)
    grads2 = None if grads2 is None else tensors("grads2", grads2)
    compensation = [] if compensation is None else tensors("compensation", compensation, written=True)
    if momentum_buffers is not None:
        momentum_buffers = tensors("momentum_buffers", momentum_buffers, written=True)
    if coefficients is not None:
        tensor("coefficients", coefficients)
    options = StepOptions.checked(lr, l, weight_decay, momentum, momentum_rule, maximize)
    options.check_held(params)
    if coefficients is None and (options.momentum != 0) != (momentum_buffers is not None):
        raise ValueError(
            f"momentum is {momentum}, and momentum_buffers "
            + ("None: expected a buffer for each of the params" if momentum_buffers is None else "given: expected None")
        )
    if grads2 is None and options.l != 1:
        raise ValueError(f"grads2 is None, but at l = {l} a step needs the gradients of two batches")
    if not params:
        _check_lists(params, grads1, grads2, compensation, momentum_buffers)
        return nothing_stepped(grads2 is not None)
    with torch.no_grad():
        raw = _op(
            params,
            grads1,
            grads2,
            compensation,
            *options[:3],
            bool(skip_nonfinite),
            coefficients,
            backend,
            momentum_buffers,
            *options[3:],
        )
    return StepStats(raw, grads2 is not None, rounding=rounding(params))


class StepOptions(NamedTuple):
    """A step's options, checked."""

    lr: float
    l: float
    weight_decay: float
    momentum: float
    momentum_rule: str
    maximize: bool

    @classmethod
    def checked(
        cls,
        lr: float,
        l: float,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        momentum_rule: str = "time",
        maximize: bool = False,
    ) -> StepOptions:
        """Refuse what is no number or out of range; see :func:`svag_step_`."""
        lr, l, weight_decay = check_step_scalars(lr, l, weight_decay)
        momentum = check_momentum(momentum, momentum_rule, l)
        return cls(lr, l, weight_decay, momentum, momentum_rule, bool(maximize))

    def check_held(self, params: Sequence[Tensor]) -> None:
        """Refuse options that the params' arithmetic can't hold."""
        check_held(self.lr, self.l, self.weight_decay, params)
        if self.momentum != 0 and self.momentum_rule == "time":
            check_decay("momentum", self.momentum, self.l, params)


@dataclass(frozen=True)
class ReadyStep:
    """A step on tensors and options that have been checked, each once; what is called takes it."""

    params: list[Tensor]
    grads1: list[Tensor]
    grads2: list[Tensor] | None
    compensation: list[Tensor]
    momentum_buffers: list[Tensor]
    options: StepOptions
    coefficients: Tensor | None
    backend: Callable[..., Tensor]

    @classmethod
    def of(
        cls,
        params: list[Tensor],
        grads1: list[Tensor],
        grads2: list[Tensor] | None,
        options: StepOptions,
        *,
        compensation: list[Tensor] | None = None,
        momentum_buffers: list[Tensor] | None = None,
        coefficients: Tensor | None = None,
        backend: str,
    ) -> ReadyStep:
        """Refuse lists that :func:`svag_step_` would."""
        _check_lists(params, grads1, grads2, compensation, momentum_buffers)
        if coefficients is not None:
            _check_coefficients(coefficients, params[0].device)
        step = select("svag_step_", backend, params)
        return cls(params, grads1, grads2, compensation or [], momentum_buffers or [], options, coefficients, step)

    def spans(self, of: str) -> Spans:
        """Return where the written tensors and each batch's gradients are; ``of`` ends their names."""
        return step_spans(self.params, self.grads1, self.grads2, self.compensation, self.momentum_buffers, of)

    def __call__(self, skip_nonfinite: bool) -> Tensor:
        """Take the step; return StepStats.raw."""
        with torch.no_grad():
            raw = self.backend(
                self.params,
                laid_out_like(self.grads1, self.params),
                None if self.grads2 is None else laid_out_like(self.grads2, self.params),
                self.compensation,
                self.momentum_buffers,
                step_scalars(*self.options),
                skip_nonfinite,
                self.coefficients,
            )
        mark_written([*self.params, *self.compensation, *self.momentum_buffers])
        return raw


def ready_step(
    params: list[Tensor],
    grads1: list[Tensor],
    grads2: list[Tensor] | None,
    options: StepOptions,
    *,
    compensation: list[Tensor] | None,
    momentum_buffers: list[Tensor] | None,
    coefficients: Tensor | None,
    backend: str,
) -> ReadyStep:
    """Refuse what :func:`svag_step_` would; return the step, to be taken once all the others are ready too."""
    tensors("params", params, written=True)
    for name, read in (("grads1", grads1), ("grads2", grads2)):
        tensors(name, read or [])
    for name, written in (("compensation", compensation), ("momentum_buffers", momentum_buffers)):
        tensors(name, written or [], written=True)
    options.check_held(params)
    step = ReadyStep.of(
        params,
        grads1,
        grads2,
        options,
        compensation=compensation,
        momentum_buffers=momentum_buffers,
        coefficients=coefficients,
        backend=backend,
    )
    if has_memory(params[0]):
        return step

    def without_memory(*_: object) -> Tensor:  # the dispatcher knows what a meta or fake tensor becomes
        listed = params, grads1, grads2, compensation or [], *options[:3]
        raw: Tensor = _op(*listed, False, coefficients, backend, momentum_buffers, *options[3:])
        return raw

    return replace(step, backend=without_memory)


def _check_lists(
    params: Sequence[Tensor],
    grads1: Sequence[Tensor],
    grads2: Sequence[Tensor] | None,
    compensation: Sequence[Tensor] | None,
    momentum_buffers: Sequence[Tensor] | None,
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
        for i, p in enumerate(params):
            if p.dtype == torch.float64:
                raise TypeError(f"params[{i}] is torch.float64: compensation serves float32, bfloat16 and float16")
        check_strides("compensation", compensation, params)
    if momentum_buffers is not None:
        check_like("momentum_buffers", momentum_buffers, params, dtypes="arithmetic")
        check_strides("momentum_buffers", momentum_buffers, params)
    check_apart(*step_spans(params, grads1, grads2, compensation, momentum_buffers))


def step_spans(
    params: Sequence[Tensor],
    grads1: Sequence[Tensor],
    grads2: Sequence[Tensor] | None,
    compensation: Sequence[Tensor] | None,
    momentum_buffers: Sequence[Tensor] | None,
    of: str = "",
) -> Spans:
    """Return where a step's tensors are."""
    return (
        [
            *spans(params, "params", of),
            *spans(compensation or [], "compensation", of),
            *spans(momentum_buffers or [], "momentum_buffers", of),
        ],
        spans(grads1, "grads1", of),
        spans(grads2 or [], "grads2", of),
    )


class StepScalars(NamedTuple):
    """A step's scalars as the kernels read them, in this order; the step is ``lr / divisor`` of the direction."""

    lr: float
    divisor: float
    c1: float
    c2: float
    weight_decay: float
    momentum64: float
    """μ_l for float64 params."""
    momentum32: float
    """μ_l for all others, from the float32 that is nearest μ; not rounded itself: near 1 that changes 1 - μ_l."""


def step_scalars(
    lr: float,
    l: float,
    weight_decay: float,
    momentum: float = 0.0,
    momentum_rule: str = "time",
    maximize: bool = False,
) -> StepScalars:
    """Return the scalars of a step with these options; they must have been checked."""
    c1, c2 = svag_coefficients(l)
    if maximize:
        c1, c2 = -c1, -c2
    if momentum == 0:
        return StepScalars(lr, l, c1, c2, weight_decay, 0.0, 0.0)
    momentum32 = ctypes.c_float(momentum).value
    if momentum_rule == "fixed" or l == 1:
        return StepScalars(lr, l, c1, c2, weight_decay, momentum, momentum32)
    return StepScalars(lr, l * l, c1, c2, weight_decay, 1 - (1 - momentum) / l, 1 - (1 - momentum32) / l)


def step_coefficients(
    lr: float,
    l: float,
    weight_decay: float,
    device: torch.device,
    *,
    momentum: float = 0.0,
    momentum_rule: str = "time",
    maximize: bool = False,
) -> Tensor:
    """Return :func:`step_scalars`, float64 on ``device``, for ``svag_step_(coefficients=...)``."""
    scalars = step_scalars(lr, l, weight_decay, momentum, momentum_rule, maximize)
    return torch.tensor(scalars, dtype=torch.float64, device=device)


def _check_coefficients(coefficients: Tensor, device: torch.device) -> None:
    if coefficients.dtype != torch.float64 or coefficients.shape != (7,) or not coefficients.is_contiguous():
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
    momentum_buffers: list[Tensor] | None = None,
    momentum: float = 0.0,
    momentum_rule: str = "time",
    maximize: bool = False,
) -> Tensor:
    step = ReadyStep.of(
        params,
        grads1,
        grads2,
        StepOptions(lr, l, weight_decay, momentum, momentum_rule, maximize),
        compensation=compensation,
        momentum_buffers=momentum_buffers,
        coefficients=coefficients,
        backend=backend,
    )
    return step(skip_nonfinite)


def _fake(
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
    *rest: object,
) -> Tensor:
    _check_lists(params, grads1, grads2, compensation, momentum_buffers)
    return params[0].new_empty(5, dtype=torch.float64)


_op = register_op(
    "svag_step_(Tensor(a!)[] params, Tensor[] grads1, Tensor[]? grads2, Tensor(b!)[] compensation, float lr, float l, "
    "float weight_decay, bool skip_nonfinite, Tensor? coefficients, str backend, "
    'Tensor(c!)[]? momentum_buffers=None, float momentum=0.0, str momentum_rule="time", bool maximize=False) -> Tensor',
    _run,
    _fake,
)


@functools.lru_cache(64)
def options_scalars(options: StepOptions) -> tuple[float, float, float, float, float, float]:
    """Return the options as :func:`host_scalars` does."""
    return host_scalars(step_scalars(*options))


def host_scalars(
    scalars: StepScalars, coefficients: Tensor | None = None
) -> tuple[float, float, float, float, float, float]:
    """Return ``rate, c1, c2, weight_decay, momentum64, momentum32``, from the tensor if there is one."""
    read = scalars if coefficients is None else StepScalars(*coefficients.tolist())
    return read.lr / read.divisor, *read[2:]


@implements("svag_step_", "reference")
def _reference(
    params: list[Tensor],
    grads1: list[Tensor],
    grads2: list[Tensor] | None,
    compensation: list[Tensor],
    momentum_buffers: list[Tensor],
    scalars: StepScalars,
    skip_nonfinite: bool,
    coefficients: Tensor | None,
) -> Tensor:
    raw = raw_statistics(params, grads1, grads2)
    finite = raw[FINITE] != 0
    rate, c1, c2, weight_decay, momentum64, momentum32 = host_scalars(scalars, coefficients)

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
def _cpu(
    params: list[Tensor],
    grads1: list[Tensor],
    grads2: list[Tensor] | None,
    compensation: list[Tensor],
    momentum_buffers: list[Tensor],
    scalars: StepScalars,
    skip_nonfinite: bool,
    coefficients: Tensor | None,
) -> Tensor:
    from svag_fast import _C

    raw = torch.empty(5, dtype=torch.float64, device="cpu")
    _C.step(
        *_descriptors(params, grads1, grads2, compensation, momentum_buffers),
        *host_scalars(scalars, coefficients),
        skip_nonfinite,
        torch.get_num_threads(),
        address(raw, "raw"),
    )
    return raw


@implements("svag_step_", "cuda")
def _cuda(
    params: list[Tensor],
    grads1: list[Tensor],
    grads2: list[Tensor] | None,
    compensation: list[Tensor],
    momentum_buffers: list[Tensor],
    scalars: StepScalars,
    skip_nonfinite: bool,
    coefficients: Tensor | None,
) -> Tensor:
    from svag_fast import _C

    described = _descriptors(params, grads1, grads2, compensation, momentum_buffers)
    raw = params[0].new_empty(5, dtype=torch.float64)
    workspace = params[0].new_empty(_C.cuda_step_workspace(described[5]), dtype=torch.float64)
    _C.cuda_step(
        *described,
        *host_scalars(scalars),
        0 if coefficients is None else address(coefficients, "coefficients"),
        skip_nonfinite,
        *device_and_stream(params[0].device),
        address(workspace, "workspace"),
        address(raw, "raw"),
    )
    return raw


_COEFFICIENTS: DeviceCache[Tensor] = DeviceCache(64)


def constant_coefficients(scalars: StepScalars, device: torch.device) -> Tensor:
    """Return the scalars as a tensor, kept on the device: a schedule sets each rate many steps long."""

    def make() -> Tensor:
        return torch.tensor(scalars, dtype=torch.float64, device=device)

    kept: Tensor = _COEFFICIENTS.get(device, scalars, make, "coefficients")
    return kept


@implements("svag_step_", "triton")
def _triton(
    params: list[Tensor],
    grads1: list[Tensor],
    grads2: list[Tensor] | None,
    compensation: list[Tensor],
    momentum_buffers: list[Tensor],
    scalars: StepScalars,
    skip_nonfinite: bool,
    coefficients: Tensor | None,
) -> Tensor:
    from svag_fast.kernels.step import svag_step

    if coefficients is None:
        coefficients = constant_coefficients(scalars, params[0].device)
    with torch.cuda.device_of(params[0]):  # type: ignore[no-untyped-call]
        raw: Tensor = svag_step(params, grads1, grads2, compensation, momentum_buffers, coefficients, skip_nonfinite)
    return raw


def _descriptors(
    params: list[Tensor],
    grads1: list[Tensor],
    grads2: list[Tensor] | None,
    compensation: list[Tensor],
    momentum_buffers: list[Tensor],
) -> tuple[list[int], list[int], list[int], list[int], list[int], list[int], list[int], list[int]]:
    """What the compiled kernels are told of the tensors: addresses, sizes and dtypes."""
    return (
        addresses(params, "params"),
        addresses(grads1, "grads1"),
        addresses(grads2 or [], "grads2"),
        addresses(compensation, "compensation"),
        addresses(momentum_buffers, "momentum_buffers"),
        list(map(Tensor.numel, params)),
        [DTYPE_CODES[p.dtype] for p in params],
        [DTYPE_CODES[g.dtype] for g in grads1],
    )
