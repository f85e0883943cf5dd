"""Which layers of a model a joint pass serves, and in which way each."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Literal, NamedTuple, TypeAlias

from torch import Tensor, nn

from svag_fast.nn.joint_grads import NotJoint
from svag_fast.nn.pair_batch_norm import _PAIRED, _PLAIN, why_not_paired
from svag_fast.optim.grad_watch import hooks_on
from svag_fast.sample_norms.dispatch import is_served
from svag_fast.sample_norms.rule import Rule, rule_of

Way: TypeAlias = Literal["product", "batch norm", "halves", "without a rule"]

_PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_OWN = {"weight", "bias"}  # not reparametrised
_BY_HALVES = (
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.PReLU,
    nn.Embedding,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Bilinear,
)


class Layer(NamedTuple):
    """A layer that is served."""

    label: str
    module: nn.Module
    way: Way
    """"without a rule": half by half with all that is inside it."""
    rule: Rule | None
    """Of its samples' norms, where it knows all its parameters."""


def layers_of(root: nn.Module, params: Mapping[str, nn.Parameter]) -> Iterator[Layer]:
    """Yield a model's layers that need more than their own forward.

    Args:
        root: the model.
        params: the trained parameters, by name.

    Raises:
        NotJoint: a layer has no way here, with its name.
    """
    trained = set(params.values())
    reached: set[Tensor] = set()
    served: dict[nn.Module, str] = {}
    inner: dict[nn.Module, str] = {}  # what is inside a layer without a rule, and whose
    for name, module in root.named_modules():
        own = [p for p in module._parameters.values() if p is not None and p in trained]
        label = f"{name or 'the model'} ({type(module).__name__})"
        reached.update(own)
        _check_plain(label, module)
        batch_norm = type(module) in _PAIRED or type(module) in _PLAIN
        if module in inner:
            if batch_norm:
                raise NotJoint(f"{label} is inside of {inner[module]}, which is run half by half")
            continue
        if not own and not batch_norm and not _computes_weights(module, trained):
            continue
        if "forward" in module.__dict__ or is_served(module):
            raise NotJoint(f"{label} has a forward of its own put onto the instance")
        way = _way_of(label, module)
        served[module] = label
        if way == "without a rule":
            if module is root:
                raise NotJoint(
                    f"{label} has parameters of its own and no way to tell their two gradients apart in one pass"
                )
            inner.update(dict.fromkeys(module.modules(), label))
        yield Layer(label, module, way, None if way == "without a rule" else norm_rule(module))
    for name, p in params.items():
        if p not in reached:
            raise NotJoint(f"{name} is not a parameter of the model's own modules")
        if hooks_on(p) or p._post_accumulate_grad_hooks:
            raise NotJoint(f"{name} has gradient hooks, which must see each batch's gradient")
    for module, label in inner.items():
        if served.get(module, label) != label:
            raise NotJoint(f"{served[module]} is also inside of {label}, which is run half by half")


def has_norms(layers: list[Layer], trained: Container[Tensor]) -> bool:
    """Whether each sample's norms can be had: every layer has a rule for them, and no parameter is used twice."""
    owned = [p for layer in layers for p in layer.module._parameters.values() if p is not None and p in trained]
    if len(owned) != len(set(owned)):
        return False
    return all(
        layer.rule is not None and layer.rule.refusal(layer.module) is None
        for layer in layers
        if layer.way != "product"
    )


def shared_parameter(root: nn.Module, trained: Container[Tensor]) -> str | None:
    """A trained parameter of two modules, if there is one, by both names."""
    owners: dict[Tensor, str] = {}
    for name, module in root.named_modules():
        for key, p in module._parameters.items():
            if p is not None and p in trained:
                if p in owners:
                    return f"{owners[p]} and {name}.{key}"
                owners[p] = f"{name}.{key}"
    return None


def _computes_weights(module: nn.Module, trained: Container[Tensor]) -> bool:
    """Whether a trained weight is made from others at each use."""
    made = module._modules.get("parametrizations")
    return made is not None and any(p in trained for p in made.parameters())


def _way_of(label: str, module: nn.Module) -> Way:
    kind = type(module)
    if kind in _PAIRED or kind in _PLAIN:
        return "batch norm"
    weight = module._parameters.get("weight")
    if kind in _PRODUCTS and weight is not None and not weight.is_complex() and module._parameters.keys() <= _OWN:
        return "product"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and (module.sparse or module.max_norm is not None):
        raise NotJoint(f"{label}: sparse gradients and max_norm are not served")
    return "halves" if kind in _BY_HALVES else "without a rule"


def norm_rule(module: nn.Module) -> Rule | None:
    """The rule of a layer's samples' norms, where it knows all its parameters."""
    found = rule_of(type(module))
    if found is None or found[1].knows is None or not found[1].knows.issuperset(module._parameters):
        return None
    return found[1]


def _check_plain(label: str, module: nn.Module) -> None:
    if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
        raise NotJoint(f"{label} is compiled")
    if (reason := why_not_paired(module)) is not None:
        raise NotJoint(f"{label}: {reason}")
