"""A model while its per-sample norms are taken: which layers are served, which parameters tracked, who the samples are.

Nothing is taken for settled on entry: each pass through the model looks whether layers or parameters were added,
replaced, frozen or unfrozen since, and serves or refuses them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from svag_fast.sample_norms import dispatch
from svag_fast.sample_norms.rows import RowCheck, Sequences, takes_samples_second
from svag_fast.sample_norms.rule import Known, Rule, Scope, label_of, rule_of
from svag_fast.sample_norms.tables import Samples, Table
from svag_fast.sample_norms.tape import Recorder, in_backward

_OPAQUE = (torch.jit.ScriptModule, nn.DataParallel)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Methods whose override changes what a layer computes.
_FORWARD_METHODS = ("forward", "_conv_forward")

# What was found out about a layer in earlier passes, in whatever context.
_KNOWN: WeakKeyDictionary[nn.Module, Known] = WeakKeyDictionary()


class UnsupportedModuleError(TypeError):
    """A module whose samples' gradients can't be told apart; the message names it and says what to do."""


@dataclass
class _Served:
    """A layer that has a rule."""

    scope: Scope
    kind: type[nn.Module]
    end: Callable[[], None]


class _Shape:
    """Which layers a model has, and which parameters those that aren't served have: compared in each pass, so sorted by
    what is quick to compare."""

    def __init__(self) -> None:
        self._parents: list[tuple[Mapping[str, Any], tuple[Any, ...]]] = []
        self._childless: list[Mapping[str, Any]] = []
        self._bare: list[Mapping[str, Any]] = []  # parameters of modules that have none
        self._others: list[tuple[Mapping[str, Any], list[tuple[int, bool]]]] = []

    def add(self, module: nn.Module, served: bool) -> None:
        """Note a module; a served one looks after its parameters itself."""
        if module._modules:
            self._parents.append((module._modules, tuple(module._modules.values())))
        else:
            self._childless.append(module._modules)
        if not served and module._parameters:
            self._others.append((module._parameters, _trained(module._parameters)))
        elif not served:
            self._bare.append(module._parameters)

    def outdated(self) -> bool:
        """Whether anything came, went, was frozen or unfrozen."""
        if any(self._childless) or any(self._bare):
            return True
        for modules, children in self._parents:
            if tuple(modules.values()) != children:
                return True
        return any(_trained(parameters) != trained for parameters, trained in self._others) if self._others else False


def _trained(parameters: Mapping[str, Any]) -> list[tuple[int, bool]]:
    """What tells whether parameters are the same, and frozen or not as before."""
    return [(id(p), p.requires_grad) for p in parameters.values() if p is not None]


def _has_any(parameters: Mapping[str, Any]) -> bool:
    for parameter in parameters.values():  # noqa: SIM110  (faster than any() with a generator)
        if parameter is not None:
            return True
    return False


class Watch:
    """See the module's text. `wanted`: the only parameters to track, or None for all that require a gradient."""

    def __init__(
        self,
        model: nn.Module,
        recorder: Recorder,
        wanted: list[nn.Parameter] | None,
        batch_size: int | None,
        check: bool,
    ) -> None:
        self.model = model
        self.recorder = recorder
        self.check = check
        self._wanted = None if wanted is None else {id(p): p for p in wanted}
        self._given = batch_size
        self._samples = Samples(batch_size)
        self._rows = RowCheck(model, recorder, check)
        self._sequences = Sequences(model, self._samples)
        self._last_batch_size: int | None = None
        self._all_tracked = True  # whether no other parameter of the model is trained
        self._depth = 0
        self._served: dict[nn.Module, _Served] = {}
        self._root_end: Callable[[], None] | None = None
        self._shape = _Shape()

    def begin(self) -> None:
        """Serve the model; refuses before anything is changed."""
        self.scan()
        if not self.recorder.aliases:
            raise ValueError("parameters must be some that require a gradient, got none: there is nothing to track")

    def end(self) -> None:
        """Leave the model as it was."""
        self._end_root()
        self._sequences.watch(set())
        for served in self._served.values():
            served.end()
        self._served = {}

    def scan(self) -> None:
        """Look at the whole model, and serve it as it is now."""
        modules: list[tuple[str, nn.Module]] = []
        _walk("", self.model, modules)
        names, aliases = self._tracked(modules)
        plans: dict[nn.Module, Scope] = {}
        sequences: set[nn.Module] = set()
        shape = _Shape()
        met: set[nn.Module] = set()
        for place, module in modules:
            if module in met:
                continue
            met.add(module)
            parameters = module._parameters
            scope = None
            if _traits(type(module)) is not _PLAIN or _has_any(parameters):  # type: ignore[arg-type]
                scope = self._plan(place, module, names)
            if scope is not None:
                plans[module] = scope
            elif takes_samples_second(module):
                sequences.add(module)
            shape.add(module, served=scope is not None)
        for module in [m for m, s in self._served.items() if m not in plans or s.kind is not type(m)]:
            self._served.pop(module).end()
        self._sequences.watch(sequences)
        for module, scope in plans.items():
            if module in self._served:
                self._served[module].scope.renew(scope)
            else:
                if module is self.model:
                    self._end_root()
                forward = self._root_forward(scope) if module is self.model else self._layer_forward(scope)
                self._served[module] = _Served(scope, type(module), dispatch.serve(module, forward))
        self._serve_root()
        self.recorder.track(names, aliases)
        tracked = [scope.known for scope in plans.values() if scope.names]
        self._rows.look_again(tracked)
        self._samples.look_again(tracked, self._all_tracked)
        self._shape = shape

    def _serve_root(self) -> None:
        if self.model not in self._served and self._root_end is None and "forward" not in self.model.__dict__:
            if dispatch.is_served(self.model):
                raise UnsupportedModuleError(
                    "the model is served already: first leave the other per_sample_sq_norms context"
                )
            self._root_end = dispatch.serve(self.model, self._root_forward(None))

    def _end_root(self) -> None:
        if self._root_end is not None:
            self._root_end()
            self._root_end = None

    def untracked(self) -> str | None:
        """The name of a parameter that may have got a gradient without being tracked."""
        if not self._shape.outdated() and all(served.scope.current() for served in self._served.values()):
            return None
        for name, parameter in self.model.named_parameters():
            if self._is_wanted(parameter) and parameter.requires_grad and not self.recorder.tracks(parameter):
                return name
        return None

    def _is_wanted(self, parameter: Tensor | None) -> bool:
        return parameter is not None and (self._wanted is None or id(parameter) in self._wanted)

    def _tracked(self, modules: list[tuple[str, nn.Module]]) -> tuple[dict[nn.Parameter, str], dict[str, str]]:
        """Each tracked parameter's first name, and for every name that first name."""
        names: dict[nn.Parameter, str] = {}
        aliases: dict[str, str] = {}
        met: set[int] = set()
        self._all_tracked = True
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
                    aliases[name] = names.setdefault(parameter, name)
                elif parameter.requires_grad:
                    self._all_tracked = False
        if self._wanted is not None and (missing := len(self._wanted.keys() - met)):
            raise ValueError(f"parameters must be the model's, got {missing} others of {len(self._wanted)}")
        return names, aliases

    def _plan(self, place: str, module: nn.Module, names: Mapping[nn.Parameter, str]) -> Scope | None:
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
            return self._scope(place, module, own, couples)
        except UnsupportedModuleError:
            if own or couples:
                raise
            return None  # nothing of it is trained

    def _scope(self, place: str, module: nn.Module, own: dict[str, str], couples: bool) -> Scope:
        kind = type(module)
        found = rule_of(kind)
        if found is None:
            if isinstance(module, _TRANSPOSED):
                advice = "transposed convolutions are not supported: use upsampling and a convolution"
            else:
                advice = "no rule for it"
            raise UnsupportedModuleError(
                f"{label_of(place, module)}: {advice}, or teach it with svag_fast.register_rule({kind.__name__}) "
                "(svag_fast.by_vmap is a rule without a formula), freeze it, or leave its parameters out with "
                "parameters=..."
            )
        base, rule = found
        if "forward" in module.__dict__:
            raise UnsupportedModuleError(
                f"{label_of(place, module)} has a forward of its own put onto the instance: take the patch off"
            )
        if module not in self._served and dispatch.is_served(module):
            raise UnsupportedModuleError(
                f"{label_of(place, module)} is served already: first leave the other per_sample_sq_norms context"
            )
        if kind is not base and any(_method(kind, m) is not _method(base, m) for m in _FORWARD_METHODS):
            raise UnsupportedModuleError(
                f"{label_of(place, module)} overrides the forward of {base.__name__}, so that its rule may be wrong: "
                f"give it its own with svag_fast.register_rule({kind.__name__})"
            )
        known = _KNOWN.get(module)
        if known is None or known.rule is not rule or known.batch_size_given is not (self._given is not None):
            known = _KNOWN[module] = Known(rule, self._given is not None)
        scope = Scope(self.recorder, own, place, module, known, self.check, couples)
        if own or couples:
            _refuse(rule, scope)
        if rule.knows is not None and (unknown := own.keys() - rule.knows):
            raise UnsupportedModuleError(
                f"{scope.label} has the parameter {sorted(unknown)[0]!r}, which {base.__name__} has not "
                "(reparametrised, as by weight_norm?): give it a rule with svag_fast.register_rule, or remove the "
                "reparametrisation"
            )
        return scope

    def _layer_forward(self, scope: Scope) -> Callable[..., Any]:
        module, kind, rule, known = scope.module, type(scope.module), scope.known.rule, scope.known
        plain = dispatch.plain_forward(kind)
        samples, rows = self._samples, self._rows
        run, may_refuse = rule.run, type(rule).refusal is not Rule.refusal

        def forward(*args: Any, **kwargs: Any) -> Any:
            if scope.names or scope.couples:
                if may_refuse:
                    _refuse(rule, scope)
            elif takes_samples_second(module):
                return self._sequences.forward(module, *args, **kwargs)
            if not torch.is_grad_enabled() or not (args or kwargs):
                return plain(module, *args, **kwargs)
            if type(module) is not kind or not scope.current():
                self.scan()
                return module.forward(*args, **kwargs)
            if not scope.names:
                return plain(module, *args, **kwargs)
            x = args[0] if args else None
            if (
                len(args) == 1
                and not kwargs
                and type(x) is Tensor
                and known.samples_only
                and x.dim() > 0
                and x.shape[0] == samples.batch_size
                and samples.plainly(x)
            ):
                return run(scope, module, args, kwargs) if rows.calls is None else self._run(scope, args, kwargs)
            return self._serve(scope, rule, plain, args, kwargs)

        return forward

    def _serve(
        self, scope: Scope, rule: Rule, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a layer on samples, or on copies of a value that has none."""
        module = scope.module
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not tensors or torch._C._get_tracing_state() is not None:
            return plain(module, *args, **kwargs)
        table = any(isinstance(x, Table) for x in tensors)
        B = self._batch_size_now()
        if B is None:
            if table or scope.known.shared_only or scope.known.mixed:
                raise ValueError(
                    f"the input of {scope.label} must be one with samples where the batch size is not known, got a "
                    "value without"
                )
            x = tensors[0]
            if module is not self.model and x.dim() == 1 and not (x.is_floating_point() or x.is_complex()):
                raise ValueError(
                    f"the indices of {scope.label} must be given inside of the model's own forward, got "
                    f"{list(x.shape)} outside, which may be samples or positions: call the model itself, or pass "
                    "batch_size=..."
                )
            return self._run(scope, args, kwargs)
        if table or not self._samples.include(scope.known, tensors, B):
            return self._serve_shared(scope, rule, tensors, B, args, kwargs)
        if not any(x.dim() > 0 and x.shape[0] == B for x in tensors):
            raise ValueError(
                f"the first dimension of {scope.label}'s input must be the model's {B} samples (not samples and "
                f"positions folded together), got {list(tensors[0].shape)}: pass batch_size=... if the batch size is "
                "another"
            )
        return self._run(scope, args, kwargs)

    def _run(self, scope: Scope, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = scope.known.rule.run(scope, scope.module, args, kwargs)
        self._rows.add(scope, (args, kwargs), out)
        return out

    def _serve_shared(
        self, scope: Scope, rule: Rule, tensors: list[Tensor], B: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a layer on each sample's copy of a value that they share."""
        x = tensors[0]
        rows = x.rows if isinstance(x, Table) else x.expand(B, *x.shape)
        # Layers that act on channels take [1, C, ...] as [B, C, ...], the others anything behind the samples.
        single = not rule.any_rows and x.dim() > 0 and x.shape[0] == 1
        if any(y is not x for y in tensors) or not (single or rule.any_rows):
            raise ValueError(
                f"the input of {scope.label} must be one that depends on the model's input of {B} samples, or can be "
                f"computed for each sample apart, got {list(x.shape)}: give it an input whose first dimension is the "
                "samples, as by positions.expand(len(x), -1), or leave its parameters out with parameters=..."
            )
        copies = rows.select(1, 0) if single else rows
        args, kwargs = tree_map(lambda y: copies if y is x else y, (args, kwargs))
        out = self._run(scope, args, kwargs)

        def as_table(y: Any) -> Any:
            return (
                Table.of(y[:, None] if single else y, scope.label, self._samples.is_samples)
                if isinstance(y, Tensor)
                else y
            )

        return tree_map(as_table, out)

    def _batch_size_now(self) -> int | None:
        """B, also of the graph whose backward pass runs a checkpoint's layers once more."""
        if self._samples.batch_size is not None or not in_backward():
            return self._samples.batch_size
        running = self.recorder.running_batch_size()
        return self._last_batch_size if running is None else running  # a checkpoint refuses other shapes than before

    def _root_forward(self, scope: Scope | None) -> Callable[..., Any]:
        model, samples, rows = self.model, self._samples, self._rows
        inner = (
            functools.partial(dispatch.plain_forward(type(model)), model)
            if scope is None
            else self._layer_forward(scope)
        )

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._depth or not torch.is_grad_enabled() or in_backward():
                return inner(*args, **kwargs)
            if self._shape.outdated():
                self.scan()
            inputs = _tensors(args, kwargs)
            before = samples.batch_size
            self._depth += 1
            samples.inputs = inputs
            try:
                if self._given is None and inputs:
                    self._samples.batch_size = inputs[0].shape[0]
                self._last_batch_size = self._samples.batch_size
                out = samples.run(inner, args, kwargs, rows.begin)
                if rows.calls:
                    rows.end([x for x in _leaves(out) if isinstance(x, Tensor)], samples.batch_size)
                return out
            finally:
                self._depth -= 1
                samples.inputs, samples.batch_size = [], before
                rows.calls = None

        return forward


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among a model's inputs, scalars left out."""
    found = args if not kwargs and all(isinstance(x, Tensor) for x in args) else _leaves((args, kwargs))
    return [x for x in found if isinstance(x, Tensor) and x.dim() > 0]


def _leaves(inputs: Any) -> list[Any]:
    leaves = []
    for x in tree_leaves(inputs):
        if isinstance(x, Mapping):  # a kind of dictionary that PyTorch doesn't know
            leaves.extend(_leaves(dict(x)))
        else:
            leaves.append(x)
    return leaves


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


def _method(kind: type[nn.Module], name: str) -> Any:
    return dispatch.plain_forward(kind) if name == "forward" else getattr(kind, name, None)


def _refuse(rule: Rule, scope: Scope) -> None:
    reason = rule.refusal(scope.module)
    if reason is not None:
        raise UnsupportedModuleError(f"{scope.label}: {reason}")
