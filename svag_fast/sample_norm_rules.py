"""How each kind of layer tells its samples' gradients apart: one rule a kind, with its formula.

Notation: b is the gradient of the loss in the layer's output, a its input, i the sample (first dimension), t the other
positions (tokens, pixels). A rule for a layer of your own is one function; see `register_rule`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svag_fast.sample_norm_tape import Recorder, SampleGrads, Use, hook, row_sq_norms, sample_chunks

# (module, inputs, output_grad) -> name of a parameter of the module itself -> per-sample gradients [B, *shape]
RuleFunction: TypeAlias = Callable[[Any, tuple[Any, ...], Tensor], Mapping[str, Tensor]]
_F = TypeVar("_F", bound=RuleFunction)


class Scope:
    """One module inside the context: the recorder, and which of the module's own parameters are tracked as what."""

    def __init__(self, recorder: Recorder, names: Mapping[str, str], place: str, module: nn.Module) -> None:
        self.recorder = recorder
        self.names = names
        self.place = place
        self.module = module
        self.cache: Any = None  # what a rule derives from the module's options once

    @property
    def label(self) -> str:
        """The module's name and type, for messages."""
        return label_of(self.place, self.module)

    def use(self, name: str, part: tuple[int, int] | None = None) -> Use | None:
        """A new use of the module's parameter `name`; None where it is not tracked."""
        return Use(self.recorder, self.names[name], part) if name in self.names else None

    def alias(self, module: nn.Module, name: str) -> Tensor:
        """The parameter as a view whose gradient is noted as due, so that uses elsewhere are noticed."""
        parameter = module._parameters[name]
        assert parameter is not None
        if name not in self.names:
            return parameter
        alias = parameter.view_as(parameter)
        tracked = self.names[name]
        hook(alias, lambda grad: self.recorder.expect(tracked, grad))
        return alias


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
                        f"the rule for {type(module).__name__} must give {name} [B, {list(shape)}], got {got}"
                    )
                norms[name].append(row_sq_norms(grads[name]))
        return {name: torch.cat(parts) for name, parts in norms.items()}

    def run(self, scope: Scope, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's forward, such that the backward pass delivers to the scope's recorder."""
        own = module._parameters
        plain = {name: own[name] for name in scope.names}
        shapes = {name: p.shape for name, p in plain.items() if p is not None}
        try:
            for name in shapes:
                own[name] = scope.alias(module, name)  # type: ignore[assignment]
            output = type(module).forward(module, *args, **kwargs)
        finally:
            own.update(plain)
        if not isinstance(output, Tensor) or not all(isinstance(x, Tensor) for x in (*args, *kwargs.values())):
            raise TypeError(f"{scope.label}: a rule needs a module that takes tensors and returns one tensor")
        if not output.requires_grad:
            return output
        inputs = (*args, *kwargs.values())
        versions = [x._version for x in inputs]
        uses = {name: scope.use(name) for name in shapes}

        def sample_grads(name: str, output_grad: Tensor) -> SampleGrads:
            B = output_grad.shape[0]
            return lambda rows: self.sample_grads(module, _rows(inputs, B, rows), output_grad[rows])[name]

        def deliver(output_grad: Tensor) -> None:
            if [x._version for x in inputs] != versions:
                raise RuntimeError(
                    f"an input of {scope.label} was changed by an in-place operation before the backward pass"
                )
            with torch.no_grad(), without_autocast(output_grad):
                for name, sq_norms in self.sq_norms(module, inputs, output_grad, shapes).items():
                    use = uses[name]
                    assert use is not None
                    use.deliver(sq_norms, sample_grads(name, output_grad))

        hook(output, deliver)
        return output


def _rows(inputs: tuple[Any, ...], B: int, rows: slice) -> tuple[Any, ...]:
    """The samples in a slice, of all inputs that have samples."""
    return tuple(x[rows] if x.dim() > 0 and x.shape[0] == B else x for x in inputs)


class _FunctionRule(Rule):
    def __init__(self, function: RuleFunction) -> None:
        self.function = function

    def sample_grads(self, module: Any, inputs: tuple[Any, ...], output_grad: Tensor) -> Mapping[str, Tensor]:
        return self.function(module, inputs, output_grad)


_RULES: dict[type[nn.Module], Rule] = {}


def rule_of(kind: type[nn.Module]) -> tuple[type[nn.Module], Rule] | None:
    """The rule of the nearest registered class among the module type and its parents."""
    for base in kind.__mro__:
        if base in _RULES:
            return base, _RULES[base]
    return None


def register_rule(*module_types: type[nn.Module]) -> Callable[[_F], _F]:
    """Decorator: teach `per_sample_sq_norms` a kind of layer, or replace what it knows of one.

    The function gets the module, its inputs and the gradient of the loss in its output, each with the samples first,
    and returns each sample's gradient [b, *shape] of the module's own parameters, by name (those of its children have
    their own rules). It may be called with some of the samples at a time, so that all B gradients never exist at once.

    Example:
        >>> @register_rule(Scale)  # y = weight * x, weight [C], x [B, T, C]
        ... def scale(module, inputs, output_grad):
        ...     return {"weight": (output_grad * inputs[0]).sum(1)}

    Subclasses that don't override `forward` share the rule. `by_vmap` is a rule without a formula.
    """
    if not module_types:
        raise ValueError("register_rule needs at least one module type")
    for kind in module_types:
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise TypeError(f"register_rule takes classes derived from torch.nn.Module, not {kind!r}")

    def register(function: _F) -> _F:
        for kind in module_types:
            _RULES[kind] = _FunctionRule(function)
        return function

    return register


def register(rule: Rule, *module_types: type[nn.Module]) -> None:
    """Put a rule object into the table."""
    _RULES.update(dict.fromkeys(module_types, rule))


def by_vmap(module: nn.Module, inputs: tuple[Any, ...], output_grad: Tensor) -> Mapping[str, Tensor]:
    """g_i = ∂⟨b_i, f(x_i)⟩/∂w by torch.func, for layers without a formula: repeats the layer's forward and backward."""
    own = {name: p.detach() for name, p in module._parameters.items() if p is not None}
    plain = dict(module._parameters)

    def weighted(weights: dict[str, Tensor], b: Tensor, *sample: Tensor) -> Tensor:
        try:
            module._parameters.update(weights)  # type: ignore[arg-type]
            output = type(module).forward(module, *(x[None] for x in sample))
        finally:
            module._parameters.update(plain)
        inner: Tensor = (output[0] * b).sum()
        return inner

    per_sample = torch.func.vmap(torch.func.grad(weighted), (None, 0, *(0 for _ in inputs)))
    out: Mapping[str, Tensor] = per_sample(own, output_grad, *inputs)
    return out


_NOTHING = nullcontext()


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Sums keep their precision, even where the backward pass runs under autocast."""
    kind = tensor.device.type
    if not torch.is_autocast_enabled(kind):
        return _NOTHING
    off: AbstractContextManager[Any] = torch.autocast(kind, enabled=False)
    return off


def _positions(x: Tensor) -> Tensor:
    """Σ_t over everything behind [B, C]."""
    return x.flatten(2).sum(2) if x.dim() > 2 else x


def _wide(x: Tensor) -> Tensor:
    """At least float32: half-precision products are summed in it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@register_rule(nn.GroupNorm)
def group_norm(module: nn.GroupNorm, inputs: tuple[Any, ...], output_grad: Tensor) -> Mapping[str, Tensor]:
    """Weight: Σ_t b_t ⊙ x̂_t, x̂ the normalised input; bias: Σ_t b_t."""
    normalised = F.group_norm(_wide(inputs[0]), module.num_groups, eps=module.eps)
    return _affine(normalised, output_grad)


@register_rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def instance_norm(module: Any, inputs: tuple[Any, ...], output_grad: Tensor) -> Mapping[str, Tensor]:
    """As GroupNorm's, with one group a channel, or with the running statistics where the module uses those."""
    x = _wide(inputs[0])
    if module.training or not module.track_running_stats:
        return _affine(F.instance_norm(x, eps=module.eps), output_grad)
    return _affine(_by_running_statistics(module, x), output_grad)


def _by_running_statistics(module: Any, x: Tensor) -> Tensor:
    out: Tensor = F.batch_norm(x, module.running_mean, module.running_var, None, None, False, 0.0, module.eps)
    return out


def _affine(normalised: Tensor, output_grad: Tensor) -> Mapping[str, Tensor]:
    return {"weight": _positions(output_grad * normalised), "bias": _positions(_wide(output_grad))}


@register_rule(nn.LayerNorm)
def layer_norm(module: nn.LayerNorm, inputs: tuple[Any, ...], output_grad: Tensor) -> Mapping[str, Tensor]:
    """Weight: Σ_t b_t ⊙ x̂_t over the dimensions between the samples and the normalised ones; bias: Σ_t b_t."""
    normalised = F.layer_norm(_wide(inputs[0]), module.normalized_shape, eps=module.eps)
    return {
        "weight": _tokens(output_grad * normalised, module.normalized_shape),
        "bias": _tokens(_wide(output_grad), module.normalized_shape),
    }


@register_rule(nn.RMSNorm)
def rms_norm(module: nn.RMSNorm, inputs: tuple[Any, ...], output_grad: Tensor) -> Mapping[str, Tensor]:
    """Σ_t b_t ⊙ x_t / rms(x_t)."""
    # Where eps is None, PyTorch takes the epsilon of the input's own dtype.
    eps = torch.finfo(inputs[0].dtype).eps if module.eps is None else module.eps
    normalised = F.rms_norm(_wide(inputs[0]), list(module.normalized_shape), eps=eps)
    return {"weight": _tokens(output_grad * normalised, module.normalized_shape)}


def _tokens(x: Tensor, kept: tuple[int, ...]) -> Tensor:
    """Σ_t over the dimensions between the samples and the last ones of shape `kept`."""
    return x.reshape(x.shape[0], -1, *kept).sum(1)


@register_rule(nn.PReLU)
def prelu(module: nn.PReLU, inputs: tuple[Any, ...], output_grad: Tensor) -> Mapping[str, Tensor]:
    """Σ_t b_t min(x_t, 0), over the channels too where they share one slope."""
    x = _wide(inputs[0])
    rows = output_grad * x.clamp(max=0)
    if module.num_parameters == 1:
        return {"weight": rows.flatten(1).sum(1, keepdim=True)}
    return {"weight": _positions(rows)}


class _BatchNorm(Rule):
    """By its running statistics (evaluation mode) as GroupNorm's; in training mode the samples are coupled."""

    knows = frozenset({"weight", "bias"})

    def refusal(self, module: Any) -> str | None:
        if module.training or module.running_mean is None:
            return (
                "BatchNorm that uses the batch's statistics couples the samples, so that none has a gradient of its "
                "own (with affine=False too): use svag_fast.noise.from_two_batches or StepStats, replace it by "
                "GroupNorm, or put it into evaluation mode"
            )
        return None

    def sample_grads(self, module: Any, inputs: tuple[Any, ...], output_grad: Tensor) -> Mapping[str, Tensor]:
        return _affine(_by_running_statistics(module, _wide(inputs[0])), output_grad)


class _Embedding(Rule):
    """|g_i|² = Σ_v |Σ_{t: index_t = v} b_t|²: only rows that are looked up, padding_idx without."""

    knows = frozenset({"weight"})

    def refusal(self, module: Any) -> str | None:
        if module.scale_grad_by_freq:
            return "scale_grad_by_freq=True divides by counts over the batch, which couples the samples"
        if module.max_norm is not None:
            return "max_norm rewrites the weight in each forward pass: renormalise it between the steps instead"
        if module.sparse:
            return "sparse=True gives sparse gradients, which have no fused step: use sparse=False"
        return None

    def sample_grads(self, module: Any, inputs: tuple[Any, ...], output_grad: Tensor) -> Mapping[str, Tensor]:
        index, b = self._lookups(module, inputs[0], output_grad)
        grads = b.new_zeros(index.shape[0], module.num_embeddings, module.embedding_dim)
        samples = torch.arange(index.shape[0], device=index.device)[:, None].expand_as(index)
        return {"weight": grads.index_put_((samples, index), b, accumulate=True)}

    def sq_norms(
        self, module: Any, inputs: tuple[Any, ...], output_grad: Tensor, shapes: Mapping[str, torch.Size]
    ) -> Mapping[str, Tensor]:
        index, b = self._lookups(module, inputs[0], output_grad)
        B = index.shape[0]
        samples = torch.arange(B, device=index.device)[:, None]
        keys, inverse = torch.unique(samples * module.num_embeddings + index, return_inverse=True)
        rows = b.new_zeros(keys.numel(), b.shape[-1]).index_add_(0, inverse.flatten(), b.flatten(0, 1))
        out = torch.zeros(B, dtype=torch.float64, device=b.device)
        return {"weight": out.index_add_(0, keys // module.num_embeddings, row_sq_norms(rows))}

    def _lookups(self, module: Any, index: Tensor, output_grad: Tensor) -> tuple[Tensor, Tensor]:
        """Indices [B, T] and their output gradients [B, T, d], zero at the padding index."""
        B = index.shape[0]
        index = index.reshape(B, -1)
        b = _wide(output_grad).reshape(B, -1, output_grad.shape[-1])
        if module.padding_idx is not None:
            b = b * (index != module.padding_idx)[..., None]
        return index, b


register(_BatchNorm(), nn.modules.batchnorm._BatchNorm)
register(_Embedding(), nn.Embedding)
