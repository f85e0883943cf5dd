"""Both batches through any model, one after the other: the way where nothing about the model has to be known.

The model is called on each half of the rows, and the two outputs meet in the user's loss. Between them the graph is
cut, so that each half's backward pass leaves that batch's own gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from svag_fast.nn.pair_batch_norm import _PLAIN
from svag_fast.sample_norms.tape import in_backward

Gradients = dict[Tensor, Tensor]


class _Cut(NamedTuple):
    """One output of a call: what each half made, and the leaves that the loss saw in their place."""

    made: tuple[Tensor, Tensor]
    leaves: tuple[Tensor, Tensor]


def leaves_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """What a model is called on, out of its containers."""
    if not kwargs and len(args) == 1 and isinstance(args[0], Tensor):  # as a rule: without a search
        return [args[0]]
    return tree_leaves((args, kwargs))


def row_count(args: Any, kwargs: Any) -> int:
    """2B: the first dimension of the first tensor among a model's inputs.

    Raises:
        ValueError: there is none, it is odd, or tensors are in containers that PyTorch can't look into.
    """
    if len(args) == 1 and not kwargs and type(x := args[0]) is Tensor and x.dim() > 0:  # as a rule
        return _even(x.shape[0])
    leaves = leaves_of(args, kwargs)
    for leaf in leaves:
        if hides_tensors(leaf):
            raise ValueError(
                f"the model's input must be tensors as they are, or in a dict, got some in a {type(leaf).__name__}"
            )
    rows = next((x.shape[0] for x in leaves if isinstance(x, Tensor) and x.dim() > 0), None)
    if rows is None:
        raise ValueError(
            "the model's input must be tensors whose first dimension is the samples of both batches, got none"
        )
    return _even(rows)


def hides_tensors(leaf: Any) -> bool:
    """Whether tensors are in an object that PyTorch can't look into."""
    if isinstance(leaf, (Tensor, nn.Module)):
        return False
    inside = leaf.values() if isinstance(leaf, Mapping) else vars(leaf).values() if hasattr(leaf, "__dict__") else ()
    return any(isinstance(x, Tensor) for x in inside)


def _even(rows: int) -> int:
    if rows % 2 or rows == 0:
        raise ValueError(
            f"the model's input must be two batches of the same size, torch.cat([x1, x2]), got {rows} rows"
        )
    return rows


