"""A model under an optimizer in pair passes: which way its calls go, what its backward pass has to fulfil."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from svag_fast.nn.halves import ByHalves, Gradients, leaves_of
from svag_fast.nn.joint import Joint
from svag_fast.nn.joint_grads import NotJoint
from svag_fast.nn.look import Look
from svag_fast.nn.pair_batch_norm import CoupledSamples
from svag_fast.nn.replay import Replay
from svag_fast.optim.in_backward import StepsInBackward
from svag_fast.optim.two_batch import TwoBatchOptimizer
from svag_fast.sample_norms.context import SampleNorms, per_sample_sq_norms
from svag_fast.sample_norms.tape import NO_TASK, Recorder, current_task

Way: TypeAlias = Literal["auto", "joint", "halves"]

# Elements of both batches' input up to which a CPU takes both batches at once without norms; with norms it always does.
# Measured: docs/decisions.md.
JOINT_ELEMENTS = 512 * 64


class Run:
    """The model under an optimizer: kept by the optimizer, since to look through a model costs as much as a small step.

    What it has found out holds while the model and the optimizer stay as they are: see `serves`.
    """

    def __init__(self, model: nn.Module, optimizer: TwoBatchOptimizer, wanted: Way) -> None:
        self.model = model
        self.ddp = model if isinstance(model, DistributedDataParallel) else None
        self.root: nn.Module = model if self.ddp is None else self.ddp.module
        self.optimizer = optimizer
        self.wanted = wanted
        self.way: str | None = None
        self._seen = Look(model, optimizer)
        self._params = _trained(self.root, optimizer)
        self._joint: Joint | str | None = None  # or why it can't be
        self._halves = ByHalves(self.root, self._params)
        self._engine: Joint | ByHalves | None = None
        self._first: Gradients = {}
        self._losses_seen = self._said = self._left = False
        self.norms: SampleNorms | None = None
        self._with_norms = False
        self._context: per_sample_sq_norms | None = None
        self._synchronises = True
        self._steps: StepsInBackward | None = None
        self.undo: list[Callable[[], object]] = []
        """What leaves the context; empty where none is entered."""

    def serves(self, model: nn.Module, optimizer: TwoBatchOptimizer, wanted: Way) -> bool:
        """Whether all is as it was."""
        same = self.model is model and self.optimizer is optimizer and self.wanted == wanted
        return same and self._seen.holds()

    def begin(self, *, norms: bool) -> None:
        """Enter a context; its errors are `pair_pass`'s."""
        self.norms, self._with_norms = None, norms
        if self.optimizer._pair.grads is not None:
            raise RuntimeError(
                "a gradient is held already: call step(), or discard_gradient() to give it up (to accumulate, call "
                "pair.backward several times within one context)"
            )
        if self.ddp is not None and getattr(self.ddp, "_comm_hooks", None):
            raise ValueError(
                "the DistributedDataParallel model must be without a communication hook, which can't see both "
                "gradients, got one"
            )
        self._steps = None if self.wanted == "halves" else self.optimizer.steps_in_backward()
        if self._steps is not None and self.ddp is not None:
            raise ValueError(
                "in_backward must be False under DistributedDataParallel, which averages gradients, got True"
            )
        if self._joint is None and self.wanted != "halves":
            try:
                self._joint = Joint(self.root, self._params)
            except NotJoint as reason:
                self._joint = str(reason)
        if self.wanted == "joint" and isinstance(self._joint, str):
            raise _refused(self._joint)
        if norms and not (isinstance(self._joint, Joint) and self._joint.has_norms and self.wanted != "halves"):
            if self.wanted == "joint":
                raise _refused("norms of a layer without a rule for them, or of a parameter used twice")
            self._take_norms_by_halves()  # now: it refuses what has none
        if self._steps is not None and isinstance(self._joint, Joint) and (names := self._joint.shared) is not None:
            raise ValueError(f"in_backward must be False where parameters are shared, got True with {names} the same")
        self.undo.append(_patch(self.root, self._forward))
        if self.ddp is not None:
            self.undo.append(_patch(self.ddp, self._unsynchronised))

    def end(self) -> None:
        """Leave the context, and the model as it was."""
        while self.undo:
            self.undo.pop()()
        self._stop()
        if self._context is not None:
            self._context.__exit__(None, None, None)
            self._context = None

    def _take_norms_by_halves(self) -> None:
        """Around the model itself: without what is put onto it meanwhile."""
        context = per_sample_sq_norms(self.root)
        ours = self.root.__dict__.pop("forward", None) if self.undo else None
        try:
            self.norms = context.__enter__()
            self._context = context
        finally:
            if ours is not None:
                self.root.__dict__["forward"] = ours

    def _start(self, engine: Joint | ByHalves) -> Joint | ByHalves:
        if self._engine is not None:
            self._stop()
        second_updates = self.optimizer.l != 1
        if isinstance(engine, Joint):
            recorder = None
            if self._with_norms:
                recorder = Recorder()
                recorder.aliases = {name: name for name in self._params}
                self.norms = SampleNorms(recorder, "mean")
            only_once = () if self._steps is None else self._steps.options
            engine.begin(second_updates=second_updates, norms=recorder, only_once=only_once)
        else:
            if self._with_norms and self._context is None:
                self._take_norms_by_halves()
            engine.begin(second_updates=second_updates)
        self._engine, self.way = engine, engine.way
        return engine

    def _stop(self) -> None:
        if self._engine is not None:
            self._engine.end()
            self._engine = None

    # ---- forward

    def _forward(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not torch.is_grad_enabled():
            return inner(*args, **kwargs)
        if self._left and not self.optimizer._pair.paired:  # a step's: not beside what the next forward pass saves
            self._clear()
        engine = self._engine or self._start(self._chosen(args, kwargs))
        if not isinstance(engine, Joint) or engine.inside or current_task() != NO_TASK:
            return engine.forward(inner, args, kwargs)
        if engine.is_verified and self._seen.switched():
            engine.doubt()
        if engine.is_verified or engine.outputs:
            try:
                return engine.forward(inner, args, kwargs)
            except NotJoint as reason:
                raise _refused(str(reason)) from None
        replay = Replay(self.root)
        try:
            engine.verify(inner, args, kwargs)
            out = engine.forward(inner, args, kwargs)
        except NotJoint as reason:
            if self.wanted == "joint":
                raise _refused(str(reason)) from None
            replay.rewind()  # the call may have got as far as to update statistics
            return self._start(self._fallen_back(str(reason))).forward(inner, args, kwargs)
        self._say_without_rule(engine.without_rule)
        return out

    def _chosen(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Joint | ByHalves:
        faster = self._with_norms or self._steps is not None
        for x in () if faster else leaves_of(args, kwargs):
            if isinstance(x, Tensor) and x.dim() > 0:
                faster = x.is_cuda or x.numel() <= JOINT_ELEMENTS
                break
        if self._joint is None or self._context is not None or not (faster or self.wanted == "joint"):
            return self._halves
        return self._fallen_back(self._joint) if isinstance(self._joint, str) else self._joint

    def _fallen_back(self, reason: str) -> ByHalves:
        self._joint = reason
        if not self._said:
            self._said = True
            warnings.warn(
                "pair_pass takes this model's batches one after the other, which is exact but slower on small inputs: "
                f'{reason}. (Said once; way="halves" says nothing.)',
                stacklevel=6,
            )
        return self._halves

    def _say_without_rule(self, layers: list[str]) -> None:
        if layers and not self._said:
            self._said = True
            warnings.warn(
                "pair_pass runs layers without a rule on one batch, then on the other, which is exact but slower: "
                f"{', '.join(layers)}. (Said once.)",
                stacklevel=6,
            )

    def _unsynchronised(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """DistributedDataParallel's forward, whose reducer would average the second gradient alone."""
        ddp = self.ddp
        assert ddp is not None
        if not torch.is_grad_enabled():
            return inner(*args, **kwargs)
        self._synchronises = synchronises = ddp.require_backward_grad_sync
        ddp.require_backward_grad_sync = False
        try:
            return inner(*args, **kwargs)
        finally:
            ddp.require_backward_grad_sync = synchronises
            ddp.require_forward_param_sync = synchronises  # buffers go out before the next forward, as without us

    # ---- backward

    def backward(self, losses: Tensor) -> None:
        """See `Pair.backward`."""
        engine = self._engine
        rows = self._checked(losses)
        assert engine is not None
        if self.optimizer._pair.stepped is not None:
            raise RuntimeError(
                "layers have taken their step in the backward pass (in_backward=True), which leaves nothing to "
                "accumulate to: call step() first, or in_backward=False"
            )
        if self.optimizer._pair.paired:  # accumulation
            self.optimizer._pair.second(self.optimizer.param_groups, seen_by_scaler=False)
        else:
            self._clear()
        steps = self.optimizer.steps_in_backward() if isinstance(engine, Joint) and self._steps is not None else None
        try:
            if not self._losses_seen:
                _check_losses(losses, engine.outputs)
                self._losses_seen = True
            weights = torch.full_like(losses, 2 / rows)
            if isinstance(engine, Joint):
                engine.backward(losses, weights, self._first, steps)
            else:
                engine.backward(losses, weights, self._first)
            if not self._first and (steps is None or not steps.raws):
                raise RuntimeError("no trained parameter has part in the losses")
            if self.ddp is not None and self._synchronises:
                self._average(self.ddp)
        except BaseException as error:
            engine.forget()
            self.optimizer.discard_gradient()
            self._clear()
            if steps is not None and steps.raws and isinstance(error, Exception):
                raise RuntimeError(
                    "the backward pass has failed after layers took their step in it (in_backward=True): the "
                    "parameters are of different steps, so load a checkpoint"
                ) from error
            raise
        self._left = True
        stepped = steps if steps is not None and steps.raws else None
        self.optimizer._pair.put(self.optimizer.param_groups, self._first, stepped, engine.task)

    def _clear(self) -> None:
        """Drop both gradients."""
        self._first, self._left = {}, False
        for group in self.optimizer.param_groups:
            for p in group["params"]:  # also of what is frozen now: its last gradient would move it
                p.grad = None

    def _checked(self, losses: Tensor) -> int:
        if not isinstance(losses, Tensor) or not losses.is_floating_point():
            raise TypeError(f"losses must be a tensor of real numbers, got {type(losses).__name__}")
        if losses.dim() != 1 or losses.shape[0] % 2 or not losses.shape[0]:
            raise ValueError(
                f"losses must be one for each sample of both batches, [2B] (reduction='none'), got {list(losses.shape)}"
            )
        if self._engine is None or not self._engine.outputs:
            raise ValueError(
                "losses must be of a model called inside the context, with gradients, since the last backward, got "
                "others"
            )
        if not losses.requires_grad:
            raise ValueError(
                "losses must be made with the model, and not under torch.no_grad(), got some without a gradient"
            )
        rows = losses.shape[0]
        outputs = self._engine.outputs
        if rows != outputs[0].shape[0] and rows not in [len(x) for x in outputs[1:]]:
            raise ValueError(
                f"losses must be {self._engine.outputs[0].shape[0]}, as the rows of the model's outputs, got {rows}"
            )
        return rows

    def _average(self, ddp: DistributedDataParallel) -> None:
        """Both gradients' means over all processes, in one message for each dtype and device."""
        params = list(self._params.values())  # the same list in every process, whatever each has reached
        reached = torch.tensor(
            [float(p in self._first or p.grad is not None) for p in params],
            dtype=torch.float32,
            device=params[0].device,
        )
        torch.distributed.all_reduce(reached, group=ddp.process_group)
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for p, processes in zip(params, reached.tolist(), strict=True):
            if processes == 0:
                continue
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            grads = kinds.setdefault((p.device, p.dtype), [])
            grads += [self._first.setdefault(p, torch.zeros_like(p)), p.grad]
        with torch.no_grad():
            for grads in kinds.values():
                flat = torch.cat([g.reshape(-1) for g in grads])
                torch.distributed.all_reduce(flat, group=ddp.process_group)
                parts = torch.split(flat / ddp.process_group.size(), [g.numel() for g in grads])
                for g, part in zip(grads, parts, strict=True):
                    g.copy_(part.view(g.shape))


def _refused(reason: str) -> CoupledSamples:
    return CoupledSamples(f'the model can\'t take both batches at once: {reason}; way="halves" serves it')


def _trained(root: nn.Module, optimizer: TwoBatchOptimizer) -> dict[str, nn.Parameter]:
    """The model's trained parameters by name, which must be the optimizer's."""
    params = {name: p for name, p in root.named_parameters() if p.requires_grad}
    theirs = {p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    ours = set(params.values())
    if missing := [name for name, p in params.items() if p not in theirs]:
        raise ValueError(
            f"the optimizer's parameters must be all that the model trains, got none for {missing[0]} (freeze it, or "
            "add it)"
        )
    if others := len(theirs - ours):
        raise ValueError(
            f"the optimizer's parameters must be the model's, got {others} others: put the modules into one, such as a "
            "torch.nn.ModuleList, and pass that"
        )
    if not params:
        raise ValueError("the model must be one with a trained parameter, got none")
    return params


def _check_losses(losses: Tensor, outputs: list[Tensor]) -> None:
    """Each batch's losses must come from its own rows of the model's outputs."""
    rows = losses.shape[0] // 2
    for half in (0, 1):
        weights = torch.zeros_like(losses)
        weights[rows * half : rows * (half + 1)] = 1
        grads = torch.autograd.grad(losses, outputs, weights, retain_graph=True, allow_unused=True)
        for x, grad in zip(outputs, grads, strict=True):
            n = x.shape[0] // 2
            if grad is not None and bool((grad[n * (1 - half) : n * (2 - half)].nan_to_num() != 0).any()):
                raise RuntimeError(
                    "one batch's losses depend on the model's outputs for the other batch: each loss must be of "
                    "its own sample, or of its own batch"
                )


def _patch(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Have `forward(inner, args, kwargs)` run in place of a module's forward; returns what ends that.

    On the instance, so that it works with what others put there or onto the class: compilers, trainers, our own norms.
    A module that is compiled in place keeps its compiled call, which does not look at what is on top.
    """
    place = "forward" if module._compiled_call_impl is None else "_compiled_call_impl"
    missing = object()
    before = module.__dict__.get(place, missing)

    def inner(*args: Any, **kwargs: Any) -> Any:
        if before is missing:
            return type(module).forward(module, *args, **kwargs)
        return before(*args, **kwargs)

    def patched(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(inner, args, kwargs)

    module.__dict__[place] = types.MethodType(patched, module)

    def undo() -> None:
        if before is missing:
            module.__dict__.pop(place, None)
        else:
            module.__dict__[place] = before

    return undo
