"""The fused SVAG step of many replicas in one list of stacked tensors: options and statistics of each replica's own."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from svag_fast.numeric import integer, number
from svag_fast.ops.backends import implements, select
from svag_fast.ops.checks import check_like, check_momentum, numbers
from svag_fast.ops.memory import address
from svag_fast.ops.step import SVAG_STEP, cuda_step, triton_step
from svag_fast.ops.step_call import StepCall, StepKind, StepLists, take_step
from svag_fast.ops.step_options import (
    HostScalars,
    MomentumRule,
    StepOptions,
    StepScalars,
    constant_coefficients,
    options_scalars,
    step_scalars,
)
from svag_fast.ops.step_stats import StepStats

OneOrEach: TypeAlias = float | tuple[float, ...]
"""One number for all replicas, or one of each, which then are not all the same."""


def svag_replicas_step_(
    params: Sequence[Tensor],
    grads1: Sequence[Tensor],
    grads2: Sequence[Tensor] | None,
    *,
    replicas: int,
    lr: float | Sequence[float] | Tensor,
    l: float | Sequence[float] | Tensor,
    weight_decay: float | Sequence[float] | Tensor = 0.0,
    compensation: Sequence[Tensor] | None = None,
    skip_nonfinite: bool = False,
    backend: str = "auto",
    momentum_buffers: Sequence[Tensor] | None = None,
    momentum: float = 0.0,
    momentum_rule: MomentumRule = "time",
    maximize: bool = False,
) -> StepStats:
    """Take :func:`svag_fast.ops.svag_step_` of S replicas, which are the rows of the tensors, each by itself.

    Each replica's params and statistics have the bits of its step alone, in tensors of its own: they depend neither on
    S, nor on the threads, nor on what the other replicas hold. Only Triton's statistics differ from those in float32's
    rounding. It is one pass, but for ``reference``, which steps one replica after the other.

    Args:
        params: [S, ...], and so all other tensors; else as for ``svag_step_``. The replicas' dimension is the outermost
            in memory too, as of what ``torch.stack`` makes.
        grads1, grads2, compensation, momentum_buffers, backend, momentum, momentum_rule, maximize: as there. ``grads2``
            may be None only where ``l`` is 1 for all.
        replicas: S, at least 1.
        lr, l, weight_decay: one number for all, or S of them. A replica at ``l = 1`` takes nothing from ``grads2``.
        skip_nonfinite: leave a replica as it is when any of its gradient entries is inf or nan; the others step.

    Returns:
        The statistics, each [S].

    Raises:
        ValueError, TypeError: something doesn't fit; the message names it, and nothing was written.
        BackendError: the backend can't serve the call.
    """
    options = ReplicaOptions.checked(replicas, lr, l, weight_decay, momentum, momentum_rule, maximize)
    if (options.momentum != 0) != (momentum_buffers is not None):
        expected = "None" if options.momentum == 0 else "a buffer for each of the params"
        found = "None" if momentum_buffers is None else "buffers"
        raise ValueError(f"momentum_buffers must be {expected} where momentum is {momentum}, got {found}")
    if grads2 is None and options.l != 1:
        raise ValueError(f"grads2 must be the second batch's gradients at l = {l}, got None")
    lists = StepLists(params, grads1, grads2, compensation, momentum_buffers)  # type: ignore[arg-type]
    return take_step(
        SVAG_REPLICAS_STEP,
        lists,
        options,
        extra=options.replicas,
        skip_nonfinite=bool(skip_nonfinite),
        backend=backend,
    )


class ReplicaOptions(NamedTuple):
    """The options of a step of replicas, checked."""

    lr: OneOrEach
    l: OneOrEach
    weight_decay: OneOrEach
    momentum: float
    momentum_rule: str
    maximize: bool
    replicas: int

    @classmethod
    def checked(
        cls,
        replicas: int,
        lr: Any,
        l: Any,
        weight_decay: Any = 0.0,
        momentum: float = 0.0,
        momentum_rule: str = "time",
        maximize: bool = False,
    ) -> ReplicaOptions:
        """Refuse what is no number, or not one of each replica, or out of range; see :func:`svag_replicas_step_`."""
        S = integer("replicas", replicas, least=1)
        named = zip(("lr", "l", "weight_decay"), (lr, l, weight_decay), strict=True)
        given = [one_or_each(name, value, S) for name, value in named]
        each = [value if isinstance(value, tuple) else (value,) * S for value in given]
        rows = list(dict.fromkeys(zip(*each, strict=True)))
        for row in rows:
            try:
                StepOptions.checked(row[0], row[1], row[2], momentum, momentum_rule, maximize)
            except (TypeError, ValueError) as error:
                if len(rows) == 1:
                    raise
                s = list(zip(*each, strict=True)).index(row)
                raise type(error)(f"replica {s}: {error}") from error
        momentum = check_momentum(momentum, momentum_rule, 1)
        lr, l, weight_decay = (value if isinstance(value, tuple) else float(value) for value in given)
        return cls(lr, l, weight_decay, momentum, momentum_rule, bool(maximize), S)

    def of(self, s: int) -> StepOptions:
        """Return replica s's options."""
        lr, l, weight_decay = (value[s] if isinstance(value, tuple) else value for value in self[:3])
        return StepOptions(lr, l, weight_decay, self.momentum, self.momentum_rule, self.maximize)

    def check_held(self, params: Sequence[Tensor]) -> None:
        """Refuse options that the params' arithmetic can't hold."""
        for options in dict.fromkeys(map(self.of, range(self.replicas))):
            options.check_held(params)


