"""The first batch's gradient, kept while the second batch's is made, and the checks that there are two."""

from __future__ import annotations

import functools
import itertools
import operator
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from svag_fast.ops.step_stats import StepStats
from svag_fast.optim.grad_watch import VERSION, GradWatch, is_plain, look, versions
from svag_fast.optim.in_backward import StepsInBackward
from svag_fast.optim.optimizer_methods import outside_compiler

GroupGrads = list[Tensor | None]
_Groups = list[dict[str, Any]]
_NONES = itertools.repeat(None)


class HeldGradient:
    """What a two-batch optimizer keeps between its calls.

    One object for the optimizer's life, changed in place: trainers wrap an optimizer by copying its ``__dict__``, and
    what the wrapper holds the optimizer must step with.
    """

    def __init__(self) -> None:
        self.stats: StepStats | None = None
        self.warned = False
        self.run: object = None
        """What ``pair_pass`` keeps about the model."""
        self.watch = GradWatch()
        self.clear()

    def clear(self) -> None:
        """Forget the gradient."""
        self.grads: list[GroupGrads] | None = None
        """Group by group, beside its params; None where nothing is held."""
        self.unscaled = False
        """Whether a GradScaler's scale was taken out of both gradients already."""
        self.paired = False
        """Whether one backward pass made both gradients, so that nothing is left to backpropagate."""
        self.stepped: StepsInBackward | None = None
        """The steps that layers took in the backward pass."""
        self.clipped = False
        self.by_closure = False
        """Whether ``step(closure)`` holds it itself."""
        self._params: list[list[Tensor]] = []
        # In one list, of each first gradient: whether it was as its backward pass left it where it was taken (None: not
        # known), and how often it had been changed in place then.
        self._first_kept: list[bool | None] = []
        self._first_versions: list[int] = []
        self._first_seen = self.watch.seen
        self.watch.noted = None
        # The parameters with a first gradient, and how often each had been changed in place where it was taken.
        self._moving: list[Tensor] = []
        self._moves: list[int] = []

    def take(self, groups: _Groups) -> None:
        """Take the groups' gradients out of ``.grad``, without a copy where nobody else can write to them.

        Raises:
            RuntimeError: there is none.
        """
        params = [list(group["params"]) for group in groups]
        listed = [p for of_group in params for p in of_group]
        reached = [p for p in listed if p.grad is not None]
        if not reached:
            raise RuntimeError("no parameter has a gradient to hold: call backward() on the first batch's loss first")
        kept = self.watch.kept(listed)
        self.clear()
        self.grads = []
        for of_group in params:
            self._add(of_group)
        self._first_kept = kept
        self._note_the_point()
        self.watch.follow(listed, reached)

    @outside_compiler
    def put(
        self,
        groups: _Groups,
        first: Mapping[Tensor, Tensor],
        stepped: StepsInBackward | None = None,
        task: int | None = None,
    ) -> None:
        """Keep the first batch's gradients that were made together with the second's, which are in ``.grad``.

        Args:
            groups: the optimizer's.
            first: a parameter's gradient, of its shape, in memory of its own.
            stepped: the other parameters' steps.
            task: the number of the backward pass that made both, of all in this process; None where it isn't known.
        """
        self.clear()
        self.paired = True
        self.stepped = stepped
        self.grads = [[first.get(p) for p in group["params"]] for group in groups]
        self._params = [list(group["params"]) for group in groups]
        self.watch.follow([p for params in self._params for p in params])
        self.watch.saw(task)  # it need not have reached the parameter whose hook tells of passes
        self._note_the_point()
        self.note_both()

    def take_group(self, params: list[Tensor]) -> None:
        """Take the gradients of a group that joins while the others' are held.

        Raises:
            RuntimeError: the second batch's backward pass has begun, so that theirs are sums over both batches.
        """
        begun = any(p.grad is not None for listed in self._params for p in listed)
        if begun and any(p.grad is not None for p in params):
            raise RuntimeError(
                "the new group's parameters have a gradient that may be the sum over both batches: add the group "
                "before the second batch's backward(), or call discard_gradient() first"
            )
        self._add(list(params))
        self._first_kept += [None] * len(params)
        self.watch.follow([p for listed in self._params for p in listed])

    def _add(self, params: list[Tensor]) -> None:
        assert self.grads is not None
        self._params.append(params)
        self.grads.append([_take(p) for p in params])
        self._first_versions += versions(self.grads[-1])
        for p in params:
            p.grad = None

    def _note_the_point(self) -> None:
        """Note how often each parameter with a first gradient was changed in place."""
        grads = itertools.chain(*(self.grads or ()))
        having = [*itertools.compress(itertools.chain(*self._params), map(operator.is_not, grads, _NONES))]
        try:
            self._moving, self._moves = having, [*map(VERSION, having)]
        except RuntimeError:  # one is of inference mode, and keeps no count
            self._moving = [p for p in having if not p.is_inference()]
            self._moves = [*map(VERSION, self._moving)]

    def note_both(self) -> None:
        """Take both gradients as they are for unchanged."""
        self._first_versions = versions([g for listed in self.grads or [] for g in listed])
        self._first_kept = [True] * len(self._first_versions)
        self._first_seen = self.watch.seen
        self.watch.note()

    def first(self) -> list[Tensor]:
        """Return what is held, in one list."""
        return [g for listed in self.grads or [] for g in listed if g is not None]

    def second(self, groups: _Groups, *, seen_by_scaler: bool) -> list[GroupGrads]:
        """Return the second batch's gradients, which are in ``.grad``.

        Args:
            groups: the optimizer's.
            seen_by_scaler: a GradScaler has gone over them alone.

        Raises:
            RuntimeError: there are none, the parameters are others, or they alone were changed after their backward.
        """
        same = len(groups) == len(self._params)
        for group, params in zip(groups, self._params, strict=same):
            same = same and len(group["params"]) == len(params) and all(map(operator.is_, group["params"], params))
        if not same:
            raise RuntimeError(
                "the parameters are others than when the gradient was held: call discard_gradient(), then both "
                "backward passes again"
            )
        second: list[GroupGrads] = []
        seen = False
        for params in self._params:
            second.append([p.grad for p in params])
            seen = seen or any(map(operator.is_not, second[-1], _NONES))
        if not seen and self.stepped is None:
            raise RuntimeError(
                "a gradient is held, but no parameter has one of the second batch: call backward() on the second "
                "batch's loss after hold_gradient() (a closure: at each of its calls)"
            )
        noted = self.watch.noted
        changed = noted is not None and look(second[0] if len(second) == 1 else [*itertools.chain(*second)]) != noted
        if changed or False in self._first_kept:
            self._refuse_one_changed(_changes_of_a_scaler() if seen_by_scaler else 0)
        moves = [*map(VERSION, self._moving)]
        if moves and all(map(operator.gt, moves, self._moves)):
            warnings.warn(
                "the parameters were changed in place after the first gradient was held. Unless they were put back, "
                "the two gradients are of different points, and the step, G and N are wrong",
                stacklevel=6,
            )
        return second

    def _refuse_one_changed(self, by_scaler: int) -> None:
        watch = self.watch
        params = [p for listed in self._params for p in listed]
        first, second = self._first_kept, watch.kept(params, by_scaler)
        if False in second:
            now = versions([g for listed in self.grads or [] for g in listed])
            first = [k and v == then for k, v, then in zip(first, now, self._first_versions, strict=True)]
        if (False in first) == (False in second):
            return
        alone, other, until = (first, second, watch.seen) if False in first else (second, first, None)
        changed = [p for p, a, b in zip(params, alone, other, strict=True) if a is False and b]
        if not changed:
            return
        # A pass that the watch hasn't seen leaves the watched parameter's gradient alone.
        since = self._first_seen if until else watch.seen
        if watch.unseen(since, until) and all(p is not watch.hooked for p in changed):
            return
        which, than, when = ("held", "second", "before") if until else ("second", "held", "after")
        raise RuntimeError(
            f"the {which} gradient, or a part of it, was changed or replaced after its backward pass and the {than} "
            f"one was not, as by clip_grad_norm_ {when} hold_gradient(). Clip both by "
            "optimizer.clip_grad_norm_(max_norm) before step(), under a GradScaler after optimizer.unscale_(scaler); "
            "or change each after its own backward pass, always: where it is to stay as it is, by a factor of 1"
        )

    def check_scaler(self, *, divides: bool) -> None:
        """Refuse a step under a GradScaler that would take its scale out of one gradient alone, or too late.

        Args:
            divides: whether the step itself will take the scale out.
        """
        if not divides and not self.unscaled:
            raise RuntimeError(
                "GradScaler.unscale_ has divided the current gradient alone: call optimizer.unscale_(scaler) in "
                "its place, or let GradScaler.step unscale both"
            )
        if self.clipped and not self.unscaled:
            raise RuntimeError(
                "clip_grad_norm_ has clipped gradients that a GradScaler's scale was in: call discard_gradient(), "
                "make both again, and call optimizer.unscale_(scaler) before clip_grad_norm_"
            )


