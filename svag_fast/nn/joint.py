"""Both batches through a model at once, each layer's weight gradient formed for each half of the rows.

Linear layers and convolutions form both in the weight-gradient product, with one pass over the rows. The parameters of
small layers (normalisations, embeddings), and of layers that nothing is known about, enter the graph twice, once for
each batch, and such layers are run half by half (`layer_halves`). Nothing else in the model knows of batches, so no
module may mix samples: `joint_checks` looks whether that is so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from svag_fast.nn.halves import Gradients, row_count
from svag_fast.nn.joint_checks import Met, check_losses, used_elsewhere, verify
from svag_fast.nn.joint_grads import NotJoint, PairCall, Twin
from svag_fast.nn.joint_layers import Layer, has_norms, layers_of, norm_rule, shared_parameter
from svag_fast.nn.layer_halves import LayerHalves
from svag_fast.nn.pair_batch_norm import pair_batch_norm
from svag_fast.nn.replay import tensors_of
from svag_fast.ops.backends import as_chosen
from svag_fast.ops.weight_grad.shapes import Geometry
from svag_fast.optim.in_backward import StepsInBackward
from svag_fast.sample_norms.layers.conv import conv_plan
from svag_fast.sample_norms.layers.linear import LINEAR
from svag_fast.sample_norms.layers.products import Product
from svag_fast.sample_norms.rule import SeenCall, in_full_precision
from svag_fast.sample_norms.tape import NO_TASK, Recorder, Rows, current_task, hook, in_backward

Due: TypeAlias = tuple[PairCall, Tensor | None, Tensor, bool, str | None, int, int]

# What layers whose gradients are formed together may keep alive.
DUE_BYTES = 1 << 23


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
        self.params = params
        self.names = {p: name for name, p in params.items()}
        self._second_updates = True
        self._layers = list(layers_of(root, params))
        self.without_rule = [layer.label for layer in self._layers if layer.way == "without a rule"]
        forwards = {layer.module: self._forward_of(layer) for layer in self._layers}
        self._root_forward = forwards.pop(root, None)
        self._forwards = list(forwards.items())
        self._norms: Recorder | None = None
        self._sq_norms: dict[str, Tensor] = {}
        self._used: set[nn.Module] = set()  # in the running pass, where norms are taken
        self._twins: dict[Tensor, tuple[Tensor, Tensor]] = {}
        self._first: Gradients = {}  # of the running backward pass
        self._second: Gradients = {}
        self.steps: StepsInBackward | None = None  # of the running backward pass
        self._due: list[Due] = []  # layers whose gradients are to be formed
        self._due_bytes = 0
        self.task: int | None = None
        """The last backward pass's number in this process, where it has reached a layer."""
        self._only_once: Container[Tensor] = ()
        self.inside = False
        self.rows = 2  # of the running call of the model
        self.met: list[Met] | None = None  # layers' outputs, in passes that are looked at
        self.taking = self.takes_norms = self.learns = False
        self.is_verified = self._seen_losses = False

    # ---- the context

    @property
    def has_norms(self) -> bool:
        """Whether each sample's norms can be had."""
        return has_norms(self._layers, self.names)

    @property
    def shared(self) -> str | None:
        """A parameter of two modules, if there is one."""
        return shared_parameter(self.root, self.names)

    def begin(self, *, second_updates: bool, norms: Recorder | None = None, only_once: Container[Tensor] = ()) -> None:
        """Serve the layers.

        Args:
            second_updates: whether the second batch updates running statistics.
            norms: takes each sample's squared norms; only where `has_norms`.
            only_once: weights that may take their step in the backward pass, and be used once in the forward.
        """
        self._only_once = only_once
        self._second_updates, self._norms, self.takes_norms = second_updates, norms, norms is not None
        for module, forward in self._forwards:
            module.__dict__["forward"] = forward  # onto the instance: a class's costs more to change

    def end(self) -> None:
        """Leave the model as it was."""
        self.forget()
        for module, _ in self._forwards:
            module.__dict__.pop("forward", None)

    def forget(self) -> None:
        """Drop what the calls so far left."""
        self.outputs, self._twins, self.met = [], {}, None
        self._used.clear()

    # ---- forward

    def forward(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's forward, with its layers served."""
        inner = self._root_forward or inner
        if self.inside or not torch.is_grad_enabled() or current_task() != NO_TASK:
            return inner(*args, **kwargs)
        rows = self.rows = row_count(args, kwargs)
        if not self._seen_losses and self.met is None:
            self.met = []
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

    def _forward_of(self, layer: Layer) -> Callable[..., Any]:
        """What runs in place of a layer's own forward."""
        label, module, way, _ = layer
        if way == "product":
            return self._product(label, module)
        if way == "batch norm":
            return self._served(label, self._run_batch_norm, module)
        return self._served(label, self._run_by_halves, module, inner=way == "without a rule")

    def _served(self, label: str, run: Callable[..., Any], module: nn.Module, **how: Any) -> Callable[..., Any]:
        """A layer's forward by `run`, in the model's call and what a checkpoint repeats of it; else its own."""
        plain = functools.partial(type(module).forward, module)
        halves = LayerHalves(label, module, **how)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not (self.inside or in_backward()):  # in evaluation, or called past the model
                return plain(*args, **kwargs)
            out, made = run(halves, plain, *args, **kwargs)
            for x, dim in made if self.met is not None else ():
                self._meet(label, x, dim, required=not halves.inner)
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
            if not (self.inside or current_task() != NO_TASK) or not torch.is_grad_enabled():
                return plain(input)
            weight, bias = own["weight"], own["bias"]
            if input.dim() < 2 or not (is_linear or input.dim() == weight.dim()):
                raise NotJoint(f"an input {list(input.shape)} of {type(module).__name__} has no samples")
            if input.shape[0] % self.rows:
                self._check_rows(label, input.shape[0])
            if weight in self._only_once and not in_backward():
                if module in self._used:
                    raise RuntimeError(
                        f"{label} must be used once before a backward pass, since its weight takes its step there "
                        "(in_backward=True), got a second use: in_backward=False for its param group"
                    )
                if self._norms is None:
                    self._used.add(module)
            if self._norms is not None:
                self._use(module, input)
            product: Product = LINEAR
            if not is_linear:
                plan = conv_plan(module, weight)
                product = plan.product
                if plan.pad is not None:
                    input = plan.padded(input)
            if call is None or call.product is not product or call.weight is not weight or call.bias is not bias:
                call = PairCall(self, product, weight, bias)
            out = call.run(input)
            if self.met is not None:
                self._meet(label, out)
            return out

        return forward

    def _meet(self, label: str, out: Tensor, dim: int = 0, *, required: bool = True) -> None:
        if self.met is not None and out.grad_fn is not None and not in_backward():
            self.met.append(Met(label, out.grad_fn, out.output_nr, dim, required))

    def _check_rows(self, label: str, rows: int) -> None:
        """As many as the model's samples, or so many times as many: what is picked from the samples is others in each
        pass, and may be of both batches."""
        if rows % self.rows:
            raise NotJoint(f"{label}: its rows are not the samples in order: {rows} for {self.rows} samples")

    def _use(self, module: nn.Module, input: Tensor) -> None:
        """Where norms are taken each layer is used once, on the samples."""
        if in_backward():
            return
        if module in self._used or input.shape[0] != self.rows:
            raise NotJoint(f"a {type(module).__name__} is called twice, or not on the samples themselves, in a pass")
        self._used.add(module)

    def _twin(self, p: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """A parameter for each batch."""
        if p is None or not torch.is_grad_enabled() or p not in self.names:
            return p, p
        twin = self._twins.get(p)
        if twin is None:
            twin = self._twins[p] = Twin.apply(p, self)  # type: ignore[no-untyped-call]
            if self.met is not None and not in_backward():
                self.met.append(Met(self.names[p], twin[0].grad_fn, None, required=False))  # type: ignore[index]
        return twin

    def _run_batch_norm(self, halves: LayerHalves, plain: Callable[..., Any], input: Tensor) -> Any:
        module: Any = halves.module
        module._check_input_dim(input)
        if module.training or module.running_mean is None:
            weights, biases = self._twin(module.weight), self._twin(module.bias)
            self._check_rows(halves.label, input.shape[0])
            updates = self._second_updates
            out = pair_batch_norm(module, input, weights=weights, biases=biases, second_updates=updates)
            return out, [(out, 0)]
        return self._run_by_halves(halves, plain, input)

    def _trains(self, module: nn.Module) -> bool:
        return any(p in self.names for p in module._parameters.values())

    def _run_by_halves(self, halves: LayerHalves, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._norms is not None and torch.is_grad_enabled() and self._trains(halves.module):
            self._use(halves.module, tensors_of((args, kwargs))[0])
        out, made = halves.run(plain, self._twin, args, kwargs, check_rows=self._check_rows, learns=self.learns)
        if self._norms is not None and made and out.requires_grad:
            self._take_norms_later(halves.label, halves.module, (*args, *kwargs.values()), out)
        return out, made

    def _take_norms_later(self, label: str, module: nn.Module, inputs: tuple[Any, ...], out: Tensor) -> None:
        """By the layer's rule, once the backward pass has brought the gradient of its output."""
        own = {name: p for name, p in module._parameters.items() if p in self.names}
        shapes = {name: p.shape for name, p in own.items() if p is not None}
        rule, seen = norm_rule(module), SeenCall(label, module, inputs)
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

    def backward(self, losses: Tensor, weights: Tensor, first: Gradients, steps: StepsInBackward | None = None) -> None:
        """Add the first batch's gradients to those in `first`, and the second's to ``.grad``.

        Args:
            losses, weights: [2B], as for autograd.
            first: see above.
            steps: takes the steps of the weights that have no gradient then.

        Raises:
            RuntimeError: a parameter got a gradient from elsewhere than its layer.
        """
        if steps is not None and (name := used_elsewhere(self, [losses])) is not None:  # before anything has moved
            raise self._from_elsewhere(name)
        self._first, self._second, self._sq_norms, self.task = {}, {}, {}, None
        if self.met is not None:
            check_losses(self, losses, self.met)
            self._seen_losses = True
        before: Gradients = {}
        for param in self.params.values():
            if param.grad is not None:
                before[param] = param.grad
                param.grad = None
        self.taking, self.steps = True, steps
        try:
            torch.autograd.backward(losses, weights)
            self._take_due()
        finally:
            self.taking, self.steps = False, None
            self._due, self._due_bytes = [], 0
        self.forget()
        for name, p in self.params.items():
            if p.grad is not None:
                raise self._from_elsewhere(name)
        for sums, grads in ((first, self._first), (before, self._second)):
            for of in grads.keys() & sums.keys():
                grads[of] = sums[of] + grads[of]
            sums.update(grads)
        self._first, self._second = {}, {}  # which would keep them alive
        for kept, grad in before.items():
            kept.grad = grad
        if self._norms is not None:  # each loss has the weight 1/B
            self._norms.passes.append(Rows(len(losses) // 2, self._sq_norms, self._norms.aliases))

    def _from_elsewhere(self, name: str) -> RuntimeError:
        return RuntimeError(
            f"{name} got a gradient from outside its own layer's forward in the model's call, so its gradient can't be "
            'told apart by batches: have the model return what the losses need, or way="halves"'
        )

    def later(self, call: PairCall, x: Tensor | None, b: Tensor, wants_bias: bool, backend: str | None) -> None:
        """Have a layer's gradients formed: at once, or, as long as what they need is small, together with others'.

        Each change between the backward pass and ours has code brought back into the caches, at the price of a small
        layer's kernel.
        """
        self.task = current_task()
        self._due.append((call, x, b, wants_bias, backend, 0 if x is None else x._version, b._version))
        self._due_bytes += b.nbytes + (0 if x is None else x.nbytes)
        if self._due_bytes > DUE_BYTES or self.steps is not None or not b.is_cpu:
            self._take_due()

    def _take_due(self) -> None:
        with torch.no_grad():
            for call, x, b, wants_bias, backend, x_version, b_version in self._due:
                if b._version != b_version or (x is not None and x._version != x_version):
                    raise RuntimeError(
                        "a layer's input, or the gradient of its output, was changed by an in-place operation in the "
                        'backward pass, where gradients are still to be formed of it: way="halves"'
                    )
                if backend is None:
                    call.take(x, b, wants_bias)
                else:
                    as_chosen(backend, call.take, x, b, wants_bias)
        self._due, self._due_bytes = [], 0

    def step(self, weight: Tensor, product: Product, x: Tensor, b: Tensor) -> bool:
        """Have a weight take its step at once, if it may and there is a kernel for its layer."""
        if self.steps is None or weight not in self._only_once:
            return False
        geometry = product.geometry
        if geometry is None:
            if product is not LINEAR:
                return False
            rows, width = len(b), (x.shape[-1], b.shape[-1])
            x, b, geometry = x.reshape(rows, -1, width[0]), b.reshape(rows, -1, width[1]), Geometry()
        taken, sq_norms = self.steps.take(weight, x, b, geometry, norms=self.takes_norms)
        if taken and self.takes_norms:
            assert sq_norms is not None
            self.take_norms(weight, sq_norms)
        return taken

    def take(self, p: Tensor, grad1: Tensor, grad2: Tensor) -> None:
        """Two gradients of a parameter, in memory of their own."""
        if self.task is None:
            self.task = current_task()
        for grads, grad in ((self._first, grad1), (self._second, grad2)):
            if grad.stride() != p.stride() or grad._base is not None or grad.dtype != p.dtype:
                grad = torch.empty_like(p).copy_(grad)
            if (there := grads.setdefault(p, grad)) is not grad:
                grads[p] = there + grad

    def take_norms(self, p: Tensor, sq_norms: Tensor) -> None:
        """Each sample's squared norm of a parameter's gradient."""
        self._sq_norms[self.names[p]] = sq_norms  # type: ignore[index]

    def doubt(self) -> None:
        """Look again, since the model may do something else now."""
        self.is_verified = self._seen_losses = False

    def verify(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hold the model to what this way takes for granted, before its first pass; raises `NotJoint`."""
        verify(self, inner, args, kwargs)
        self.is_verified = True
