"""What SVAG and its adaptive variants share: an optimizer whose step combines the gradients of two batches."""

from __future__ import annotations

import itertools
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from operator import is_not
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as registered
from torch.optim.optimizer import ParamsT

from svag_fast.numeric import number
from svag_fast.ops.backends import check_name
from svag_fast.ops.step_call import Scaler, StepCall, StepKind, StepLists, check_calls_apart, read_the_scale
from svag_fast.ops.step_stats import FINITE, StepStats, is_one_batch, nothing_stepped, total
from svag_fast.optim import loaded_state
from svag_fast.optim.callers import only_makes_state, tell_scaler
from svag_fast.optim.closure_losses import detached, mean
from svag_fast.optim.grad_lists import divide, gradients, overflow, sharded
from svag_fast.optim.group_options import (
    as_clock,
    check_clocks,
    is_immutable,
    on_device,
    read_clock,
    start_clocks,
    takes_two_batches,
)
from svag_fast.optim.held_gradient import GroupGrads, HeldGradient
from svag_fast.optim.holding import HoldingOptimizer
from svag_fast.optim.in_backward import StepsInBackward
from svag_fast.optim.optimizer_methods import as_torch_wraps, outside_compiler, plain

State: TypeAlias = dict[str, Any]


class Work(NamedTuple):
    """A part of a step, checked and ready to be taken."""

    call: StepCall
    states: Sequence[State] = ()
    """What is kept of each of its params, if anything is."""
    fresh: Mapping[Tensor, State] = MappingProxyType({})
    """Of these what the optimizer doesn't have yet."""
    take: Callable[[bool, Scaler | None], Tensor] | None = None
    """What is called in place of ``call``."""
    moves: bool = True
    """Whether it moves parameters, so that the group's clocks count it."""


class Plan(NamedTuple):
    """A group's step, as its options say: made when they are set."""

    options: Any
    """As a step takes them, checked."""
    kind: StepKind
    kept: tuple[str | None, str | None]
    """The names of what is kept for each param, as :class:`StepLists` has it."""
    has_extra: bool
    """Whether the step takes more than lists and options (:meth:`TwoBatchOptimizer._extra`)."""
    l: Any
    """A number, or [S] where the replicas differ."""
    time: Any
    """The SDE's time of a step; None where only a captured step's kernel reads the rate."""


MakeCall: TypeAlias = Callable[..., StepCall | None]
# By map, not by a comprehension: a step takes a small net's kernel little longer than some function calls.
_RATE = operator.attrgetter("options.lr")
_ROUNDING = operator.attrgetter("call.rounding")
_MOVES = operator.attrgetter("moves")
_NONES = itertools.repeat(None)
_add_param_group = plain(Optimizer.add_param_group)


