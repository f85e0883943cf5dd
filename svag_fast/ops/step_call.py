"""A step over lists of tensors on its way from the caller to a kernel: one :class:`StepCall`, checked once.

C++ reads and checks plain tensors itself (csrc/tensor_reader.h): Python takes some 0.1 ms for 34 of them, more than a
small net's kernel, DLPack's exchange functions 0.02. What C++ leaves, Python copies, or refuses by name.
"""

from __future__ import annotations

import functools
import itertools
import operator
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from svag_fast.ops.backends import BACKENDS, CHOICE, VARIABLE, select, settled
from svag_fast.ops.checks import check_like, check_params, check_strides, laid_out_like, tensors
from svag_fast.ops.library import is_watched, register_op
from svag_fast.ops.memory import Spans, addresses, check_apart, has_memory, mark_written, spans
from svag_fast.ops.step_stats import FINITE, ROUNDING, StepStats, nothing_stepped, raw_statistics, rounding

if TYPE_CHECKING:
    from svag_fast import _C

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_ITEMSIZES = [dtype.itemsize for dtype in DTYPE_CODES]


@functools.cache
def tensor_reader() -> _C.TensorReader | None:
    """What reads tensors from C++; None where this PyTorch offers no way to, or another than is known here."""
    exchange_api = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if exchange_api is None or BACKENDS["cpu"].why_unavailable() is not None:
        return None
    from svag_fast import _C

    return _C.TensorReader.of(exchange_api, [Tensor, torch.nn.Parameter], Tensor.is_neg, Tensor.storage_offset)


class StepLists(NamedTuple):
    """The tensors of a step: lists as long as the params', or None."""

    params: list[Tensor]
    grads1: list[Tensor]
    grads2: list[Tensor] | None
    kept1: list[Tensor] | None = None
    """What the optimizer keeps for each param and the step writes; :attr:`StepKind.kept` names it."""
    kept2: list[Tensor] | None = None


@dataclass(frozen=True)
class StepKind:
    """Which step it is: what its lists are called, and the dtypes that fit (:func:`check_like`)."""

    op: str
    code: int
    """C++'s StepKind."""
    kept: tuple[str, str]
    kept_dtypes: tuple[str, str]
    grad_dtypes: str
    check_extra: Callable[[StepLists, Any], None]
    """Refuses what is given beside lists and options."""
    dispatch: Callable[[StepLists, Any, Any, str, bool], Tensor]
    """Takes the step by PyTorch's dispatcher, given lists, options, what is beside them, backend, skip_nonfinite."""
    raw_shape: Callable[[Any], tuple[int, ...]] = lambda options: (5,)
    """The shape of its ``StepStats.raw``, given its options."""

    def register(self, schema: str, unpacked: Callable[..., tuple[StepLists, Any, Any, str, bool]]) -> Any:
        """Return the op of this step; ``unpacked`` turns its arguments into those of :attr:`dispatch`."""

        def run(*arguments: Any) -> Tensor:
            lists, options, extra, backend, skip_nonfinite = unpacked(*arguments)
            return StepCall.by_checks(self, lists, options, extra=extra, backend=backend)(skip_nonfinite)

        def fake(*arguments: Any) -> Tensor:
            lists, options, extra, _, _ = unpacked(*arguments)
            self.check(lists, options, extra)
            return lists.params[0].new_empty(self.raw_shape(options), dtype=torch.float64)

        return register_op(schema, run, fake)

    def named(self, lists: StepLists) -> StepLists:
        """Refuse what is no list of tensors with values of their own; to be called before the dispatcher."""
        params, grads1, grads2, kept1, kept2 = lists
        return StepLists(
            tensors("params", params, written=True),
            tensors("grads1", grads1),
            None if grads2 is None else tensors("grads2", grads2),
            None if kept1 is None else tensors(self.kept[0], kept1, written=True),
            None if kept2 is None else tensors(self.kept[1], kept2, written=True),
        )

    def check(self, lists: StepLists, options: Any, extra: Any) -> None:
        """Refuse lists that don't fit together, and options that the params' arithmetic can't hold."""
        params, grads1, grads2, kept1, kept2 = lists
        check_params(params)
        options.check_held(params)
        check_like("grads1", grads1, params, self.grad_dtypes)
        if grads2 is not None:
            check_like("grads2", grads2, params, self.grad_dtypes)
            for i, (g1, g2) in enumerate(zip(grads1, grads2, strict=True)):
                if g1.dtype != g2.dtype:
                    raise TypeError(f"grads2[{i}] must be {g1.dtype}, as grads1[{i}] is, got {g2.dtype}")
        for name, kept, dtypes in zip(self.kept, (kept1, kept2), self.kept_dtypes, strict=True):
            if kept is not None:
                check_like(name, kept, params, dtypes)
                check_strides(name, kept, params)
        if extra is not None:
            self.check_extra(lists, extra)
        check_apart(*self.spans(lists))

    def spans(self, lists: StepLists, of: str = "") -> Spans:
        """Return where the written tensors and each batch's gradients are; ``of`` ends their names."""
        params, grads1, grads2, kept1, kept2 = lists
        kept = [*spans(kept1 or [], self.kept[0], of), *spans(kept2 or [], self.kept[1], of)]
        written = [*spans(params, "params", of), *kept]
        return written, spans(grads1, "grads1", of), spans(grads2 or [], "grads2", of)