@functools.cache
def _changes_of_a_scaler() -> int:
    """Return how many changes in place a GradScaler's pass over a gradient counts as, in this torch."""
    g, one = torch.ones(1, device="cpu", dtype=torch.float32), torch.ones((), device="cpu", dtype=torch.float32)
    version = g._version
    torch._amp_foreach_non_finite_check_and_unscale_([g], torch.zeros_like(one), one)
    return g._version - version


def _take(p: Tensor) -> Tensor | None:
    """Return the gradient to keep."""
    owned = _owned(p)
    g = p.grad
    return g if g is None or owned else g.detach().clone()


def _owned(p: Tensor) -> bool:
    """Whether a parameter's gradient fills memory of its own, to which nothing but ``p.grad`` refers.

    Views of a bucket (DistributedDataParallel), buffers that a trainer or a captured graph writes to again, and what a
    user's variable refers to are not.
    """
    g = p.grad
    if g is None or not is_plain(g):
        return False
    storage = g.untyped_storage()
    return _fills(g, storage) and _references(g, storage) == _references_alone()


def _fills(g: Tensor, storage: torch.UntypedStorage) -> bool:
    # Memory of another library can't be resized.
    return storage.nbytes() == g.nbytes and storage.resizable()


def _references(g: Tensor, storage: torch.UntypedStorage) -> tuple[int, ...]:
    """Count what refers to the memory, to the tensor and to the two Python objects."""
    uses = torch._C._storage_Use_Count(storage._cdata), g._use_count()  # type: ignore[attr-defined]
    return *uses, sys.getrefcount(g), sys.getrefcount(storage)


@functools.cache
def _references_alone() -> tuple[int, ...]:
    """Return the counts of a gradient to which nothing but ``p.grad`` refers: they differ between versions of torch."""
    p = nn.Parameter(torch.empty(1, device="cpu", dtype=torch.float32))
    p.grad = torch.empty(1, device="cpu", dtype=torch.float32)
    g = p.grad
    storage = g.untyped_storage()
    return _references(g, storage)
