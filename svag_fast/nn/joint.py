"""Both batches through a model at once, each layer's weight gradient formed for each half of the rows.

Linear layers and convolutions form both in the weight-gradient product, with one pass over the rows. The parameters of
small layers (normalisations, embeddings) enter the graph twice, once for each batch, and such layers are run half by
half. Nothing else in the model knows of batches, so no module may
mix samples: `Joint.verify` looks whether that is so.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from svag_fast.nn.halves import Gradients, row_count
from svag_fast.nn.joint_grads import OURS, PairCall, Twin
from svag_fast.nn.pair_batch_norm import _PAIRED, _PLAIN, pair_batch_norm, why_not_paired
from svag_fast.nn.replay import Replay, differ, randomised, rewound, tensors_of
from svag_fast.optim.grad_watch import hooks_on
from svag_fast.sample_norms.dispatch import is_served
from svag_fast.sample_norms.layers.conv import conv_plan
from svag_fast.sample_norms.layers.linear import LINEAR
from svag_fast.sample_norms.layers.products import Product
from svag_fast.sample_norms.rule import Rule, Seen, in_full_precision, rule_of
from svag_fast.sample_norms.tape import Recorder, Rows, hook, in_backward

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


class NotJoint(Exception):  # noqa: N818  (a reason, not a fault)
    """Why a model can't take both batches at once; its two halves can still be run one after the other."""


class _Layer(NamedTuple):
    module: nn.Module
    forward: Callable[..., Any]
    rule: Rule | None  # of its samples' norms; None where they come out of its weight-gradient product


class _Met(NamedTuple):
    """A layer's output in a pass: the node that made it, since the tensor itself would be kept from being freed."""

    layer: str
    node: Any
    output: int


