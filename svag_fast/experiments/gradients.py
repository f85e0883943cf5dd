"""Both batches' gradients of a run's step, and what measuring the noise adds to their cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from svag_fast.nn.pair_pass import pair_pass
from svag_fast.nn.pair_run import Way
from svag_fast.optim.two_batch import TwoBatchOptimizer
from svag_fast.sample_norms.context import UnsupportedModuleError, per_sample_sq_norms

# (model, batch) -> each sample's loss, [rows of the batch]
Losses: TypeAlias = Callable[[nn.Module, Any], Tensor]


class PairResult(NamedTuple):
    """What :func:`pair_gradients` returns.

    Attributes:
        losses: [2], each batch's mean loss.
        sq_norms: [2B] float64, |g_i|² of each sample's own gradient, or None where they were not asked for.
        way: "joint" (one pass) or "halves" (two); see :class:`svag_fast.pair_pass`.
    """

    losses: Tensor
    sq_norms: Tensor | None
    way: str | None


def has_sample_norms(model: nn.Module) -> bool:
    """Whether each sample has a gradient of its own, and every trained layer a rule for its norm."""
    try:
        with per_sample_sq_norms(model):
            return True
    except UnsupportedModuleError:
        return False


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Each sample's cross-entropy [B], of images [B, ...] and labels [B]."""
    images, labels = batch
    return F.cross_entropy(model(images), labels, reduction="none")


def pair_gradients(
    model: nn.Module,
    optimizer: TwoBatchOptimizer,
    batch: Any,
    *,
    norms: bool,
    losses: Losses = cross_entropy,
    way: Way = "auto",
) -> PairResult:
    """Leave the gradients of both batches' mean losses in the optimizer, by the cheapest way that is exact.

    Args:
        model: a module.
        optimizer: of its parameters; its ``step()`` takes the gradients.
        batch: of 2B samples: the first batch, then the second.
        norms: every sample's squared gradient norm as well; only where `has_sample_norms`.
        losses: each sample's loss.
        way: see :class:`svag_fast.pair_pass`.
    """
    with pair_pass(model, optimizer, norms=norms, way=way) as pair:
        found = losses(model, batch)
        pair.backward(found)
    return PairResult(found.detach().view(2, -1).mean(1), pair.norms.total if norms else None, pair.way)


def measuring_cost(
    model: nn.Module,
    optimizer: TwoBatchOptimizer,
    batch: Any,
    *,
    both: bool,
    repeats: int = 5,
    losses: Losses = cross_entropy,
    way: Way = "auto",
) -> float:
    """Return the time that measuring adds to the gradient that a step needs, as a fraction of that one's time.

    A step that combines both batches needs the gradient of a weighted mean of their losses, by PyTorch alone in as
    many passes as `pair_gradients` takes; one on the first batch alone (SGD) needs that batch's. Measured here and now,
    in alternation, medians. Gradients are cleared after it. Only where `has_sample_norms`.

    Args:
        model, optimizer, batch, losses, way: as in `pair_gradients`.
        both: whether the step needs both.
        repeats: of the measurement, after one that warms up.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    cuda = tensors[0].is_cuda
    rows = len(tensors[0])
    halves = [
        tree_map(lambda x, part=part: x[part] if isinstance(x, Tensor) and x.dim() and len(x) == rows else x, batch)
        for part in (slice(rows // 2), slice(rows // 2, None))
    ]
    taken: str | None = None

    def one(batch: Any) -> None:
        torch.autograd.grad(losses(model, batch).mean(), params, allow_unused=True)

    def plain() -> None:
        if both and taken == "joint":
            one(batch)
            return
        one(halves[0])
        if both:
            one(halves[1])

    def with_norms() -> None:
        nonlocal taken
        taken = pair_gradients(model, optimizer, batch, norms=True, losses=losses, way=way).way

    ways: list[Callable[[], None]] = [with_norms, plain]
    # On one thread its own time: a busy machine takes a thread off its core in the middle of a pass.
    clock = time.thread_time if torch.get_num_threads() == 1 and not cuda else time.perf_counter
    times: list[list[float]] = [[], []]
    for _ in range(repeats + 1):
        for run, seconds in zip(ways, times, strict=True):
            start = clock()
            run()
            if cuda:
                torch.cuda.synchronize(tensors[0].device)
            seconds.append(clock() - start)
        optimizer.discard_gradient()
    optimizer.zero_grad()
    measured, needed = (median(seconds[1:]) for seconds in times)  # the first round warms up
    return measured / needed - 1