def one_or_each(name: str, value: Any, replicas: int) -> OneOrEach:
    """Return one number for all replicas, or a tuple of one for each where they differ.

    Raises:
        TypeError: they are no numbers.
        ValueError: they are as many as neither 1 nor the replicas; or not in a row.
    """
    if isinstance(value, float | int):
        return value
    if isinstance(value, Tensor) or hasattr(value, "__array__"):
        if value.ndim > 1:
            raise ValueError(f"{name} must be one number or [{replicas}], got the shape {list(value.shape)}")
        value = value.tolist()
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        return number(name, value)
    each = tuple(numbers(name, value))
    if len(each) not in (1, replicas):
        raise ValueError(f"{name} must be one number or one for each of the {replicas} replicas, got {len(each)}")
    return each[0] if len(set(each)) == 1 else each


def check_replicas(params: Sequence[Tensor], replicas: int, of: str = "") -> None:
    """Refuse params whose first dimension isn't the replicas', in shape and in memory; ``of`` ends their names."""
    for i, p in enumerate(params):
        if p.dim() == 0 or p.shape[0] != replicas:
            raise ValueError(f"params[{i}]{of} must be [{replicas}, ...] with replicas={replicas}, got {list(p.shape)}")
        if replicas > 1 and p.numel() and p.stride(0) * replicas != p.numel():
            raise ValueError(
                f"params[{i}]{of} must be in memory with the replicas' dimension outermost, got shape "
                f"{list(p.shape)}, strides {list(p.stride())}"
            )


def _unpacked(
    params: list[Tensor],
    grads1: list[Tensor],
    grads2: list[Tensor] | None,
    compensation: list[Tensor],
    replicas: int,
    lr: list[float],
    l: list[float],
    weight_decay: list[float],
    skip_nonfinite: bool,
    backend: str,
    momentum_buffers: list[Tensor] | None = None,
    momentum: float = 0.0,
    momentum_rule: str = "time",
    maximize: bool = False,
) -> tuple[StepLists, ReplicaOptions, int, str, bool]:
    """Return what :func:`_dispatch` has given to the op."""
    lists = StepLists(params, grads1, grads2, compensation or None, momentum_buffers)
    options = ReplicaOptions.checked(replicas, lr, l, weight_decay, momentum, momentum_rule, maximize)
    return lists, options, options.replicas, backend, skip_nonfinite


