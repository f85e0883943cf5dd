"""The SVAG optimizer: two independent batches a step, with torch.optim's interface (paper, equation 5)."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from svag_fast.kernels.device_cache import is_capturing
from svag_fast.ops.checks import PARAM_DTYPES
from svag_fast.ops.step import SVAG_STEP
from svag_fast.ops.step_call import StepKind
from svag_fast.ops.step_options import MomentumRule, StepOptions, step_scalars, svag_coefficients
from svag_fast.ops.step_replicas import SVAG_REPLICAS_STEP, ReplicaOptions, check_replicas
from svag_fast.optim.grad_lists import Grads
from svag_fast.optim.in_backward import StepsInBackward, check_in_backward
from svag_fast.optim.loaded_state import TorchPeer
from svag_fast.optim.two_batch import Plan, State, TwoBatchOptimizer

__all__ = ["SVAG", "Grads", "TwoBatchOptimizer", "svag_loss"]


@overload
def svag_loss(loss1: Tensor, loss2: Tensor, l: float) -> Tensor: ...


@overload
def svag_loss(loss1: Tensor, loss2: float | None = None, l: float | None = None) -> Tensor: ...


def svag_loss(loss1: Tensor, loss2: Tensor | float | None = None, l: float | None = None) -> Tensor:
    """Return ``c1*loss1 + c2*loss2``, whose gradient is SVAG's, for use with any optimizer at ``lr / l``.

        svag_loss(loss1, loss2, l)
        svag_loss(losses, l)  # both batches in one pass: losses [2B]; BatchNorm by svag_fast.nn.pair_(model)

    The path that works everywhere: SVAG is linear in the loss. The value is not a loss to look at (c2 <= 0), and G and
    N are not known: :func:`svag_fast.pair_pass` gives them.

    Args:
        loss1, loss2: scalar losses of two independent batches at the same parameters. Or one vector [2B] of the losses
            of both batches' samples, the first batch's first (``reduction="none"``): each batch's mean is taken.
        l: SVAG's hyperparameter, >= 1.

    Raises:
        TypeError: ``l`` is missing, or no number.
        ValueError: ``l`` is out of range, the losses of both batches are no vector of even length, or c1 is infinite in
            a loss's dtype.
    """
    if not isinstance(loss2, Tensor) or l is None:
        if (loss2 is None) == (l is None):
            raise TypeError(
                "svag_loss's arguments must be (loss1, loss2, l), or (losses, l) with the losses of both batches' "
                f"samples, got l {'nowhere' if l is None else 'beside losses alone'}"
            )
        l = loss2 if l is None else l  # type: ignore[assignment]
        if loss1.dim() != 1 or len(loss1) % 2 or not len(loss1):
            raise ValueError(
                f"losses must be one for each sample of both batches, [2B] (reduction='none'), got {list(loss1.shape)}"
            )
        loss1, loss2 = loss1.reshape(2, -1).mean(1).unbind()
    c1, c2 = svag_coefficients(l)  # type: ignore[arg-type]
    for name, loss in (("loss1", loss1), ("loss2", loss2)):
        if c1 > torch.finfo(loss.dtype).max:
            raise ValueError(
                f"l must be smaller, since c1 = {c1:.3g} is infinite in {loss.dtype}, the dtype of {name}, got {l}"
            )
    return c1 * loss1 + c2 * loss2


_MOMENTUM_DEFAULTS = {"momentum": 0.0, "momentum_rule": "time", "maximize": False}
_LATER_DEFAULTS = {"capturable": False, "replicas": None, "in_backward": False, **_MOMENTUM_DEFAULTS}
_BUFFERS = ("compensation", "momentum_buffer")


def _new_buffer(p: Tensor) -> Tensor:
    """A buffer of zeros in the step's arithmetic: float64 beside float64, else float32."""
    if is_capturing(p.device):
        raise RuntimeError("a captured graph would zero the buffer at each replay: take a step before the capture")
    return torch.zeros_like(p, dtype=torch.float64 if p.dtype == torch.float64 else torch.float32, requires_grad=False)


