"""The first batch's gradient, kept while the second batch's is made, and the checks that there are two."""

from __future__ import annotations

import functools
import itertools
import operator
import sys
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from svag_fast.ops.step_stats import StepStats

GroupGrads = list[Tensor | None]
_Groups = list[dict[str, Any]]


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
        self.clear()

    def clear(self) -> None:
        """Forget the gradient."""
        self.grads: list[GroupGrads] | None = None
        """Group by group, beside its params; None where nothing is held."""
        self.unscaled = False
        """Whether a GradScaler's scale was taken out of both gradients already."""
        self.paired = False
        """Whether one backward pass made both gradients, so that nothing is left to backpropagate."""
        self.clipped = False
        self.by_closure = False
        """Whether ``step(closure)`` holds it itself."""
        self._params: list[list[Tensor]] = []
        # How much more often each second gradient was changed in place than its first by what made them; None where
        # the first's count says nothing.
        self._more: list[list[int | None]] = []
        # The second gradients where their backward pass ended, each with how often it had been changed in place.
        self._made: list[list[tuple[Tensor, int] | None]] = []
        # The parameters with a first gradient, and how often each had been changed in place where it was taken.
        self._moving: list[Tensor] = []
        self._moves: list[int] = []
        handle: torch.utils.hooks.RemovableHandle | None = self.__dict__.pop("_watching", None)
        if handle is not None:
            handle.remove()

    def take(self, groups: _Groups) -> None:
        """Take the groups' gradients out of ``.grad``, without a copy where nobody else can write to them.

        Raises:
            RuntimeError: there is none.
        """
        taken = [[_take(p) for p in group["params"]] for group in groups]
        if all(g is None for pairs in taken for g, _ in pairs):
            raise RuntimeError("no parameter has a gradient to hold: call backward() on the first batch's loss first")
        self.clear()
        self.grads = []
        for group, pairs in zip(groups, taken, strict=True):
            self._add(group["params"], pairs)
        self._note_the_point()
        watched = next((p for p in self._moving if p.requires_grad), None)
        if watched is not None:
            self._watching = watched.register_hook(_AtTheEnd(self))  # type: ignore[no-untyped-call]

    def put(self, groups: _Groups, first: Mapping[Tensor, Tensor]) -> None:
        """Keep the first batch's gradients that were made together with the second's, which are in ``.grad``.

        Args:
            groups: the optimizer's.
            first: a parameter's gradient, of its shape, in memory of its own.
        """
        self.clear()
        self.paired = True
        self.grads = [[first.get(p) for p in group["params"]] for group in groups]
        self._params = [list(group["params"]) for group in groups]
        self._more = [
            [None if g is None or p.grad is None else p.grad._version - g._version for p, g in zip(*pair, strict=True)]
            for pair in zip(self._params, self.grads, strict=True)
        ]
        self._note_the_point()
        self.second_is_made()

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
        self._add(params, [_take(p) for p in params])

    def _add(self, params: list[Tensor], pairs: list[tuple[Tensor | None, int | None]]) -> None:
        assert self.grads is not None
        self._params.append(list(params))
        self.grads.append([g for g, _ in pairs])
        self._more.append([more for _, more in pairs])
        for p in params:
            p.grad = None

    def _note_the_point(self) -> None:
        """Note how often each parameter with a first gradient was changed in place."""
        pairs = zip(self._params, self.grads or [], strict=True)
        having = [p for params, grads in pairs for p, g in zip(params, grads, strict=True) if g is not None]
        self._moving = [p for p in having if not p.is_inference()]  # which keeps no count
        self._moves = [p._version for p in self._moving]

    def second_is_made(self) -> None:
        """Note how often each second gradient was changed in place, at the end of a backward pass."""
        self._made = [
            [None if (g := p.grad) is None or g.is_inference() else (g, g._version) for p in params]
            for params in self._params
        ]

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
            seen = seen or any(map(operator.is_not, second[-1], itertools.repeat(None)))
        if not seen:
            raise RuntimeError(
                "a gradient is held, but no parameter has one of the second batch: call backward() on the second "
                "batch's loss after hold_gradient() (a closure: at each of its calls)"
            )
        by_scaler = _changes_of_a_scaler() if seen_by_scaler else 0
        changed = [
            (g1, None if more is None else then[1] - more)
            for mores, made, listed1, listed2 in zip(self._more, self._made, self.grads or [], second, strict=False)
            for more, then, g1, g2 in zip(mores, made, listed1, listed2, strict=True)
            if then is not None and g1 is not None and g2 is then[0] and g2._version > then[1] + by_scaler
        ]
        if changed and _alone(changed, second):
            raise RuntimeError(
                "the second gradient, or a part of it, was changed in place after its backward pass and the held one "
                "was not, as by clip_grad_norm_ after hold_gradient(). Clip both by "
                "optimizer.clip_grad_norm_(max_norm) before step(), under a GradScaler after "
                "optimizer.unscale_(scaler); or change each after its own backward "
                "pass. (Gradients accumulated over several backward passes: as many for the one as for the other.)"
            )
        moves = [p._version for p in self._moving]
        if moves and all(map(operator.gt, moves, self._moves)):
            warnings.warn(
                "the parameters were changed in place after the first gradient was held. Unless they were put back, "
                "the two gradients are of different points, and the step, G and N are wrong",
                stacklevel=6,
            )
        return second

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