class Scaler(NamedTuple):
    """What a GradScaler hands a step: float32 tensors of one element on the params' device, which no host reads."""

    found_inf: Tensor
    """Where it isn't 0 the step is skipped; the statistics say "not finite" then."""
    scale: Tensor | None = None
    """What the step has to divide the gradients by, where :func:`read_the_scale` says that it can."""

    def to(self, device: torch.device) -> Scaler:
        """Return it on a device."""
        return Scaler(*(None if t is None else t.to(device, torch.float32, non_blocking=True) for t in self))  # type: ignore[arg-type]

    def note_in(self, raw: Tensor) -> Tensor:
        """Write into the raw statistics that the step was skipped, if it was; return them."""
        raw[FINITE] *= (self.found_inf == 0).view(())
        return raw


class StepCall(NamedTuple):
    """A step on tensors and options that have been checked; what is called takes it. Read-only."""

    kind: StepKind
    lists: StepLists
    options: Any
    """``StepOptions`` or ``AdaptiveOptions``."""
    extra: Any
    """What a kind of step has beside them: ``coefficients`` or ``steps``."""
    backend: Callable[[StepCall, bool], Tensor]
    rounding: float
    """As in ``StepStats``."""
    read: _C.StepTensors | None = None
    """The tensors as C++ has read them, if it has."""
    scaler: Scaler | None = None

    @classmethod
    def by_reader(
        cls, kind: StepKind, lists: StepLists, options: Any, *, extra: Any = None, backend: str
    ) -> StepCall | None:
        """Return the step where C++ reads and checks its tensors, else None."""
        reader = tensor_reader()
        if reader is None or (read := reader.read(kind.code, *lists)) is None:
            return None
        if not fits_float32(options):
            options.check_held(lists.params)
        if extra is not None:
            kind.check_extra(lists, extra)
        asked = lists.params[0].device, CHOICE.get(), os.environ.get(VARIABLE), *BACKENDS.values()
        step = settled(kind.op, backend, *asked) or select(kind.op, backend, lists.params)
        return cls(kind, lists, options, extra, step, ROUNDING[read.all_float64], read)

    @classmethod
    def by_checks(cls, kind: StepKind, lists: StepLists, options: Any, *, extra: Any = None, backend: str) -> StepCall:
        """Return the step, checked in Python; of tensors that are :meth:`StepKind.named`."""
        kind.check(lists, options, extra)
        step = select(kind.op, backend, lists.params)
        return cls(kind, lists, options, extra, step, rounding(lists.params))

    @classmethod
    def of(cls, kind: StepKind, lists: StepLists, options: Any, *, extra: Any = None, backend: str) -> StepCall:
        """Return the step, or raise what its op does.

        Raises:
            ValueError, TypeError, BackendError: as the op.
        """
        call = cls.by_reader(kind, lists, options, extra=extra, backend=backend)
        if call is not None:
            return call
        call = cls.by_checks(kind, kind.named(lists), options, extra=extra, backend=backend)
        if has_memory(lists.params[0]):
            return call
        # The dispatcher knows what a meta or fake tensor becomes.
        return call._replace(
            backend=lambda _, skip_nonfinite: kind.dispatch(lists, options, extra, backend, skip_nonfinite)
        )

    def __call__(self, skip_nonfinite: bool, scaler: Scaler | None = None) -> Tensor:
        """Take the step; return StepStats.raw. ``scaler``: only with ``skip_nonfinite``."""
        call = self if scaler is None else self._replace(scaler=scaler)
        if self.read is not None:
            raw = self.backend(call, skip_nonfinite)
        else:
            with torch.no_grad():
                raw = self.backend(call._laid_out(), skip_nonfinite)
        params, grads1, grads2, kept1, kept2 = self.lists
        mark_written([*params, *(kept1 or ()), *(kept2 or ())])
        if scaler is not None and scaler.scale is not None:
            mark_written(grads2 or grads1)
        return raw

    def statistics(self) -> Tensor:
        """Return StepStats.raw by plain PyTorch, without a step."""
        with torch.no_grad():
            raw = raw_statistics(*self.lists[:3])
        return raw if self.scaler is None else self.scaler.note_in(raw)

    def _laid_out(self) -> StepCall:
        lists = self.lists
        grads1 = laid_out_like(lists.grads1, lists.params)
        grads2 = None if lists.grads2 is None else laid_out_like(lists.grads2, lists.params)
        return self._replace(lists=lists._replace(grads1=grads1, grads2=grads2))

    def _gradients(self) -> list[Tensor]:
        return [*self.lists.grads1, *(self.lists.grads2 or [])]

    def described(self) -> _C.StepTensors:
        """Return the tensors, which C++ hasn't read, as the compiled kernels want them: addresses, sizes and dtypes."""
        from svag_fast import _C

        params, grads1, grads2, kept1, kept2 = self.lists
        return _C.StepTensors(
            addresses(params, "params"),
            addresses(grads1, "grads1"),
            addresses(grads2 or [], "grads2"),
            addresses(kept1 or [], self.kind.kept[0]),
            addresses(kept2 or [], self.kind.kept[1]),
            list(map(Tensor.numel, params)),
            [DTYPE_CODES[p.dtype] for p in params],
            [DTYPE_CODES[g.dtype] for g in grads1],
        )


