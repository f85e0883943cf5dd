"""A layer run on one half of the rows, then on the other, each with its own batch's copies of the parameters.

Autograd itself then forms the two gradients, in two segments, so nothing about the layer has to be known but where its
rows are. Small layers (normalisations, embeddings) go this way, and every layer without a rule of its own: together
with all that is inside it, since its forward may use its children's parameters directly.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_unflatten

from svag_fast.nn.halves import hides_tensors
from svag_fast.nn.joint_grads import NotJoint

Twins: TypeAlias = Callable[[Tensor | None], tuple[Tensor | None, Tensor | None]]
_Call: TypeAlias = tuple[str, tuple[bool, ...]]


class LayerHalves:
    """See the module's text.

    Args:
        label: of the layer in errors.
        module: the layer.
        inner: whether what is inside the module goes with it; else only its own parameters have copies.
    """

    def __init__(self, label: str, module: nn.Module, *, inner: bool = False) -> None:
        self.label, self.module, self.inner = label, module, inner
        modules = list(module.modules()) if inner else [module]
        self._owned = [m._parameters for m in modules if m._parameters]
        self._recurrent = [m for m in modules if isinstance(m, nn.RNNBase)]
        self._rows_are = module if isinstance(module, nn.RNNBase) else None
        self._seen: dict[_Call, list[bool]] = {}

    def run(
        self,
        plain: Callable[..., Any],
        twins: Twins,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        check_rows: Callable[[str, int], None],
        learns: bool,
    ) -> tuple[Any, list[tuple[Tensor, int]]]:
        """The layer's output of both halves, and its tensors with the dimension of their rows.

        Args:
            plain: the layer's own forward.
            twins: gives a parameter's copies.
            args, kwargs: of the call. Tensors that have the first one's number of rows are halved, others are shared.
            check_rows: raises where there are not as many rows as they should be.
            learns: whether to note which those are; else it must be as noted: a shared tensor may have as many rows by
                chance, but not for two numbers of samples.

        Raises:
            NotJoint: the samples can't be told in the inputs or outputs.
        """
        pairs = [(own, {key: twins(p) for key, p in own.items()}) for own in self._owned]
        if not self.inner and all(p is q for _, both in pairs for p, q in both.values()):
            return plain(*args, **kwargs), []
        leaves, structure = self._flatten((args, kwargs))
        dims = self._dims(leaves, kwargs)
        if not dims:
            return plain(*args, **kwargs), []  # its parameters are found to be used without their copies
        rows = leaves[next(iter(dims))].shape[next(iter(dims.values()))]
        check_rows(self.label, rows)
        halved = [i in dims and x.dim() > dims[i] and x.shape[dims[i]] == rows for i, x in enumerate(leaves)]
        if self.inner or len(dims) > 1:
            self._check((str(structure), tuple(i in dims for i in range(len(leaves)))), halved, learns=learns)
        outs = []
        lists = [(m, m._flat_weights, m._flat_weight_refs) for m in self._recurrent]
        kept = [(own, dict(own)) for own in self._owned]
        try:
            for half in (0, 1):
                for own, both in pairs:
                    own.update({key: pair[half] for key, pair in both.items()})  # type: ignore[misc]
                for module in self._recurrent:
                    _relist(module)
                some = [
                    x.narrow(dims[i], rows // 2 * half, rows // 2) if is_halved else x
                    for i, (x, is_halved) in enumerate(zip(leaves, halved, strict=True))
                ]
                args_, kwargs_ = tree_unflatten(some, structure)
                outs.append(plain(*args_, **kwargs_))
        finally:
            for own, before in kept:
                own.update(before)
            for module, weights, refs in lists:
                module._flat_weights, module._flat_weight_refs = weights, refs
        return self._joined(outs[0], outs[1], rows // 2)

    def _flatten(self, value: Any) -> tuple[list[Any], Any]:
        leaves, structure = tree_flatten(value, _is_packed if self.inner else None)
        for x in leaves:
            if self.inner and (_is_packed(x) or hides_tensors(x)):
                raise NotJoint(f"{self.label} takes or returns a {type(x).__name__}, whose rows can't be told")
        return leaves, structure

    def _dims(self, leaves: list[Any], kwargs: dict[str, Any]) -> dict[int, int]:
        """For each tensor among the inputs, the dimension in which it has its rows, if it has them."""
        found = {i: 0 for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.dim() > 0}
        module = self._rows_are
        if module is None or not found:
            return found
        if kwargs or leaves[0].dim() != 3:
            raise NotJoint(f"{self.label} is called with keywords, or on other than [samples, times, features]")
        return {i: 0 if i == 0 and module.batch_first else 1 for i in found}

    def _check(self, call: _Call, halved: list[bool], *, learns: bool) -> None:
        seen = self._seen.get(call)
        if seen is None and learns:
            self._seen[call] = halved
        elif seen != halved:
            raise NotJoint(
                f"{self.label} has no rule of its own, and which of its inputs have samples can't be told by their "
                "number of rows, or not as in the first pass"
            )

    def _joined(self, first: Any, second: Any, rows: int) -> tuple[Any, list[tuple[Tensor, int]]]:
        if isinstance(first, Tensor) and self._rows_are is None and first.dim() > 0 and first.shape[0] == rows:
            out = torch.cat([first, second])
            return out, [(out, 0)]
        leaves1, structure = self._flatten(first)
        leaves2, other = self._flatten(second)
        if structure != other:
            raise NotJoint(f"{self.label} returns other things for one batch than for the other")
        made, joined = [], []
        for i, (x, y) in enumerate(zip(leaves1, leaves2, strict=True)):
            if not isinstance(x, Tensor):
                if x is not y and x != y:
                    raise NotJoint(f"{self.label} returns {x!r} for one batch and {y!r} for the other")
                joined.append(x)
                continue
            dim = 0 if self._rows_are is None or (i == 0 and self._rows_are.batch_first) else 1
            if x.dim() <= dim or x.shape[dim] != rows or x.dim() != y.dim() or y.shape[dim] != rows:
                raise NotJoint(f"{self.label} returns {list(x.shape)}, in which the {rows} samples can't be told")
            joined.append(torch.cat([x, y], dim))
            made.append((joined[-1], dim))
        return tree_unflatten(joined, structure), made


def _is_packed(x: Any) -> bool:
    return isinstance(x, PackedSequence)


def _relist(module: Any) -> None:
    """Have a recurrent layer, which keeps a list of its weights, see those that it has now."""
    own = module._parameters
    module._flat_weights = [own.get(name) for name in module._flat_weights_names]
    module._flat_weight_refs = [None if w is None else weakref.ref(w) for w in module._flat_weights]
