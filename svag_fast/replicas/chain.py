"""Models that are a chain of layers, read as plain data: a table of layers, and all parameters in one flat vector.

chain = chain_of(model)                   # refused, by path and class, where the model is no such chain
weights = chain.flatten(model).weights    # [P], the trained parameters in the order of model.parameters()
model = chain.unflatten(weights)          # an ordinary model again
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from svag_fast.nn.fuse import FusedSequential
from svag_fast.optim.grad_watch import hooks_on
from svag_fast.sample_norms.plan import UnsupportedModuleError


@dataclass(frozen=True)
class Parameter:
    """Where a parameter, or a buffer that takes its place, is in the flat vectors.

    Attributes:
        name: its name in the model.
        shape: its shape.
        trained: in ``weights``; else in ``frozen``.
        offset: of its first element there.
    """

    name: str
    shape: tuple[int, ...]
    trained: bool
    offset: int

    @property
    def end(self) -> int:
        """The offset behind its last element."""
        return self.offset + math.prod(self.shape)


@dataclass(frozen=True)
class ChainLayer:
    """One layer.

    Attributes:
        path: the module's name in the model, and its class, for messages.
        kind: linear, conv, group_norm, layer_norm, relu, tanh, gelu, gelu_tanh, pool, global_pool or flatten.
        sizes: of linear (in, out); of conv (in, out, kernel, stride down, stride across); of group_norm (groups,
            channels); of layer_norm its shape; of pool (height, width, stride down, stride across).
        eps: of a norm.
        weight, bias: their names, or None.
    """

    path: str
    kind: str
    sizes: tuple[int, ...] = ()
    eps: float = 0.0
    weight: str | None = None
    bias: str | None = None


class FlatParameters(NamedTuple):
    """A model's values, float32: ``weights`` [P] are trained, ``frozen`` [F] are not."""

    weights: Tensor
    frozen: Tensor


@dataclass(frozen=True)
class Chain:
    """A model as plain data.

    Attributes:
        layers: in the order in which they are applied.
        parameters: trained and frozen ones in the order of ``model.parameters()``, then fixed buffers.
    """

    layers: tuple[ChainLayer, ...]
    parameters: tuple[Parameter, ...]
    _template: nn.Module = field(repr=False, compare=False)

    @property
    def weight_count(self) -> int:
        """P, the number of trained parameters."""
        return sum(math.prod(p.shape) for p in self.parameters if p.trained)

    @property
    def frozen_count(self) -> int:
        """F, the number of values that are not trained."""
        return sum(math.prod(p.shape) for p in self.parameters if not p.trained)

    def parameter(self, name: str) -> Parameter:
        """Return where a parameter is, by its name in the model."""
        return next(p for p in self.parameters if p.name == name)

    def flatten(self, model: nn.Module) -> FlatParameters:
        """Return the values of a model that is the same chain.

        Raises:
            UnsupportedModuleError: it is no chain.
            ValueError: it is another one.
        """
        if chain_of(model) != self:
            raise ValueError("model must be of the chain's layers and parameters, got others")
        return self._values(model)

    def initial(self) -> FlatParameters:
        """Return the values of the model that the chain was read from."""
        return self._values(self._template)

    def _values(self, model: nn.Module) -> FlatParameters:
        values = {**dict(model.named_parameters()), **dict(model.named_buffers())}

        def flat(trained: bool) -> Tensor:
            parts = [values[p.name].detach().reshape(-1) for p in self.parameters if p.trained == trained]
            return torch.cat([torch.empty(0, dtype=torch.float32, device="cpu"), *parts])

        return FlatParameters(flat(True), flat(False))

    def unflatten(self, weights: Tensor, frozen: Tensor | None = None) -> nn.Module:
        """Return an ordinary model with these values.

        Args:
            weights: [P] float32.
            frozen: [F] float32; by default those of the model that the chain was read from.

        Raises:
            ValueError: a tensor has another shape or dtype.
        """
        for name, flat, count in (("weights", weights, self.weight_count), ("frozen", frozen, self.frozen_count)):
            if flat is not None and (flat.shape != (count,) or flat.dtype != torch.float32):
                raise ValueError(f"{name} must be torch.float32 [{count}], got {flat.dtype} {list(flat.shape)}")
        model = copy.deepcopy(self._template)
        values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        with torch.no_grad():
            for p in self.parameters:
                flat = weights if p.trained else frozen
                if flat is not None:
                    values[p.name].copy_(flat[p.offset : p.end].view(p.shape))
        return model


@dataclass(frozen=True)
class FixedLinear:
    """For :func:`register_chain`: a linear layer without bias whose weight is the module's buffer of this name."""

    buffer: str