def _dispatch(lists: StepLists, options: ReplicaOptions, replicas: int, backend: str, skip_nonfinite: bool) -> Tensor:
    params, grads1, grads2, compensation, momentum_buffers = lists
    if compensation is not None and not compensation:  # which the op would take for none
        check_like("compensation", compensation, params)
    scalars = [list(value) if isinstance(value, tuple) else [value] for value in options[:3]]
    momentum = options[3:6]
    lists_given = params, grads1, grads2, compensation or []
    raw: Tensor = _op(*lists_given, replicas, *scalars, skip_nonfinite, backend, momentum_buffers, *momentum)
    return raw


SVAG_REPLICAS_STEP = StepKind(
    op="svag_replicas_step_",
    code=SVAG_STEP.code,
    kept=SVAG_STEP.kept,
    kept_dtypes=SVAG_STEP.kept_dtypes,
    grad_dtypes=SVAG_STEP.grad_dtypes,
    check_extra=lambda lists, replicas: check_replicas(lists.params, replicas),
    dispatch=_dispatch,
    raw_shape=lambda options: (options.replicas, 5),
)

_op = SVAG_REPLICAS_STEP.register(
    "svag_replicas_step_(Tensor(a!)[] params, Tensor[] grads1, Tensor[]? grads2, Tensor(b!)[] compensation, "
    "int replicas, float[] lr, float[] l, float[] weight_decay, bool skip_nonfinite, str backend, "
    'Tensor(c!)[]? momentum_buffers=None, float momentum=0.0, str momentum_rule="time", bool maximize=False) -> Tensor',
    _unpacked,
)


@functools.lru_cache(64)
def _scalars(options: ReplicaOptions) -> list[HostScalars]:
    return [options_scalars(options.of(s)) for s in range(options.replicas)]


@implements("svag_replicas_step_", "cpu")
def _cpu(call: StepCall, skip_nonfinite: bool) -> Tensor:
    raw = torch.empty((call.options.replicas, 5), dtype=torch.float64, device="cpu")
    place = raw.data_ptr() if type(raw) is Tensor else address(raw, "raw")
    tensors = call.described() if call.read is None else call.read
    tensors.replicas_step(_scalars(call.options), skip_nonfinite, torch.get_num_threads(), place)
    return raw


@implements("svag_replicas_step_", "reference")
@torch.no_grad()
def _reference(call: StepCall, skip_nonfinite: bool) -> Tensor:
    step, raws = select(SVAG_STEP.op, "reference", call.lists.params), []
    for s in range(call.options.replicas):
        lists = StepLists(*(None if listed is None else [t[s] for t in listed] for listed in call.lists))  # type: ignore[arg-type]
        one = call._replace(kind=SVAG_STEP, lists=lists, options=call.options.of(s), extra=None, read=None)
        raws.append(step(one, skip_nonfinite))
    return torch.stack(raws)


@functools.lru_cache(64)
def _step_scalars(options: ReplicaOptions) -> tuple[StepScalars, ...]:
    return tuple(step_scalars(*options.of(s)) for s in range(options.replicas))


def _coefficients(call: StepCall) -> Tensor:
    return constant_coefficients(_step_scalars(call.options), call.lists.params[0].device)


@implements("svag_replicas_step_", "cuda")
def _cuda(call: StepCall, skip_nonfinite: bool) -> Tensor:
    replicas = call.options.replicas
    raw = call.lists.params[0].new_empty((replicas, 5), dtype=torch.float64)
    cuda_step(call, _coefficients(call), skip_nonfinite, raw, replicas)
    return raw


@implements("svag_replicas_step_", "triton")
def _triton(call: StepCall, skip_nonfinite: bool) -> Tensor:
    return triton_step(call, _coefficients(call), skip_nonfinite, call.options.replicas)