class ByHalves:
    """See the module's text.

    Args:
        root: the model whose calls are halved.
        params: the trained parameters, by name.
    """

    way = "halves"
    task: int | None = None
    """As of `Joint`: not known."""

    def __init__(self, root: nn.Module, params: Mapping[str, nn.Parameter]) -> None:
        self.root = root
        self.outputs: list[Tensor] = []
        self._params = params
        self._second_updates = True
        self._norms: list[Any] = [m for m in root.modules() if isinstance(m, (_BatchNorm, _InstanceNorm))]
        self._cuts: list[list[_Cut]] = []
        self._paired: list[tuple[nn.Module, type[nn.Module]]] = []
        self._inside = False

    def begin(self, *, second_updates: bool) -> None:
        """Have a paired BatchNorm see one batch at a time, as a plain one; `second_updates`: the second batch updates
        running statistics."""
        self._second_updates = second_updates
        for module in self._norms:
            if type(module) in _PLAIN:
                self._paired.append((module, type(module)))
                module.__class__ = _PLAIN[type(module)]

    def end(self) -> None:
        """Leave the model as it was."""
        self.forget()
        for module, kind in self._paired:
            module.__class__ = kind
        self._paired = []

    def forget(self) -> None:
        """Drop the graphs of the calls so far."""
        self._cuts, self.outputs = [], []

    def forward(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's forward, of both halves."""
        if self._inside or not torch.is_grad_enabled() or in_backward():
            return inner(*args, **kwargs)
        rows = row_count(args, kwargs)
        halves = [tree_map(lambda x, i=i: _half(x, rows, i), (args, kwargs)) for i in (0, 1)]
        self._inside = True
        try:
            (args1, kwargs1), (args2, kwargs2) = halves
            first = inner(*args1, **kwargs1)
            with _statistics(self._norms, counted=True, used=self._second_updates):
                second = inner(*args2, **kwargs2)
        finally:
            self._inside = False
        return self._join(first, second, rows // 2)

    def _join(self, first: Any, second: Any, rows: int) -> Any:
        leaves1, structure = tree_flatten(first)
        leaves2, other = tree_flatten(second)
        if structure != other:
            raise ValueError("the model's outputs must be built the same for both batches, got different ones")
        cuts: list[_Cut] = []
        joined = [self._join_leaf(x, y, rows, cuts) for x, y in zip(leaves1, leaves2, strict=True)]
        self._cuts.append(cuts)
        return tree_unflatten(joined, structure)

    def _join_leaf(self, x: Any, y: Any, rows: int, cuts: list[_Cut]) -> Any:
        if not isinstance(x, Tensor):
            if x is not y and x != y:
                raise ValueError(
                    f"the model's outputs must be tensors where the two batches differ, got {x!r} for one and {y!r} "
                    "for the other"
                )
            return x
        if x.dim() == 0 or x.shape[0] != rows or y.shape[0] != rows:
            raise ValueError(
                "the first dimension of each output must be the samples (a loss inside the model: one value a "
                f"sample), got {list(x.shape)} for a batch of {rows}"
            )
        if not (x.requires_grad or y.requires_grad):
            return torch.cat([x, y])
        leaves = x.detach().requires_grad_(), y.detach().requires_grad_()
        cuts.append(_Cut((x, y), leaves))
        self.outputs.append(torch.cat(leaves))
        return self.outputs[-1]

    def backward(self, losses: Tensor, weights: Tensor, first: Gradients) -> None:
        """Add the first batch's gradients to those in `first`, and the second's to ``.grad``.

        Raises:
            RuntimeError: a parameter has part in the losses without the model's call.
        """
        params = self._params
        second = {p: p.grad for p in params.values()}
        for p in params.values():
            p.grad = None
        torch.autograd.backward(losses, weights)
        for name, p in params.items():
            if p.grad is not None:
                raise RuntimeError(
                    f"{name} has part in the losses without the call of the model inside the context (its parameter, a "
                    "layer or a kept activation was used directly), so its gradient can't be told apart by batches: "
                    "have the model return what the losses need"
                )
        cuts, self._cuts, self.outputs = self._cuts, [], []
        for half, held in ((0, first), (1, second)):
            for p in params.values():
                p.grad = held.get(p)
            with _statistics(self._norms, counted=False, used=half == 0 or self._second_updates):
                for call in reversed(cuts):
                    pairs = [(cut.made[half], cut.leaves[half].grad) for cut in call if cut.made[half].requires_grad]
                    pairs = [(made, grad) for made, grad in pairs if grad is not None]
                    if pairs:
                        torch.autograd.backward(*map(list, zip(*pairs, strict=True)))  # type: ignore[arg-type]
            if half == 0:
                first.update({p: p.grad for p in params.values() if p.grad is not None})


def _half(x: Any, rows: int, half: int) -> Any:
    """A half of what has samples, the whole of what they share."""
    if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[0] != rows:
        return x
    return x[rows // 2 * half : rows // 2 * (half + 1)]


@contextmanager
def _statistics(norms: list[Any], *, counted: bool, used: bool) -> Iterator[None]:
    """What running statistics see meanwhile: a new batch; one that they have seen (a checkpoint's recomputation); none.

    A recomputation must save the same tensors as the forward before it, so there the statistics are handed over, with
    momentum 0; unused ones are not.
    """
    if counted and used:
        yield
        return
    before = [(m, m.track_running_stats, m.momentum, m._buffers.get("num_batches_tracked")) for m in norms]
    try:
        for module, _, _, batches in before:
            if not used and isinstance(module, _BatchNorm):
                module.track_running_stats = module.track_running_stats and not module.training
            else:
                module.momentum = 0.0
                if batches is not None:
                    module._buffers["num_batches_tracked"] = None
        yield
    finally:
        for module, tracks, momentum, batches in before:
            module.track_running_stats, module.momentum = tracks, momentum
            if batches is not None:
                module._buffers["num_batches_tracked"] = batches
