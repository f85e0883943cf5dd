"""The fused SVAG step of Adam and RMSprop over lists of tensors, with the noise statistics of the same pass.

Source: Malladi, Lyu, Panigrahi, Arora, "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms" (NeurIPS 2022):
the two-batch combination of SVAG, with the square-root scaling rule read at κ = 1/l.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from svag_fast.numeric import number
from svag_fast.ops.backends import implements
from svag_fast.ops.checks import check_decay, check_held, check_step_scalars, integers
from svag_fast.ops.memory import address
from svag_fast.ops.step_call import StepCall, StepKind, StepLists, take_step
from svag_fast.ops.step_options import svag_coefficients
from svag_fast.ops.step_stats import StepStats
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
    steps = integers("steps", steps)
    options = AdaptiveOptions.checked(lr, l, None if exp_avgs is None else beta1, beta2, eps, weight_decay, maximize)
    if grads2 is None and options.l != 1:
        raise ValueError(f"grads2 must be the second batch's gradients at l = {l}, got None")
    lists = StepLists(params, grads1, grads2, exp_avgs, exp_avg_sqs)  # type: ignore[arg-type]
    skip_nonfinite = bool(skip_nonfinite)
    return take_step(ADAPTIVE_STEP, lists, options, extra=steps, skip_nonfinite=skip_nonfinite, backend=backend)


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
        raise ValueError(
            f"l must be smaller at {name} = {beta}, which becomes 1 - (1 - {name})/l and rounds to 1, got {l}"
        )
    return beta


def _check_steps(lists: StepLists, steps: list[int]) -> None:
    if len(steps) != len(lists.params):
        raise ValueError(f"steps must be a number for each of the {len(lists.params)} params, got {len(steps)}")
    for i, step in enumerate(steps):
        if step < 1:
            raise ValueError(f"steps[{i}] must be >= 1, got {step}")


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


@functools.lru_cache(64)
def _rates(options: AdaptiveOptions) -> _Rates:
    return _Rates(options)


def _unpacked(
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
) -> tuple[StepLists, AdaptiveOptions, list[int], str, bool]:
    """Return what :func:`_dispatch` has given to the op."""
    lists = StepLists(params, grads1, grads2, exp_avgs, exp_avg_sqs)
    options = AdaptiveOptions(lr, l, None if exp_avgs is None else beta1, beta2, eps, weight_decay, maximize)
    return lists, options, steps, backend, skip_nonfinite


def _dispatch(
    lists: StepLists, options: AdaptiveOptions, steps: list[int], backend: str, skip_nonfinite: bool
) -> Tensor:
    lr, l, beta1, *others, maximize = options
    raw: Tensor = _op(*lists, steps, lr, l, beta1 or 0.0, *others, skip_nonfinite, backend, maximize)
    return raw


ADAPTIVE_STEP = StepKind(
    op="svag_adaptive_step_",
    code=1,
    kept=("exp_avgs", "exp_avg_sqs"),
    kept_dtypes=("same", "same"),
    grad_dtypes="same",
    check_extra=_check_steps,
    dispatch=_dispatch,
)

_op = ADAPTIVE_STEP.register(
    "svag_adaptive_step_(Tensor(a!)[] params, Tensor[] grads1, Tensor[]? grads2, Tensor(b!)[]? exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, int[] steps, float lr, float l, float beta1, float beta2, float eps, "
    "float weight_decay, bool skip_nonfinite, str backend, bool maximize=False) -> Tensor",
    _unpacked,
)


@implements("svag_adaptive_step_", "reference")
@torch.no_grad()
def _reference(call: StepCall, skip_nonfinite: bool) -> Tensor:
    params, grads1, grads2, exp_avgs, exp_avg_sqs = call.lists
    assert exp_avg_sqs is not None
    steps, rates = call.extra, _rates(call.options)
    raw = call.statistics()
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
def _cpu(call: StepCall, skip_nonfinite: bool) -> Tensor:
    if call.scaler is not None and bool(call.scaler.found_inf):
        return call.statistics()
    rates = _rates(call.options)
    corrections = {step: (rates.step_size(step), rates.bias_correction2_sqrt(step)) for step in set(call.extra)}
    step_sizes, bias_corrections2_sqrt = zip(*map(corrections.__getitem__, call.extra), strict=True)
    raw = torch.empty(5, dtype=torch.float64, device="cpu")
    place = raw.data_ptr() if type(raw) is Tensor else address(raw, "raw")
    tensors = call.described() if call.read is None else call.read
    tensors.adaptive_step(
        step_sizes,
        bias_corrections2_sqrt,
        rates.c1,
        rates.c2,
        rates.weight_decay,
        0.0 if rates.beta1 is None else 1 - rates.beta1,
        rates.beta2,
        1 - rates.beta2,
        rates.eps,
        skip_nonfinite,
        torch.get_num_threads(),
        place,
    )
    return raw