ChainStep: TypeAlias = "nn.Module | FixedLinear"
ChainRule: TypeAlias = Callable[[Any], Sequence[tuple[str, ChainStep]]]
_RULES: dict[type[nn.Module], ChainRule] = dict.fromkeys(
    (nn.Sequential, FusedSequential), lambda module: list(module._modules.items())
)


def register_chain(cls: type[nn.Module], rule: ChainRule) -> None:
    """Say that modules of exactly this class are chains.

    Args:
        cls: the class; a subclass of it needs its own rule.
        rule: from a module to what its ``forward`` applies one after the other: pairs of a name and a module, which is
            the module's child of that name, or a layer without parameters in place of a function (``("mean",
            nn.AdaptiveAvgPool2d(1))``), or a :class:`FixedLinear`.
    """
    _RULES[cls] = rule


def chain_of(model: nn.Module) -> Chain:
    """Read a model that is a chain of layers.

    Served: ``nn.Sequential``, nested too, and classes of :func:`register_chain`; of Linear, Conv2d (3x3 with padding 1
    or 1x1 without, stride 1 or 2), GroupNorm, LayerNorm, ReLU, Tanh, GELU, AvgPool2d, AdaptiveAvgPool2d(1), Flatten,
    Identity, and Dropout where it does nothing. Parameters are float32 on the CPU, trained or frozen (requires_grad).

    Raises:
        UnsupportedModuleError: anything else; the message names the module's path and class, and why.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got a {type(model).__name__}")
    parameters = _parameters(model)
    layers = tuple(_layers(model, ""))
    used = [name for layer in layers for name in (layer.weight, layer.bias) if name is not None]
    buffers = dict(model.named_buffers())
    for name in [*parameters, *buffers]:
        if name not in used:
            owner = model.get_submodule(name.rpartition(".")[0])
            what = "parameter" if name in parameters else "buffer"
            raise _refused(name.rpartition(".")[0], owner, f"its {what} {name} is none that the layer's formula has")
    for name in used:
        if used.count(name) > 1:
            path = name.rpartition(".")[0]
            raise _refused(path, model.get_submodule(path), f"it is applied twice: {name} would be shared")
    slots, offsets = [], [0, 0]
    for name, value in [*parameters.items(), *buffers.items()]:
        trained = value.requires_grad
        slots.append(Parameter(name, tuple(value.shape), trained, offsets[trained]))
        offsets[trained] = slots[-1].end
    if not offsets[True]:
        raise _refused("", model, "it has no trained parameter")
    return Chain(layers, tuple(slots), copy.deepcopy(model))


def _refused(path: str, module: object, why: str) -> UnsupportedModuleError:
    name = path or "the model"
    return UnsupportedModuleError(f"{name} ({type(module).__name__}) can't be part of a chain: {why}")


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters in their order, having refused what a chain can't see of them and of the modules."""
    for path, module in model.named_modules():
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        if any(getattr(module, name) for name in hooks):
            raise _refused(path, module, "it has hooks, which would not be called")
        if "forward" in vars(module):
            raise _refused(path, module, "its forward was replaced")
        if nn.utils.parametrize.is_parametrized(module):
            raise _refused(path, module, "its parameters are parametrized")
    spans: list[tuple[int, int, str]] = []
    named = list(model.named_parameters(remove_duplicate=False))
    for name, p in [*named, *model.named_buffers(remove_duplicate=False)]:
        path = name.rpartition(".")[0]
        module = model.get_submodule(path)
        if p.dtype != torch.float32:
            raise _refused(path, module, f"{name} is {p.dtype}, expected torch.float32")
        if p.device.type != "cpu" or p.layout != torch.strided:
            raise _refused(path, module, f"{name} is {p.layout} on {p.device}, expected a dense tensor on the CPU")
        if hooks_on(p) or getattr(p, "_post_accumulate_grad_hooks", None):
            raise _refused(path, module, f"{name} has hooks, which would not be called")
        if not p.is_contiguous():
            raise _refused(path, module, f"{name} has strides {list(p.stride())}, expected a contiguous tensor")
        start, end = p.data_ptr(), p.data_ptr() + p.nbytes
        for other_start, other_end, other in spans:
            if start < other_end and other_start < end:
                raise _refused(path, module, f"{name} shares memory with {other}")
        spans.append((start, end, name))
    return dict(named)


