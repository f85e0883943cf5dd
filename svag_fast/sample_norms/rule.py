"""How each kind of layer tells its samples' gradients apart: one rule a kind, with its formula.

Notation: b is the gradient of the loss in the layer's output, a its input, i the sample (first dimension), t the other
positions (tokens, pixels). A rule for a layer of your own is one function; see `register_rule`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from svag_fast.ops.memory import has_memory
from svag_fast.sample_norms import checks
from svag_fast.sample_norms.dispatch import plain_forward, run_plainly
from svag_fast.sample_norms.tape import Recorder, SampleGrads, Use, hook, row_sq_norms, sample_chunks

# (module, inputs, output_grad) -> name of a parameter of the module itself -> per-sample gradients [B, *shape]
RuleFunction: TypeAlias = Callable[[Any, tuple[Any, ...], Tensor], Mapping[str, Tensor]]
_F = TypeVar("_F", bound=RuleFunction)


class Known:
    """What earlier passes, in whatever context, found out about a layer under its rule."""

    def __init__(self, rule: Rule, batch_size_given: bool) -> None:
        self.rule = rule
        self.batch_size_given = batch_size_given  # another batch size makes other inputs samples
        self.samples_only = False  # called on samples, and never on a value that all samples share
        self.shared_only = False
        self.mixed = False
        self.doubtful = False  # called on samples that don't show it, so that the pass has to be followed
        self.asked: int | None = None  # how often at most, in a pass that taught nothing new
        self.rows_checked = False  # whether its rows were found to be the samples
        self.checked: set[tuple[str, torch.dtype, bool]] = set()  # parameters, with dtype, and whether on CUDA

    @property
    def settled(self) -> bool:
        """Whether the layer's input will be of the kind that it was of."""
        return self.samples_only or self.shared_only

    def add(self, samples: bool, plain: bool) -> bool:
        """Note a call on samples, which show it or don't, or on a value that they share; whether that is new."""
        before = self.samples_only, self.shared_only, self.doubtful
        self.doubtful = self.doubtful or (samples and not plain)
        if self.mixed or (self.shared_only if samples else self.samples_only):
            self.mixed, self.samples_only, self.shared_only = True, False, False
        else:
            self.samples_only, self.shared_only = samples, not samples
        return before != (self.samples_only, self.shared_only, self.doubtful)


class Scope:
    """One module inside the context, for its rule.

    Attributes:
        recorder: of the context.
        names: which of the module's own parameters are tracked, and as what.
        place: the module's name in the model.
        check: whether every pass is compared with the samples' own gradients.
    """

    recorder: Recorder
    names: Mapping[str, str]
    place: str
    module: nn.Module
    known: Known
    check: bool

    @property
    def label(self) -> str:
        """The module's name and type, for messages."""
        return label_of(self.place, self.module)

    def use(self, name: str, part: tuple[int, int] | None = None) -> Use | None:
        """A new use of the module's parameter `name`; None where it is not tracked."""
        return Use(self.recorder, self.names[name], part) if name in self.names else None

    def alias(self, module: nn.Module, name: str, shown: Callable[[Tensor], None] | None = None) -> Tensor:
        """The parameter as a view whose gradient is noted as due, so that uses elsewhere are noticed, and shown."""
        parameter = module._parameters[name]
        assert parameter is not None
        if name not in self.names:
            return parameter
        alias = parameter.view_as(parameter)
        tracked = self.names[name]
        if shown is not None:
            hook(alias, shown)
        hook(alias, lambda grad: self.recorder.expect(tracked, grad) if grad is not None else None)
        return alias

    def to_check(self, name: str, like: Tensor) -> bool:
        """Whether the gradient of the module's parameter is to be compared with the samples' own in this use."""
        return (self.check or (name, like.dtype, like.is_cuda) not in self.known.checked) and has_memory(like)

    def checked(self, name: str, like: Tensor) -> None:
        """Note that it was right."""
        self.known.checked.add((name, like.dtype, like.is_cuda))