class _AtTheEnd:
    """A hook that notes the second gradients at the end of each backward pass that it is called in."""

    def __init__(self, pair: HeldGradient) -> None:
        self._pair = weakref.ref(pair)

    def __call__(self, _: Tensor) -> None:
        pair = self._pair()
        if pair is not None:
            _after_the_pass(functools.partial(_after_the_pass, pair.second_is_made))  # and what others put behind it


def _after_the_pass(function: Callable[[], None]) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(function)


def _alone(changed: list[tuple[Tensor, int | None]], second: list[GroupGrads]) -> bool:
    """Whether of these first gradients, whose second was changed, none was, each with the count that says so.

    None says nothing. A higher count: changed too, or accumulated over more backward passes.
    """
    if any(count is None or g1._version > count for g1, count in changed):
        return False
    # Views of one buffer count each other's changes.
    return not any(_shares_memory(g) for listed in second for g in listed if g is not None)


@functools.cache
def _changes_of_a_scaler() -> int:
    """Return how many changes in place a GradScaler's pass over a gradient counts as, in this torch."""
    g, one = torch.ones(1, device="cpu", dtype=torch.float32), torch.ones((), device="cpu", dtype=torch.float32)
    version = g._version
    torch._amp_foreach_non_finite_check_and_unscale_([g], torch.zeros_like(one), one)
    return g._version - version


def _take(p: Tensor) -> tuple[Tensor | None, int | None]:
    """Return the gradient to keep, and 0, or None where its count of changes in place can't be compared."""
    owned = _owned(p)
    g = p.grad
    if g is None:
        return None, None
    return (g, 0) if owned else (g.detach().clone(), None)


def _owned(p: Tensor) -> bool:
    """Whether a parameter's gradient fills memory of its own, to which nothing but ``p.grad`` refers.

    Views of a bucket (DistributedDataParallel), buffers that a trainer or a captured graph writes to again, and what a
    user's variable refers to are not.
    """
    g = p.grad
    if g is None or not _is_plain(g):
        return False
    storage = g.untyped_storage()
    return _fills(g, storage) and _references(g, storage) == _references_alone()


def _shares_memory(g: Tensor) -> bool:
    """Whether other tensors may be in the gradient's memory."""
    if not _is_plain(g):
        return True
    storage = g.untyped_storage()
    return not _fills(g, storage) or _references(g, storage)[0] != _references_alone()[0]


def _is_plain(g: Tensor) -> bool:
    return type(g) is Tensor and g.layout is torch.strided and not g.is_inference()


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
