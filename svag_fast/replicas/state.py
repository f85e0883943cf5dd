"""What a model keeps beside parameters, buffers and children: a text of it that changes with its value.

The walk is pickle's, which reaches whatever an object is made of. Functions are walked too: what one has closed over,
its defaults, and what a partial or a method is bound to.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import pickle
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from svag_fast.replicas.errors import NotReplicable

_OWN = {*vars(nn.Module())} - {"training"}
_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def attributes(model: nn.Module) -> dict[str, str]:
    """Each attribute beside parameters, buffers and children, by path, as text.

    Raises:
        NotReplicable: tensors, modules or torch's generators are in one, where a replica can't have its own.
    """
    own = {id(module) for module in model.modules()}
    found: dict[str, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for key, value in vars(module).items():
            if key not in _OWN:
                where = f"{path}.{key}".removeprefix(".")
                found[where] = _text(where, value, own)
    return found


def _text(where: str, value: Any, own: set[int]) -> str:
    with contextlib.suppress(RecursionError):  # of what holds itself
        if all(isinstance(leaf, _PLAIN) for leaf in tree_leaves(value)):
            return repr(value)
    for fast in (True, False):
        stream = _Digest()
        try:
            _Walk(where, value, own, stream, fast=fast).dump(value)
        except NotReplicable:
            raise
        except (ValueError, RecursionError) as error:  # a fast pickler can't follow what holds itself
            if not fast:
                raise NotReplicable(
                    f"{where} is a {type(value).__name__} that can't be looked into: {error}"
                ) from error
        else:
            return f"a {type(value).__qualname__} with the digest {stream.sum.hexdigest()[:8]}"
    raise AssertionError("unreachable")


class _Digest(io.RawIOBase):
    """A file that keeps a hash of what is written to it."""

    def __init__(self) -> None:
        self.sum = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sum.update(data)
        return len(data)


class _Walk(pickle.Pickler):
    """A pickler that reaches what functions hold, and refuses tensors, modules and torch's generators."""

    def __init__(self, where: str, top: Any, own: set[int], stream: _Digest, *, fast: bool) -> None:
        super().__init__(stream, protocol=4)
        self.where, self.top, self.own = where, top, own
        self.functions: set[int] = set()
        self.fast = fast  # without references to what came before: then equal values are equal bytes

    def persistent_id(self, value: Any) -> str | None:
        """Refuse what can't be each replica's own; pickle asks of every object."""
        if isinstance(value, (Tensor, nn.Module, torch.Generator)):
            raise NotReplicable(
                f"{self.where} {'is' if value is self.top else 'holds'} a {type(value).__name__} outside the model's "
                "parameters, buffers and modules, where a replica can't have its own: register it"
            )
        if isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType)):
            return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', repr(value))}"
        return None

    def reducer_override(self, value: Any) -> Any:
        """Take apart what pickle would take by name, or not at all."""
        if isinstance(value, types.FunctionType):
            return tuple, (self._function(value),)
        if isinstance(value, types.MethodType):
            # A copy of the model binds the methods of its modules again, as it doesn't do with what a function holds.
            bound_to = "the model" if id(value.__self__) in self.own else value.__self__
            return tuple, ((bound_to, value.__func__.__qualname__),)
        try:
            return value.__reduce_ex__(4)
        except (TypeError, ValueError, AttributeError, RuntimeError, pickle.PicklingError):  # such as a lock
            return tuple, ((type(value).__qualname__, getattr(value, "__dict__", None)),)

    def _function(self, function: types.FunctionType) -> tuple[Any, ...]:
        code = function.__code__
        name = (function.__module__, function.__qualname__)
        if id(function) in self.functions:  # it calls itself
            return name
        self.functions.add(id(function))
        empty = types.CellType()  # equal to a cell without contents alone
        cells = [cell.cell_contents for cell in function.__closure__ or () if cell != empty]
        constants = [constant for constant in code.co_consts if isinstance(constant, _PLAIN)]
        return (*name, code.co_code, code.co_names, constants, cells, function.__defaults__, function.__kwdefaults__)
