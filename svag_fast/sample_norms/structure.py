"""A model's modules and parameters as they were found, compared cheaply with what they are.

A :class:`Structure` keeps none of them alive, so that it may be kept by the model's identity. :class:`Standing` holds
them while a context is open, where the same is asked in each pass.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

from svag_fast.sample_norms.dispatch import plain_forward

# Methods whose override changes what a layer computes.
FORWARD_METHODS = ("forward", "_conv_forward")

_Names: TypeAlias = tuple[str, ...]
_Ids: TypeAlias = tuple[int, ...]


class _Module(NamedTuple):
    """One module: its own, and what `_modules` and `_parameters` had."""

    ref: weakref.ref[nn.Module]
    kind: type[nn.Module]
    has_forward: bool  # on the instance
    samples_second: bool
    child_names: _Names
    children: _Ids
    parameter_names: _Names
    parameters: _Ids


def takes_samples_second(module: nn.Module) -> bool:
    """Whether a module says that its first dimension is no sample."""
    return module.__dict__.get("batch_first") is False


def method(kind: type[nn.Module], name: str) -> Any:
    """A class's method as it is where nothing is served."""
    return plain_forward(kind) if name == "forward" else getattr(kind, name, None)


class Structure:
    """What was found; told by :meth:`add`, module by module, each once."""

    def __init__(self) -> None:
        self._modules: list[_Module] = []
        self._parameters: dict[int, tuple[weakref.ref[Tensor], bool]] = {}
        self._methods: dict[type[nn.Module], tuple[Any, ...]] = {}

    def add(self, module: nn.Module) -> None:
        """Note a module."""
        own, below, kind = module._parameters, module._modules, type(module)
        self._modules.append(
            _Module(
                weakref.ref(module),
                kind,
                "forward" in module.__dict__,
                takes_samples_second(module),
                tuple(below),
                tuple(map(id, below.values())),
                tuple(own),
                tuple(map(id, own.values())),
            )
        )
        for parameter in own.values():
            if parameter is not None:
                self._parameters[id(parameter)] = weakref.ref(parameter), parameter.requires_grad
        if own and kind not in self._methods:
            self._methods[kind] = tuple(method(kind, name) for name in FORWARD_METHODS)

    def look(self) -> Standing | None:
        """Compare all of it with what there is; None where anything is another, or another kind."""
        standing = Standing()
        for ref, kind, has_forward, second, child_names, children, names, parameters in self._modules:
            module = ref()
            if module is None or type(module) is not kind:
                return None
            own = module.__dict__
            if ("forward" in own) is not has_forward or (own.get("batch_first") is False) is not second:
                return None
            standing.alive.append(module)
            for there, keys, ids in (
                (module._modules, child_names, children),
                (module._parameters, names, parameters),
            ):
                if not ids:
                    if there:
                        return None
                    standing.empty.append(there)
                elif tuple(there) != keys or tuple(map(id, there.values())) != ids:
                    return None
                else:
                    standing.filled.append((there, ids))
        for parameter_ref, trained in self._parameters.values():
            parameter = parameter_ref()
            if parameter is None or parameter.requires_grad is not trained:
                return None
            standing.parameters.append((parameter, trained))
        for kind, methods in self._methods.items():
            if kind.forward is not methods[0] and plain_forward(kind) is not methods[0]:
                return None
            if getattr(kind, FORWARD_METHODS[1], None) is not methods[1]:
                return None
        return standing


class Switches:
    """The flags and words among a model's own attributes: what it does may change with them, as in training mode.

    Not numbers, of which many are counters, nor what the attributes' objects have inside.
    """

    def __init__(self, model: nn.Module) -> None:
        self._of: list[tuple[weakref.ref[nn.Module], Callable[[Any], Any]]] = []
        self._then: list[Any] = []
        for module in model.modules():
            own = module.__dict__
            names = [name for name, value in own.items() if type(value) in (bool, str)]
            if names:
                values = operator.itemgetter(*names, names[0])  # of one name it would be no tuple
                self._of.append((weakref.ref(module), values))
                self._then += values(own)

    def changed(self) -> bool:
        """Whether one of them is another, or a module has gone."""
        try:
            now = [values(ref().__dict__) for ref, values in self._of]
        except (KeyError, AttributeError):  # a flag, or a module (None has no attributes)
            return True
        return not all(map(operator.is_, itertools.chain.from_iterable(now), self._then))


class Standing:
    """The same while a context is open, in quick terms."""

    def __init__(self) -> None:
        self.alive: list[nn.Module] = []  # else another module might get a place that is compared
        self.empty: list[Mapping[str, Any]] = []
        self.filled: list[tuple[Mapping[str, Any], _Ids]] = []
        self.parameters: list[tuple[Tensor, bool]] = []

    @staticmethod
    def unknown() -> Standing:
        """What is outdated each time, of a model whose modules don't keep what they contain."""
        standing = Standing()
        standing.empty.append({"": None})
        return standing

    def outdated(self) -> bool:
        """Whether a module or a parameter came, went, was frozen or unfrozen."""
        if any(self.empty):
            return True
        for there, ids in self.filled:
            if tuple(map(id, there.values())) != ids:
                return True
        for parameter, trained in self.parameters:  # noqa: SIM110  (faster than any() with a generator)
            if parameter.requires_grad is not trained:
                return True
        return False
