"""What SVAG and its adaptive variants share: an optimizer whose step combines the gradients of two batches."""

from __future__ import annotations

import itertools
import math
import numbers
import operator
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from svag_fast.numeric import number, real
from svag_fast.ops.backends import check_name
from svag_fast.ops.checked_step import CheckedStep
from svag_fast.ops.memory import check_apart
from svag_fast.ops.step_stats import FINITE, StepStats, nothing_stepped, rounding, total
from svag_fast.optim import loaded_state
from svag_fast.optim.callers import only_makes_state, tell_scaler
from svag_fast.optim.grad_lists import Grads, carriers, divide, gradients, sharded
from svag_fast.optim.group_options import CLOCKS, count, on_device, start_clocks
from svag_fast.optim.held_gradient import GroupGrads, HeldGradient
from svag_fast.optim.optimizer_methods import outside_compiler, plain, seen_by_hooks_and_profilers


class Work(NamedTuple):
    """A part of a step, checked and ready to be taken."""

    step: Any
    """Takes it, called with ``skip_nonfinite``, and returns StepStats.raw; ``spans`` says where its tensors are."""
    keep: Callable[[Tensor, bool], None] | None
    """Keeps the state that the step has used, called with what it returned and ``skip_nonfinite``."""
    moves: bool = True
    """Whether it moves parameters, so that the group's clocks count it."""


_IMMUTABLE = frozenset({float, int, bool, str})
_add_param_group = plain(Optimizer.add_param_group)
_zero_grad = plain(Optimizer.zero_grad)


