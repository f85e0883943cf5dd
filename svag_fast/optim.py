"""The SVAG optimizer: two independent batches a step, in torch.optim's manners (paper, equation 5)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from svag_fast.grad_lists import Grads
from svag_fast.held_gradient import GroupGrads
from svag_fast.loaded_state import TorchKin
from svag_fast.ops.checked_step import CheckedStep
from svag_fast.ops.checks import PARAM_DTYPES
from svag_fast.ops.step import check_step, step_coefficients, svag_coefficients, svag_step_
from svag_fast.ops.step_stats import StepStats
from svag_fast.two_batch import TwoBatchOptimizer, Work

__all__ = ["SVAG", "Grads", "TwoBatchOptimizer", "svag_loss"]


def svag_loss(loss1: Tensor, loss2: Tensor, l: float) -> Tensor:
    """Return ``c1*loss1 + c2*loss2``, whose gradient is SVAG's, for use with any optimizer at ``lr / l``.

    The slow path that works everywhere: SVAG is linear in the loss. The value is not a loss to look at (c2 <= 0).

    Args:
        loss1, loss2: scalar losses of two independent batches at the same parameters.
        l: SVAG's hyperparameter, >= 1.
    """
    c1, c2 = svag_coefficients(l)
    return c1 * loss1 + c2 * loss2


class SVAG(TwoBatchOptimizer):
    """SVAG: ``x -= (lr/l) * (c1*g1 + c2*g2 + weight_decay*x)`` with ``c1, c2 = (1 ± sqrt(2l-1)) / 2``.

    Its mean step is SGD's, its noise covariance ``l`` times larger a unit step; ``l`` of its steps make one effective
    step, and as ``l`` grows its path converges to SGD's SDE. Source: Li, Malladi, Arora, "On the Validity of Modeling
    SGD with Stochastic Differential Equations", NeurIPS 2021, equations 5 and 7. At ``l = 1`` it is SGD.

    The two gradients must come from independent batches at the same parameters::

        opt.zero_grad()
        loss(batch1).backward()
        opt.hold_gradient()  # keeps g1 without a copy, clears .grad
        loss(batch2).backward()
        stats = opt.step()

        loss = opt.step(closure)  # or: closure clears, draws a fresh batch, backpropagates; called twice. opt.stats

    Args:
        params: parameters or param groups, each group with its own ``lr`` and ``weight_decay`` if it wants.
        lr: the paper's eta, what a scheduler changes; the step taken is ``lr / l``. A float or a 0-d tensor.
        l: SVAG's hyperparameter, >= 1.
        weight_decay: the paper's lambda.
        compensated: keep in float32 what rounding the parameters loses (one float32 buffer a parameter): needed where
            ``lr / l`` is so small that a step is below one ulp of the parameters. Not for float64 parameters.
        capturable: allow the step in a CUDA graph: ``lr`` becomes a 0-d float64 tensor on the parameters' device (one
            that is given stays), which the kernel reads when it runs, so a replayed graph follows what a scheduler
            writes there. Take a few steps before the capture. Needs backend ``cuda`` or ``triton`` in a graph.
        backend: "auto" or a row of :mod:`svag_fast.ops.backends`.

    With ``torch.amp.GradScaler``: ``scaler.scale(loss).backward()`` for both batches, then ``scaler.step(opt)``; both
    gradients are unscaled, and a step with an inf or nan in either is skipped without synchronising. To clip, call
    ``opt.unscale_(scaler)`` where it is used, and ``opt.clip_grad_norm_(max_norm)``, before the step: both serve both
    gradients.

    Trainers that wrap an optimizer: Lightning's manual optimisation and Fabric offer all methods on the wrapper;
    behind Accelerate's, call ``optimizer.optimizer.hold_gradient()``.

    Raises:
        ValueError, TypeError: an option or a parameter is out of range, and which.
    """

    torch_kin = TorchKin(
        "SGD", frozenset({"momentum", "dampening", "nesterov"}), off=("momentum", "nesterov", "maximize"), any_l=True
    )
    state_names = frozenset({"compensation"})

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        *,
        l: float = 1,
        weight_decay: float = 0.0,
        compensated: bool = False,
        capturable: bool = False,
        backend: str = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "l": l,
            "weight_decay": weight_decay,
            "compensated": compensated,
            "capturable": capturable,
            "backend": backend,
        }
        # What a capturable step reads on each device, and the l and weight decay that were written there.
        self._on_device: dict[tuple[int, torch.device], tuple[Tensor, tuple[float, float]]] = {}
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        for group in state["param_groups"]:
            group.setdefault("capturable", False)
        self._on_device = {}
        super().__setstate__(state)

    def _check_params(self, group: dict[str, Any]) -> None:
        super()._check_params(group)
        for i, p in enumerate(group["params"]):
            if group["compensated"] and p.requires_grad and p.dtype == torch.float64:
                allowed = ", ".join(str(d) for d in PARAM_DTYPES if d != torch.float64)
                raise TypeError(f"params[{i}] of the group is torch.float64: compensated serves {allowed}")

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        for name in ("compensated", "capturable"):
            if not isinstance(group[name], bool):
                raise TypeError(f"Invalid {name}: {group[name]!r} (expected a bool)")

    def _finish_loading(self, state_dict: dict[str, Any]) -> None:
        # torch casts state to the parameter's dtype; the compensation of a 16-bit parameter is float32.
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, params, strict=True):
            if "compensation" in self.state.get(p, {}):
                value = state_dict["state"][i]["compensation"]
                self.state[p]["compensation"] = torch.empty_like(p, dtype=torch.float32).copy_(value)
        for group in self.param_groups:
            if group["capturable"]:  # from another device's checkpoint
                for name in (k for k, v in group.items() if isinstance(v, Tensor)):
                    group[name] = group[name].to(group["params"][0].device)

    def _work_of(
        self, group: dict[str, Any], lr: float | None, first: GroupGrads, second: GroupGrads | None
    ) -> list[Work]:
        if lr is not None and not (group["compensated"] or group["capturable"]):
            l, weight_decay, backend = group["l"], group["weight_decay"], group["backend"]
            step = CheckedStep.of(
                group["params"], first, second, lr=lr, l=l, weight_decay=weight_decay, backend=backend
            )
            if step is not None:
                return [Work(step, check=None)]
        return super()._work_of(group, lr, first, second)

    def _work(
        self, group: dict[str, Any], lr: float | None, params: list[Tensor], grads1: Grads, grads2: Grads | None
    ) -> Work:
        options: dict[str, Any] = {"lr": lr, "l": group["l"], "weight_decay": group["weight_decay"]}
        if group["capturable"]:  # the coefficients' rate is used
            options |= {"lr": 0.0, "coefficients": self._coefficients(group, params[0].device)}
        if group["compensated"]:
            options["compensation"] = [self._compensation(p) for p in params]
        options["backend"] = group["backend"]

        def take(skip_nonfinite: bool) -> StepStats:
            stats = svag_step_(params, grads1, grads2, skip_nonfinite=skip_nonfinite, **options)
            for p, value in zip(params, options.get("compensation", []), strict=False):
                self.state[p]["compensation"] = value
            return stats

        return Work(take, functools.partial(check_step, params, grads1, grads2, **options))

    def _make_state(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params if group["compensated"] else []:
            self.state[p]["compensation"] = self._compensation(p)

    def _coefficients(self, group: dict[str, Any], device: torch.device) -> Tensor:
        """Return the group's coefficients on the device, with lr copied there by the device itself."""
        options = float(group["l"]), float(group["weight_decay"])
        coefficients, written = self._on_device.get((id(group), device), (None, None))
        if coefficients is None or written != options:
            coefficients = step_coefficients(0.0, *options, device)
            self._on_device[id(group), device] = coefficients, options
        coefficients[0].copy_(group["lr"])
        return coefficients

    def _compensation(self, p: Tensor) -> Tensor:
        if p in self.state and "compensation" in self.state[p]:
            kept: Tensor = self.state[p]["compensation"]
            return kept
        return torch.zeros_like(p, dtype=torch.float32)
