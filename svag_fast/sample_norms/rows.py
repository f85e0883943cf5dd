"""Whether the samples come first: rows compared with each other, and modules that take the samples second."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from svag_fast.ops.memory import has_memory
from svag_fast.sample_norms import dispatch
from svag_fast.sample_norms.rule import label_of
from svag_fast.sample_norms.tape import Recorder, hook

if TYPE_CHECKING:
    from svag_fast.sample_norms.rule import Known, Scope
    from svag_fast.sample_norms.tables import Samples


class LayerCall(NamedTuple):
    """A use of a layer in a pass through the model whose rows are checked."""

    scope: Scope
    inputs: list[Tensor]
    outputs: list[Tensor]


def check_rows(calls: list[LayerCall], outputs: list[Tensor], batch_size: int) -> None:
    """Row i of every layer's input, and of the model's output, must depend on row i alone of the layers before.

    It finds rows that only happen to be B (positions before the samples, tokens sorted by expert), rows in another
    order, and models that mix the samples. One backward pass for each bit of the rows' numbers, from the rows that have
    it: whatever the order, a row is then exchanged for one without some bit of its number.
    """
    ends = {id(x): (x, f"{call.scope.label}: {{}} of its input") for call in calls for x in call.inputs}
    ends |= {id(x): (x, "{} of the model's output") for x in outputs if id(x) not in ends}
    ends = {
        key: end
        for key, end in ends.items()
        if end[0].requires_grad and end[0].dim() > 0 and end[0].shape[0] == batch_size
    }
    for bit in range((batch_size - 1).bit_length()):
        rows = [i for i in range(batch_size) if i >> bit & 1]
        rest = [i for i in range(batch_size) if not i >> bit & 1]
        if _mixes(calls, [x for x, _ in ends.values()], rows, rest) is None:
            continue
        for x, name in ends.values():
            source = _mixes(calls, [x], rows, rest)
            if source is not None:
                listed = ", ".join(map(str, rows[:4])) + ", ..." * (len(rows) > 4)
                raise ValueError(
                    f"{name.format(f'the rows {listed}')} depend on other rows of {source}'s output than those: its "
                    f"rows are not the {batch_size} samples in their order (positions first, as with "
                    "batch_first=False; tokens gathered; rows sorted), or the model "
                    "mixes the samples, which then have no gradients of their own. Give the model, and every layer, "
                    "the samples first; where as many positions as samples come first in an output on purpose, begin "
                    "with another number of samples; for a model that mixes samples use "
                    "svag_fast.noise.estimators.from_two_batches"
                )
    made = [x for x in outputs if x.requires_grad]
    if made and all(x.dim() > 1 and all(size % batch_size for size in x.shape) for x in made):
        raise ValueError(
            f"the model's output must be of the {batch_size} samples that its input's first dimension was taken for, "
            f"got {list(made[0].shape)}: give it the samples first, or pass batch_size=..."
        )


def _mixes(calls: list[LayerCall], ends: list[Tensor], rows: list[int], rest: list[int]) -> str | None:
    """The first layer of whose output the rest of the rows comes into those rows of the ends."""
    if not ends:
        return None
    labels = {id(y): (y, call.scope.label) for call in calls for y in call.outputs if y.requires_grad}
    others: dict[int, Tensor] = {}

    def look(key: int, grad: Tensor) -> None:
        others[key] = grad.detach()[rest].nan_to_num().count_nonzero()

    # Looked at on its way and let go: at once these gradients would take the memory of the whole pass. Where no input
    # has a gradient a way through the graph begins.
    hooks = [hook(y, functools.partial(look, key)) for key, (y, _) in labels.items()]
    begin = [y for call in calls if not any(x.requires_grad for x in call.inputs) for y in call.outputs]
    try:
        _backward(ends, rows, [y for y in begin if y.requires_grad])
        _backward(ends, rows, [y for key, (y, _) in labels.items() if key not in others])
    finally:
        for handle in hooks:
            handle.remove()
    if not others or not bool(torch.stack([count.cpu() for count in others.values()]).any()):
        return None
    return next(label for key, (_, label) in labels.items() if key in others and bool(others[key] > 0))


def _backward(ends: list[Tensor], rows: list[int], begin: list[Tensor]) -> None:
    """Go back from some rows of each of the ends, pseudo-randomly weighted; the graph stays."""
    if not begin:
        return
    generator = torch.Generator("cpu").manual_seed(0)
    some = [x[rows] for x in ends]
    weights = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64, device="cpu").to(x.device, x.dtype) for x in some
    ]
    torch.autograd.grad(some, begin, weights, retain_graph=True, allow_unused=True)


class RowCheck:
    """Checks the rows of a pass through the model, where a layer's were not before or it is asked for in every pass."""

    def __init__(self, model: nn.Module, recorder: Recorder, always: bool) -> None:
        self.calls: list[LayerCall] | None = None  # in a pass whose rows may have to be checked
        self._layers: list[Known] = []
        self._model = model
        self._recorder = recorder
        self._always = always
        self._all_checked = False

    def look_again(self, layers: list[Known]) -> None:
        """These layers are tracked from now on."""
        self._layers = layers
        self._all_checked = True
        for known in layers:
            if not known.rows_checked:
                self._all_checked = False

    def begin(self) -> None:
        """A pass begins, or begins again."""
        self.calls = [] if self._always or not self._all_checked else None

    def add(self, scope: Scope, inputs: Any, outputs: Any) -> None:
        """Note a layer's call."""
        if self.calls is not None:
            self.calls.append(LayerCall(scope, _all_tensors(inputs), _all_tensors(outputs)))

    def end(self, outputs: list[Tensor], batch_size: int | None) -> None:
        """Check the pass; raises where its rows are not the samples."""
        calls, self.calls = self.calls, None  # a checkpoint's layers run again in the backward pass
        new = [call.scope.known for call in calls or () if not call.scope.known.rows_checked]
        if not calls or not (new or self._always) or batch_size is None or batch_size < 2:
            return
        if not all(has_memory(x) for call in calls for x in call.outputs):
            return
        if not self._always and _has_backward_hooks(self._model) and not any(map(_may_have_positions_first, calls)):
            return  # they would be called once more
        self._recorder.paused = True
        try:
            check_rows(calls, outputs, batch_size)
        except RuntimeError as error:
            self._recorder.unknown_rows = (
                f"whether the rows of the model are its samples could not be found out, so norms are not known: {error}"
            )
        else:
            self._recorder.unknown_rows = None
            for known in new:
                known.rows_checked = True
        finally:
            self._recorder.paused = False
        self._all_checked = all(known.rows_checked for known in self._layers)


