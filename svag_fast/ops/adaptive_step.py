"""The fused SVAG step of Adam and RMSprop over lists of tensors, with the noise statistics of the same pass.

Source: Malladi, Lyu, Panigrahi, Arora, "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms" (NeurIPS 2022):
the two-batch combination of SVAG, with the square-root scaling rule read at κ = 1/l.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from svag_fast.numeric import number
from svag_fast.ops.backends import implements, select
from svag_fast.ops.checks import (
    check_decay,
    check_held,
    check_like,
    check_params,
    check_step_scalars,
    check_strides,
    integers,
    laid_out_like,
    tensors,
)
from svag_fast.ops.library import register_op
from svag_fast.ops.memory import Spans, address, addresses, check_apart, has_memory, mark_written, spans
from svag_fast.ops.step import DTYPE_CODES, svag_coefficients
from svag_fast.ops.step_stats import StepStats, nothing_stepped, raw_statistics, rounding
from svag_fast.theory.scaling_rules import square_root_scaling_rule


def svag_adaptive_step_(
    params: Sequence[Tensor],
    grads1: Sequence[Tensor],
    grads2: Sequence[Tensor] | None,
    exp_avgs: Sequence[Tensor] | None,
    exp_avg_sqs: Sequence[Tensor],
    *,
    steps: Sequence[int],
    lr: float,
    l: float,
    beta1: float = 0.0,
    beta2: float,
    eps: float,
    weight_decay: float = 0.0,
    skip_nonfinite: bool = False,
    backend: str = "auto",
    maximize: bool = False,
) -> StepStats:
    """Take one step of Adam, or of RMSprop (``exp_avgs`` None), in place on the gradient ``c1*g1 + c2*g2``.

    The rates are the square-root scaling rule's at κ = 1/l: lr/√l, (1 - β)/l, ε√l; ``l`` steps make one of the plain
    optimizer. With g = c1 g1 + c2 g2 + weight_decay x, m ← β1 m + (1-β1) g and v ← β2 v + (1-β2) g²:

        Adam     x ← x - lr/(1-β1^k) m / (√v/√(1-β2^k) + ε)
        RMSprop  x ← x - lr g / (√v + ε)

    At ``l = 1`` the second gradient only serves the statistics. "reference" does torch.optim's operations in torch's
    order, so it gives the same bits at ``l = 1``; "cpu" rounds at the same places and gives the same moments, and the
    same params but for torch's own square root, which is not always correctly rounded (MKL's): one ulp of the step.

    Args:
        params: as for :func:`svag_fast.ops.svag_step_`. Gradients and moments have their param's dtype.
        grads1: gradients on the first batch.
        grads2: gradients on the second, independent batch; None only at ``l = 1``.
        exp_avgs: Adam's m, updated in place, with the param's strides; None for RMSprop.
        exp_avg_sqs: v, updated in place, with the param's strides. RMSprop's must not start from zero at ``l > 1``
            (:class:`svag_fast.SVAGRMSprop`).
        steps: the number k of this step for each param, from 1 on; only Adam's bias corrections use it.
        lr: of the plain optimizer, >= 0.
        l: SVAG's hyperparameter, >= 1.
        beta1: of the plain optimizer, in [0, 1); unused for RMSprop.
        beta2: of the plain optimizer, in [0, 1); RMSprop's alpha. What ``l`` makes of it must not round to 1: for
            params that are not float64, (1 - β)/l > 2^-25.
        eps: of the plain optimizer, >= 0.
        weight_decay: L2, added to the gradient.
        skip_nonfinite: leave everything as it is when any gradient entry is inf or nan, without synchronising.
        backend: "auto" or a row of :mod:`svag_fast.ops.backends`; "cpu" serves float32 and float64.
        maximize: turn the gradients' sign, not the decay's, as torch.optim does. The statistics stay.

    Raises:
        ValueError, TypeError: something doesn't fit; the message names it, and nothing was written.
        BackendError: the backend can't serve the call.
    """
    params = tensors("params", params, written=True)
    grads1 = tensors("grads1", grads1)
    grads2 = None if grads2 is None else tensors("grads2", grads2)
    exp_avgs = None if exp_avgs is None else tensors("exp_avgs", exp_avgs, written=True)
    exp_avg_sqs = tensors("exp_avg_sqs", exp_avg_sqs, written=True)
    steps = integers("steps", steps)
    options = AdaptiveOptions.checked(lr, l, None if exp_avgs is None else beta1, beta2, eps, weight_decay, maximize)
    options.check_held(params)
    if grads2 is None and options.l != 1:
        raise ValueError(f"grads2 is None, but at l = {l} a step needs the gradients of two batches")
    if not params:
        _check(params, grads1, grads2, exp_avgs, exp_avg_sqs, steps)
        return nothing_stepped(grads2 is not None)
    with torch.no_grad():
        raw = _op(
            params,
            grads1,
            grads2,
            exp_avgs,
            exp_avg_sqs,
            steps,
            options.lr,
            options.l,
            options.beta1 or 0.0,
            options.beta2,
            options.eps,
            options.weight_decay,
            bool(skip_nonfinite),
            backend,
            options.maximize,
        )
    return StepStats(raw, grads2 is not None, rounding=rounding(params))


class AdaptiveOptions(NamedTuple):
    """A step's options, checked; without ``beta1`` it is RMSprop's."""

    lr: float
    l: float
    beta1: float | None
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool

    @classmethod
    def checked(
        cls,
        lr: float,
        l: float,
        beta1: float | None,
        beta2: float,
        eps: float,
        weight_decay: float,
        maximize: bool,
        *,
        names: tuple[str, str] = ("beta1", "beta2"),
    ) -> AdaptiveOptions:
        """Refuse what is no number or out of range, the betas by their ``names``; see :func:`svag_adaptive_step_`."""
        lr, l, weight_decay = check_step_scalars(lr, l, weight_decay)
        eps = number("epsilon value", eps, least=0)
        if beta1 is not None:
            beta1 = _check_beta(names[0], beta1, l)
        return cls(lr, l, beta1, _check_beta(names[1], beta2, l), eps, weight_decay, bool(maximize))

    def check_held(self, params: Sequence[Tensor]) -> None:
        """Refuse options that the params' arithmetic can't hold."""
        check_held(self.lr, self.l, self.weight_decay, params)
        if self.beta1 is not None:
            check_decay("beta1", self.beta1, self.l, params)
        check_decay("beta2", self.beta2, self.l, params)


def _check_beta(name: str, beta: float, l: float) -> float:
    """Refuse a decay rate out of [0, 1), or one that ``l`` brings so near to 1 that it rounds to 1."""
    beta = number(name, beta, least=0, below=1)
    if beta + (1 - 1 / l) * (1 - beta) >= 1:
        raise ValueError(f"Invalid l: {l} (with it {name} = {beta} becomes 1 - (1 - {name})/l, which rounds to 1)")
    return beta


@dataclass(frozen=True)
class ReadyAdaptiveStep:
    """A step on tensors and options that have been checked, each once; what is called takes it."""

    params: list[Tensor]
    grads1: list[Tensor]
    grads2: list[Tensor] | None
    exp_avgs: list[Tensor] | None
    exp_avg_sqs: list[Tensor]
    steps: list[int]
    options: AdaptiveOptions
    backend: Callable[..., Tensor]

    @classmethod
    def of(
        cls,
        params: list[Tensor],
        grads1: list[Tensor],
        grads2: list[Tensor] | None,
        exp_avgs: list[Tensor] | None,
        exp_avg_sqs: list[Tensor],
        *,
        steps: list[int],
        options: AdaptiveOptions,
        backend: str,
    ) -> ReadyAdaptiveStep:
        """Refuse lists that :func:`svag_adaptive_step_` would."""
        _check(params, grads1, grads2, exp_avgs, exp_avg_sqs, steps)
        step = select("svag_adaptive_step_", backend, params)
        return cls(params, grads1, grads2, exp_avgs, exp_avg_sqs, steps, options, step)

    def spans(self, of: str) -> Spans:
        """Return where the written tensors and each batch's gradients are; ``of`` ends their names."""
        return _spans(self.params, self.grads1, self.grads2, self.exp_avgs, self.exp_avg_sqs, of)

    def __call__(self, skip_nonfinite: bool) -> Tensor:
        """Take the step; return StepStats.raw."""
        with torch.no_grad():
            raw = self.backend(
                self.params,
                laid_out_like(self.grads1, self.params),
                None if self.grads2 is None else laid_out_like(self.grads2, self.params),
                self.exp_avgs,
                self.exp_avg_sqs,
                self.steps,
                _Rates(self.options),
                skip_nonfinite,
            )
        mark_written([*self.params, *(self.exp_avgs or []), *self.exp_avg_sqs])
        return raw


