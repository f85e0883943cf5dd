"""Values that all samples share: position embeddings, relative biases, learned tokens.

A layer called on a value without samples (`wpe(torch.arange(T))`) has one gradient for the whole batch. Inside the
context it is computed once for each sample, on copies; the result is a `Table`, which looks as the layer's plain output
does and becomes one row for each sample where it meets the samples: `x + table`, x [B, ...]. The values are those of
the plain model, and each copy's gradient is its own sample's.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from svag_fast.sample_norms.rule import Known

# Says whether a tensor that meets a table belongs to the samples.
IsSamples: TypeAlias = Callable[[Tensor], bool]

# Binary functions that broadcast, by name, and with the first operand changed in place; "mul" serves __rmul__ too.
_MEETS = {"add", "sub", "mul", "div", "truediv", "true_divide", "matmul", "where", "maximum", "minimum", "pow"}
_JOINS = {"cat", "concat", "concatenate", "stack"}
_OF_THE_GRAPH = {"backward", "register_hook", "register_post_accumulate_grad_hook", "retain_grad"}


class Table(Tensor):
    """A layer's output without samples, and behind it `rows` [B, *shape]: each sample's own copy."""

    rows: Tensor
    label: str
    is_samples: IsSamples

    @staticmethod
    def of(rows: Tensor, label: str, is_samples: IsSamples) -> Table:
        """The table whose copies are the rows; `label` names the layer in messages."""
        value = rows[0] if rows.shape[0] else rows.sum(0)
        table: Table = value.as_subclass(Table)
        table.rows, table.label, table.is_samples = rows, label, is_samples
        return table

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            tables = [x for x in tensors if isinstance(x, Table)]
            one = tables[0]
            name = getattr(func, "__name__", "")
            if name in _OF_THE_GRAPH:
                raise _mixes(one, name)
            # Numbers and tensors of no dimension are of no sample: a table with them is a table still.
            if not any(x.dim() and not isinstance(x, Table) for x in tensors) and not _writes(name, kwargs):
                return _among_tables(func, name, args, kwargs, one)
            if kwargs.keys() <= {"dim", "axis", "alpha"} and not isinstance(args[0], Table):
                pass  # the first operand may be changed in place
            elif _writes(name, kwargs):
                raise _mixes(one, name)
            return _meet(func, name, args, kwargs, one)


def _writes(name: str, kwargs: dict[str, Any]) -> bool:
    dunder = name.startswith("__")
    return (
        "out" in kwargs
        or name == "__setitem__"
        or (name.startswith("__i") and name not in _QUESTIONS)
        or (name.endswith("_") and not dunder)
    )


_QUESTIONS = {"__index__", "__int__", "__invert__", "__init_subclass__", "__instancecheck__"}


def _among_tables(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], one: Table) -> Any:
    """A function of tables alone is one of every sample's copy."""
    plain = func(*args, **kwargs)
    results = [x for x in tree_leaves(plain) if isinstance(x, Tensor)]
    if not results:
        return plain  # a shape, a dtype, a device
    if any(plain is x for x in args):
        return plain  # .to() where there is nothing to do
    flat: list[Tensor] = []

    def slot(x: Any) -> Any:
        if isinstance(x, Table):
            flat.append(x.rows)
            return _Slot(len(flat) - 1)
        return x

    form = tree_map(slot, (args, kwargs))

    def on_copies(*copies: Tensor) -> Any:
        filled_args, filled_kwargs = tree_map(lambda x: copies[x.index] if isinstance(x, _Slot) else x, form)
        return func(*filled_args, **filled_kwargs)

    if flat[0].shape[0] == 0:
        return tree_map(lambda x: _empty(x, one) if isinstance(x, Tensor) else x, plain)
    try:
        rows = torch.func.vmap(on_copies)(*flat)
    except RuntimeError as error:
        raise _mixes(one, name) from error
    if [x.shape[1:] for x in tree_leaves(rows) if isinstance(x, Tensor)] != [x.shape for x in results]:
        raise _mixes(one, name)
    return tree_map(lambda x: Table.of(x, one.label, one.is_samples) if isinstance(x, Tensor) else x, rows)


class _Slot:
    def __init__(self, index: int) -> None:
        self.index = index


def _empty(value: Tensor, one: Table) -> Table:
    rows = value.as_subclass(Tensor)[None].expand(0, *value.shape)
    return Table.of(rows, one.label, one.is_samples)


