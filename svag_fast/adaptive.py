"""SVAG for adaptive methods: Adam and RMSprop on two independent batches a step.

Source: Malladi, Lyu, Panigrahi, Arora, "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms" (NeurIPS 2022).
The two gradients are combined as in SVAG, which makes the noise covariance ``l`` times larger, and the hyperparameters
follow the square-root scaling rule at batch size B/l: lr/√l, (1 - β)/l and ε√l; ``l`` steps make one of the plain
optimizer. (The ℓ of that paper is the root of our ``l``.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from svag_fast.ops.adaptive_step import check_beta, svag_adaptive_step_
from svag_fast.ops.checks import check_nonnegative
from svag_fast.ops.step_stats import StepStats
from svag_fast.optim import Grads, TwoBatchOptimizer


class _AdaptiveOptimizer(TwoBatchOptimizer):
    """Keeps the moments of each parameter, under torch.optim's own names."""

    _moment_names: tuple[str, ...]

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_nonnegative("epsilon value", group["eps"])

    def _adaptive_update(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads1: Grads,
        grads2: Grads | None,
        skip_nonfinite: bool,
        *,
        beta1: float | None,
        beta2: float,
    ) -> StepStats:
        states = [self.state[p] if p in self.state else self._fresh_state(p) for p in params]
        first, second = self._moment_names[:-1], self._moment_names[-1]
        stats = svag_adaptive_step_(
            params,
            grads1,
            grads2,
            [state[first[0]] for state in states] if first else None,
            [state[second] for state in states],
            steps=[int(state["step"].item()) + 1 for state in states],
            lr=float(group["lr"]),
            l=group["l"],
            beta1=0.0 if beta1 is None else beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            skip_nonfinite=skip_nonfinite,
            backend=group["backend"],
        )
        taken = bool(stats.finite) if skip_nonfinite else True
        for p, state in zip(params, states, strict=True):
            state["step"] += taken
            self.state[p] = state
        return stats

    def _fresh_state(self, p: Tensor) -> dict[str, Tensor]:
        moments = {name: torch.zeros_like(p, memory_format=torch.preserve_format) for name in self._moment_names}
        return {"step": torch.tensor(0.0), **moments}


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
        backend: "auto" or a row of :mod:`svag_fast.ops.backends`.

    Raises:
        ValueError, TypeError: an option or a parameter is out of range, and which.
    """

    _moment_names = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        l: float = 1,
        weight_decay: float = 0.0,
        backend: str = "auto",
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "l": l, "weight_decay": weight_decay, "backend": backend}
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if len(group["betas"]) != 2:
            raise ValueError(f"Invalid betas: {group['betas']} (expected two numbers)")
        for i, beta in enumerate(group["betas"]):
            check_beta(f"beta parameter at index {i}", beta, group["l"])

    def _update(
        self, group: dict[str, Any], params: list[Tensor], grads1: Grads, grads2: Grads | None, skip_nonfinite: bool
    ) -> StepStats:
        beta1, beta2 = group["betas"]
        return self._adaptive_update(group, params, grads1, grads2, skip_nonfinite, beta1=beta1, beta2=beta2)


class SVAGRMSprop(_AdaptiveOptimizer):
    """RMSprop with SVAG's two batches a step; at ``l = 1`` it is ``torch.optim.RMSprop`` without momentum.

    As :class:`SVAGAdam`, with ``alpha`` in place of ``betas``: the second moment's decay rate, in [0, 1).

    Raises:
        ValueError, TypeError: an option or a parameter is out of range, and which.
    """

    _moment_names = ("square_avg",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        *,
        l: float = 1,
        weight_decay: float = 0.0,
        backend: str = "auto",
    ) -> None:
        defaults = {"lr": lr, "alpha": alpha, "eps": eps, "l": l, "weight_decay": weight_decay, "backend": backend}
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_beta("alpha", group["alpha"], group["l"])

    def _update(
        self, group: dict[str, Any], params: list[Tensor], grads1: Grads, grads2: Grads | None, skip_nonfinite: bool
    ) -> StepStats:
        return self._adaptive_update(group, params, grads1, grads2, skip_nonfinite, beta1=None, beta2=group["alpha"])
