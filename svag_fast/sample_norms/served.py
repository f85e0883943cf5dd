"""A layer that is served: what its forward does inside a context, on samples and on values that all samples share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from svag_fast.sample_norms.dispatch import plain_forward
from svag_fast.sample_norms.plan import Plan, refuse
from svag_fast.sample_norms.rule import Scope
from svag_fast.sample_norms.structure import takes_samples_second
from svag_fast.sample_norms.tables import Table

if TYPE_CHECKING:
    from svag_fast.sample_norms.watch import Watch


class Layer(Scope):
    """See the module's text."""

    def __init__(self, watch: Watch, plan: Plan, module: nn.Module) -> None:
        _, self.kind, self.place, self.names, self.known, self.couples, self.may_refuse = plan
        self.recorder = watch.recorder
        self.module = module
        self.check = watch.check
        self._watch = watch
        self._samples = watch.samples
        self._rows = watch.rows
        self._seen: list[tuple[str, Tensor | None, bool]] = []
        for name, parameter in module._parameters.items():
            self._seen.append((name, parameter, parameter is not None and parameter.requires_grad))

    def _outdated(self) -> bool:
        """Whether the module has another class, or other parameters, or frozen ones, or not, than before."""
        module = self.module
        parameters = module._parameters
        if type(module) is not self.kind or len(parameters) != len(self._seen):
            return True
        for name, parameter, trained in self._seen:
            if parameters.get(name) is not parameter:
                return True
            if parameter is not None and parameter.requires_grad is not trained:
                return True
        return False

    def _plain(self) -> Callable[..., Any]:
        return plain_forward(self.kind)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What runs in place of the module's forward."""
        module, known = self.module, self.known
        if self.names or self.couples:
            if self.may_refuse:  # options may have changed since
                refuse(known.rule, self.place, module)
        elif takes_samples_second(module):
            return self._watch.sequences().forward(module, *args, **kwargs)
        if not torch.is_grad_enabled() or not (args or kwargs):
            return self._plain()(module, *args, **kwargs)
        if self._outdated():
            self._watch.scan()
            return module.forward(*args, **kwargs)
        if not self.names:
            return self._plain()(module, *args, **kwargs)
        x, samples = args[0] if args else None, self._samples
        if (
            len(args) == 1
            and not kwargs
            and type(x) is Tensor
            and known.samples_only
            and x.dim() > 0
            and x.shape[0] == samples.batch_size
            and ((samples.grad_tells and x.requires_grad and not x.is_leaf) or samples.plainly(x))
        ):
            rows = self._rows
            return known.rule.run(self, module, args, kwargs) if rows.calls is None else self._run(args, kwargs)
        return self._serve(args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = self.known.rule.run(self, self.module, args, kwargs)
        self._rows.add(self, (args, kwargs), out)
        return out

    def _serve(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run on samples, or on copies of a value that has none."""
        module = self.module
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not tensors or torch._C._get_tracing_state() is not None:
            return self._plain()(module, *args, **kwargs)
        table = any(isinstance(x, Table) for x in tensors)
        B = self._watch.batch_size_now()
        if B is None:
            if table or self.known.shared_only or self.known.mixed:
                raise ValueError(
                    f"the input of {self.label} must be one with samples where the batch size is not known, got a "
                    "value without"
                )
            x = tensors[0]
            if module is not self._watch.model and x.dim() == 1 and not (x.is_floating_point() or x.is_complex()):
                raise ValueError(
                    f"the indices of {self.label} must be given inside of the model's own forward, got "
                    f"{list(x.shape)} outside, which may be samples or positions: call the model itself, or pass "
                    "batch_size=..."
                )
            return self._run(args, kwargs)
        if table or not self._samples.include(self.known, tensors, B):
            return self._serve_shared(tensors, B, args, kwargs)
        if not any(x.dim() > 0 and x.shape[0] == B for x in tensors):
            raise ValueError(
                f"the first dimension of {self.label}'s input must be the model's {B} samples (not samples and "
                f"positions folded together), got {list(tensors[0].shape)}: pass batch_size=... if the batch size is "
                "another"
            )
        return self._run(args, kwargs)

    def _serve_shared(self, tensors: list[Tensor], B: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run on each sample's copy of a value that they share."""
        rule = self.known.rule
        x = tensors[0]
        rows = x.rows if isinstance(x, Table) else x.expand(B, *x.shape)
        # Layers that act on channels take [1, C, ...] as [B, C, ...], the others anything behind the samples.
        single = not rule.any_rows and x.dim() > 0 and x.shape[0] == 1
        if any(y is not x for y in tensors) or not (single or rule.any_rows):
            raise ValueError(
                f"the input of {self.label} must be one that depends on the model's input of {B} samples, or can be "
                f"computed for each sample apart, got {list(x.shape)}: give it an input whose first dimension is the "
                "samples, as by positions.expand(len(x), -1), or leave its parameters out with parameters=..."
            )
        copies = rows.select(1, 0) if single else rows
        args, kwargs = tree_map(lambda y: copies if y is x else y, (args, kwargs))
        out = self._run(args, kwargs)

        def as_table(y: Any) -> Any:
            if not isinstance(y, Tensor):
                return y
            return Table.of(y[:, None] if single else y, self.label, self._samples.is_samples)

        return tree_map(as_table, out)