def take_step(
    kind: StepKind, lists: StepLists, options: Any, *, extra: Any = None, skip_nonfinite: bool, backend: str
) -> StepStats:
    """Take the step that a public op was called for: at once where C++ reads it, else by PyTorch's dispatcher."""
    has_second = lists.grads2 is not None
    if not is_watched() and all(listed is None or type(listed) is list for listed in lists):
        call = StepCall.by_reader(kind, lists, options, extra=extra, backend=backend)
        if call is not None:
            return StepStats(call(skip_nonfinite), has_second, rounding=call.rounding)
    lists = kind.named(lists)
    if not lists.params:
        kind.check(lists, options, extra)
        return nothing_stepped(has_second, kind.raw_shape(options))
    with torch.no_grad():
        raw = kind.dispatch(lists, options, extra, backend, skip_nonfinite)
    return StepStats(raw, has_second, rounding=rounding(lists.params))


_READS_SCALE: set[Callable[..., Any]] = set()


def reads_scale(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a backend whose kernel divides the gradients by a :class:`Scaler`'s scale itself.

    It leaves those of the last batch divided in memory, as torch's fused optimizers do, for whoever looks at ``.grad``.
    """
    _READS_SCALE.add(function)
    return function


def read_the_scale(calls: list[StepCall]) -> bool:
    """Whether all calls' kernels can read a GradScaler's scale: then no pass over the gradients has to go before.

    They write to gradients then, so that none may be in two places.
    """
    if not all(call.backend in _READS_SCALE for call in calls):
        return False
    places = []
    for call in calls:
        if call.read is None:
            if any(map(operator.is_not, call._gradients(), call._laid_out()._gradients())):
                return False  # the kernel takes a copy
            places += [(span.start, span.end) for listed in call.kind.spans(call.lists) for span in listed]
            continue
        params, grads1, grads2, _, _, sizes, param_dtypes, grad_dtypes = call.read.columns()
        for starts, dtypes in ((params, param_dtypes), (grads1, grad_dtypes), (grads2, grad_dtypes)):
            places += [(a, a + n * _ITEMSIZES[d]) for a, n, d in zip(starts, sizes, dtypes, strict=False) if n]
    places.sort()
    return all(end <= start for (_, end), (start, _) in itertools.pairwise(places))


_SINGLE = [torch.empty(0, dtype=torch.float32, device="cpu")]


@functools.lru_cache(64)
def fits_float32(options: Any) -> bool:
    """Whether float32 arithmetic holds a step's options; all others' then do."""
    try:
        options.check_held(_SINGLE)
    except ValueError:
        return False
    return True


def check_calls_apart(calls: list[StepCall], ends: Iterable[str]) -> None:
    """Refuse steps that share memory with one another, or of which some have tensors without memory (meta) and some
    not: their statistics have no sum. ``ends`` tell them apart in the names of their tensors.
    """
    read = [call.read for call in calls if call.read is not None]
    if len(read) == len(calls) and type(read[0]).apart(read):
        return
    firsts = [call.lists.params[0] for call in calls]
    if len({p.is_meta for p in firsts}) > 1:
        devices = " and ".join(dict.fromkeys(str(p.device) for p in firsts))
        raise ValueError(f"params must be all on meta or none of them, got some on {devices}")
    places = [call.kind.spans(call.lists, end) for call, end in zip(calls, ends, strict=True)]
    check_apart(*(list(itertools.chain(*listed)) for listed in zip(*places, strict=True)))
