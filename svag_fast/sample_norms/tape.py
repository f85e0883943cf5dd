"""What happens between a forward and a backward pass that measures per-sample norms: who used which parameter, and how.

A `Use` is made in the forward pass for each use of a parameter; the backward pass delivers that use's squared norms. A
parameter with several uses (weight sharing, tied parameters) has cross terms, |Σ_u g_iu|² = Σ_u,v ⟨g_iu, g_iv⟩: its
uses keep what is needed to form the per-sample gradients again, a few samples at a time, at the end of the pass.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from svag_fast.ops.memory import has_memory
from svag_fast.optim.grad_watch import hooks_on

# Forms the per-sample gradients [b, *shape] of the samples in a slice.
SampleGrads: TypeAlias = Callable[[slice], Tensor]
# Rows of a parameter's first dimension; None means all. Different parts of one parameter must not overlap.
Part: TypeAlias = tuple[int, int] | None

# Elements of the per-sample gradients that are held at a time where they have to be formed: 16 MiB in float32.
_CHUNK_ELEMENTS = 1 << 22
# The backward pass that the caller runs in; NO_TASK outside of one. Asked for often, so without a function around it.
current_task: Callable[[], int] = torch._C._current_graph_task_id
NO_TASK = -1
_NOTHING = nullcontext()
_SUMMED = (torch.float32, torch.float64, torch.complex64, torch.complex128)


class Use:
    """One use of a parameter, or of some rows of it, in a forward pass."""

    __slots__ = ("__weakref__", "key", "made_in", "recorder", "shared")

    def __init__(self, recorder: Recorder, name: str, part: Part = None) -> None:
        self.recorder = recorder
        self.key = key = name, part
        self.shared = False
        self.made_in = current_task()
        if self.made_in == NO_TASK:
            waiting = recorder.pending.get(key)
            if waiting is None:
                recorder.pending[key] = [weakref.ref(self)]
            else:
                if waiting and waiting[-1]() is None:  # graphs that never had a backward pass
                    waiting[:] = [use for use in waiting if use() is not None]
                waiting.append(weakref.ref(self))

    def deliver(self, sq_norms: Tensor, sample_grads: SampleGrads, due: Tensor | None = None) -> None:
        """Hand over this use's |g_iu|² [B], in the backward pass, and how to form the g_iu themselves.

        `due` is the gradient on its way to the parameter from here, if no `Recorder.expect` notes it.
        """
        recorder, key = self.recorder, self.key
        if recorder.paused:
            return
        waiting = recorder.pending.get(key)
        if waiting:  # not for this use any more
            if len(waiting) == 1 and waiting[0]() is self:
                waiting.clear()
            else:
                waiting[:] = [use for use in waiting if use() is not None and use() is not self]
        current = recorder.open_pass
        if current is None or current.task != current_task():
            current = recorder.open()
            if current is None:
                return
        B = sq_norms.shape[0]
        if current.batch_size is None:
            current.batch_size = B
        if self.made_in != NO_TASK or current.batch_size != B:
            recorder.refuse(current, self, B)
            return
        uses = current.delivered.get(key)
        # What forms the gradients again holds the layer's activations: kept only where another use has cross terms.
        if uses is None:
            current.delivered[key] = [(self, sq_norms, sample_grads if self.shared or waiting else None)]
        else:
            uses.append((self, sq_norms, sample_grads))
        if due is not None:
            if key[0] in current.due:
                current.expect(key[0], due)
            else:
                current.due[key[0]] = due, True


class _Pass:
    """One backward pass: what each use delivered, and the gradient that each parameter is due."""

    def __init__(self, task: int) -> None:
        self.task = task
        self.batch_size: int | None = None
        self.delivered: dict[tuple[str, Part], list[tuple[Use, Tensor, SampleGrads | None]]] = {}
        self.due: dict[str, tuple[Tensor, bool]] = {}  # the sum so far, and whether it is of one tensor only
        self.arrived: set[str] = set()

    def expect(self, name: str, grad: Tensor) -> None:
        """See `Recorder.expect`."""
        if name in self.due:
            self.due[name] = self.due[name][0] + grad, False
        else:
            self.due[name] = grad, True


class Rows(NamedTuple):
    """What one backward pass gave: |g_i|² [B] as they came by first name, and the first name of every name then."""

    batch_size: int
    sq_norms: dict[str, Tensor]
    aliases: dict[str, str]


class Recorder:
    """Gathers the norms of every backward pass.

    `aliases` maps every name of a tracked parameter to its first name in the model; `untracked` names a parameter that
    may have got a gradient without being tracked, if there is one.
    """

    def __init__(self) -> None:
        self.closed = False
        self.paused = False  # while a check runs backward through the graph
        self.aliases: dict[str, str] = {}
        self.passes: list[Rows] = []
        # Uses before their backward pass, which are to be waited for while their graphs are alive.
        self.pending: dict[tuple[str, Part], list[weakref.ref[Use]]] = {}
        self.untracked: Callable[[], str | None] = lambda: None
        self.unknown_rows: str | None = None  # why nobody knows whether rows are samples; until a forward pass can tell
        self._numels: dict[str, int] = {}
        self._hooked: dict[int, tuple[nn.Parameter, str, torch.utils.hooks.RemovableHandle]] = {}
        self._problem: str | None = None
        self._doubts: list[tuple[str, Tensor]] = []  # a problem, and how far it goes: 0 where there is none
        self.open_pass: _Pass | None = None  # the last backward pass that was open

    def track(self, names: list[tuple[weakref.ref[nn.Parameter], str]], aliases: dict[str, str]) -> None:
        """Hook these parameters too; ahead of the user's own hooks, which may change the gradient."""
        if aliases != self.aliases:
            self.aliases = self.aliases | aliases
        for reference, name in names:
            parameter = reference()
            assert parameter is not None
            self._numels[name] = parameter.numel()
            known = self._hooked.get(id(parameter))
            if known is not None and known[1] == name:
                continue
            if known is not None:
                known[2].remove()
            handle = parameter.register_hook(functools.partial(self._arrive, name, parameter))  # type: ignore[no-untyped-call]
            hooks: Any = parameter._backward_hooks
            if len(hooks) > 1:
                theirs = [(key, hooks.pop(key)) for key in list(hooks) if key != handle.id]
                hooks.update(theirs)
            self._hooked[id(parameter)] = parameter, name, handle

    def tracks(self, parameter: nn.Parameter) -> bool:
        """Whether the gradient of a parameter is watched."""
        return id(parameter) in self._hooked

    def close(self) -> None:
        """Take nothing more, and the hooks off."""
        self.closed = True
        self.open_pass = None
        for _, _, handle in self._hooked.values():
            handle.remove()
        self._hooked = {}

    def running_batch_size(self) -> int | None:
        """How many samples the running backward pass has, once a layer has told."""
        current = self.open_pass
        return None if current is None or current.task != current_task() else current.batch_size

    def refuse(self, current: _Pass, use: Use, batch_size: int) -> None:
        """Say why a use may not deliver so many rows in this pass."""
        if use.made_in != NO_TASK:
            self.fail(
                f"{use.key[0]} was used inside a backward pass: checkpoint with use_reentrant=False, whose recomputed "
                "layers belong to the pass that asks for them"
            )
        else:
            self.fail(
                f"the first dimension must be the samples in every layer, but {use.key[0]} saw {batch_size} rows where "
                f"other layers saw {current.batch_size}"
            )

    def expect(self, name: str, grad: Tensor) -> None:
        """Note a gradient that is on its way to a parameter, to be compared with the one that arrives."""
        current = self.open()
        if current is not None:
            current.expect(name, grad)

    def check(self) -> None:
        """Raise what made the norms unknown, if anything did."""
        if self._doubts:
            for problem, error in self._doubts:
                if bool(error > 0):
                    self.fail(problem)
            self._doubts = []
        if self._problem is not None:
            raise RuntimeError(self._problem)

    def reset(self) -> None:
        """Forget every pass so far."""
        self.passes = []
        self._doubts = []
        self._problem = None
        self.open_pass = None

    def open(self) -> _Pass | None:
        """The backward pass that is running; None once the context is left."""
        if self.closed or self.paused:
            return None
        task = current_task()
        if self.open_pass is None or self.open_pass.task != task:
            self.open_pass = current = _Pass(task)  # a pass that an exception cut short is dropped
            torch.autograd.Variable._execution_engine.queue_callback(functools.partial(self._finish, current))
        return self.open_pass

    def _arrive(self, name: str, parameter: nn.Parameter, grad: Tensor) -> None:
        current = self.open_pass
        if self.paused or current is None or current.task != current_task():
            current = self.open()
            if current is None:
                return
        if len(parameter._backward_hooks or ()) > 1 and hooks_on(parameter) > 1:  # the user's come behind this
            self._look_behind_hooks(name, parameter, grad)
        current.arrived.add(name)
        due = current.due.pop(name, None)
        if due is None:
            self.fail(_foreign(name))
            return
        # A parameter that is used where nobody looks is found out: more arrives than its uses have delivered.
        ours, single = due
        if (single and grad is ours) or not has_memory(grad) or (single and grad.data_ptr() == ours.data_ptr()):
            return
        # Sums of the same terms in another order: equal to rounding. Read back only when the norms are.
        rounding = 64 * torch.finfo(grad.dtype).eps
        if grad.numel():
            self._doubts.append((_foreign(name), (grad - ours).abs().max() - rounding * ours.abs().max()))

    def _look_behind_hooks(self, name: str, parameter: nn.Parameter, before: Tensor) -> None:
        """Find out whether the parameter's other hooks change the gradient: its norms are those before."""
        version = before._version

        def look(grads: tuple[Tensor, ...]) -> None:
            handle.remove()
            problem = (
                f"a hook on {name} changed its gradient on the way to .grad, where the per-sample norms are of the "
                "gradient before: take the hook off, or leave the parameter out with parameters=..."
            )
            if before._version != version:
                self.fail(problem)
            elif grads[0] is not before and grads[0].numel() and has_memory(grads[0]):
                self._doubts.append((problem, (grads[0] - before).abs().max()))

        with torch.enable_grad():
            handle = get_gradient_edge(parameter).node.register_prehook(look)

    def _finish(self, current: _Pass) -> None:
        """At the end of a backward pass: cross terms of the shared parameters, then keep the norms."""
        if self.open_pass is current:
            self.open_pass = None
        if self.unknown_rows is not None:
            self.fail(self.unknown_rows)
        if self.closed or self._problem is not None:
            return
        missing = self.untracked()
        if missing is not None:
            self.fail(
                f"{missing} was added, replaced or unfrozen after the forward pass had begun, or where the model's own "
                "forward was not called: its per-sample norms are not known"
            )
            return
        unheard = current.arrived - {name for name, _ in current.delivered}
        if unheard:
            self.fail(
                f"the gradient of {min(unheard)} arrived, but that of its layer's output was not seen on the way (was "
                "the output changed in place?): its per-sample norms are not known"
            )
            return
        if current.batch_size is None:
            return
        norms: dict[str, Tensor] = {}
        with torch.no_grad() if torch.is_grad_enabled() else _NOTHING:
            for (name, _), uses in current.delivered.items():
                if name in current.arrived:  # else autograd.grad was not asked for it
                    sq_norms = uses[0][1] if len(uses) == 1 else self._shared(name, uses)
                    norms[name] = norms[name] + sq_norms if name in norms else sq_norms
        if norms:
            self.passes.append(Rows(current.batch_size, norms, self.aliases))

    def _shared(self, name: str, uses: list[tuple[Use, Tensor, SampleGrads | None]]) -> Tensor:
        kept = []
        for use, _, sample_grads in uses:
            use.shared = True
            if sample_grads is None:
                self.fail(f"{name} was used again after its backward had begun: its cross terms are lost")
                return uses[0][1]
            kept.append(sample_grads)
        # An upper bound, where the use is of a part.
        chunks = sample_chunks(uses[0][1].shape[0], self._numels[name])
        return torch.cat([row_sq_norms(sum_of(f(rows) for f in kept)) for rows in chunks])

    def watch_second(self, grad: Tensor, label: str) -> Tensor:
        """The gradient, such that a second derivative through it makes the norms unknown."""
        leaf = torch.zeros((), dtype=torch.float32, device="cpu", requires_grad=True)
        out: Tensor = _Second.apply(grad, leaf, self, label)  # type: ignore[no-untyped-call]
        return out

    def fail_for_good(self, problem: str) -> None:
        """As `fail`, where other reasons found are but consequences."""
        self._problem = problem

    def fail(self, problem: str) -> None:
        """Make the norms unknown, for the first reason given."""
        if self._problem is None:
            self._problem = problem


