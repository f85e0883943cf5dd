"""Which layers of a model have to be served, by which rule, and which parameters tracked; what can't be is refused.

What was found out holds for every later context while the model's structure does: see `found`.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Container, Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from svag_fast.sample_norms import dispatch
from svag_fast.sample_norms.rule import CHANGES, Known, Rule, label_of, rule_of
from svag_fast.sample_norms.structure import (
    FORWARD_METHODS,
    Standing,
    Structure,
    Switches,
    method,
    takes_samples_second,
)

_OPAQUE = (torch.jit.ScriptModule, nn.DataParallel)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# What was found out about a layer in earlier passes, and about a model on earlier entries, in whatever context.
_KNOWN: WeakKeyDictionary[nn.Module, Known] = WeakKeyDictionary()
_FOUND: WeakKeyDictionary[nn.Module, Found] = WeakKeyDictionary()
_SWITCHES: WeakKeyDictionary[nn.Module, Switches] = WeakKeyDictionary()


class UnsupportedModuleError(TypeError):
    """A module whose samples' gradients can't be told apart; the message names it and says what to do."""


class Plan(NamedTuple):
    """How a module is served. Like all that is kept by the model, it keeps no module alive."""

    ref: weakref.ref[nn.Module]
    kind: type[nn.Module]
    place: str
    names: Mapping[str, str]  # of the module's own tracked parameters -> their names in the model
    known: Known
    couples: bool  # the module mixes the samples unless its options forbid it
    may_refuse: bool


class Found:
    """What a look through a model found."""

    def __init__(self, batch_size_given: bool) -> None:
        self.batch_size_given = batch_size_given
        self.rules = CHANGES[0]
        self.plans: list[Plan] = []
        self.names: list[tuple[weakref.ref[nn.Parameter], str]] = []
        self.aliases: dict[str, str] = {}
        self.all_tracked = True  # whether no other parameter of the model is trained
        self.structure = Structure()
        self.dispatches: dict[type[nn.Module], dispatch.Dispatch] = {}  # of earlier contexts


def refuse(rule: Rule, place: str, module: nn.Module) -> None:
    """Raise what the rule has against the module with its present options."""
    reason = rule.refusal(module)
    if reason is not None:
        raise UnsupportedModuleError(f"{label_of(place, module)}: {reason}")


def found_before(model: nn.Module, batch_size_given: bool) -> tuple[Found, Standing] | None:
    """What an earlier context found, where all is as it was then."""
    found = _FOUND.get(model)
    if found is None or found.batch_size_given is not batch_size_given or found.rules != CHANGES[0]:
        return None
    standing = found.structure.look()
    if standing is None:
        return None
    for plan in found.plans:
        if plan.may_refuse:
            module = plan.ref()
            assert module is not None
            refuse(plan.known.rule, plan.place, module)
    return found, standing


def switched(model: nn.Module) -> bool:
    """Whether the model's switches are others than in the last pass; what was found out about its rows is void then."""
    switches = _SWITCHES.get(model)
    if switches is not None and not switches.changed():
        return False
    _SWITCHES[model] = Switches(model)
    for module in model.modules():
        known = _KNOWN.get(module)
        if known is not None:
            known.rows_checked = False
    return True