def label_of(place: str, module: nn.Module) -> str:
    """How messages call the module at a place in the model."""
    return f"{place or 'the model'} ({type(module).__name__})"


class Rule:
    """A kind of layer: by default its own forward, with its output's gradient caught on the way back.

    `sample_grads` is all that most rules say; the plain gradient stays PyTorch's. `sq_norms` may be overridden where
    the norms can be had without the gradients.
    """

    # Names of the parameters that the rule knows; None where it is asked in the backward pass.
    knows: frozenset[str] | None = None
    # Whether the layer acts on the last dimensions only, so that it takes any dimensions behind the samples.
    any_rows = False

    def least_dims(self, module: Any) -> int:
        """The fewest dimensions of an input with samples."""
        return 1

    def refusal(self, module: Any) -> str | None:
        """Why this module can't be served with its present options, or None."""
        return None

    def sample_grads(self, module: Any, inputs: tuple[Any, ...], output_grad: Tensor) -> Mapping[str, Tensor]:
        """Each sample's gradient [B, *shape] of each parameter of the module itself."""
        raise NotImplementedError

    def sq_norms(
        self, module: Any, inputs: tuple[Any, ...], output_grad: Tensor, shapes: Mapping[str, torch.Size]
    ) -> Mapping[str, Tensor]:
        """|g_i|² [B] of each parameter in `shapes`, a few samples at a time."""
        B = output_grad.shape[0]
        norms: dict[str, list[Tensor]] = {name: [] for name in shapes}
        for rows in sample_chunks(B, max(math.prod(shape) for shape in shapes.values())):
            grads = self.sample_grads(module, _rows(inputs, B, rows), output_grad[rows])
            for name, shape in shapes.items():
                if name not in grads or grads[name].shape[1:] != shape:
                    got = list(grads[name].shape) if name in grads else "none"
                    raise ValueError(
                        f"the rule's {name} for {type(module).__name__} must be [B, {list(shape)}], got {got}"
                    )
                norms[name].append(row_sq_norms(grads[name]))
        return {name: torch.cat(parts) for name, parts in norms.items()}

    def total(
        self, module: Any, inputs: tuple[Any, ...], output_grad: Tensor, shapes: Mapping[str, torch.Size]
    ) -> dict[str, Tensor]:
        """Σ_i g_i of each parameter in `shapes`, by the rule, in double precision."""
        B = output_grad.shape[0]
        sums: dict[str, Tensor] = {}
        for rows in sample_chunks(B, max(math.prod(shape) for shape in shapes.values())):
            grads = self.sample_grads(module, _rows(inputs, B, rows), output_grad[rows])
            for name in shapes:
                part = checks.double(grads[name]).sum(0)
                sums[name] = sums[name] + part if name in sums else part
        return sums

    def run(self, scope: Scope, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's forward, such that the backward pass delivers to the scope's recorder."""
        inputs = (*args, *kwargs.values())
        if not all(isinstance(x, Tensor) for x in inputs):
            raise TypeError(
                f"{scope.label} must be a module that takes tensors and returns one tensor, which a rule needs, got "
                f"{[type(x).__name__ for x in inputs]} as inputs"
            )
        least = self.least_dims(module)
        if inputs[0].dim() < least:
            raise ValueError(
                f"the input of {scope.label} must be [B, ...] of at least {least} dimension{'s' * (least > 1)} for "
                f"per-sample norms, got {list(inputs[0].shape)}"
            )
        own = module._parameters
        plain = {name: own[name] for name in scope.names}
        shapes = {name: p.shape for name, p in plain.items() if p is not None}
        sums: dict[str, tuple[Tensor, Tensor]] = {}
        to_check = {name: shape for name, shape in shapes.items() if scope.to_check(name, inputs[-1])}
        try:
            for name in shapes:
                shown = functools.partial(checks.check_sum, scope, name, sums, inputs[-1]) if name in to_check else None
                own[name] = scope.alias(module, name, shown)  # type: ignore[assignment]
            output = plain_forward(type(module))(module, *args, **kwargs)
        finally:
            own.update(plain)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"{scope.label} must be a module that takes tensors and returns one tensor, which a rule needs, got a "
                f"{type(output).__name__} as output"
            )
        if not output.requires_grad:
            return output
        if output._is_view():  # its node, and hook, would be replaced where somebody changes it in place
            output = output.clone()
        if output.dim() == 0 or not any(x.dim() > 0 and x.shape[0] == output.shape[0] for x in inputs):
            raise ValueError(
                f"the first dimension of {scope.label}'s input and output must be the samples, got "
                f"{list(inputs[0].shape)} and {list(output.shape)}"
            )
        seen = SeenCall(scope.label, module, inputs)
        module = seen.module
        uses = {name: scope.use(name) for name in shapes}

        def sample_grads(name: str, output_grad: Tensor) -> SampleGrads:
            B = output_grad.shape[0]
            return lambda rows: self.sample_grads(module, _rows(inputs, B, rows), output_grad[rows])[name]

        def deliver(output_grad: Tensor) -> Tensor | None:
            if scope.recorder.paused:
                return None
            with torch.no_grad(), in_full_precision(output_grad):
                for name, sq_norms in seen.sq_norms(self, output_grad, shapes).items():
                    use = uses[name]
                    assert use is not None
                    use.deliver(sq_norms, sample_grads(name, output_grad))
                    if scope.check:
                        checks.check_norms(scope, name, sq_norms, sample_grads(name, output_grad))
                if to_check:
                    size = output_grad.abs().sum(dtype=torch.float64) * (1 + checks.largest(inputs))
                    for name, total in self.total(module, inputs, output_grad, to_check).items():
                        sums[name] = total, size
            return scope.recorder.watch_second(output_grad, scope.label) if torch.is_grad_enabled() else None

        hook(output, deliver)
        return output


class SeenCall:
    """A layer's inputs, options and statistics in a forward pass, for the backward pass, before which they may change.

    Args:
        label: of the layer, for messages.
        module: the layer.
        inputs: what it was called on.
    """

    def __init__(self, label: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.module = _as_it_is(module)
        self._label = label
        self._inputs = inputs
        self._versions = [x._version for x in inputs]

    def sq_norms(self, rule: Rule, output_grad: Tensor, shapes: Mapping[str, torch.Size]) -> Mapping[str, Tensor]:
        """|g_i|² [B] of each parameter in `shapes`.

        Raises:
            RuntimeError: an input was changed in place since.
        """
        if [x._version for x in self._inputs] != self._versions:
            raise RuntimeError(
                f"an input of {self._label} was changed by an in-place operation before the backward pass"
            )
        return rule.sq_norms(self.module, self._inputs, output_grad, shapes)


def _as_it_is(module: nn.Module) -> nn.Module:
    """The module with the options and statistics of this forward pass, for the backward pass, before which they may be
    changed."""
    out = object.__new__(type(module))
    out.__dict__.update(module.__dict__)
    out.__dict__["_parameters"] = dict(module._parameters)
    if module._buffers:
        buffers = {name: None if x is None else x.detach().clone() for name, x in module._buffers.items()}
        out.__dict__["_buffers"] = buffers
    return out


def _rows(inputs: tuple[Any, ...], B: int, rows: slice) -> tuple[Any, ...]:
    """The samples in a slice, of all inputs that have samples."""
    return tuple(x[rows] if x.dim() > 0 and x.shape[0] == B else x for x in inputs)


class FunctionRule(Rule):
    """One whose samples' gradients a function gives."""

    def __init__(
        self,
        function: RuleFunction,
        knows: frozenset[str] | None = None,
        least_dims: Callable[[Any], int] = lambda module: 1,
        any_rows: bool = False,
    ) -> None:
        self.function = function
        self.knows = knows
        self._least_dims = least_dims
        self.any_rows = any_rows

    def least_dims(self, module: Any) -> int:
        """The fewest dimensions of an input with samples."""
        return self._least_dims(module)

    def sample_grads(self, module: Any, inputs: tuple[Any, ...], output_grad: Tensor) -> Mapping[str, Tensor]:
        """Each sample's gradient [B, *shape] of weight and bias."""
        return self.function(module, inputs, output_grad)


_RULES: dict[type[nn.Module], Rule] = {}
CHANGES = [0]  # how often the table was changed


def rule_of(kind: type[nn.Module]) -> tuple[type[nn.Module], Rule] | None:
    """The rule of the nearest registered class among the module type and its parents."""
    for base in kind.__mro__:
        if base in _RULES:
            return base, _RULES[base]
    return None


def register_rule(*module_types: type[nn.Module]) -> Callable[[_F], _F]:
    """Decorator: teach `per_sample_sq_norms` a kind of layer, or replace what it knows of one.

    The function gets the module, its inputs and the gradient of the loss in its output, each with the samples first.
    It returns each sample's gradient [b, *shape] of the module's own parameters, by name. Those of the module's
    children have their own rules. The function may be called with some of the samples at a time, so that all B
    gradients never exist at once.

    Example:
        >>> @register_rule(Scale)  # y = weight * x, weight [C], x [B, T, C]
        ... def scale(module, inputs, output_grad):
        ...     return {"weight": (output_grad * inputs[0]).sum(1)}

    Subclasses that don't override `forward` share the rule. `by_vmap` is a rule without a formula.
    """
    if not module_types:
        raise ValueError("module_types must be one class or more, got none")
    for kind in module_types:
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise TypeError(f"module_types must be classes derived from torch.nn.Module, got {kind!r}")

    def decorate(function: _F) -> _F:
        for kind in module_types:
            register(FunctionRule(function), kind)
        return function

    return decorate


def register(rule: Rule, *module_types: type[nn.Module]) -> None:
    """Put a rule object into the table."""
    _RULES.update(dict.fromkeys(module_types, rule))
    CHANGES[0] += 1


def by_vmap(module: nn.Module, inputs: tuple[Any, ...], output_grad: Tensor) -> Mapping[str, Tensor]:
    """g_i = ∂⟨b_i, f(x_i)⟩/∂w by torch.func, for layers without a formula: repeats the layer's forward and backward."""
    own = {name: p.detach() for name, p in module._parameters.items() if p is not None}
    plain = dict(module._parameters)
    forward = plain_forward(type(module))
    B = output_grad.shape[0]
    if B == 0:
        return {name: p.new_zeros(0, *p.shape) for name, p in own.items()}
    with_samples = [x.dim() > 0 and x.shape[0] == B for x in inputs]

    def weighted(weights: dict[str, Tensor], b: Tensor, *sample: Tensor) -> Tensor:
        rows = (x[None] if has else x for x, has in zip(sample, with_samples, strict=True))
        try:
            module._parameters.update(weights)  # type: ignore[arg-type]
            output = forward(module, *rows)
        finally:
            module._parameters.update(plain)
        inner: Tensor = (output[0] * b.conj()).sum()
        return inner.real if inner.is_complex() else inner

    dims = (None, 0, *(0 if has else None for has in with_samples))
    with run_plainly():  # a child has a rule of its own
        out: Mapping[str, Tensor] = torch.func.vmap(torch.func.grad(weighted), dims)(own, output_grad, *inputs)
    return out


_NOTHING = nullcontext()


def in_full_precision(grad: Tensor) -> AbstractContextManager[Any]:
    """Sums over an output's gradient keep their precision, even where the backward pass runs under autocast. Raises
    where it is not one backward pass, but many at once."""
    if torch._C._functorch.is_functorch_wrapped_tensor(grad) or torch._C._functorch.is_legacy_batchedtensor(grad):
        raise RuntimeError(
            "a backward pass under torch.func's transforms (vmap of autograd.grad, is_grads_batched=True, "
            "vectorize=True) inside per_sample_sq_norms, which measures plain ones: take it outside of the context"
        )
    kind = grad.device.type
    if not torch._C._is_any_autocast_enabled() or kind == "meta" or not torch.is_autocast_enabled(kind):
        return _NOTHING
    off: AbstractContextManager[Any] = torch.autocast(kind, enabled=False)
    return off
