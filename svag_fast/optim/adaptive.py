"""SVAG for adaptive methods: Adam and RMSprop on two independent batches a step.

Source: Malladi, Lyu, Panigrahi, Arora, "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms" (NeurIPS 2022).
The two gradients are combined as in SVAG, which makes the noise covariance ``l`` times larger, and the hyperparameters
follow the square-root scaling rule at batch size B/l: lr/√l, (1 - β)/l and ε√l; ``l`` steps make one of the plain
optimizer. (The ℓ of that paper is the root of our ``l``.)
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from svag_fast.ops.adaptive_step import ADAPTIVE_STEP, AdaptiveOptions
from svag_fast.ops.step_call import Scaler, StepKind
from svag_fast.ops.step_stats import FINITE
from svag_fast.optim.grad_lists import Grads
from svag_fast.optim.initial_square_avg import MEASURE, MEASURED_STEPS, averaged, check_start, filled, second_moment
from svag_fast.optim.loaded_state import TorchPeer
from svag_fast.optim.two_batch import MakeCall, Plan, State, TwoBatchOptimizer, Work


class _AdaptiveOptimizer(TwoBatchOptimizer):
    """Keeps the moments of each parameter, under torch.optim's own names."""

    _moment_names: tuple[str | None, str]
    """The first moment's name, if it is kept, and the second's."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("maximize", False)
        for p_state in self.state.values():
            if "step" in p_state:  # torch counts in float32, which ends at 2^24, and its old versions in Python
                p_state["step"] = torch.as_tensor(p_state["step"], device="cpu").double()

    def _time_of(self, lr: Any, l: float) -> Any:
        return lr * lr / l  # by the square-root scaling rule

    def _kind(self, group: dict[str, Any], options: Any) -> tuple[StepKind, tuple[str | None, str | None], bool]:
        return ADAPTIVE_STEP, self._moment_names, True

    def _extra(self, group: dict[str, Any], plan: Plan, params: list[Tensor], states: list[State]) -> list[int]:
        return [int(state["step"].item()) + 1 for state in states]

    def _keep(self, work: Work, raw: Tensor, skip_nonfinite: bool) -> None:
        if not skip_nonfinite or bool(raw[FINITE]):
            torch._foreach_add_([state["step"] for state in work.states], 1)
        self.state.update(work.fresh)

    def _new_state(self, group: dict[str, Any], p: Tensor) -> State:
        names = filter(None, self._moment_names)
        moments = {name: torch.zeros_like(p, memory_format=torch.preserve_format) for name in names}
        return {"step": torch.tensor(0.0, dtype=torch.float64, device="cpu"), **moments}


class SVAGAdam(_AdaptiveOptimizer):
    """Adam with SVAG's two batches a step; at ``l = 1`` it is ``torch.optim.Adam``.

    Use it as :class:`svag_fast.SVAG`: backward, ``hold_gradient()``, backward, ``step()``, or ``step(closure)``. The
    arguments ``lr``, ``betas`` and ``eps`` are those of plain Adam at the same batch size; the step scales them by
    ``l``. At equal ``effective_steps`` paths of different ``l`` are at the same time of the SDE. With a GradScaler each
    step synchronises once, to know whether it counts.

    Args:
        params: parameters or param groups, each group with its own options (but for ``l``) if it wants.
        lr: plain Adam's learning rate, a float or a 0-d tensor.
        betas: plain Adam's decay rates, in [0, 1).
        eps: plain Adam's term for the denominator.
        l: SVAG's hyperparameter, >= 1.
        weight_decay: L2, added to the gradient as in torch.optim.Adam.
        maximize: turn the gradients' sign, not the decay's, as torch.optim does.
        backend: "auto" or a row of :mod:`svag_fast.ops.backends`.

    Raises:
        ValueError, TypeError: an option or a parameter is out of range, and which.
    """

    _moment_names = ("exp_avg", "exp_avg_sq")
    torch_peer = TorchPeer(
        "Adam", frozenset({"betas", "amsgrad"}), off=("amsgrad", "decoupled_weight_decay"), any_l=False
    )
    state_names = frozenset({"step", "exp_avg", "exp_avg_sq"})
    values = operator.itemgetter("lr", "betas", "eps", "l", "weight_decay", "maximize", "backend")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        l: float = 1,
        weight_decay: float = 0.0,
        maximize: bool = False,
        backend: str = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "l": l,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "backend": backend,
        }
        super().__init__(params, defaults)

    def _check_options(self, group: dict[str, Any], lr: Any) -> AdaptiveOptions:
        betas = group["betas"]
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise ValueError(f"betas must be two numbers, got {betas!r}")
        named = (group[name] for name in ("eps", "weight_decay", "maximize"))
        names = ("beta parameter at index 0", "beta parameter at index 1")
        return AdaptiveOptions.checked(lr, group["l"], *betas, *named, names=names)


class SVAGRMSprop(_AdaptiveOptimizer):
    """RMSprop with SVAG's two batches a step; at ``l = 1`` it is ``torch.optim.RMSprop`` without momentum.

    As :class:`SVAGAdam`, with ``alpha`` in place of ``betas``, and a start for ``square_avg``. RMSprop has no bias
    correction. From zero, torch's start, the variance after one effective step grows like log l, so no limit exists.
    (In lr², under noise alone, it is (1 + 1/2 + ... + 1/l)/(1 - α).) Source: Malladi et al. 2022, whose SDE starts from
    a given second moment.

    Args:
        params, lr, eps, l, weight_decay, maximize, backend: as SVAGAdam's.
        alpha: plain RMSprop's decay rate of the second moment, in [0, 1).
        initial_square_avg: where ``square_avg`` starts, for each entry of a parameter:

            - None: at zero, as in torch, for ``l = 1`` alone.
            - A number > 0: plain RMSprop's second moment E g² (gradients squared, of a batch of the same size), one
              for all ``l``. ``square_avg`` starts at ``l`` times it. Param groups may have their own.
            - "measure": in a parameter's first 100 steps it does not move. Each takes the held and the current gradient
              as any step. ``square_avg`` is the mean of (c1 g1 + c2 g2 + weight_decay x)² over both orders of the two
              batches, unbiased for what it averages later, (∇L)² + lΣ. ``stats`` are as usual. A group that does not
              move counts neither ``steps`` nor ``effective_steps`` nor ``time``, so let schedules and the loop's end
              follow ``effective_steps``. Entries without any gradient get the mean of the others.

            To compare paths of different ``l``, give all of them the same start, also ``l = 1``.

    Raises:
        ValueError, TypeError: an option or a parameter is out of range, and which.
        RuntimeError: from ``step()``, while measuring: a gradient is not finite (under a GradScaler the step is skipped
            as usual), or at ``l > 1`` all of a parameter's were zero. Nothing was written.
    """

    _moment_names = (None, "square_avg")
    torch_peer = TorchPeer("RMSprop", frozenset({"alpha", "centered"}), off=("momentum", "centered"), any_l=False)
    state_names = frozenset({"step", "square_avg", "measured"})
    values = operator.itemgetter(
        *("lr", "alpha", "eps", "l", "initial_square_avg", "weight_decay", "maximize", "backend")
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        *,
        l: float = 1,
        initial_square_avg: float | str | None = None,
        weight_decay: float = 0.0,
        maximize: bool = False,
        backend: str = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "l": l,
            "initial_square_avg": initial_square_avg,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "backend": backend,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # before there was a start, which is for parameters that have no state yet
            group.setdefault("initial_square_avg", None if group["l"] == 1 else MEASURE)

    def _check_options(self, group: dict[str, Any], lr: Any) -> AdaptiveOptions:
        named = (group[name] for name in ("eps", "weight_decay", "maximize"))
        options = AdaptiveOptions.checked(lr, group["l"], None, group["alpha"], *named, names=("", "alpha value"))
        check_start(group["initial_square_avg"], options.l)
        return options

    def _work(
        self,
        group: dict[str, Any],
        plan: Plan,
        params: list[Tensor],
        grads1: Grads,
        grads2: Grads | None,
        call: MakeCall,
    ) -> list[Work] | None:
        start = group["initial_square_avg"]
        measured = [isinstance(start, str) and self._measures(p) for p in params] if start is not None else []
        if not any(measured):
            return super()._work(group, plan, params, grads1, grads2, call)
        work: list[Work] = []
        for measures in (True, False):
            if chosen := [i for i, m in enumerate(measured) if m == measures]:
                first, second = [grads1[i] for i in chosen], grads2 and [grads2[i] for i in chosen]
                part = super()._work(group, plan, [params[i] for i in chosen], first, second, call)
                if part is None:
                    return None
                work += map(self._measuring, part) if measures else part
        return work

    def _measures(self, p: Tensor) -> bool:
        """Whether the parameter's next step only measures; a state without a count came from elsewhere, complete."""
        state = self.state.get(p)
        return not state or int(state.get("measured", MEASURED_STEPS)) < MEASURED_STEPS

    def _measuring(self, work: Work) -> Work:
        """Return what averages the gradients' squares and leaves the params alone; a step's refusals are behind it."""
        ready, states = work.call, work.states
        params, grads1, grads2, *_ = ready.lists
        options = ready.options

        @torch.no_grad()
        def measure(skip_nonfinite: bool, scaler: Scaler | None = None) -> tuple[Tensor, list[Tensor] | None]:
            raw = ready._replace(scaler=scaler).statistics()
            if skip_nonfinite and not raw[FINITE]:
                return raw, None
            seconds: Sequence[Tensor | None] = grads2 or [None] * len(params)
            rule = (options.l, options.weight_decay, options.maximize)
            return raw, [
                averaged(state["square_avg"], second_moment(p, g1, g2, *rule), state["measured"], options.l)
                for p, g1, g2, state in zip(params, grads1, seconds, states, strict=True)
            ]

        # What is refused must be so before any part of the step is taken; but a GradScaler's scale is in them still.
        scaled = getattr(self, "found_inf", None) is not None
        early = None if scaled else measure(False)

        def take(skip_nonfinite: bool, scaler: Scaler | None) -> Tensor:
            raw, averages = early or measure(skip_nonfinite, scaler)
            for p, state, average in zip(params, states, averages or [], strict=averages is not None):
                self.state[p] = {**state, "square_avg": average, "measured": state["measured"] + 1}
            return raw

        return Work(ready, take=take, moves=False)

    def _new_state(self, group: dict[str, Any], p: Tensor) -> dict[str, Any]:
        state, start = super()._new_state(group, p), group["initial_square_avg"]
        if start is None:
            return state
        if isinstance(start, str):
            return {**state, "measured": 0}
        return {**state, "square_avg": filled(state["square_avg"], start, group["l"])}