def _meet(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], one: Table) -> Any:
    """A table and samples: each sample meets its own copy."""
    base = name.strip("_")
    base = base[1:] if base[1:] in _MEETS and base[0] in "ri" else base
    joins = base in _JOINS
    operands = list(args[0]) if joins else list(args)
    others = [x for x in operands if isinstance(x, Tensor) and not isinstance(x, Table) and x.dim()]
    B = one.rows.shape[0]
    if base not in _MEETS | _JOINS or not others:
        raise _mixes(one, name)
    samples = [x.shape[0] == B and one.is_samples(x) for x in others]
    if not any(samples):
        if _writes(name, kwargs):
            raise _mixes(one, name)
        return _among_tables(func, name, tuple(args), kwargs, one)
    if not all(samples):
        raise _mixes(one, name)
    dims = max(x.dim() for x in others)
    if joins and (dim := operator.index(kwargs.get("dim", args[1] if len(args) > 1 else 0))) in (0, -dims):
        raise _mixes(one, f"{name} along dimension {dim}")
    smallest = min(x.dim() for x in others)
    if base == "matmul" and smallest < 3:
        raise _mixes(one, name)

    def of_samples(x: Any) -> Any:
        if not isinstance(x, Table):
            return x
        if x.dim() > smallest:
            raise _mixes(one, name)
        if x.dim() < dims:
            # Broadcasting lines up the last dimensions: the ones go behind the samples'.
            return x.rows.reshape(B, *(1,) * (dims - 1 - x.dim()), *x.shape)
        if x.shape[0] == 1 and not joins:  # the plain value would be broadcast over the samples
            return x.rows.select(1, 0)
        if x.shape[0] == B:  # row i of the plain value goes with sample i
            return x.rows.diagonal(0, 0, 1).movedim(-1, 0)
        raise _mixes(one, name)

    operands = [of_samples(x) for x in operands]
    result = func(operands, *args[1:], **kwargs) if joins else func(*operands, **kwargs)
    return result


def _mixes(table: Table, name: str) -> RuntimeError:
    return RuntimeError(
        f"{table.label} was given a value that does not depend on the model's input of {table.rows.shape[0]} samples "
        f"(pass batch_size=... if that is not the batch size), and its output went into {name!r}, through which "
        "per-sample norms can't be followed: give the layer an input whose first dimension is the samples, as by "
        "positions.expand(len(x), -1), or leave its parameters out with parameters=..."
    )


class FollowAgain(BaseException):
    """The pass needs to know what depends on the samples: run it again and follow it."""