class _Second(torch.autograd.Function):
    """The identity, which notes that somebody differentiates a gradient. `anchor`: so that it always has a graph."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, anchor: Tensor, recorder: Recorder, label: str) -> Tensor:
        ctx.recorder, ctx.label = recorder, label
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.recorder.fail_for_good(
            f"second derivatives went through {ctx.label} (a gradient penalty, a Hessian-vector product): per-sample "
            "norms of these are not known; .grad is right. Take them outside of the context"
        )
        return grad, None, None, None


def hook(tensor: Tensor, function: Callable[[Tensor], Tensor | None]) -> torch.utils.hooks.RemovableHandle:
    """Have the gradient of a tensor shown to a function."""
    handle: torch.utils.hooks.RemovableHandle = tensor.register_hook(function)  # type: ignore[no-untyped-call]
    return handle


def sum_of(tensors: Iterable[Tensor]) -> Tensor:
    """The sum of at least one tensor."""
    first, *rest = tensors
    for tensor in rest:
        first = first + tensor
    return first


def sample_chunks(batch_size: int, numel: int) -> list[slice]:
    """Slices of samples whose gradients, of `numel` elements each, fit into the memory allowed; at least one slice."""
    step = max(1, _CHUNK_ELEMENTS // max(1, numel))
    return [slice(k, min(k + step, batch_size)) for k in range(0, max(1, batch_size), step)]


def row_sq_norms(rows: Tensor) -> Tensor:
    """|row_i|² [B] as float64 of [B, ...], each row's squares added in at least float32, without a copy of the rows."""
    rows = rows.flatten(1) if rows.dim() > 1 else rows[:, None]
    if rows.dtype not in _SUMMED:
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms.double().square()


def in_backward() -> bool:
    """Whether a backward pass is running, in which a checkpoint may run layers once more."""
    return current_task() != NO_TASK


def _foreign(name: str) -> str:
    return (
        f"{name} got a gradient from outside its own module's forward, so its per-sample norms can't be told: call the "
        "module instead of using its parameter, or leave the parameter out with parameters=... (code compiled before "
        "the context may also go past the module)"
    )