class Survey:
    """One look through a model.

    Args:
        model: the model.
        wanted: the only parameters to track, by id; None for all that require a gradient.
        batch_size_given: whether the user gave the batch size.
        ours: the modules that the asking context serves already.

    Raises:
        UnsupportedModuleError: a module can't be served.
        ValueError: a wanted parameter is not the model's.
    """

    def __init__(
        self, model: nn.Module, wanted: Mapping[int, Tensor] | None, batch_size_given: bool, ours: Container[nn.Module]
    ) -> None:
        self._wanted = wanted
        self._ours = ours
        self.found = found = Found(batch_size_given)
        self.sequences: set[nn.Module] = set()  # not trained, and take the samples second
        modules: list[tuple[str, nn.Module]] = []
        _walk("", model, modules)
        names = self._tracked(modules)
        found.names = [(weakref.ref(parameter), name) for parameter, name in names.items()]
        met: set[nn.Module] = set()
        for place, module in modules:
            if module in met:
                continue
            met.add(module)
            plan = None
            if _traits(type(module)) is not _PLAIN or _has_any(module._parameters):  # type: ignore[arg-type]
                plan = self._plan(place, module, names)
            if plan is not None:
                found.plans.append(plan)
            elif takes_samples_second(module):
                self.sequences.add(module)
            found.structure.add(module)
        if wanted is None and not self.sequences:
            _FOUND[model] = found

    def _is_wanted(self, parameter: Tensor | None) -> bool:
        return parameter is not None and (self._wanted is None or id(parameter) in self._wanted)

    def _tracked(self, modules: list[tuple[str, nn.Module]]) -> dict[nn.Parameter, str]:
        """Each tracked parameter's first name."""
        names: dict[nn.Parameter, str] = {}
        met: set[int] = set()
        for label, module in modules:
            if not module._parameters:
                continue
            for own, parameter in module._parameters.items():
                if parameter is None:
                    continue
                name = f"{label}.{own}" if label else own
                if type(parameter) is not nn.Parameter and is_lazy(parameter):
                    raise UnsupportedModuleError(f"{name} is not initialised yet: run the model once before")
                met.add(id(parameter))
                if parameter.requires_grad and self._is_wanted(parameter):
                    if not isinstance(parameter, nn.Parameter):
                        raise UnsupportedModuleError(
                            f"{name} is not the model's own parameter just now (functional_call?), so its per-sample "
                            "norms can't be told: call the model itself, or pass it its own parameters"
                        )
                    self.found.aliases[name] = names.setdefault(parameter, name)
                elif parameter.requires_grad:
                    self.found.all_tracked = False
        if self._wanted is not None and (missing := len(self._wanted.keys() - met)):
            raise ValueError(f"parameters must be the model's, got {missing} others of {len(self._wanted)}")
        return names

    def _plan(self, place: str, module: nn.Module, names: Mapping[nn.Parameter, str]) -> Plan | None:
        """How the module is to be served, if it is; raises where it needs to be and can't."""
        own = {name: names[p] for name, p in module._parameters.items() if p is not None and p in names}
        kind = type(module)
        opaque, couples = _traits(kind)  # type: ignore[arg-type]  # classes are hashable
        if not (own or opaque or couples or any(self._is_wanted(p) for p in module._parameters.values())):
            return None
        if opaque:
            raise UnsupportedModuleError(
                f"{label_of(place, module)} hides its layers: pass the plain module that it was made from"
            )
        try:
            return self._with_rule(place, module, own, couples)
        except UnsupportedModuleError:
            if own or couples:
                raise
            return None  # nothing of it is trained

    def _with_rule(self, place: str, module: nn.Module, own: dict[str, str], couples: bool) -> Plan:
        kind = type(module)
        known_rule = rule_of(kind)
        if known_rule is None:
            if isinstance(module, _TRANSPOSED):
                advice = "transposed convolutions are not supported: use upsampling and a convolution"
            else:
                advice = "no rule for it"
            raise UnsupportedModuleError(
                f"{label_of(place, module)}: {advice}, or teach it with svag_fast.register_rule({kind.__name__}) "
                "(svag_fast.by_vmap is a rule without a formula), freeze it, or leave its parameters out with "
                "parameters=..."
            )
        base, rule = known_rule
        if "forward" in module.__dict__:
            raise UnsupportedModuleError(
                f"{label_of(place, module)} has a forward of its own put onto the instance: take the patch off"
            )
        if module not in self._ours and dispatch.is_served(module):
            raise UnsupportedModuleError(
                f"{label_of(place, module)} is served already: first leave the other per_sample_sq_norms context"
            )
        if kind is not base and any(method(kind, m) is not method(base, m) for m in FORWARD_METHODS):
            raise UnsupportedModuleError(
                f"{label_of(place, module)} overrides the forward of {base.__name__}, so that its rule may be wrong: "
                f"give it its own with svag_fast.register_rule({kind.__name__})"
            )
        given = self.found.batch_size_given
        known = _KNOWN.get(module)
        if known is None or known.rule is not rule or known.batch_size_given is not given:
            known = _KNOWN[module] = Known(rule, given)
        may_refuse = type(rule).refusal is not Rule.refusal and bool(own or couples)
        if may_refuse:
            refuse(rule, place, module)
        if rule.knows is not None and (unknown := own.keys() - rule.knows):
            raise UnsupportedModuleError(
                f"{label_of(place, module)} has the parameter {sorted(unknown)[0]!r}, which {base.__name__} has not "
                "(reparametrised, as by weight_norm?): give it a rule with svag_fast.register_rule, or remove the "
                "reparametrisation"
            )
        return Plan(weakref.ref(module), kind, place, own, known, couples, may_refuse)


def _walk(place: str, module: nn.Module, found: list[tuple[str, nn.Module]]) -> None:
    """Every module under every name that it has, as `named_modules(remove_duplicate=False)` has it."""
    found.append((place, module))
    for name, child in module._modules.items():
        if child is not None:
            _walk(f"{place}.{name}" if place else name, child, found)


_PLAIN = (False, False)


@functools.cache
def _traits(kind: type[nn.Module]) -> tuple[bool, bool]:
    """Whether modules of a type hide their layers, and whether they are to be looked at without parameters too."""
    opaque = issubclass(kind, _OPAQUE) or kind.__name__ == "OptimizedModule"
    couples = issubclass(kind, nn.modules.batchnorm._BatchNorm)
    return (opaque, couples) if opaque or couples else _PLAIN


def _has_any(parameters: Mapping[str, Any]) -> bool:
    for parameter in parameters.values():  # noqa: SIM110  (faster than any() with a generator)
        if parameter is not None:
            return True
    return False
