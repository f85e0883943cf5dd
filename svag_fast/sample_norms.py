"""Every sample's own squared gradient norm out of the one backward pass that training makes anyway.

The layers with large weights replace their weight gradient by one that brings the norms along
(`svag_fast.ops.weight_grad_and_sq_norms`), so they cost nothing extra; the small ones (biases, normalisations,
embeddings) are added up from their output's gradient. Which layer does what: `svag_fast.sample_norm_rules` and
`svag_fast.sample_norm_products`; how they work together: docs/per_sample_norms.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

import svag_fast.sample_norm_products  # noqa: F401  (registers its rules)
from svag_fast.sample_norm_rules import Rule, Scope, by_vmap, label_of, register_rule, rule_of
from svag_fast.sample_norm_tape import Recorder, sum_of

__all__ = ["SampleNorms", "UnsupportedModule", "by_vmap", "per_sample_sq_norms", "register_rule"]

_OPAQUE = (torch.jit.ScriptModule, nn.DataParallel)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Methods whose override changes what a layer computes.
_FORWARD_METHODS = ("forward", "_conv_forward")


class UnsupportedModule(TypeError):  # noqa: N818  (it names what was met)
    """A module whose samples' gradients can't be told apart; the message names it and says what to do."""


class SampleNorms(Mapping[str, Tensor]):
    """Squared norms of the samples' own gradients: `norms.total` [B], `norms["layer1.weight"]` [B], all float64.

    Each backward pass appends its B rows, in order. A parameter without gradient in a pass has zeros there. A tied
    parameter is listed and counted once, under its first name, and found under each of its names.
    """

    def __init__(self, recorder: Recorder, aliases: Mapping[str, str], mean: bool) -> None:
        self._recorder = recorder
        self._aliases = aliases
        self._mean = mean

    @property
    def total(self) -> Tensor:
        """|g_i|² [B] over all tracked parameters together."""
        return _joined([self._scaled(B, _sum(list(norms.values()))) for B, norms in self._passes()])

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._aliases:
            raise KeyError(f"{name!r} is not a tracked parameter; tracked are {', '.join(self._aliases)}")
        key = self._aliases[name]
        rows = []
        for B, norms in self._passes():
            any_norms = next(iter(norms.values()))
            rows.append(self._scaled(B, norms[key] if key in norms else torch.zeros_like(any_norms)))
        return _joined(rows)

    def __contains__(self, name: object) -> bool:
        return name in self._aliases

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(self._aliases.values()))

    def __len__(self) -> int:
        return len(set(self._aliases.values()))

    def reset(self) -> None:
        """Forget the passes so far, to stay in one context over many steps."""
        self._recorder.reset()

    def _passes(self) -> list[tuple[int, dict[str, Tensor]]]:
        self._recorder.check()
        if not self._recorder.passes:
            raise RuntimeError("no backward pass has reached the tracked parameters inside the context yet")
        return self._recorder.passes

    def _scaled(self, batch_size: int, sq_norms: Tensor) -> Tensor:
        """A mean loss gives each row 1/B of its sample's own gradient."""
        return sq_norms * float(batch_size) ** 2 if self._mean else sq_norms

    def __repr__(self) -> str:
        rows = sum(B for B, _ in self._recorder.passes)
        return f"SampleNorms({len(self)} parameters, {len(self._recorder.passes)} backward passes, {rows} rows)"