def _layers(module: nn.Module, path: str) -> Iterator[ChainLayer]:
    if (rule := _RULES.get(type(module))) is not None:
        for name, step in rule(module):
            inner = f"{path}.{name}" if path else name
            yield from (
                [_fixed_linear(module, path, step.buffer)] if isinstance(step, FixedLinear) else _layers(step, inner)
            )
        return
    read = _READERS.get(type(module))
    if read is None:
        raise _refused(path, module, f"expected one of {', '.join(c.__name__ for c in [*_RULES, *_READERS])}")
    layer = read(module)
    if isinstance(layer, str):
        raise _refused(path, module, layer)
    if layer is not None:
        weight, bias = (
            (f"{path}.{name}" if path else name) if getattr(module, name, None) is not None else None
            for name in ("weight", "bias")
        )
        place = f"{path or 'the model'} ({type(module).__name__})"
        yield replace(layer, path=place, weight=weight, bias=bias)


def _fixed_linear(module: nn.Module, path: str, buffer: str) -> ChainLayer:
    name = f"{path}.{buffer}" if path else buffer
    out_features, in_features = module.get_buffer(buffer).shape
    return ChainLayer(f"{name} (fixed linear layer)", "linear", (in_features, out_features), weight=name)


# ---- one reader a class: the layer, None where it does nothing, or why it isn't served


def _pair(value: Any) -> tuple[int, int]:
    first, second = value if isinstance(value, (tuple, list)) else (value, value)
    return int(first), int(second)


def _read_linear(m: nn.Linear) -> ChainLayer | str:
    return ChainLayer("", "linear", (m.in_features, m.out_features))


def _read_conv(m: nn.Conv2d) -> ChainLayer | str:
    if m.kernel_size not in ((1, 1), (3, 3)):
        return f"kernel_size {m.kernel_size}, expected 3 or 1"
    if not set(m.stride) <= {1, 2}:
        return f"stride {m.stride}, expected 1 or 2"
    kernel = m.kernel_size[0]
    padding = {"same": (kernel // 2,) * 2, "valid": (0, 0)}.get(str(m.padding), m.padding)
    if padding != (kernel // 2,) * 2:
        return f"padding {m.padding}, expected {kernel // 2}"
    if m.dilation != (1, 1) or m.groups != 1:
        return f"dilation {m.dilation} and {m.groups} groups, expected 1 and 1"
    if m.padding_mode != "zeros" and kernel > 1:
        return f"padding_mode {m.padding_mode!r}, expected 'zeros'"
    return ChainLayer("", "conv", (m.in_channels, m.out_channels, kernel, *m.stride))


def _read_group_norm(m: nn.GroupNorm) -> ChainLayer | str:
    return ChainLayer("", "group_norm", (m.num_groups, m.num_channels), m.eps)


def _read_layer_norm(m: nn.LayerNorm) -> ChainLayer | str:
    return ChainLayer("", "layer_norm", tuple(m.normalized_shape), m.eps)


def _read_gelu(m: nn.GELU) -> ChainLayer | str:
    return ChainLayer("", {"none": "gelu", "tanh": "gelu_tanh"}[m.approximate])


def _read_pool(m: nn.AvgPool2d) -> ChainLayer | str:
    if _pair(m.padding) != (0, 0) or m.ceil_mode or m.divisor_override is not None:
        return "expected no padding, no ceil_mode and no divisor_override"
    return ChainLayer("", "pool", (*_pair(m.kernel_size), *_pair(m.stride)))


def _read_global_pool(m: nn.AdaptiveAvgPool2d) -> ChainLayer | str:
    if m.output_size not in (1, (1, 1)):
        return f"output_size {m.output_size}, expected 1"
    return ChainLayer("", "global_pool")


def _read_flatten(m: nn.Flatten) -> ChainLayer | str:
    if m.start_dim != 1 or m.end_dim != -1:
        return f"dimensions {m.start_dim} to {m.end_dim}, expected 1 to -1"
    return ChainLayer("", "flatten")


def _read_dropout(m: nn.Dropout) -> ChainLayer | str | None:
    return "it draws random numbers; in evaluation mode, or with p = 0, it is served" if m.training and m.p else None


_READERS: dict[type, Callable[[Any], ChainLayer | str | None]] = {
    nn.Linear: _read_linear,
    nn.Conv2d: _read_conv,
    nn.GroupNorm: _read_group_norm,
    nn.LayerNorm: _read_layer_norm,
    nn.ReLU: lambda m: ChainLayer("", "relu"),
    nn.Tanh: lambda m: ChainLayer("", "tanh"),
    nn.GELU: _read_gelu,
    nn.AvgPool2d: _read_pool,
    nn.AdaptiveAvgPool2d: _read_global_pool,
    nn.Flatten: _read_flatten,
    nn.Identity: lambda m: None,
    nn.Dropout: _read_dropout,
}