def _all_tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def _may_have_positions_first(call: LayerCall) -> bool:
    """Whether a layer takes positions as well as samples, in any order."""
    return call.scope.known.rule.any_rows and any(x.dim() + (not x.is_floating_point()) > 2 for x in call.inputs)


def _has_backward_hooks(model: nn.Module) -> bool:
    if nn.modules.module._global_backward_hooks or nn.modules.module._global_backward_pre_hooks:
        return True
    return any(module._backward_hooks or module._backward_pre_hooks for module in model.modules())


class Sequences:
    """The modules that take the samples second and aren't trained: what they are given is looked at."""

    def __init__(self, model: nn.Module, samples: Samples) -> None:
        self._model = model
        self._samples = samples
        self._served: dict[nn.Module, list[dispatch.Served]] = {}

    def watch(self, modules: set[nn.Module]) -> None:
        """Watch these from now on, and no others."""
        for module in self._served.keys() - modules:
            dispatch.take_back(self._served.pop(module))
        for module in modules - self._served.keys() - {self._model}:
            if "forward" not in module.__dict__ and not dispatch.is_served(module):
                function = functools.partial(self.forward, module)
                self._served[module] = dispatch.serve_all([(module, function)], {})

    def forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The module's own; raises where it is given the samples first."""
        B = self._samples.batch_size
        x = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if B is None or x is None or x.dim() != 3 or x.shape[0] != B:
            pass
        elif x.shape[1] != B or any(_same(x, y) for y in self._samples.inputs):
            place = next((name for name, m in self._model.named_modules() if m is module), "")
            raise ValueError(
                f"the input of {label_of(place, module)}, which takes the samples second (batch_first=False), must be "
                f"of the model's {B} samples, got {list(x.shape)}: build it with batch_first=True, or give the model "
                "the samples first and transpose before and behind this module"
            )
        return dispatch.plain_forward(type(module))(module, *args, **kwargs)


def _same(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are the same elements in the same order."""
    if x is y:
        return True
    same_shape = x.shape == y.shape and x.stride() == y.stride() and x.storage_offset() == y.storage_offset()
    return same_shape and x.untyped_storage()._cdata == y.untyped_storage()._cdata