class TwoBatchOptimizer(HoldingOptimizer):
    """An optimizer whose step combines the gradients of two batches: what SVAG and its adaptive variants share.

    A subclass says in :meth:`_kind` which step it takes, and what it keeps for it.
    """

    _step_supports_amp_scaling = True
    state_dict = outside_compiler(plain(Optimizer.state_dict))
    torch_peer: loaded_state.TorchPeer
    """The optimizer of torch.optim whose checkpoints are taken over."""
    state_names: frozenset[str]
    """What is kept for each parameter."""
    values: operator.itemgetter[Any]
    """All options of a group."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._pair = HeldGradient()
        # By the group's id: its options' values, and what they were found to ask for.
        self._plans_of: dict[int, tuple[tuple[Any, ...], Plan]] = {}
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_pair", HeldGradient()).clear()
        self._plans_of = {}
        for group in self.param_groups:
            start_clocks(group)
        if any(map(takes_two_batches, self.param_groups)):
            self._pair.watch.follow(self._all_params())

    def _all_params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def l(self) -> float:
        """SVAG's hyperparameter, the same for all param groups."""
        return read_clock(self.param_groups[0], "l")

    @property
    def effective_steps(self) -> float:
        """The sum of ``1 / l`` over the steps: a schedule in the paper's sense is a function of these."""
        return read_clock(self.param_groups[0], "effective_steps")

    @property
    def time(self) -> float:
        """The SDE's time: the sum of ``lr / l`` over the steps (adaptive: ``lr² / l``), for the first param group.

        With momentum and ``momentum_rule="fixed"`` the limit is the SDE of SGD at lr/(1 - momentum), whose time runs
        1/(1 - momentum) times as fast.
        """
        return read_clock(self.param_groups[0], "time")

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
            if "replicas" in group and "replicas" not in self.defaults:
                raise TypeError(f"the optimizer of replicas must be SVAG, got {type(self).__name__}")
            options = self._check_group(group, read=True)
            if self.param_groups:
                self._check_agrees(group, options.l, self._check_group(self.param_groups[0], read=True).l)
        _add_param_group(self, param_group)
        group = self.param_groups[-1]
        try:
            self._check_params(group)
            start_clocks(group)
            if self._pair.grads is not None:
                self._pair.take_group(group["params"])
            elif takes_two_batches(group):
                self._pair.watch.follow(self._all_params())
        except BaseException:
            self.param_groups.pop()
            raise

    def _check_agrees(self, group: dict[str, Any], l: Any, wanted: Any) -> None:
        """Refuse a group whose l, as a step takes it, isn't the one wanted, or that has other replicas."""
        for name, value, other in (
            ("l", l, wanted),
            ("replicas", group.get("replicas"), self.param_groups[0].get("replicas")),
        ):
            if value != other:
                raise ValueError(f"{name} must be {other}, as in the other param groups, got {group.get(name)}")

    def steps_in_backward(self) -> StepsInBackward | None:
        """What takes weights' steps inside of a backward pass of both batches; None where no group wants it."""
        return None

    def _check_params(self, group: dict[str, Any]) -> None:
        for i, p in enumerate(group["params"]):
            if kind := sharded(p):
                raise TypeError(
                    f"params[{i}] of the group must be a whole tensor for {type(self).__name__}, which would step and "
                    f"measure one rank's shard alone, got a {kind} (DistributedDataParallel keeps parameters whole)"
                )

    def _check_group(self, group: dict[str, Any], *, read: bool = False) -> Any:
        """Return the group's options as a step takes them, checked, ``lr`` first.

        It is 0 where only a captured step's kernel reads it, unless ``read``.
        """
        lr = group["lr"]
        if isinstance(lr, Tensor):
            if lr.numel() != 1 and group.get("replicas") is None:
                raise ValueError(f"Tensor lr must be 1-element, got shape {list(lr.shape)}")
            if not read and on_device(group):
                lr = 0.0
        check_name(group["backend"])
        if not isinstance(group["maximize"], bool):
            raise TypeError(f"maximize must be a bool, got {group['maximize']!r}")
        return self._check_options(group, lr)

    def _check_options(self, group: dict[str, Any], lr: Any) -> Any:
        """Return the options of the group's step at the rate ``lr``, checked."""
        raise NotImplementedError

    def _plans(self) -> list[Plan]:
        """Return all groups' plans, made where the options are others than at the last step."""
        plans: list[Plan] = []
        for group in self.param_groups:
            values = self.values(group)
            kept = self._plans_of.get(id(group))
            if kept is not None and not all(map(operator.is_, values, kept[0])):
                kept = None
            if kept is None:
                if plans and group.get("replicas") is None:  # before what depends on l
                    self._check_agrees(group, number("l", group["l"]), plans[0].options.l)
                options = self._check_group(group)
                l = as_clock(options.l)
                time = None if on_device(group) else self._time_of(as_clock(options.lr), l)
                kept = values, Plan(options, *self._kind(group, options), l, time)
                if all(map(is_immutable, values)):  # the same objects then are the same values
                    self._plans_of[id(group)] = kept
            plans.append(kept[1])
            options, first = kept[1].options, plans[0].options
            if options.l != first.l or group.get("replicas") != self.param_groups[0].get("replicas"):
                self._check_agrees(group, options.l, first.l)
        return plans

    # ---- the step

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
            RuntimeError: ``l > 1`` and no gradient is held; one is held and the second batch has none; one alone
                was changed after its backward pass; a gradient is sparse; a closure is given where ``pair_pass`` made
                both gradients.
            ValueError, TypeError: an option of a group, or a gradient, is out of range, and which.

            In each case nothing was written, in no group.
        """
        try:
            if (
                registered._global_optimizer_pre_hooks
                or registered._global_optimizer_post_hooks
                or self._optimizer_step_pre_hooks
                or self._optimizer_step_post_hooks
                or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
                or torch.compiler.is_compiling()
            ):
                return _watched_step(self, closure)
            return self._step(closure)
        except BaseException:
            if self._pair.by_closure:  # or the next call would take it for its own first batch's
                self._pair.clear()
            # A GradScaler leaves these where a step was refused, and would multiply its scale into what is left.
            self.__dict__.pop("grad_scale", None)
            self.__dict__.pop("found_inf", None)
            raise

    step.hooked = True  # type: ignore[attr-defined]  # Optimizer looks for it

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        value = None if closure is None else self._backpropagated(closure)
        pair, groups, plans = self._pair, self.param_groups, self._plans()
        if not any(map(_RATE, plans)) and only_makes_state():
            for group, plan in zip(groups, plans, strict=True):
                reached = [p for p in group["params"] if p.grad is not None]
                self.state.update(self._states(group, plan, reached)[1] if any(plan.kept) else {})
            return self._nothing_stepped() if value is None else value
        scaled = getattr(self, "found_inf", None) is not None
        if scaled:
            self._check_no_replicas("a GradScaler")
            self._check_no_in_backward("a GradScaler")
        scale: Tensor | None = getattr(self, "grad_scale", None) if scaled else None
        if pair.grads is None:
            lists = self._one_batch(plans[0].options.l)
        else:
            if scaled:
                pair.check_scaler(divides=scale is not None)
            second = pair.second(groups, seen_by_scaler=scaled and not pair.unscaled)
            lists = list(zip(pair.grads, second, strict=True))
        by_group = []
        for group, plan, (grads1, grads2) in zip(groups, plans, lists, strict=True):
            work, params = None, group["params"]
            if params and all(map(is_not, grads1, _NONES)) and all(map(is_not, grads2 or (), _NONES)):
                work = self._work(group, plan, params, grads1, grads2, StepCall.by_reader)
            by_group.append(work or self._work_by_device(group, plan, grads1, grads2))
        works = [part for parts in by_group for part in parts]
        if len(works) > 1:
            ends = [f" of group {k}" for k, parts in enumerate(by_group) for _ in parts]
            check_calls_apart([part.call for part in works], ends)
        scaler = None
        if scaled:
            scaler = self._scaler(works, lists, scale)
        raws: list[Tensor] = []
        for part in works:
            of_device = None if scaler is None else scaler.to(part.call.lists.params[0].device)
            raws.append((part.take or part.call)(scaled, of_device))
            if part.states:
                self._keep(part, raws[-1], scaled)
        precision = max(map(_ROUNDING, works), default=0.0)
        if pair.stepped is not None:
            raws += pair.stepped.raws
            precision = max(precision, pair.stepped.rounding)
        if not raws:  # no parameter has a gradient
            pair.stats = self._nothing_stepped()
            return pair.stats if value is None else value
        held = pair.grads is not None
        two_batches = held and plans[0].options.l != 1
        raw = raws[0] if len(raws) == 1 else total(raws)
        pair.stats = StepStats(raw, held, two_batches, precision)
        if two_batches and not pair.warned and raw.is_cpu:
            rows = raw.view(-1, 5).tolist()
            if [1 for row in rows if row[0] == row[1]]:
                self._warn_of_one_batch(rows, raw.dim() == 2)
        if scale is not None and held:  # it has looked at the second gradient alone
            tell_scaler(raw[FINITE])
        pair.clear()
        counted = raw[FINITE] if scaled else 1
        for group, plan, parts in zip(groups, plans, by_group, strict=True):
            if not parts or any(map(_MOVES, parts)):
                time = self._time_of(group["lr"].double(), plan.l) if plan.time is None else plan.time
                count(group, counted, plan.l, time)
        return pair.stats if value is None else value

    def _warn_of_one_batch(self, rows: list[list[float]], of_replicas: bool) -> None:
        same = [str(s) for s, row in enumerate(rows) if is_one_batch([row])]
        if same:
            self._pair.warned = True
            of = f" of replica {', '.join(same)}" if of_replicas else ""
            warnings.warn(f"{type(self).__name__}{of}: {StepStats.ONE_BATCH}", stacklevel=4)

    def _scaler(
        self, works: list[Work], lists: list[tuple[GroupGrads, GroupGrads | None]], scale: Tensor | None
    ) -> Scaler:
        """Return what the works' kernels have to know of a GradScaler; what they can't take themselves is done here."""
        found_inf: Tensor = self.found_inf  # type: ignore[attr-defined]
        if len(works) > 1 and self._pair.grads is not None:
            # A kernel sees its own list alone, and the scaler has looked at the second gradient alone.
            found_inf = found_inf + overflow(self._pair.first(), found_inf)
        if scale is not None and (any(w.take for w in works) or not read_the_scale([w.call for w in works])):
            divide([g for both in lists for listed in both for g in listed or [] if g is not None], scale)
            scale = None
        return Scaler(found_inf, scale)

    def _backpropagated(self, closure: Callable[[], Any]) -> Any:
        """Call the closure once a batch that has no gradient yet, and return its value."""
        if self._pair.paired:
            raise RuntimeError(
                "pair_pass has made both batches' gradients: call step() without a closure, or discard_gradient() first"
            )
        plans = self._plans()
        with torch.enable_grad():
            if self._pair.grads is not None or plans[0].options.l == 1:
                return closure()
            first = detached(closure())
            self.hold_gradient()
            self._pair.by_closure = True
            return mean(first, detached(closure()))

    def _nothing_stepped(self) -> StepStats:
        replicas = self.param_groups[0].get("replicas")
        return nothing_stepped(False, (5,) if replicas is None else (replicas, 5))

    def _one_batch(self, l: Any) -> list[tuple[GroupGrads, GroupGrads | None]]:
        """Return the groups' gradients where none is held."""
        lists = [[p.grad for p in group["params"]] for group in self.param_groups]
        if l != 1 and any(g is not None for listed in lists for g in listed):
            shown = l if isinstance(l, tuple) else f"{l:g}"
            raise RuntimeError(
                f"{type(self).__name__} with l = {shown} combines two batches, and no gradient is held: call "
                "hold_gradient() between the two backward passes, or pass step() a closure"
            )
        return [(listed, None) for listed in lists]

    def _work_by_device(
        self, group: dict[str, Any], plan: Plan, first: GroupGrads, second: GroupGrads | None
    ) -> list[Work]:
        works: list[Work] = []
        for params, grads1, grads2 in gradients(group["params"], first, second):
            works += self._work(group, plan, params, grads1, grads2, StepCall.of) or []
        return works

    def _work(
        self,
        group: dict[str, Any],
        plan: Plan,
        params: list[Tensor],
        grads1: Any,
        grads2: Any,
        call: MakeCall,
    ) -> list[Work] | None:
        """Return what updates a group's params of one device, all of which have gradients; None where ``call`` does."""
        states, fresh = self._states(group, plan, params) if any(plan.kept) else ([], {})
        kept = [name and [state[name] for state in states] for name in plan.kept]
        extra = self._extra(group, plan, params, states) if plan.has_extra else None
        lists = StepLists(params, grads1, grads2, *kept)  # type: ignore[arg-type]
        step = call(plan.kind, lists, plan.options, extra=extra, backend=group["backend"])
        return None if step is None else [Work(step, states, fresh)]

    def _kind(self, group: dict[str, Any], options: Any) -> tuple[StepKind, tuple[str | None, str | None], bool]:
        """Return ``kind``, ``kept`` and ``has_extra`` of the group's plan."""
        raise NotImplementedError

    def _extra(self, group: dict[str, Any], plan: Plan, params: list[Tensor], states: list[State]) -> Any:
        """Return what a step takes beside lists and options."""
        raise NotImplementedError

    def _time_of(self, lr: Any, l: float) -> Any:
        return lr / l

    # ---- what is kept for each parameter

    def _new_state(self, group: dict[str, Any], p: Tensor) -> State:
        """Return the state of a parameter that has not moved."""
        return {}

    def _states(
        self, group: dict[str, Any], plan: Plan, params: list[Tensor]
    ) -> tuple[list[State], dict[Tensor, State]]:
        """Return the params' states, and of these the new ones, to be kept once a step has used them."""
        wanted = {*filter(None, plan.kept)}
        states: list[State] = []
        fresh: dict[Tensor, State] = {}
        for p in params:
            state = self.state.get(p)
            if state is None or not wanted <= state.keys():
                state = fresh[p] = {**self._new_state(group, p), **(state or {})}
            states.append(state)
        return states, fresh

    def _keep(self, work: Work, raw: Tensor, skip_nonfinite: bool) -> None:
        """Keep the state that a step has used, given the statistics that it returned."""
        self.state.update(work.fresh)

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
            loaded_state.own_memory(self.state, loaded["state"])
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

    def _check_loaded_group(self, group: dict[str, Any]) -> Any:
        options = self._check_group(group, read=True)
        check_clocks(group)
        return options

    def _finish_loading(self, state_dict: dict[str, Any]) -> None:
        """Mend what torch's own loading leaves."""


def count(group: dict[str, Any], taken: Any, l: Any, time: Any) -> None:
    """Add a step to the clocks, the sums compensated (Kahan): exact to about an ulp after any number of steps.

    Args:
        group: the param group.
        taken: 1, or a 0-d float64 tensor that is 0 where the step was skipped.
        l: the step's; of replicas that differ [S].
        time: the step's own; of replicas that differ [S].
    """
    new = {"steps": group["steps"] + taken}
    for name, lost, term in (
        ("effective_steps", "effective_steps_lost", taken / l),
        ("time", "time_lost", taken * time),
    ):
        term = term + group[lost]
        new[name] = group[name] + term
        new[lost] = term - (new[name] - group[name])
    if not group.get("capturable"):
        group.update(new)
        return
    for name, value in new.items():
        group[name].copy_(value)


_watched_step = as_torch_wraps(TwoBatchOptimizer._step)
