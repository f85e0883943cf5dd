"""A model while its per-sample norms are taken: its layers served, its parameters tracked, its samples known.

Nothing is taken for settled on entry: each pass through the model looks whether layers or parameters were added,
replaced, frozen or unfrozen since, and serves or refuses them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from svag_fast.sample_norms import dispatch
from svag_fast.sample_norms.plan import Found, Survey, UnsupportedModuleError, found_before, switched
from svag_fast.sample_norms.rows import RowCheck, Sequences
from svag_fast.sample_norms.rule import Known
from svag_fast.sample_norms.served import Layer
from svag_fast.sample_norms.structure import Standing
from svag_fast.sample_norms.tables import Samples
from svag_fast.sample_norms.tape import NO_TASK, Recorder, current_task, in_backward


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
        self.samples = Samples(batch_size)
        self.rows = RowCheck(model, recorder, check)
        self._wanted = None if wanted is None else {id(p): p for p in wanted}
        self._given = batch_size
        self._last_batch_size: int | None = None
        self._depth = 0
        self._layers: dict[nn.Module, Layer] = {}
        self._served: list[dispatch.Served] = []
        self._tracked: list[Known] = []
        self._standing: Standing
        self._plain: Callable[..., Any]  # the model's own forward, where it is no layer itself
        self._sequences: Sequences | None = None

    def begin(self) -> None:
        """Serve the model; refuses before anything is changed."""
        before = None
        if self._wanted is None and dispatch.is_idle():  # else others may serve its modules
            before = found_before(self.model, self._given is not None)
        if before is None:
            self.scan()
        else:
            self._serve(*before)
        if not self.recorder.aliases:
            raise ValueError("parameters must be some that require a gradient, got none: there is nothing to track")

    def end(self) -> None:
        """Leave the model as it was."""
        if self._sequences is not None:
            self._sequences.watch(set())
        dispatch.take_back(self._served)
        self._served, self._layers = [], {}

    def scan(self) -> None:
        """Look at the whole model, and serve it as it is now."""
        look = Survey(self.model, self._wanted, self._given is not None, self._layers)
        if self.model not in self._layers and not self._served and dispatch.is_served(self.model):
            raise UnsupportedModuleError(
                "the model is served already: first leave the other per_sample_sq_norms context"
            )
        if look.sequences or self._sequences is not None:
            self.sequences().watch(look.sequences)
        self._serve(look.found, look.found.structure.look() or Standing.unknown())

    def sequences(self) -> Sequences:
        """Who looks at modules that take the samples second and aren't trained."""
        if self._sequences is None:
            self._sequences = Sequences(self.model, self.samples)
        return self._sequences

    def _serve(self, found: Found, standing: Standing) -> None:
        layers: dict[nn.Module, Layer] = {}
        functions: list[tuple[nn.Module, dispatch.Function]] = []
        tracked = []
        for plan in found.plans:
            module = plan.ref()
            assert module is not None
            layers[module] = layer = Layer(self, plan, module)
            functions.append((module, layer.forward))
            if plan.names:
                tracked.append(plan.known)
        model = self.model
        if model in layers or "forward" not in model.__dict__:
            functions.append((model, self._forward))  # over its own layer's, which it calls
        before, self._layers = self._served, layers
        self._served = dispatch.serve_all(functions, found.dispatches)
        last, _ = self._served[-1]
        self._plain = functools.partial(last.plain, model)
        if before:
            dispatch.take_back([served for served in before if served not in self._served])
        self.recorder.track(found.names, found.aliases)
        self._tracked = tracked
        self.rows.look_again(tracked)
        self.samples.look_again(tracked, found.all_tracked)
        self._standing = standing

    def untracked(self) -> str | None:
        """The name of a parameter that may have got a gradient without being tracked."""
        if not self._standing.outdated():
            return None
        for name, parameter in self.model.named_parameters():
            wanted = self._wanted is None or id(parameter) in self._wanted
            if wanted and parameter.requires_grad and not self.recorder.tracks(parameter):
                return name
        return None

    def batch_size_now(self) -> int | None:
        """B, also of the graph whose backward pass runs a checkpoint's layers once more."""
        if self.samples.batch_size is not None or not in_backward():
            return self.samples.batch_size
        running = self.recorder.running_batch_size()
        return self._last_batch_size if running is None else running  # a checkpoint refuses other shapes than before

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """What runs in place of the model's own forward."""
        passes = not self._depth and torch.is_grad_enabled() and current_task() == NO_TASK
        if passes and self._standing.outdated():
            self.scan()
        if passes and switched(self.model):
            self.rows.look_again(self._tracked)
        layer = self._layers.get(self.model)
        inner = self._plain if layer is None else layer.forward
        if not passes:
            return inner(*args, **kwargs)
        samples, rows = self.samples, self.rows
        x = args[0] if len(args) == 1 and not kwargs else None
        inputs = [x] if type(x) is Tensor and x.dim() > 0 else _tensors((args, kwargs))
        before = samples.batch_size
        self._depth += 1
        samples.inputs = inputs
        try:
            if self._given is None and inputs:
                samples.batch_size = inputs[0].shape[0]
            self._last_batch_size = samples.batch_size
            out = samples.run(inner, args, kwargs, rows.begin)
            if rows.calls:
                rows.end([x for x in _leaves(out) if isinstance(x, Tensor)], samples.batch_size)
            return out
        finally:
            self._depth -= 1
            samples.inputs, samples.batch_size = [], before
            rows.calls = None


def _tensors(inputs: Any) -> list[Tensor]:
    """The tensors among a model's inputs, scalars left out."""
    return [x for x in _leaves(inputs) if isinstance(x, Tensor) and x.dim() > 0]


def _leaves(inputs: Any) -> list[Any]:
    leaves = []
    for x in tree_leaves(inputs):
        if isinstance(x, Mapping):  # a kind of dictionary that PyTorch doesn't know
            leaves.extend(_leaves(dict(x)))
        else:
            leaves.append(x)
    return leaves