class Provenance(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows which tensors depend on the samples: the model's inputs, and what any op makes of them.

    Shapes can't say it: T positions may well be B.
    """

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first op imports the whole compiler

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.asleep = False  # nothing more will be asked in this pass
        self._entered = False
        self._known: set[StorageWeakRef] = set()
        self._mark(inputs)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.asleep:
            return out
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        # What fills memory that `empty` made is not always seen here.
        if "empty" in getattr(func, "__name__", "") or any(self.of_samples(x) for x in tensors):
            self._mark(x for x in tree_leaves(out) if isinstance(x, Tensor))
            schema = getattr(func, "_schema", None)
            if schema is not None and schema.is_mutable:
                self._mark(_written(schema, args, kwargs))
        return out

    def begin(self) -> None:
        """Follow from here."""
        self.__enter__()  # type: ignore[no-untyped-call]
        self._entered = True

    def sleep(self) -> None:
        """Ask for nothing more: following costs time in each op. Where another mode is on top it stays, idle."""
        self.asleep = True
        if _get_current_dispatch_mode() is self:
            self.end()

    def end(self) -> None:
        """Follow no longer."""
        if self._entered:
            self._entered = False
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def of_samples(self, tensor: Tensor) -> bool:
        """Whether the tensor depends on the samples, or may do so."""
        if self.asleep:
            raise FollowAgain
        reference = _storage(tensor)
        return reference is None or reference in self._known

    def _mark(self, tensors: Iterable[Tensor]) -> None:
        self._known.update(reference for x in tensors if (reference := _storage(x)) is not None)


def _written(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The operands that an op changes."""
    values = [
        args[i] if i < len(args) else kwargs.get(argument.name)
        for i, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def _storage(tensor: Tensor) -> StorageWeakRef | None:
    """A tensor's memory, which its views share and nobody else gets while this lives; None where it has none."""
    try:
        return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    except (NotImplementedError, RuntimeError):
        return None  # sparse, nested


class Samples:
    """Which tensors are the samples' in the pass through the model that runs.

    Some show it (`plainly`). For the others the pass is followed op by op; from what was asked in earlier passes it is
    known whether that is needed, and until when.
    """

    def __init__(self, batch_size: int | None) -> None:
        self.batch_size = batch_size  # None: unknown, as outside of the model's own forward
        self.inputs: list[Tensor] = []  # the model's
        self._samples: list[Tensor] = []  # those among them that are samples
        self._layers: list[Known] = []
        self._all_tracked = True
        self.grad_tells = True  # whether only what was made of samples has a gradient
        self._can_follow = False  # inside the model's own forward, whose inputs are known
        self._follow = True
        self._follow_to_the_end = False  # tables have met what they could not tell
        self._provenance: Provenance | None = None
        self._asked: dict[Known, int] = {}
        self._to_ask: int | None = None  # how many questions more there will be; None: unknown
        self._learned = False

    def look_again(self, layers: list[Known], all_tracked: bool) -> None:
        """These layers are tracked from now on; `all_tracked`: no other part of the model is trained."""
        self._layers, self._all_tracked = layers, all_tracked
        self.grad_tells = self.grad_tells and all_tracked if self._can_follow else all_tracked
        self._follow = False
        for known in layers:
            settled = known.samples_only or known.shared_only or known.asked is not None
            if known.doubtful or known.mixed or not settled:
                self._follow = True

    def run(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], begin: Callable[[], None]
    ) -> Any:
        """The model's forward, followed where it has to be; `begin` is called before each try."""
        begin()
        if not self.inputs or self.batch_size is None:
            return forward(*args, **kwargs)
        if len(self.inputs) == 1 and self.inputs[0].shape[0] == self.batch_size:
            self._samples, self.grad_tells = self.inputs, self._all_tracked
        else:
            self._samples = self._find_samples(self.batch_size)
            self.grad_tells = self._all_tracked and not any(
                x.requires_grad and all(x is not y for y in self._samples) for x in self.inputs
            )
        self._can_follow = True
        try:
            if not self._follow:
                try:
                    return forward(*args, **kwargs)
                except FollowAgain:
                    begin()
            unknown = self._follow_to_the_end or any(known.asked is None for known in self._layers)
            if not unknown:
                try:
                    return self._followed(forward, args, kwargs, sum(known.asked or 0 for known in self._layers))
                except FollowAgain:
                    begin()
            return self._followed(forward, args, kwargs, None)
        finally:
            self._can_follow, self.grad_tells, self._samples = False, self._all_tracked, []

    def _find_samples(self, B: int) -> list[Tensor]:
        first = next((x for x in self.inputs if x.shape[0] == B), None)
        # Indices [B] beside an input [B, B, ...] may be positions.
        doubtful = first is not None and first.dim() > 1 and first.shape[1] == B
        return [
            x
            for x in self.inputs
            if x.shape[0] == B and not (doubtful and x.dim() == 1 and not x.is_floating_point() and x is not first)
        ]

    def _followed(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], questions: int | None
    ) -> Any:
        self._asked, self._to_ask, self._learned = {}, questions, False
        self._provenance = provenance = Provenance(self._samples)
        provenance.begin()
        try:
            if questions == 0:
                provenance.sleep()
            out = forward(*args, **kwargs)
        finally:
            provenance.end()
            self._provenance = None
        if not self._learned:
            for known in self._layers:
                known.asked = max(known.asked or 0, self._asked.get(known, 0))
        self._follow = self._follow_to_the_end or any(known.mixed or known.doubtful for known in self._layers)
        return out

    def plainly(self, tensor: Tensor) -> bool:
        """Whether a tensor shows that it is made of the samples: it has a gradient, or is the input or a view of it."""
        if self.grad_tells and tensor.requires_grad and not tensor.is_leaf:
            return True
        for x in self._samples:
            if tensor is x:
                return True
        memory = _storage(tensor) if self._samples else None
        return memory is not None and any(memory == _storage(x) for x in self._samples)

    def include(self, known: Known, tensors: list[Tensor], B: int) -> bool:
        """Whether a layer's inputs are the samples', as opposed to a value that they share."""
        plain = any(x.dim() > 0 and x.shape[0] == B and self.plainly(x) for x in tensors)
        if plain and known.samples_only:
            return True
        if self._provenance is not None:
            samples = any(self._provenance.of_samples(x) for x in tensors)
            self._learned = known.add(samples, plain) or self._learned
            self._count(known)
            return samples
        if known.shared_only and not plain:
            return False  # taken for shared, samples would give the same, or be refused where they meet others
        if self._can_follow:
            raise FollowAgain
        # Outside of the model's own forward nothing more can be known.
        return known.samples_only if known.settled else any(x.dim() > 0 and x.shape[0] == B for x in tensors)

    def _count(self, known: Known) -> None:
        assert self._provenance is not None
        self._asked[known] = self._asked.get(known, 0) + 1
        if self._to_ask is not None:
            self._to_ask -= 1
            if self._to_ask == 0:
                self._provenance.sleep()

    def is_samples(self, tensor: Tensor) -> bool:
        """Whether a tensor that meets a value without samples depends on the samples."""
        if self.plainly(tensor):
            return True
        if self._provenance is not None:
            self._follow_to_the_end = True
            return self._provenance.of_samples(tensor)
        if not self._can_follow:
            return tensor.requires_grad  # layers give tables where they are given values without samples
        raise FollowAgain