class TwoBatchOptimizer(Optimizer):
    """An optimizer whose step combines the gradients of two batches: what SVAG and its adaptive variants share.

    A subclass says in :meth:`_work` how one group's tensors on one device are updated.
    """

    _step_supports_amp_scaling = True
    state_dict = outside_compiler(plain(Optimizer.state_dict))
    torch_kin: loaded_state.TorchKin
    """The optimizer of torch.optim whose checkpoints are taken over."""
    state_names: frozenset[str]
    """What is kept for each parameter."""
    values: operator.itemgetter[Any]
    """All options of a group."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._pair = HeldGradient()
        # By the group's id: its options' values when they were checked, and what a step takes them as.
        self._checked: dict[int, tuple[tuple[Any, ...], Any]] = {}
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_pair", HeldGradient()).clear()
        self._checked = {}
        for group in self.param_groups:
            start_clocks(group)

    @property
    def stats(self) -> StepStats | None:
        """The last step's statistics."""
        return self._pair.stats

    @property
    def l(self) -> float:
        """SVAG's hyperparameter, the same for all param groups."""
        return float(self.param_groups[0]["l"])

    @property
    def effective_steps(self) -> float:
        """The sum of ``1 / l`` over the steps: a schedule in the paper's sense is a function of these."""
        return float(self.param_groups[0]["effective_steps"])

    @property
    def time(self) -> float:
        """The SDE's time: the sum of ``lr / l`` over the steps (adaptive: ``lr² / l``), for the first param group.

        With momentum and ``momentum_rule="fixed"`` the limit is the SDE of SGD at lr/(1 - momentum), whose time runs
        1/(1 - momentum) times as fast.
        """
        return float(self.param_groups[0]["time"])

    # ---- param groups and their options

    @outside_compiler
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group with its own options; ``l`` must be the other groups' own.

        Raises:
            ValueError, TypeError: an option or a parameter is out of range, and which; nothing was added.
            RuntimeError: a gradient is held, and the second batch's backward pass has begun.
        """
        if isinstance(param_group, dict):
            group = {**self.defaults, **param_group}
            number("l", group["l"])
            if self.param_groups and group["l"] != self.l:
                raise ValueError(f"Invalid l: {group['l']} (the other param groups have {self.l}, and all must agree)")
            self._check_group(group, read=True)
        _add_param_group(self, param_group)
        group = self.param_groups[-1]
        try:
            self._check_params(group)
            start_clocks(group)
            if self._pair.grads is not None:
                self._pair.take_group(group["params"])
        except BaseException:
            self.param_groups.pop()
            raise

    def _check_params(self, group: dict[str, Any]) -> None:
        for i, p in enumerate(group["params"]):
            if kind := sharded(p):
                raise TypeError(
                    f"params[{i}] of the group is a {kind}: {type(self).__name__} doesn't serve parameters in shards, "
                    "of which it would step and measure one rank's alone (DistributedDataParallel keeps them whole)"
                )

    def _check_group(self, group: dict[str, Any], *, read: bool = False) -> Any:
        """Return the group's options as a step takes them, checked, ``lr`` first.

        It is 0 where only a captured step's kernel reads it, unless ``read``.
        """
        lr = group["lr"]
        if isinstance(lr, Tensor):
            if lr.numel() != 1:
                raise ValueError(f"Tensor lr must be 1-element, but its shape is {list(lr.shape)}")
            if not read and on_device(group):
                lr = 0.0
        check_name(group["backend"])
        if not isinstance(group["maximize"], bool):
            raise TypeError(f"Invalid maximize: {group['maximize']!r} (expected a bool)")
        return self._check_options(group, lr)

    def _check_options(self, group: dict[str, Any], lr: Any) -> Any:
        """Return the options of the group's step at the rate ``lr``, checked."""
        raise NotImplementedError

    def _checked_options(self) -> list[Any]:
        """Check all groups' options as they are now, and return them."""
        l = self.param_groups[0]["l"]
        checked = []
        for group in self.param_groups:
            values = self.values(group)
            kept = self._checked.get(id(group))
            if kept is not None and not all(map(operator.is_, values, kept[0])):
                kept = None
            if kept is None:
                number("l", group["l"])
            if group["l"] != l:
                raise ValueError(f"Invalid l: {group['l']} (the first param group has {l}, and all must agree)")
            if kept is None:
                kept = values, self._check_group(group)
                if _IMMUTABLE.issuperset(map(type, values)):  # the same objects then are the same values
                    self._checked[id(group)] = kept
            checked.append(kept[1])
        return checked

    # ---- the first gradient

    @outside_compiler
    def hold_gradient(self) -> None:
        """Keep ``.grad`` as the first batch's gradient and clear it for the second batch's.

        Nothing is copied, except gradients whose memory others see: buckets of DistributedDataParallel, a trainer's
        own buffers, a variable that refers to the gradient.

        Raises:
            RuntimeError: a gradient is held already, or there is none to hold.
        """
        if self._pair.grads is not None:
            raise RuntimeError("a gradient is held already: call step(), or discard_gradient() to give it up")
        self._pair.take(self.param_groups)

    @outside_compiler
    def hold_pair(self, first: Mapping[Tensor, Tensor]) -> None:
        """Keep both batches' gradients where one backward pass made them: what :func:`svag_fast.pair_pass` ends with.

        Then ``step()`` without a closure; clipping, unscaling and :meth:`discard_gradient` are as after
        :meth:`hold_gradient` and a second backward pass.

        Args:
            first: the first batch's gradient of each parameter that has one, in memory of its own; the second batch's
                are in ``.grad``. Replaces a pair that is held already.

        Raises:
            RuntimeError: a gradient is held by :meth:`hold_gradient`.
            ValueError: a gradient isn't of its parameter's shape, or isn't of a parameter of this optimizer.
        """
        if self._pair.grads is not None and not self._pair.paired:
            raise RuntimeError("a gradient is held already: call step(), or discard_gradient() to give it up")
        known = {p for group in self.param_groups for p in group["params"]}
        for p, g in first.items():
            if p not in known or g.shape != p.shape:
                what = "a parameter that is not the optimizer's" if p not in known else f"a parameter {list(p.shape)}"
                raise ValueError(f"first has a gradient {list(g.shape)} of {what}")
        self._pair.put(self.param_groups, first)

    @outside_compiler
    def discard_gradient(self) -> None:
        """Forget the held gradient, if any."""
        self._pair.clear()

    @outside_compiler
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients: as in torch.optim; where a pair is held, both.

        A gradient held by :meth:`hold_gradient` stays: the second batch's is to come.
        """
        _zero_grad(self, set_to_none)
        if self._pair.paired:
            self._pair.clear()

    @outside_compiler
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Clip the held gradient and the current one in place, each by its own norm, to ``max_norm``.

        Call it before ``step()``. Each is what clipped SGD would use for its batch, so SVAG on them converges to the
        SDE of clipped SGD. The statistics are those of the clipped gradient. Under a GradScaler call :meth:`unscale_`
        before.

        Returns:
            The norms before: ``[2]``, held and current, or ``[1]`` where none is held (at ``l = 1``).

        Raises:
            RuntimeError: there is no second gradient, it alone was clipped, or a norm is inf or nan and
                ``error_if_nonfinite``; nothing was clipped.
            ValueError, TypeError: ``max_norm`` isn't a number >= 0, or ``norm_type`` is nan.
        """
        if not real("max_norm", max_norm) >= 0:  # a negative one would turn the gradients round
            raise ValueError(f"Invalid max_norm: {max_norm} (expected a number >= 0)")
        if math.isnan(real("norm_type", norm_type)):
            raise ValueError(f"Invalid norm_type: {norm_type} (expected a number, or inf)")
        current = [p for group in self.param_groups for p in group["params"]]
        batches = [current]
        if self._pair.grads is not None:
            self._pair.second(self.param_groups, seen_by_scaler=False)
            batches = [carriers(self._pair.first()), current]
        norms = [
            nn.utils.get_total_norm([p.grad for p in params if p.grad is not None], norm_type, error_if_nonfinite)
            for params in batches
        ]
        self._pair.clipped = True
        for params, norm in zip(batches, norms, strict=True):
            nn.utils.clip_grads_with_norm_(params, max_norm, norm)
        return torch.stack([norm.to(norms[0].device) for norm in norms])

    @outside_compiler
    def unscale_(self, scaler: torch.amp.GradScaler) -> None:
        """Divide the held gradient and the current one by the GradScaler's scale, to clip or look at them.

        Takes the place of ``scaler.unscale_(optimizer)``, which sees the current gradient alone; an overflow in either
        is known to the scaler. Then ``scaler.step(optimizer)``.

        Raises:
            RuntimeError: there is no second gradient yet, or the scaler refuses.
        """
        if self._pair.grads is None:
            scaler.unscale_(self)
            return
        self._pair.second(self.param_groups, seen_by_scaler=False)
        self.param_groups.append({"params": carriers(self._pair.first())})
        try:
            scaler.unscale_(self)
        finally:
            self.param_groups.pop()
        self._pair.unscaled = True

    # ---- the step

    @outside_compiler
    @seen_by_hooks_and_profilers
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step from the held gradient and the current one.

        Args:
            closure: clears the gradients, draws a fresh batch, backpropagates its loss and, as in torch.optim, returns
                it. It is called twice, or once at ``l = 1``, where the second batch has weight 0, and once where a
                gradient is held. Without it: backward, :meth:`hold_gradient`, backward, ``step()``; at ``l = 1`` a
                single backward is enough.

        Returns:
            What the closure returned; of two calls, the mean of the two batches' losses, detached (the first call's
            value where they are no numbers or tensors of one shape). Without a closure, or where it returned None,
            the statistics, which are also kept as ``.stats``.

            Gradients are left as they are, so clear them with ``zero_grad`` as usual. Parameters without a gradient
            are skipped; one that only one of the two batches reaches has gradient zero on the other. A step without
            any gradient changes and counts nothing.

        Raises:
            RuntimeError: ``l > 1`` and no gradient is held; one is held and the second batch has none; the second
                alone was clipped; a gradient is sparse; a closure is given where ``pair_pass`` made both gradients.
            ValueError, TypeError: an option of a group, or a gradient, is out of range, and which.

            In each case nothing was written, in no group.
        """
        value, holds = None, False
        try:
            if closure is not None:
                if self._pair.paired:
                    raise RuntimeError(
                        "pair_pass has made both batches' gradients: call step() without a closure, or "
                        "discard_gradient() first"
                    )
                self._checked_options()
                holds = self._pair.grads is None and self.l != 1
                with torch.enable_grad():
                    if holds:
                        first = _detached(closure())
                        self.hold_gradient()
                        value = _mean(first, _detached(closure()))
                    else:
                        value = closure()
            stats = self._step()
        except BaseException:
            if holds:  # or the next call would take it for its own first batch's
                self._pair.clear()
            # A GradScaler leaves these where a step was refused, and would multiply its scale into what is left.
            self.__dict__.pop("grad_scale", None)
            self.__dict__.pop("found_inf", None)
            raise
        return stats if value is None else value

    def _step(self) -> StepStats:
        pair, groups = self._pair, self.param_groups
        checked = self._checked_options()
        if all(options.lr == 0 for options in checked) and only_makes_state():
            for group in groups:
                self._make_state(group, [p for p in group["params"] if p.grad is not None])
            return nothing_stepped(False)
        scaled = getattr(self, "found_inf", None) is not None
        lists = self._both_gradients(scaled)
        if lists is None:
            pair.stats = nothing_stepped(False)
            return pair.stats
        by_group = [
            self._work_of(group, options, first, second)
            for group, options, (first, second) in zip(groups, checked, lists, strict=True)
        ]
        work = [part for parts in by_group for part in parts]
        if len(work) > 1:
            ends = [f" of group {k}" for k, parts in enumerate(by_group) for _ in parts]
            _check_apart([part.step for part in work], ends)
        scale: Tensor | None = getattr(self, "grad_scale", None) if scaled else None
        if scale is not None:
            divide([g for both in lists for listed in both for g in listed or [] if g is not None], scale)
        raws: list[Tensor] = []
        for step, keep, _ in work:
            raws.append(step(scaled))
            if keep is not None:
                keep(raws[-1], scaled)
        held = pair.grads is not None
        params = itertools.chain.from_iterable(group["params"] for group in groups)
        stats = StepStats(total(raws), held, held and checked[0].l != 1, rounding(params))
        if not pair.warned and stats.raw.is_cpu and stats.is_one_batch():
            pair.warned = True
            warnings.warn(f"{type(self).__name__}: {StepStats.ONE_BATCH}", stacklevel=5)
        if scale is not None and held:  # it has looked at the second gradient alone
            tell_scaler(stats.raw[FINITE])
        pair.clear()
        pair.stats = stats
        counted = stats.raw[FINITE] if scaled else 1
        for group, options, parts in zip(groups, checked, by_group, strict=True):
            if parts and not any(part.moves for part in parts):
                continue
            lr = group["lr"].double() if on_device(group) else options.lr
            count(group, counted, self._time_of(lr, group["l"]))
        return stats

    def _time_of(self, lr: Any, l: float) -> Any:
        return lr / l

    def _both_gradients(self, scaled: bool) -> list[tuple[GroupGrads, GroupGrads | None]] | None:
        """Return each group's gradients of the first and, where one is held, the second batch; None if none has any."""
        pair = self._pair
        if pair.grads is not None:
            if scaled and getattr(self, "grad_scale", None) is None and not pair.unscaled:
                raise RuntimeError(
                    "GradScaler.unscale_ has divided the current gradient alone: call optimizer.unscale_(scaler) in "
                    "its place, or let GradScaler.step unscale both"
                )
            if scaled and pair.clipped and not pair.unscaled:
                raise RuntimeError(
                    "clip_grad_norm_ has clipped gradients that a GradScaler's scale was in: call discard_gradient(), "
                    "make both again, and call optimizer.unscale_(scaler) before clip_grad_norm_"
                )
            second = pair.second(self.param_groups, seen_by_scaler=scaled and not pair.unscaled)
            return list(zip(pair.grads, second, strict=True))
        lists = [[p.grad for p in group["params"]] for group in self.param_groups]
        if all(g is None for listed in lists for g in listed):
            return None
        if self.l != 1:
            raise RuntimeError(
                f"{type(self).__name__} with l = {self.l:g} combines two batches, and no gradient is held: call "
                "hold_gradient() between the two backward passes, or pass step() a closure"
            )
        return [(listed, None) for listed in lists]

    def _work_of(self, group: dict[str, Any], options: Any, first: GroupGrads, second: GroupGrads | None) -> list[Work]:
        """Check a group's gradients; return what updates it."""
        return [self._work(group, options, *lists) for lists in gradients(group["params"], first, second)]

    def _work(
        self, group: dict[str, Any], options: Any, params: list[Tensor], grads1: Grads, grads2: Grads | None
    ) -> Work:
        raise NotImplementedError

    def _make_state(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Make the state that a first step would leave, of a parameter that hasn't moved."""

    # ---- checkpoints

    @outside_compiler
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave; a gradient held meanwhile is forgotten.

        The state of torch's own optimizer (SGD for SVAG; at ``l = 1`` Adam and RMSprop) is taken over where it
        has no more options switched on. ``l`` and the other options that it lacks stay as they are.

        Raises:
            ValueError, TypeError: it is another optimizer's, or a value in it is out of range; nothing was replaced.
        """
        loaded: dict[str, Any] = {}

        def check(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
            loaded.update(loaded_state.checked(self, state))
            return loaded

        def finish(_: Optimizer) -> None:
            self._finish_loading(loaded)

        # Around the user's own hooks: the last to see what is loaded, the first to see it loaded.
        handles = [
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(finish, prepend=True),
        ]
        try:
            plain(Optimizer.load_state_dict)(self, state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _check_loaded_group(self, group: dict[str, Any]) -> None:
        self._check_group(group, read=True)
        for name in CLOCKS:
            number(name, group.get(name, 0.0), **({} if name.endswith("_lost") else {"least": 0}))

    def _finish_loading(self, state_dict: dict[str, Any]) -> None:
        """Mend what torch's own loading leaves."""


def _check_apart(steps: list[Any], ends: list[str]) -> None:
    """Refuse steps that share memory with one another; ``ends`` tell them apart in the names of their tensors."""
    if not CheckedStep.together(steps):
        written, first, second = zip(*(step.spans(end) for step, end in zip(steps, ends, strict=True)), strict=True)
        check_apart(*(list(itertools.chain(*listed)) for listed in (written, first, second)))


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _mean(first: Any, second: Any) -> Any:
    """Return the mean of two losses; where they have none, the first that there is."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        averaged = first.shape == second.shape and first.device == second.device
    else:
        averaged = isinstance(first, numbers.Real) and isinstance(second, numbers.Real)
    if averaged:
        return (first + second) / 2
    return second if first is None else first