class SVAG(TwoBatchOptimizer):
    """SVAG: ``x -= (lr/l) * (c1*g1 + c2*g2 + weight_decay*x)`` with ``c1, c2 = (1 ± sqrt(2l-1)) / 2``.

    Its mean step is SGD's, and its noise covariance is ``l`` times larger a unit step. ``l`` of its steps make one
    effective step. As ``l`` grows its path converges to SGD's SDE. At ``l = 1`` it is SGD. Source: Li, Malladi, Arora,
    "On the Validity of Modeling SGD with Stochastic Differential Equations", NeurIPS 2021, equations 5 and 7.

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
        momentum: μ of the heavy ball, in [0, 1), in torch.optim.SGD's form: ``v = μ*v + u``, ``x -= rate*v``, with u
            the bracket above. Kept in ``state[p]["momentum_buffer"]``, float32 for 16-bit parameters.
        momentum_rule: what μ and the rate become as ``l`` grows (docs/theory.md). At ``l = 1`` both are the same.
            "time" (the default): 1 - (1 - μ)/l and lr/l². They keep drift, noise and the momentum's memory in units of
            time, so the path converges to the underdamped SDE of SGD with this momentum. It asks whether *this* SGD
            follows its SDE. "fixed": μ and lr/l. It asks whether momentum matters at a small rate. Its limit is the SDE
            of SGD without momentum at lr/(1 - μ).
        maximize: turn the gradients' sign, not the decay's, as torch.optim.SGD does.
        compensated: keep in float32 what rounding the parameters loses, in one float32 buffer a parameter. Needed where
            ``lr / l`` is so small that a step is below one ulp of the parameters. Not for float64 parameters.
        capturable: allow the step in a CUDA graph. ``lr`` becomes a 0-d float64 tensor on the parameters' device (one
            that is given stays). The kernel reads it when it runs, so a replayed graph follows what a scheduler writes
            there. Weight decay and momentum stay as they were at the capture. Take a few steps before it. Needs backend
            ``cuda`` or ``triton`` in a graph.
        backend: "auto" or a row of :mod:`svag_fast.ops.backends`.
        replicas: S, where all parameters are [S, ...] with a replica in each row, as :class:`svag_fast.Replicas` has
            them. Each replica is stepped and measured by itself: every statistic is [S], :meth:`clip_grad_norm_` clips
            each by its own norm, and what one holds, nan too, changes no bit of another. ``lr``, ``l`` and
            ``weight_decay`` may then be S numbers, in a sequence or a tensor [S]. Neither ``capturable`` nor a
            GradScaler serve replicas.
        in_backward: inside of :func:`svag_fast.pair_pass`, have the weights of Linear and Conv2d layers take their step
            in the backward pass, as soon as their rows are known, so that neither batch's gradient of them is stored;
            ``step()`` then does the rest and has the statistics of all. The same as the ordinary path to rounding.
            Refused: momentum, ``maximize``, ``compensated``, ``capturable``, replicas; clipping, a GradScaler,
            accumulation; DistributedDataParallel; a weight that is used twice. A model that goes by halves, and two
            passes by hand, store gradients as ever. An error that ends the backward pass leaves the weights that have
            taken their step.

    With ``torch.amp.GradScaler``: ``scaler.scale(loss).backward()`` for both batches, then ``scaler.step(opt)``; both
    gradients are unscaled, and a step with an inf or nan in either, in any group, is skipped whole without
    synchronising: ``stats.finite`` is False then. As in torch's fused optimizers a GPU's kernels read the scale and
    ``found_inf`` themselves; they divide 16-bit gradients in float32, where ``unscale_`` rounds them to 16 bits.

    Raises:
        ValueError, TypeError: an option or a parameter is out of range, and which.
    """

    torch_peer = TorchPeer(
        "SGD", frozenset({"momentum", "dampening", "nesterov"}), off=("dampening", "nesterov"), any_l=True
    )
    state_names = frozenset(_BUFFERS)
    values = operator.itemgetter(
        *(
            "lr",
            "l",
            "weight_decay",
            *_MOMENTUM_DEFAULTS,
            "compensated",
            "capturable",
            "backend",
            "replicas",
            "in_backward",
        )
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Sequence[float] | Tensor,
        *,
        l: float | Sequence[float] | Tensor = 1,
        weight_decay: float | Sequence[float] | Tensor = 0.0,
        momentum: float = 0.0,
        momentum_rule: MomentumRule = "time",
        maximize: bool = False,
        compensated: bool = False,
        capturable: bool = False,
        backend: str = "auto",
        replicas: int | None = None,
        in_backward: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "l": l,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "momentum_rule": momentum_rule,
            "maximize": maximize,
            "compensated": compensated,
            "capturable": capturable,
            "backend": backend,
            "replicas": replicas,
            "in_backward": in_backward,
        }
        # What a capturable step reads on each device, and all but the rate that was written there.
        self._on_device: dict[tuple[int, torch.device], tuple[Tensor, StepOptions]] = {}
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        for group in state["param_groups"]:
            for name, value in _LATER_DEFAULTS.items():
                group.setdefault(name, value)
        self._on_device = {}
        super().__setstate__(state)

    def _check_params(self, group: dict[str, Any]) -> None:
        super()._check_params(group)
        if group["replicas"] is not None:
            check_replicas(group["params"], group["replicas"], " of the group")
        for i, p in enumerate(group["params"]):
            if group["compensated"] and p.requires_grad and p.dtype == torch.float64:
                allowed = ", ".join(str(d) for d in PARAM_DTYPES if d != torch.float64)
                raise TypeError(
                    f"params[{i}] of the group must be {allowed} where it is compensated, got torch.float64"
                )

    def _check_options(self, group: dict[str, Any], lr: Any) -> StepOptions | ReplicaOptions:
        for name in ("compensated", "capturable"):
            if not isinstance(group[name], bool):
                raise TypeError(f"{name} must be a bool, got {group[name]!r}")
        check_in_backward(group)
        named = (group[name] for name in ("l", "weight_decay", *_MOMENTUM_DEFAULTS))
        if group["replicas"] is None:
            return StepOptions.checked(lr, *named)
        if group["capturable"]:
            raise ValueError("capturable must be False with replicas, since a captured step reads one lr, got True")
        return ReplicaOptions.checked(group["replicas"], lr, *named)

    def steps_in_backward(self) -> StepsInBackward | None:
        """What takes weights' steps inside of a backward pass of both batches; None where no group wants it.

        Raises:
            ValueError, TypeError: an option of a group is out of range, and which.
        """
        for group in self.param_groups:
            if group["in_backward"]:
                break
        else:
            return None
        pairs = zip(self.param_groups, self._plans(), strict=True)
        return StepsInBackward(
            {
                p: (plan.options, group["backend"])
                for group, plan in pairs
                if group["in_backward"]
                for p in group["params"]
            }
        )

    def _finish_loading(self, state_dict: dict[str, Any]) -> None:
        # torch casts state to the parameter's dtype; that of a 16-bit parameter is float32 here.
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, params, strict=True):
            for name in self.state.get(p, {}).keys() & set(_BUFFERS):
                self.state[p][name] = _new_buffer(p).copy_(state_dict["state"][i][name])
        for group in self.param_groups:
            if group["capturable"]:  # from another device's checkpoint
                for name in (k for k, v in group.items() if isinstance(v, Tensor)):
                    group[name] = group[name].to(group["params"][0].device)

    def _kind(self, group: dict[str, Any], options: Any) -> tuple[StepKind, tuple[str | None, str | None], bool]:
        kept = (_BUFFERS[0] if group["compensated"] else None, _BUFFERS[1] if options.momentum != 0 else None)
        kind = SVAG_STEP if group["replicas"] is None else SVAG_REPLICAS_STEP
        return kind, kept, group["capturable"] or group["replicas"] is not None

    def _extra(self, group: dict[str, Any], plan: Plan, params: list[Tensor], states: list[State]) -> Any:
        return (
            self._coefficients(group, plan.options, params[0].device) if group["capturable"] else plan.options.replicas
        )

    def _new_state(self, group: dict[str, Any], p: Tensor) -> State:
        wanted = group["compensated"], group["momentum"] != 0
        return {name: _new_buffer(p) for name, is_wanted in zip(_BUFFERS, wanted, strict=True) if is_wanted}

    def _coefficients(self, group: dict[str, Any], options: StepOptions, device: torch.device) -> Tensor:
        """Return the group's coefficients on the device, with lr copied there by the device itself."""
        options = options._replace(lr=0.0)
        coefficients, written = self._on_device.get((id(group), device), (None, None))
        if coefficients is None or written != options:
            coefficients = torch.tensor(step_scalars(*options), dtype=torch.float64, device=device)
            self._on_device[id(group), device] = coefficients, options
        coefficients[0].copy_(group["lr"])
        return coefficients