def _joined(rows: list[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _sum(norms: list[Tensor]) -> Tensor:
    return sum_of(norms) if len(norms) <= 4 else torch.stack(norms).sum(0)  # few additions are cheaper than a stack


class per_sample_sq_norms:  # noqa: N801  (a context manager, used like a function)
    """Context in which backward passes through `model` also give each sample's squared gradient norm.

    `.grad` receives what it would without the context (to rounding), from the same single backward pass; the model is
    as before after the context, whatever happens inside.

        with svag_fast.per_sample_sq_norms(model) as norms:
            F.cross_entropy(model(x), y).backward()
        norms.total            # [B] squared norm of each sample's own gradient
        norms["layer1.weight"] # [B]

    The first dimension is the samples in every layer. Row i of each use of a parameter within one backward pass belongs
    to sample i (weights that are shared have their cross terms counted); each further backward pass appends its rows.
    A factor on the loss (a gradient scaler's, 1/k for k accumulated passes) enters squared.

    Args:
        model: any module. BatchNorm on batch statistics, transposed convolutions and layers without a rule are refused.
        loss_reduction: "mean" where the loss is the mean over the batch (norms are multiplied by B²), or "sum".
        parameters: only these parameters of the model; None for all that require a gradient.

    Raises:
        UnsupportedModule: on entry, with the module's name and what to do; the model is untouched.
        ValueError: an unknown reduction, a parameter that is not the model's, or nothing to track.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss_reduction: Literal["mean", "sum"] = "mean",
        parameters: Iterable[nn.Parameter] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction must be 'mean' or 'sum', got {loss_reduction!r}")
        self._model = model
        self._mean = loss_reduction == "mean"
        self._parameters = None if parameters is None else list(parameters)
        self._undo: list[Callable[[], object]] = []

    def __enter__(self) -> SampleNorms:
        if self._undo:
            raise RuntimeError("this context is already entered: make another per_sample_sq_norms")
        modules = list(self._model.named_modules(remove_duplicate=False))
        names, aliases = self._tracked(modules)
        self._recorder = Recorder(names)
        once = {module: label for label, module in reversed(modules)}
        plans = [plan for module, label in reversed(once.items()) if (plan := self._plan(label, module, names))]
        try:
            for module, forward in plans:
                module.__dict__["forward"] = forward
                self._undo.append(functools.partial(module.__dict__.pop, "forward", None))
            for handle in self._recorder.watch():
                self._undo.append(handle.remove)
        except BaseException:
            self._leave()
            raise
        return SampleNorms(self._recorder, aliases, self._mean)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        self._recorder.closed = True
        while self._undo:
            self._undo.pop()()

    def _tracked(self, modules: list[tuple[str, nn.Module]]) -> tuple[dict[nn.Parameter, str], dict[str, str]]:
        """Each tracked parameter's first name, and for every name that first name."""
        wanted = None if self._parameters is None else {id(p) for p in self._parameters}
        names: dict[nn.Parameter, str] = {}
        aliases: dict[str, str] = {}
        met: set[int] = set()
        for label, module in modules:
            for own, parameter in module._parameters.items():
                if parameter is None:
                    continue
                name = f"{label}.{own}" if label else own
                if is_lazy(parameter):
                    raise UnsupportedModule(f"{name} is not initialised yet: run the model once before")
                met.add(id(parameter))
                if parameter.requires_grad and (wanted is None or id(parameter) in wanted):
                    aliases[name] = names.setdefault(parameter, name)
        if wanted is not None and (missing := len(wanted - met)):
            raise ValueError(f"{missing} of the {len(wanted)} given parameters are not the model's")
        if not names:
            raise ValueError("nothing to track: no parameter, or none of those given, requires a gradient")
        return names, aliases

    def _plan(
        self, place: str, module: nn.Module, names: Mapping[nn.Parameter, str]
    ) -> tuple[nn.Module, Callable[..., Any]] | None:
        """The forward to put in place of the module's own, if it needs one."""
        own = {name: names[p] for name, p in module._parameters.items() if p is not None and p in names}
        kind = type(module)
        opaque, couples = _traits(kind)  # type: ignore[arg-type]  # classes are hashable
        if not (own or opaque or couples):
            return None
        if opaque:
            raise UnsupportedModule(
                f"{label_of(place, module)} hides its layers: pass the plain module that it was made from"
            )
        found = rule_of(kind)
        if found is None:
            if isinstance(module, _TRANSPOSED):
                advice = "transposed convolutions are not supported: use upsampling and a convolution"
            else:
                advice = "no rule for it"
            raise UnsupportedModule(
                f"{label_of(place, module)}: {advice}, or teach it with svag_fast.register_rule({kind.__name__}) "
                "(svag_fast.by_vmap is a rule without a formula), freeze it, or leave its parameters out with "
                "parameters=..."
            )
        base, rule = found
        if "forward" in module.__dict__:
            raise UnsupportedModule(
                f"{label_of(place, module)} has a forward of its own put onto the instance: first leave the other "
                "per_sample_sq_norms context, or take the patch off"
            )
        if kind is not base and any(getattr(kind, m, None) is not getattr(base, m, None) for m in _FORWARD_METHODS):
            raise UnsupportedModule(
                f"{label_of(place, module)} overrides the forward of {base.__name__}, so that its rule may be wrong: "
                f"give it its own with svag_fast.register_rule({kind.__name__})"
            )
        scope = Scope(self._recorder, own, place, module)
        _refuse(rule, scope)
        if rule.knows is not None and (unknown := own.keys() - rule.knows):
            raise UnsupportedModule(
                f"{scope.label} has the parameter {sorted(unknown)[0]!r}, which {base.__name__} has not "
                "(reparametrised, as by weight_norm?): give it a rule with svag_fast.register_rule, or remove the "
                "reparametrisation"
            )
        return module, _forward(rule, scope)


@functools.cache
def _traits(kind: type[nn.Module]) -> tuple[bool, bool]:
    """Whether modules of a type hide their layers, and whether they are to be looked at without parameters too."""
    opaque = issubclass(kind, _OPAQUE) or kind.__name__ == "OptimizedModule"
    return opaque, issubclass(kind, nn.modules.batchnorm._BatchNorm)


def _refuse(rule: Rule, scope: Scope) -> None:
    reason = rule.refusal(scope.module)
    if reason is not None:
        raise UnsupportedModule(f"{scope.label}: {reason}")


def _forward(rule: Rule, scope: Scope) -> Callable[..., Any]:
    module = scope.module
    plain = type(module).forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        _refuse(rule, scope)
        if not (torch.is_grad_enabled() and scope.names):
            return plain(module, *args, **kwargs)
        return rule.run(scope, module, args, kwargs)

    return forward