class Joint:
    """See the module's text.

    Args:
        root: the model.
        params: the trained parameters, by name.

    Raises:
        NotJoint: a layer has no way of its own here, with its name.
    """

    way = "joint"

    def __init__(self, root: nn.Module, params: Mapping[str, nn.Parameter]) -> None:
        self.root = root
        self.outputs: list[Tensor] = []
        self._params = params
        self._names = {p: name for name, p in params.items()}
        self._second_updates = True
        self._layers = list(self._plan())
        self._norms: Recorder | None = None
        self._sq_norms: dict[str, Tensor] = {}
        self._used: set[nn.Module] = set()  # in the running pass, where norms are taken
        self._twins: dict[Tensor, tuple[Tensor, Tensor]] = {}
        self._first: Gradients = {}  # of the running backward pass
        self._second: Gradients = {}
        self.inside = False
        self._rows = 0
        self._met: list[_Met] | None = None  # layers' outputs, in passes that are looked at
        self.taking = self.takes_norms = False
        self.is_verified = self._seen_losses = False

    # ---- which layers

    def _plan(self) -> Iterator[_Layer]:
        reached: set[Tensor] = set()
        for name, module in self.root.named_modules():
            own = {key: p for key, p in module._parameters.items() if p is not None and p in self._names}
            label = f"{name or 'the model'} ({type(module).__name__})"
            reached.update(own.values())
            forward = self._way_of(label, module, bool(own))
            if forward is not None:
                yield _Layer(module, forward, _norm_rule(module))
        for name, p in self._params.items():
            if p not in reached:
                raise NotJoint(f"{name} is not a parameter of the model's own modules")
            if hooks_on(p) or p._post_accumulate_grad_hooks:
                raise NotJoint(f"{name} has gradient hooks, which must see each batch's gradient")

    def _way_of(self, label: str, module: nn.Module, trained: bool) -> Callable[..., Any] | None:
        """What runs in place of the module's forward; None for its own."""
        kind = type(module)
        if kind.__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
            raise NotJoint(f"{label} is compiled")
        if (reason := why_not_paired(module)) is not None:
            raise NotJoint(f"{label}: {reason}")
        batch_norm = kind in _PAIRED or kind in _PLAIN
        if not trained and not batch_norm:
            return None
        if "forward" in module.__dict__ or is_served(module):
            raise NotJoint(f"{label} has a forward of its own put onto the instance")
        if batch_norm:
            return self._served(label, module, self._run_batch_norm)
        weight = module._parameters.get("weight")
        if kind in _PRODUCTS and weight is not None and not weight.is_complex() and module._parameters.keys() <= _OWN:
            return self._product(label, module)
        if isinstance(module, nn.Embedding) and (module.sparse or module.max_norm is not None):
            raise NotJoint(f"{label}: sparse gradients and max_norm are not served")
        if kind in _BY_HALVES:
            return self._served(label, module, self._run_by_halves)
        raise NotJoint(f"{label} has parameters and no way to tell its two gradients apart in one pass")

    # ---- the context

    @property
    def has_norms(self) -> bool:
        """Whether each sample's norms can be had: every layer has a rule for them, and no parameter is used twice."""
        owned = [p for layer in self._layers for p in layer.module._parameters.values() if p in self._names]
        if len(owned) != len(set(owned)):
            return False
        return all(
            layer.rule is not None and layer.rule.refusal(layer.module) is None
            for layer in self._layers
            if type(layer.module) not in _PRODUCTS
        )

    def begin(self, *, second_updates: bool, norms: Recorder | None = None) -> None:
        """Serve the layers.

        Args:
            second_updates: whether the second batch updates running statistics.
            norms: takes each sample's squared norms; only where `has_norms`.
        """
        self._second_updates, self._norms, self.takes_norms = second_updates, norms, norms is not None
        for module, forward, _ in self._layers:
            if module is not self.root:
                module.__dict__["forward"] = forward  # onto the instance: a class's costs more to change

    def end(self) -> None:
        """Leave the model as it was."""
        self.forget()
        for module, _, _ in self._layers:
            if module is not self.root:
                module.__dict__.pop("forward", None)

    def forget(self) -> None:
        """Drop what the calls so far left."""
        self.outputs, self._twins, self._met = [], {}, None
        self._used.clear()

    # ---- forward

    def forward(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's forward, with its layers served."""
        inner = next((layer.forward for layer in self._layers if layer.module is self.root), inner)
        if self.inside or not torch.is_grad_enabled() or in_backward():
            return inner(*args, **kwargs)
        rows = self._rows = row_count(args, kwargs)
        if not self._seen_losses and self._met is None:
            self._met = []
        self.inside = True
        try:
            out = inner(*args, **kwargs)
        finally:
            self.inside = False
        for x in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(x, Tensor) and x.requires_grad:
                if x.dim() == 0 or x.shape[0] != rows:
                    raise NotJoint(
                        f"the model returns {list(x.shape)}, whose first dimension is not the {rows} samples"
                    )
                self.outputs.append(x)
        return out

    @property
    def looks(self) -> bool:
        """Whether the running forward pass will be looked at."""
        return self._met is not None

    def _served(self, label: str, module: nn.Module, run: Callable[..., Any]) -> Callable[..., Any]:
        """A layer's forward by `run`, in the model's call and what a checkpoint repeats of it; else its own."""
        plain = functools.partial(type(module).forward, module)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not (self.inside or in_backward()):  # in evaluation, or called past the model
                return plain(*args, **kwargs)
            out = run(label, module, plain, *args, **kwargs)
            if self._met is not None:
                self._meet(label, out)
            return out

        return forward

    def _product(self, label: str, module: Any) -> Callable[..., Any]:
        """The forward of a Linear layer or a convolution."""
        plain = functools.partial(type(module).forward, module)
        own = module._parameters
        is_linear = isinstance(module, nn.Linear)
        call: PairCall | None = None

        def forward(input: Tensor) -> Any:
            nonlocal call
            if not (self.inside or in_backward()) or not torch.is_grad_enabled():
                return plain(input)
            weight, bias = own["weight"], own["bias"]
            if input.dim() < 2 or not (is_linear or input.dim() == weight.dim()):
                raise NotJoint(f"an input {list(input.shape)} of {type(module).__name__} has no samples")
            _check_rows(module, input)
            if self._norms is not None:
                self._use(module, input)
            product: Product = LINEAR
            if not is_linear:
                plan = conv_plan(module, weight)
                product, input = plan.product, plan.padded(input)
            if call is None or call.product is not product or call.weight is not weight or call.bias is not bias:
                call = PairCall(self, product, weight, bias)
            out = call.run(input)
            if self._met is not None:
                self._meet(label, out)
            return out

        return forward

    def _meet(self, label: str, out: Tensor) -> None:
        if self._met is not None and out.grad_fn is not None and not in_backward():
            self._met.append(_Met(label, out.grad_fn, out.output_nr))

    def _use(self, module: nn.Module, input: Tensor) -> None:
        """Where norms are taken each layer is used once, on the samples."""
        if in_backward():
            return
        if module in self._used or input.shape[0] != self._rows:
            raise NotJoint(f"a {type(module).__name__} is called twice, or not on the samples themselves, in a pass")
        self._used.add(module)

    def _twin(self, p: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """A parameter for each batch."""
        if p is None or not torch.is_grad_enabled() or p not in self._names:
            return p, p
        twin = self._twins.get(p)
        if twin is None:
            twin = self._twins[p] = Twin.apply(p, self)  # type: ignore[no-untyped-call]
        return twin

    def _run_batch_norm(self, label: str, module: Any, plain: Callable[..., Any], input: Tensor) -> Any:
        module._check_input_dim(input)
        if module.training or module.running_mean is None:
            weights, biases = self._twin(module.weight), self._twin(module.bias)
            _check_rows(module, input)
            return pair_batch_norm(module, input, weights=weights, biases=biases, second_updates=self._second_updates)
        return self._run_by_halves(label, module, plain, input)

    def _run_by_halves(
        self, label: str, module: nn.Module, plain: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        own = module._parameters
        twins = {key: self._twin(p) for key, p in own.items()}
        if all(p is q for p, q in twins.values()):
            return plain(*args, **kwargs)
        tensors = tensors_of((args, kwargs))
        if not tensors:
            return plain(*args, **kwargs)
        rows = _check_rows(module, tensors[0])
        if self._norms is not None:
            self._use(module, tensors[0])
        before, outs = dict(own), []
        try:
            for half in (0, 1):
                own.update({key: pair[half] for key, pair in twins.items()})  # type: ignore[misc]
                some = slice(rows // 2 * half, rows // 2 * (half + 1))
                args_, kwargs_ = tree_map(lambda x, some=some: _rows_of(x, rows, some), (args, kwargs))
                outs.append(plain(*args_, **kwargs_))
        finally:
            own.update(before)
        out = torch.cat(outs)
        if self._norms is not None and out.requires_grad:
            self._take_norms_later(label, module, (*args, *kwargs.values()), out)
        return out

    def _take_norms_later(self, label: str, module: nn.Module, inputs: tuple[Any, ...], out: Tensor) -> None:
        """By the layer's rule, once the backward pass has brought the gradient of its output."""
        own = {name: p for name, p in module._parameters.items() if p in self._names}
        shapes = {name: p.shape for name, p in own.items() if p is not None}
        rule, seen = _norm_rule(module), Seen(label, module, inputs)
        assert rule is not None

        def take(output_grad: Tensor) -> None:
            if not self.taking:
                return
            with torch.no_grad(), in_full_precision(output_grad):
                for name, sq_norms in seen.sq_norms(rule, output_grad, shapes).items():
                    if name in own:
                        self.take_norms(own[name], sq_norms)

        hook(out, take)

    # ---- backward

    def backward(self, losses: Tensor, weights: Tensor, first: Gradients) -> None:
        """Add the first batch's gradients to those in `first`, and the second's to ``.grad``.

        Raises:
            RuntimeError: a parameter got a gradient from elsewhere than its layer.
        """
        self._first, self._second, self._sq_norms = {}, {}, {}
        if self._met is not None:
            self._check_losses(losses, self._met)
        before: Gradients = {p: p.grad for p in self._params.values() if p.grad is not None}
        for p in before:
            p.grad = None
        self.taking = True
        try:
            torch.autograd.backward(losses, weights)
        finally:
            self.taking = False
        self.forget()
        for name, p in self._params.items():
            if p.grad is not None:
                raise RuntimeError(
                    f"{name} got a gradient from outside its own layer's forward in the model's call, so its gradient "
                    'can\'t be told apart by batches: have the model return what the losses need, or way="halves"'
                )
        for sums, grads in ((first, self._first), (before, self._second)):
            for p, grad in grads.items():
                sums[p] = sums[p] + grad if p in sums else grad
        for kept, grad in before.items():
            kept.grad = grad
        if self._norms is not None:  # each loss has the weight 1/B
            self._norms.passes.append(Rows(len(losses) // 2, self._sq_norms, self._norms.aliases))

    def take(self, p: Tensor, grad1: Tensor, grad2: Tensor) -> None:
        """Two gradients of a parameter, in memory of their own."""
        for grads, grad in ((self._first, grad1), (self._second, grad2)):
            if grad.stride() != p.stride() or grad._base is not None or grad.dtype != p.dtype:
                grad = torch.empty_like(p).copy_(grad)
            grads[p] = grads[p] + grad if p in grads else grad

    def take_norms(self, p: Tensor, sq_norms: Tensor) -> None:
        """Each sample's squared norm of a parameter's gradient."""
        self._sq_norms[self._names[p]] = sq_norms  # type: ignore[index]

    # ---- are the halves apart?

    def verify(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hold the model to what this way takes for granted, before its first pass, on few of the samples.

        Neither half's outputs may change with the other half's inputs; each layer's rows must be on the way to their
        own half's outputs alone; and no parameter may be used outside its layer. Looked at with other parameters, which
        are put back with buffers and generators.

        Raises:
            NotJoint: it is not so, or can't be seen, and where.
        """
        rows = row_count(args, kwargs)
        with rewound(self.root) as replay, randomised(self.root):
            try:
                self._verify(inner, _few(args, rows), _few(kwargs, rows), replay)
            except NotJoint:
                raise
            except Exception:  # a model that takes no other batch size tells what is wrong with this one, if anything
                replay.rewind()
                self._verify(inner, args, kwargs, replay)
        self.is_verified = True

    def _verify(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], replay: Replay) -> None:
        rows = row_count(args, kwargs)
        alone = []
        self.inside = True
        try:
            with torch.no_grad():
                for half in (None, 0, 1):
                    replay.rewind()
                    alone.append(_outputs(self.forward(inner, *_one_batch_twice(args, kwargs, rows, half)), rows))
        finally:
            self.inside = False
        for half in (0, 1):
            own = slice(rows // 2 * half, rows // 2 * (half + 1))
            for x, y in zip(alone[0], alone[half + 1], strict=True):
                if x.shape != y.shape or differ(x[own], y[own], noise=_rounding(x)):
                    raise NotJoint("one batch's outputs change with the other batch: samples are coupled")
        torch.clear_autocast_cache()  # casts made without gradients
        try:
            self._met = []
            self.forward(inner, args, kwargs)
            self._check_graph(self._met, rows)
        finally:
            self.forget()

    def _check_graph(self, met: list[_Met], rows: int) -> None:
        if not self.outputs:
            raise NotJoint(f"the model returns no tensor with a gradient whose first dimension is the {rows} samples")
        for half in (0, 1):
            weights = [_random_rows(x, half) for x in self.outputs]
            for name, own, other in self._rows_reached(self.outputs, weights, met, half):
                if other:
                    raise NotJoint(
                        f"{name}: its rows are not the samples in order (positions first, a value that all share), or "
                        "the samples are coupled after it"
                    )
                if not own:
                    raise NotJoint(f"{name}: the model's outputs do not depend on it, so its rows can't be checked")
        if (used := self._used_elsewhere(self.outputs)) is not None:
            raise NotJoint(f"{used} is used outside of its own layer's forward")

    def _check_losses(self, losses: Tensor, met: list[_Met]) -> None:
        """In the first pass: what the losses have from elsewhere than the outputs may couple the batches too."""
        for half in (0, 1):
            weights = torch.zeros_like(losses)
            weights[len(losses) // 2 * half : len(losses) // 2 * (half + 1)] = 1
            for name, _, other in self._rows_reached([losses], [weights], met, half):
                if other:
                    raise RuntimeError(
                        f"one batch's losses depend on the other batch by way of {name}, as through a loss that a "
                        "layer keeps: each loss must be of its own sample, or of its own batch"
                    )
        self._seen_losses = True

    def _rows_reached(
        self, outputs: list[Tensor], weights: list[Tensor], met: list[_Met], half: int
    ) -> Iterator[tuple[str, bool, bool]]:
        """For each layer, whether a backward pass from one half reaches its rows of that half, and of the other."""
        reached = [[False, False] for _ in met]

        def look(layer: int, grads: tuple[Tensor | None, ...]) -> None:
            grad = grads[met[layer].output]
            if grad is not None:
                reached[layer] = [bool((rows.nan_to_num() != 0).any()) for rows in torch.split(grad, len(grad) // 2)]

        # By hooks: to ask for the layers' gradients would hold them all at once.
        handles = []
        for layer, m in enumerate(met):
            # A function's node without a graph, which nothing reaches, can't be hooked in an older PyTorch.
            with contextlib.suppress(RuntimeError):
                handles.append(m.node.register_prehook(functools.partial(look, layer)))
        try:
            torch.autograd.grad(outputs, list(self._params.values()), weights, retain_graph=True, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        for m, halves in zip(met, reached, strict=True):
            yield m.layer, halves[half], halves[1 - half]

    def _used_elsewhere(self, outputs: list[Tensor]) -> str | None:
        """A parameter that the graph reaches otherwise than by its twins."""
        nodes: list[Any] = [x.grad_fn for x in outputs]
        seen = set(nodes)
        while nodes:
            node = nodes.pop()
            if node is None:
                continue
            for following, _ in node.next_functions:
                p = getattr(following, "variable", None)
                if p is not None and p in self._names and not isinstance(node, OURS):
                    return self._names[p]
                if following not in seen:
                    seen.add(following)
                    nodes.append(following)
        return None


def _norm_rule(module: nn.Module) -> Rule | None:
    """The rule of a layer's samples' norms, where it knows all its parameters."""
    found = rule_of(type(module))
    if found is None or found[1].knows is None or not found[1].knows.issuperset(module._parameters):
        return None
    return found[1]


def _check_rows(module: nn.Module, x: Tensor) -> int:
    if x.dim() == 0 or x.shape[0] % 2:
        raise NotJoint(f"an input {list(x.shape)} of {type(module).__name__} is not of two batches of the same size")
    return x.shape[0]


def _rows_of(x: Any, rows: int, some: slice) -> Any:
    return x[some] if isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == rows else x


def _few(inputs: Any, rows: int) -> Any:
    """Two samples of each batch, where there are more."""
    few = min(2, rows // 2)

    def pick(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[0] != rows:
            return x
        return torch.cat([x[:few], x[rows // 2 : rows // 2 + few]])

    return tree_map(pick, inputs)


def _outputs(returned: Any, rows: int) -> list[Tensor]:
    return [x for x in tensors_of(returned) if x.shape[0] == rows]


def _one_batch_twice(args: Any, kwargs: Any, rows: int, half: int | None) -> tuple[Any, Any]:
    """The inputs with one batch in both places; as they are for None."""

    def change(x: Any) -> Any:
        if half is None or not isinstance(x, Tensor) or x.dim() == 0 or x.shape[0] != rows:
            return x
        own = x[rows // 2 * half : rows // 2 * (half + 1)]
        return torch.cat([own, own])

    changed: tuple[Any, Any] = tree_map(change, (args, kwargs))
    return changed


def _rounding(x: Tensor) -> float:
    """What sums in another order may change: devices and libraries don't promise one."""
    if not x.is_floating_point() or not x.numel():
        return 0.0
    return 64 * torch.finfo(x.dtype).eps * float(x.abs().nan_to_num(0.0, 0.0, 0.0).max())


def _random_rows(x: Tensor, half: int) -> Tensor:
    """Cotangents of one half's rows."""
    generator = torch.Generator("cpu").manual_seed(half)
    draws = torch.randn(x.shape, generator=generator, dtype=torch.float64, device="cpu").to(x)
    rows = len(x) // 2
    draws[rows * (1 - half) : rows * (2 - half)] = 0
    return draws
