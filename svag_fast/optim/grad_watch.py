"""Whether gradients still are what backward passes left: how a change of one batch's gradient alone is told."""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

_GRAD, VERSION = operator.attrgetter("grad"), operator.attrgetter("_version")
_OF: tuple[Callable[[Tensor], int], ...] = (id, Tensor.data_ptr, VERSION)


class Look(NamedTuple):
    """Gradients, each 0 where that can't be told of it. Lists of numbers, which cost next to nothing to compare."""

    ids: list[int]
    addresses: list[int]
    versions: list[int]


class Seen(NamedTuple):
    """The backward passes up to some time."""

    passes: int
    """How many were watched."""
    task: int
    """The last watched one's number among all of this process."""


class GradWatch:
    """Notes which tensor each parameter's gradient is, its address and how often it was changed in place, at the end
    of each backward pass.

    Writing in place is counted by the gradient's version: changes through ``.grad.data``, NumPy or another library's
    kernels are not.

    One parameter's hook tells of the passes, since one for each would take a tenth of a small net's backward pass. So
    passes that don't reach that parameter go unseen; :meth:`unseen` knows whether there were any.
    """

    def __init__(self) -> None:
        self.seen = Seen(0, -1)
        self._params: list[Tensor] = []
        self.noted: Look | None = None
        """The gradients as the last pass left them; None where nothing is known."""
        self._hooked: weakref.ref[Tensor] | None = None
        self._unhook: Callable[[], object] = int

    @property
    def hooked(self) -> Tensor | None:
        """The parameter whose hook tells of backward passes."""
        return None if self._hooked is None else self._hooked()

    def follow(self, params: Sequence[Tensor], reached: Sequence[Tensor] = ()) -> None:
        """Note these parameters' gradients from now on.

        Args:
            params: all of them.
            reached: those that the last backward pass has reached, as far as it is known.
        """
        if not _same(self._params, params):
            self._params, self.noted = list(params), None
        hooked, among = self.hooked, reached or params
        if hooked is not None and hooked.requires_grad and id(hooked) in map(id, among):
            return
        wanted = [p for p in among if p.requires_grad and not is_lazy(p)]
        if not wanted:
            return
        self._unhook()
        self._hooked = weakref.ref(wanted[0])
        handle = wanted[0].register_hook(_Hook(self))  # type: ignore[no-untyped-call]
        self._unhook = end = weakref.finalize(self, handle.remove)
        end.atexit = False

    def saw(self, task: int | None) -> None:
        """Take all backward passes up to this number (None: up to now) for seen."""
        self.seen = Seen(self.seen.passes, _last_task() if task is None else task)

    def note(self) -> None:
        """Note the gradients as they are."""
        self.noted = look([*map(_GRAD, self._params)])

    def kept(self, params: Sequence[Tensor], changes: int = 0) -> list[bool | None]:
        """Whether each parameter's gradient is as it was noted, but for so many changes in place; None: not known.

        Args:
            params: those that are followed; of others nothing is known.
            changes: how many.
        """
        noted = self.noted
        if noted is None or not _same(self._params, params):
            return [None] * len(params)
        now = look([*map(_GRAD, params)])
        if now == noted:
            return [True if i else None for i in now.ids]
        return [
            (i, a) == (then_i, then_a) and v <= then_v + changes if i and then_i else None
            for i, a, v, then_i, then_a, then_v in zip(*now, *noted, strict=True)
        ]

    def unseen(self, since: Seen, until: Seen | None = None) -> bool:
        """Whether there may have been backward passes between two times (or now) of which the hook has not told.

        Such a pass changes gradients in place, as clipping does.
        """
        last = _last_task() - 1 if until is None else until.task
        passes = self.seen.passes if until is None else until.passes
        return last - since.task != passes - since.passes

    def _begin(self, hooked: Tensor) -> None:
        """Wait for the end of the pass that runs; one that fails leaves no notes."""
        self.seen = Seen(self.seen.passes + 1, torch._C._current_graph_task_id())
        end = functools.partial(self._end, hooked, self.noted, _mark(hooked))
        self.noted = None
        queue = torch.autograd.Variable._execution_engine.queue_callback
        queue(functools.partial(queue, end))  # behind what others put at the end of the pass

    def _end(self, hooked: Tensor, before: Look | None, mark: tuple[int, int] | None) -> None:
        if _mark(hooked) == mark:  # autograd.grad, which leaves .grad alone
            self.noted = before
        else:
            self.note()


class _Hook:
    __torch_unserializable__ = True  # a parameter may go to another process, without it

    def __init__(self, watch: GradWatch) -> None:
        self._watch = weakref.ref(watch)

    def __call__(self, _: Tensor) -> None:
        watch = self._watch()
        hooked = None if watch is None else watch.hooked
        if watch is not None and hooked is not None:
            watch._begin(hooked)


def hooks_on(p: Tensor) -> int:
    """Return how many hooks look at, or change, a gradient on its way to ``.grad``: those of watches don't."""
    hooks = p._backward_hooks
    return 0 if hooks is None else len(hooks) - [*map(type, hooks.values())].count(_Hook)


def _mark(p: Tensor) -> tuple[int, int] | None:
    g = p.grad
    return None if g is None or g.is_inference() else (id(g), g._version)


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


def look(grads: Sequence[Any]) -> Look:
    """Return what a :class:`GradWatch` notes of these gradients."""
    # No references are kept: a gradient that something refers to could not be held without a copy.
    if {*map(type, grads)} == {Tensor}:
        try:
            return Look([*map(id, grads)], [*map(Tensor.data_ptr, grads)], [*map(VERSION, grads)])
        except RuntimeError:  # a sparse one has no address, one of inference mode no count
            pass
    plain = [g is not None and is_plain(g) for g in grads]
    known = [[of(g) if of_it else 0 for g, of_it in zip(grads, plain, strict=True)] for of in _OF]
    return Look(*known)


def versions(grads: Sequence[Tensor | None]) -> list[int]:
    """Return how often each gradient was changed in place; 0 where it isn't counted."""
    try:
        return [*map(VERSION, grads)]
    except (AttributeError, RuntimeError):  # one is None, or of inference mode
        return [0 if g is None or g.is_inference() else g._version for g in grads]


def is_plain(g: Tensor) -> bool:
    """Whether a tensor has an address and a count of its changes in place."""
    return type(g) is Tensor and g.layout is torch.strided and not g.is_inference()


def _last_task() -> int:
    """Return the number of the last backward pass of this process, which is one that it makes."""
    tasks: list[int] = []
    with torch.inference_mode(False), torch.enable_grad():
        one = torch.ones((), device="cpu", dtype=torch.float32, requires_grad=True)
        one.register_hook(lambda _: tasks.append(torch._C._current_graph_task_id()))  # type: ignore[no-untyped-call]
        torch.autograd.grad(one * 1, one)
    return tasks[0]
