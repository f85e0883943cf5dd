"""The SVAG optimizer: two independent batches a step, in torch.optim's manners (paper, equation 5)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer, optimizer
from torch.optim.optimizer import ParamsT

from svag_fast.ops.backends import check_name
from svag_fast.ops.checked_step import CheckedStep
from svag_fast.ops.checks import PARAM_DTYPES, check_l, check_nonnegative
from svag_fast.ops.step import step_coefficients, svag_coefficients, svag_step_
from svag_fast.ops.step_stats import StepStats

Grads = list[Tensor]
_Step = TypeVar("_Step", bound=Callable[..., Any])


def _plain(method: Any) -> Any:
    """The optimizer's method without what keeps torch.compile out of it: that imports the compiler, 2.4 s of CPU."""
    return getattr(method, "__wrapped__", method)


_add_param_group = _plain(Optimizer.add_param_group)


def _seen_by_hooks_and_profilers(step: _Step) -> _Step:
    """Wrap ``step`` as torch.optim would, entered only where someone watches: it costs half a small net's step."""
    watched = Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def wrapper(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if (
            optimizer._global_optimizer_pre_hooks
            or optimizer._global_optimizer_post_hooks
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
        ):
            return watched(self, *args, **kwargs)
        return step(self, *args, **kwargs)

    wrapper.hooked = True  # type: ignore[attr-defined]  # Optimizer looks for it
    return wrapper  # type: ignore[return-value]


def svag_loss(loss1: Tensor, loss2: Tensor, l: float) -> Tensor:
    """Return ``c1*loss1 + c2*loss2``, whose gradient is SVAG's, for use with any optimizer at ``lr / l``.

    The slow path that works everywhere: SVAG is linear in the loss. The value is not a loss to look at (c2 <= 0).

    Args:
        loss1, loss2: scalar losses of two independent batches at the same parameters.
        l: SVAG's hyperparameter, >= 1.
    """
    c1, c2 = svag_coefficients(l)
    return c1 * loss1 + c2 * loss2


class TwoBatchOptimizer(Optimizer):
    """An optimizer whose step combines the gradients of two batches: what SVAG and its adaptive kin share.

    A subclass updates one group's tensors in :meth:`_update`.
    """

    _step_supports_amp_scaling = True
    state_dict = _plain(Optimizer.state_dict)
    load_state_dict = _plain(Optimizer.load_state_dict)

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._reset()
        super().__init__(params, {**defaults, "steps": 0, "time": 0.0})

    def _reset(self) -> None:
        # The held gradients, group by group, beside their params.
        self._held: list[list[Tensor | None]] | None = None
        self._saw_grad_scaler = False
        self.stats: StepStats | None = None
        """The last step's statistics."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group with its own options; ``l`` must be the other groups' own."""
        group = {**self.defaults, **param_group}
        self._check_group(group)
        params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        for i, p in enumerate(params):
            if isinstance(p, Tensor) and p.dtype not in self._dtypes(group):
                allowed = ", ".join(map(str, self._dtypes(group)))
                raise TypeError(f"params[{i}] of the group is {p.dtype}: expected one of {allowed}")
        _add_param_group(self, {**param_group, "params": params})

    def _dtypes(self, group: dict[str, Any]) -> tuple[torch.dtype, ...]:
        return PARAM_DTYPES

    def _check_group(self, group: dict[str, Any]) -> None:
        check_nonnegative("learning rate", float(group["lr"]))
        check_nonnegative("weight_decay", group["weight_decay"])
        check_l(group["l"])
        check_name(group["backend"])
        if self.param_groups and group["l"] != self.l:
            raise ValueError(f"Invalid l: {group['l']} (the other param groups have {self.l}, and all must agree)")

    @property
    def l(self) -> float:
        """SVAG's hyperparameter, the same for all param groups."""
        return float(self.param_groups[0]["l"])

    @property
    def effective_steps(self) -> float:
        """Steps taken divided by ``l``: a schedule in the paper's sense is a function of these."""
        return float(self.param_groups[0]["steps"]) / self.l

    @property
    def time(self) -> float:
        """The SDE's time: the sum of ``lr / l`` over the steps, for the first param group."""
        return float(self.param_groups[0]["time"])

    def hold_gradient(self) -> None:
        """Keep ``.grad`` as the first batch's gradient, without a copy, and clear it for the second batch's.

        Raises:
            RuntimeError: a gradient is held already, or there is none to hold.
        """
        if self._held is not None:
            raise RuntimeError("a gradient is held already: call step(), or discard_gradient() to give it up")
        held = [[p.grad for p in group["params"]] for group in self.param_groups]
        grads = [g for grads in held for g in grads if g is not None]
        if not grads:
            raise RuntimeError("no parameter has a gradient to hold: call backward() on the first batch's loss first")
        self._held = held
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None
        if self._saw_grad_scaler:
            # The scaler looks only at .grad. A zero there, or a nan if the held gradient overflowed, shows it both.
            with_grad = [
                p
                for group, gs in zip(self.param_groups, held, strict=True)
                for p, g in zip(group["params"], gs, strict=True)
                if g is not None
            ]
            smallest = min(with_grad, key=Tensor.numel)
            overflow = torch.stack([~g.isfinite().all() for g in grads]).any()
            smallest.grad = torch.zeros_like(smallest).masked_fill_(overflow, torch.nan)

    def discard_gradient(self) -> None:
        """Forget the held gradient, if any."""
        self._held = None

    @_seen_by_hooks_and_profilers
    def step(self, closure: Callable[[], Any] | None = None) -> StepStats:  # type: ignore[override]
        """Take one step from the held gradient and the current one.

        Args:
            closure: clears the gradients, draws a fresh batch, backpropagates its loss. It is called twice, or once
                at ``l = 1``, where the second batch has weight 0. Without it: backward, :meth:`hold_gradient`,
                backward, ``step()``; at ``l = 1`` a single backward is enough.

        Returns:
            The step's statistics (also kept as ``.stats``); gradients are left as they are, so clear them with
            ``zero_grad`` as usual. Parameters without a gradient are skipped; one that only one of the two batches
            reaches has gradient zero on the other.

        Raises:
            RuntimeError: ``l > 1`` and no gradient is held, or a gradient is sparse.
        """
        if closure is not None:
            with torch.enable_grad():
                if self._held is None and self.l != 1:
                    closure()
                    self.hold_gradient()
                closure()
        if self._held is None and self.l != 1:
            raise RuntimeError(
                f"{type(self).__name__} with l = {self.l:g} combines two batches, and no gradient is held: call "
                "hold_gradient() between the two backward passes, or pass step() a closure"
            )
        held = self._held
        updates = [
            update
            for i, group in enumerate(self.param_groups)
            for update in self._updates(group, *_first_and_second(group["params"], None if held is None else held[i]))
        ]
        scaled = self._unscale(held)
        parts = [update(scaled) for update in updates]
        if not parts:
            parts = [svag_step_([], [], None if held is None else [], lr=0.0, l=1)]
        self._held = None
        self.stats = StepStats.total(parts)
        taken = self.stats.finite if scaled else True
        for group in self.param_groups:
            steps, time = group["steps"], group["time"]
            if group.get("capturable"):  # in place: a replayed graph counts on
                steps += taken
                time += taken * (group["lr"] / group["l"])
            else:
                group["steps"] = steps + taken
                group["time"] = time + taken * (group["lr"] / group["l"])
        return self.stats

    def _unscale(self, held: list[list[Tensor | None]] | None) -> bool:
        """Divide held and current gradients by the GradScaler's scale; return whether one is at work."""
        if getattr(self, "found_inf", None) is None:
            return False
        self._saw_grad_scaler = True
        scale: Tensor | None = getattr(self, "grad_scale", None)
        if scale is None and held is not None:
            raise RuntimeError(
                "GradScaler.unscale_ has divided the current gradient alone: with a held gradient, let "
                "GradScaler.step unscale both"
            )
        if scale is not None:
            current = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            first = [g for grads in held or [] for g in grads if g is not None]
            for grads in (current, first):
                if grads:
                    with torch.no_grad():
                        torch._foreach_mul_(grads, scale.double().reciprocal().to(grads[0].device))
        return True

    def _updates(
        self, group: dict[str, Any], first: list[Tensor | None], second: list[Tensor | None] | None
    ) -> list[Callable[[bool], StepStats]]:
        """Check a group's gradients; return what updates it, called with ``skip_nonfinite``."""
        return [functools.partial(self._update, group, *lists) for lists in _gradients(group["params"], first, second)]

    def _update(
        self, group: dict[str, Any], params: list[Tensor], grads1: Grads, grads2: Grads | None, skip_nonfinite: bool
    ) -> StepStats:
        raise NotImplementedError


def _first_and_second(
    params: list[Tensor], held: list[Tensor | None] | None
) -> tuple[list[Tensor | None], list[Tensor | None] | None]:
    """A group's gradients of the first and, where one is held, the second batch."""
    current = [p.grad for p in params]
    return (current, None) if held is None else (held, current)


def _gradients(
    params: list[Tensor], first: list[Tensor | None], second: list[Tensor | None] | None
) -> Iterable[tuple[list[Tensor], Grads, Grads | None]]:
    """Yield a group's ``(params, grads1, grads2)``, one triple for each device."""
    everywhere = all(g is not None and not g.is_sparse for grads in (first, second or []) for g in grads)
    if everywhere and params and len(set(map(Tensor.get_device, params))) == 1:
        yield params, first, second  # type: ignore[misc]
        return
    devices: dict[torch.device, tuple[list[Tensor], Grads, Grads]] = {}
    for i, p in enumerate(params):
        pair = [first[i]] if second is None else [first[i], second[i]]
        if any(g is not None and g.is_sparse for g in pair):
            raise RuntimeError(f"sparse gradients are not supported (a parameter of shape {list(p.shape)} has one)")
        if any(g is not None for g in pair):
            lists = devices.setdefault(p.device, ([], [], []))
            lists[0].append(p)
            for grads, g in zip(lists[1:], pair, strict=False):
                grads.append(torch.zeros_like(p) if g is None else g)
    for listed, grads1, grads2 in devices.values():
        yield listed, grads1, None if second is None else grads2


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

        stats = opt.step(closure)  # or: closure clears, draws a fresh batch, backpropagates; called twice

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
    gradients are unscaled, and a step with an inf or nan in either is skipped without synchronising.

    Raises:
        ValueError, TypeError: an option or a parameter is out of range, and which.
    """

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
        super().__init__(params, defaults)

    def _reset(self) -> None:
        super()._reset()
        # What a capturable step reads on each device, and the weight decay that was written there.
        self._on_device: dict[tuple[int, torch.device], tuple[Tensor, float]] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("capturable", False)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group with its own options; ``l`` must be the other groups' own."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["capturable"]:
            for name in ("lr", "steps", "time"):
                if not isinstance(group[name], Tensor):
                    device = group["params"][0].device
                    group[name] = torch.tensor(float(group[name]), dtype=torch.float64, device=device)

    def _dtypes(self, group: dict[str, Any]) -> tuple[torch.dtype, ...]:
        return tuple(d for d in PARAM_DTYPES if d != torch.float64 or not group["compensated"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave; a gradient held meanwhile is forgotten."""
        super().load_state_dict(state_dict)
        # torch casts state to the parameter's dtype; the compensation of a 16-bit parameter is float32.
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, params, strict=True):
            if "compensation" in self.state.get(p, {}):
                value = state_dict["state"][i]["compensation"]
                self.state[p]["compensation"] = torch.empty_like(p, dtype=torch.float32).copy_(value)

    def _updates(
        self, group: dict[str, Any], first: list[Tensor | None], second: list[Tensor | None] | None
    ) -> list[Callable[[bool], StepStats]]:
        if not (group["compensated"] or group["capturable"]):
            lr, l, weight_decay = float(group["lr"]), group["l"], group["weight_decay"]
            step = CheckedStep.of(
                group["params"], first, second, lr=lr, l=l, weight_decay=weight_decay, backend=group["backend"]
            )
            if step is not None:
                return [step]
        return super()._updates(group, first, second)

    def _update(
        self, group: dict[str, Any], params: list[Tensor], grads1: Grads, grads2: Grads | None, skip_nonfinite: bool
    ) -> StepStats:
        compensation = [self._compensation(p) for p in params] if group["compensated"] else None
        if group["capturable"]:
            return svag_step_(
                params,
                grads1,
                grads2,
                lr=0.0,  # the coefficients' is used
                l=group["l"],
                compensation=compensation,
                skip_nonfinite=skip_nonfinite,
                coefficients=self._coefficients(group, params[0].device),
                backend=group["backend"],
            )
        return svag_step_(
            params,
            grads1,
            grads2,
            lr=float(group["lr"]),
            l=group["l"],
            weight_decay=group["weight_decay"],
            compensation=compensation,
            skip_nonfinite=skip_nonfinite,
            backend=group["backend"],
        )

    def _coefficients(self, group: dict[str, Any], device: torch.device) -> Tensor:
        """Return the group's coefficients on the device, with lr copied there by the device itself."""
        weight_decay = float(group["weight_decay"])
        coefficients, written = self._on_device.get((id(group), device), (None, None))
        if coefficients is None or written != weight_decay:
            coefficients = step_coefficients(0.0, group["l"], weight_decay, device)
            self._on_device[id(group), device] = coefficients, weight_decay
        coefficients[0].copy_(group["lr"])
        return coefficients

    def _compensation(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "compensation" not in state:
            state["compensation"] = torch.zeros_like(p, dtype=torch.float32)
        buffer: Tensor = state["compensation"]
        return buffer
