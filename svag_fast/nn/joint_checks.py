"""Before its first joint pass, is a model what the pass takes for granted: are the two halves of its rows apart?"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from svag_fast.nn.halves import row_count
from svag_fast.nn.joint_grads import OURS, NotJoint
from svag_fast.nn.replay import Replay, differ, randomised, rewound, tensors_of

if TYPE_CHECKING:
    from svag_fast.nn.joint import Joint


class Met(NamedTuple):
    """A layer's output in a pass, or the copies of a parameter.

    It is known by the node that made it, since the tensor itself would be kept from being freed.
    """

    layer: str
    node: Any
    output: int | None  # None: of a parameter's copies, one for each half
    dim: int = 0  # of its rows
    required: bool = True  # whether the model's outputs must depend on it


def verify(joint: Joint, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Hold the model to what this way takes for granted, before its first pass, on few of the samples.

    Neither half's outputs may change with the other half's inputs; each layer's rows must be on the way to their
    own half's outputs alone; and no parameter may be used outside its layer. Looked at with other parameters, which
    are put back with buffers and generators.

    Raises:
        NotJoint: it is not so, or can't be seen, and where.
    """
    rows = row_count(args, kwargs)
    with rewound(joint.root) as replay, randomised(joint.root):
        try:
            joint.learns = True
            _verify(joint, inner, _few(args, rows), _few(kwargs, rows), replay)
        except NotJoint:
            raise
        except Exception:  # a model that takes no other batch size tells what is wrong with this one, if anything
            joint.learns = False
            replay.rewind()
            _verify(joint, inner, args, kwargs, replay)
        finally:
            joint.learns = False


def _verify(
    joint: Joint, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], replay: Replay
) -> None:
    rows = joint.rows = row_count(args, kwargs)
    alone = []
    joint.inside = True
    try:
        with torch.no_grad():
            for half in (None, 0, 1):
                replay.rewind()
                alone.append(_outputs(joint.forward(inner, *_one_batch_twice(args, kwargs, rows, half)), rows))
    finally:
        joint.inside = False
    for half in (0, 1):
        own = slice(rows // 2 * half, rows // 2 * (half + 1))
        for x, y in zip(alone[0], alone[half + 1], strict=True):
            if x.shape != y.shape or differ(x[own], y[own], noise=_rounding(x)):
                raise NotJoint("one batch's outputs change with the other batch: samples are coupled")
    torch.clear_autocast_cache()  # casts made without gradients
    try:
        joint.met = []
        joint.forward(inner, args, kwargs)
        _check_graph(joint, joint.met, rows)
    finally:
        joint.forget()


def _check_graph(joint: Joint, met: list[Met], rows: int) -> None:
    if not joint.outputs:
        raise NotJoint(f"the model returns no tensor with a gradient whose first dimension is the {rows} samples")
    for node in _nodes(joint.outputs):
        if node.name() == "CheckpointFunctionBackward":
            raise NotJoint(
                "a checkpoint with use_reentrant=True hides the layers inside it (use_reentrant=False does not)"
            )
    for half in (0, 1):
        weights = [_random_rows(x, half) for x in joint.outputs]
        for name, own, other in _rows_reached(joint, joint.outputs, weights, met, half):
            if other:
                raise NotJoint(
                    f"{name}: its rows are not the samples in order (positions first, a value that all share), or "
                    "the samples are coupled after it"
                )
            if not own:
                raise NotJoint(f"{name}: the model's outputs do not depend on it, so its rows can't be checked")
    if (used := used_elsewhere(joint, joint.outputs)) is not None:
        raise NotJoint(f"{used} is used outside of its own layer's forward")


def check_losses(joint: Joint, losses: Tensor, met: list[Met]) -> None:
    """In the first pass: what the losses have from elsewhere than the outputs may couple the batches too."""
    for half in (0, 1):
        weights = torch.zeros_like(losses)
        weights[len(losses) // 2 * half : len(losses) // 2 * (half + 1)] = 1
        for name, _, other in _rows_reached(joint, [losses], [weights], met, half):
            if other:
                raise RuntimeError(
                    f"one batch's losses depend on the other batch by way of {name}, as through a loss that a "
                    "layer keeps: each loss must be of its own sample, or of its own batch"
                )


def _rows_reached(
    joint: Joint, outputs: list[Tensor], weights: list[Tensor], met: list[Met], half: int
) -> Iterator[tuple[str, bool, bool]]:
    """For each layer, whether a backward pass from one half reaches its rows of that half, and of the other."""
    reached = [[False, False] for _ in met]

    def look(layer: int, grads: tuple[Tensor | None, ...]) -> None:
        _, _, output, dim, _ = met[layer]
        grad = None if output is None else grads[output]
        halves = grads if output is None else () if grad is None else grad.chunk(2, dim)
        for which, rows in enumerate(halves):
            reached[layer][which] = rows is not None and bool((rows.nan_to_num() != 0).any())

    # By hooks: to ask for the layers' gradients would hold them all at once.
    handles = []
    for layer, m in enumerate(met):
        # A function's node without a graph, which nothing reaches, can't be hooked in an older PyTorch.
        with contextlib.suppress(RuntimeError):
            handles.append(m.node.register_prehook(functools.partial(look, layer)))
    try:
        torch.autograd.grad(outputs, list(joint.params.values()), weights, retain_graph=True, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    for m, halves in zip(met, reached, strict=True):
        yield m.layer, halves[half] or not m.required, halves[1 - half]


def used_elsewhere(joint: Joint, outputs: list[Tensor]) -> str | None:
    """A parameter that the graph reaches otherwise than by its twins."""
    for node in _nodes(outputs):
        for following, _ in node.next_functions:
            p = getattr(following, "variable", None)
            if p is not None and p in joint.names and not isinstance(node, OURS):
                return joint.names[p]
    return None


def _nodes(outputs: list[Tensor]) -> Iterator[Any]:
    """All nodes of a graph."""
    nodes: list[Any] = [x.grad_fn for x in outputs if x.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)


def _few(inputs: Any, rows: int) -> Any:
    """Two samples of each batch; of batches of two, three: another number, so that a tensor which all samples share is
    told from theirs."""
    few = [i % (rows // 2) for i in range(2 if rows != 4 else 3)]
    which = [*few, *(rows // 2 + i for i in few)]

    def pick(x: Any) -> Any:
        return x[which] if isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == rows else x

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
