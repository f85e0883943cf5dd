"""A model's and an optimizer's structure, compared at each entry with what it is then."""

from __future__ import annotations

from torch import nn

from svag_fast.optim.grad_watch import hooks_on
from svag_fast.optim.two_batch import TwoBatchOptimizer
from svag_fast.sample_norms.structure import Switches


class Look:
    """What was there, compared in quick terms; it holds all of it, so that no id is given to another object."""

    def __init__(self, model: nn.Module, optimizer: TwoBatchOptimizer) -> None:
        self._optimizer, self._model = optimizer, model
        self._groups = [list(group["params"]) for group in optimizer.param_groups]
        self._group_ids = [[*map(id, group)] for group in self._groups]
        self._modules = [
            (
                m,
                type(m),
                m.training,
                "forward" in m.__dict__,
                m._compiled_call_impl is not None,
                list(m._modules.values()),
                [*map(id, m._modules.values())],
            )
            for m in model.modules()
        ]
        self._params = [(own, [*map(id, own.values())]) for own in (m._parameters for m in model.modules()) if own]
        # Whether each is trained, and whether nobody looks at its gradient.
        self._states = [
            (p, p.requires_grad, hooks_on(p) == 0, not p._post_accumulate_grad_hooks)
            for own, _ in self._params
            for p in own.values()
            if p is not None
        ]
        self._switches = Switches(model)
        self._bare = [m._parameters for m in model.modules() if not m._parameters]

    def switched(self) -> bool:
        """Whether flags or words of the modules are others than when this was last asked."""
        if not self._switches.changed():
            return False
        self._switches = Switches(self._model)
        return True

    def holds(self) -> bool:
        """Whether all is as it was."""
        if self._switches.changed():
            return False
        groups = self._optimizer.param_groups
        if len(groups) != len(self._groups) or any(self._bare):
            return False
        for group, ids in zip(groups, self._group_ids, strict=True):
            if [*map(id, group["params"])] != ids:
                return False
        for module, kind, training, patched, compiled, _, ids in self._modules:
            if type(module) is not kind or module.training is not training:
                return False
            if ("forward" in module.__dict__) is not patched:
                return False
            if (module._compiled_call_impl is not None) is not compiled:
                return False
            if [*map(id, module._modules.values())] != ids:
                return False
        for own, ids in self._params:
            if [*map(id, own.values())] != ids:
                return False
        for p, trained, unwatched, unawaited in self._states:
            if p.requires_grad is not trained or (p._backward_hooks is None or hooks_on(p) == 0) is not unwatched:
                return False
            if (not p._post_accumulate_grad_hooks) is not unawaited:
                return False
        return True