def ready_adaptive_step(
    params: list[Tensor],
    grads1: list[Tensor],
    grads2: list[Tensor] | None,
    exp_avgs: list[Tensor] | None,
    exp_avg_sqs: list[Tensor],
    *,
    steps: list[int],
    options: AdaptiveOptions,
    backend: str,
) -> ReadyAdaptiveStep:
    """Refuse what :func:`svag_adaptive_step_` would; return the step, to be taken once all the others are ready too."""
    for name, written in (("params", params), ("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)):
        tensors(name, written or [], written=True)
    for name, read in (("grads1", grads1), ("grads2", grads2)):
        tensors(name, read or [])
    options.check_held(params)
    step = ReadyAdaptiveStep.of(
        params, grads1, grads2, exp_avgs, exp_avg_sqs, steps=steps, options=options, backend=backend
    )
    if has_memory(params[0]):
        return step

    def without_memory(*_: object) -> Tensor:  # the dispatcher knows what a meta or fake tensor becomes
        lr, l, beta1, beta2, eps, weight_decay, maximize = options
        listed = params, grads1, grads2, exp_avgs, exp_avg_sqs, steps
        raw: Tensor = _op(*listed, lr, l, beta1 or 0.0, beta2, eps, weight_decay, False, backend, maximize)
        return raw

    return replace(step, backend=without_memory)


def _spans(
    params: Sequence[Tensor],
    grads1: Sequence[Tensor],
    grads2: Sequence[Tensor] | None,
    exp_avgs: Sequence[Tensor] | None,
    exp_avg_sqs: Sequence[Tensor],
    of: str = "",
) -> Spans:
    written = [
        *spans(params, "params", of),
        *spans(exp_avgs or [], "exp_avgs", of),
        *spans(exp_avg_sqs, "exp_avg_sqs", of),
    ]
    return written, spans(grads1, "grads1", of), spans(grads2 or [], "grads2", of)


def _check(
    params: Sequence[Tensor],
    grads1: Sequence[Tensor],
    grads2: Sequence[Tensor] | None,
    exp_avgs: Sequence[Tensor] | None,
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[int],
) -> None:
    check_params(params)
    moments = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    for name, listed in {"grads1": grads1, "grads2": grads2, **moments}.items():
        if listed is not None:
            check_like(name, listed, params, dtypes="same")
    for name, listed in moments.items():
        if listed is not None:
            check_strides(name, listed, params)
    check_apart(*_spans(params, grads1, grads2, exp_avgs, exp_avg_sqs))
    if len(steps) != len(params):
        raise ValueError(f"steps has {len(steps)} numbers, but params has {len(params)}")
    for i, step in enumerate(steps):
        if step < 1:
            raise ValueError(f"steps[{i}] is {step}: expected a number from 1 on")


class _Rates:
    """The scaled hyperparameters of one call, in the numbers that torch.optim's formulae use."""

    def __init__(self, options: AdaptiveOptions) -> None:
        scaled = square_root_scaling_rule(
            1 / options.l, batch_size=1, lr=options.lr, beta1=options.beta1, beta2=options.beta2, eps=options.eps
        )
        c1, c2 = svag_coefficients(options.l)
        self.c1, self.c2 = (-c1, -c2) if options.maximize else (c1, c2)
        self.lr, self.beta1, self.beta2, self.eps = scaled.lr, scaled.beta1, scaled.beta2, scaled.eps
        self.weight_decay = options.weight_decay

    def step_size(self, step: int) -> float:
        """Return lr over the first bias correction; RMSprop has none."""
        return self.lr if self.beta1 is None else self.lr / (1 - self.beta1**step)

    def bias_correction2_sqrt(self, step: int) -> float:
        """Return the root of the second bias correction; RMSprop has none."""
        return 1.0 if self.beta1 is None else math.sqrt(1 - self.beta2**step)


def _run(
    params: list[Tensor],
    grads1: list[Tensor],
    grads2: list[Tensor] | None,
    exp_avgs: list[Tensor] | None,
    exp_avg_sqs: list[Tensor],
    steps: list[int],
    lr: float,
    l: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    skip_nonfinite: bool,
    backend: str,
    maximize: bool = False,
) -> Tensor:
    options = AdaptiveOptions(lr, l, None if exp_avgs is None else beta1, beta2, eps, weight_decay, maximize)
    step = ReadyAdaptiveStep.of(
        params, grads1, grads2, exp_avgs, exp_avg_sqs, steps=steps, options=options, backend=backend
    )
    return step(skip_nonfinite)


def _fake(
    params: list[Tensor],
    grads1: list[Tensor],
    grads2: list[Tensor] | None,
    exp_avgs: list[Tensor] | None,
    exp_avg_sqs: list[Tensor],
    steps: list[int],
    *rest: object,
) -> Tensor:
    _check(params, grads1, grads2, exp_avgs, exp_avg_sqs, steps)
    return params[0].new_empty(5, dtype=torch.float64)


_op = register_op(
    "svag_adaptive_step_(Tensor(a!)[] params, Tensor[] grads1, Tensor[]? grads2, Tensor(b!)[]? exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, int[] steps, float lr, float l, float beta1, float beta2, float eps, "
    "float weight_decay, bool skip_nonfinite, str backend, bool maximize=False) -> Tensor",
    _run,
    _fake,
)


@implements("svag_adaptive_step_", "reference")
def _reference(
    params: list[Tensor],
    grads1: list[Tensor],
    grads2: list[Tensor] | None,
    exp_avgs: list[Tensor] | None,
    exp_avg_sqs: list[Tensor],
    steps: list[int],
    rates: _Rates,
    skip_nonfinite: bool,
) -> Tensor:
    raw = raw_statistics(params, grads1, grads2)
    for i, x in enumerate(params):
        grad = rates.c1 * grads1[i]
        if rates.c2 != 0 and grads2 is not None:
            grad = grad + rates.c2 * grads2[i]
        if rates.weight_decay != 0:
            grad = grad.add(x, alpha=rates.weight_decay)
        new = {}
        direction = grad
        if exp_avgs is not None and rates.beta1 is not None:
            direction = new[exp_avgs[i]] = exp_avgs[i].lerp(grad, 1 - rates.beta1)
        v = new[exp_avg_sqs[i]] = (exp_avg_sqs[i] * rates.beta2).addcmul_(grad, grad, value=1 - rates.beta2)
        denom = (v.sqrt() / rates.bias_correction2_sqrt(steps[i])).add_(rates.eps)
        new[x] = x.addcdiv(direction, denom, value=-rates.step_size(steps[i]))
        for old, value in new.items():
            old.copy_(torch.where(raw[-1] != 0, value, old) if skip_nonfinite else value)
    return raw


def _cpu_why_not(tensors: Sequence[Tensor]) -> str | None:
    for i, t in enumerate(tensors):
        if t.dtype not in (torch.float32, torch.float64):
            return f"params[{i}] is {t.dtype}, and it serves float32 and float64"
    return None


@implements("svag_adaptive_step_", "cpu", why_not=_cpu_why_not)
def _cpu(
    params: list[Tensor],
    grads1: list[Tensor],
    grads2: list[Tensor] | None,
    exp_avgs: list[Tensor] | None,
    exp_avg_sqs: list[Tensor],
    steps: list[int],
    rates: _Rates,
    skip_nonfinite: bool,
) -> Tensor:
    from svag_fast import _C

    raw = torch.empty(5, dtype=torch.float64, device="cpu")
    _C.adaptive_step(
        addresses(params, "params"),
        addresses(grads1, "grads1"),
        addresses(grads2 or [], "grads2"),
        addresses(exp_avgs or [], "exp_avgs"),
        addresses(exp_avg_sqs, "exp_avg_sqs"),
        list(map(rates.step_size, steps)),
        list(map(rates.bias_correction2_sqrt, steps)),
        list(map(Tensor.numel, params)),
        [DTYPE_CODES[p.dtype] for p in params],
        rates.c1,
        rates.c2,
        rates.weight_decay,
        0.0 if rates.beta1 is None else 1 - rates.beta1,
        rates.beta2,
        1 - rates.beta2,
        rates.eps,
        skip_nonfinite,
        torch.get_num_threads(),
        address(raw, "raw"),
    )
    return raw
