"""Both batches' gradients of a run's step, and what measuring the noise adds to their cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from svag_fast.nn.pair_pass import pair_pass
from svag_fast.optim.two_batch import TwoBatchOptimizer
from svag_fast.sample_norms.context import UnsupportedModuleError, per_sample_sq_norms


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


def pair_gradients(
    model: nn.Module, optimizer: TwoBatchOptimizer, images: Tensor, labels: Tensor, *, norms: bool
) -> PairResult:
    """Leave both batches' cross-entropy gradients in the optimizer, by the cheapest way that is exact for the model.

    Args:
        model: maps images to logits.
        optimizer: of its parameters; its ``step()`` takes the gradients.
        images: [2B, ...]: the first batch, then the second.
        labels: [2B] int64.
        norms: every sample's squared gradient norm as well; only where `has_sample_norms`.
    """
    with pair_pass(model, optimizer, norms=norms) as pair:
        losses = F.cross_entropy(model(images), labels, reduction="none")
        pair.backward(losses)
    return PairResult(losses.detach().view(2, -1).mean(1), pair.norms.total if norms else None, pair.way)


def measuring_cost(
    model: nn.Module, optimizer: TwoBatchOptimizer, images: Tensor, labels: Tensor, *, both: bool, repeats: int = 5
) -> float:
    """Return the time that measuring adds to the gradient that a step needs, as a fraction of that one's time.

    A step that combines both batches needs the gradient of a weighted mean of their losses, by PyTorch alone in as
    many passes as `pair_gradients` takes; one on the first batch alone (SGD) needs that batch's. Measured here and now,
    in alternation, medians. Gradients are cleared after it. Only where `has_sample_norms`.

    Args:
        model, optimizer, images, labels: as in `pair_gradients`.
        both: whether the step needs both.
        repeats: of the measurement, after one that warms up.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    half = len(labels) // 2
    way: str | None = None

    def one(images: Tensor, labels: Tensor) -> None:
        torch.autograd.grad(F.cross_entropy(model(images), labels), params)

    def plain() -> None:
        if both and way == "joint":
            one(images, labels)
            return
        one(images[:half], labels[:half])
        if both:
            one(images[half:], labels[half:])

    def with_norms() -> None:
        nonlocal way
        way = pair_gradients(model, optimizer, images, labels, norms=True).way

    ways: list[Callable[[], None]] = [with_norms, plain]
    # On one thread its own time: a busy machine takes a thread off its core in the middle of a pass.
    clock = time.thread_time if torch.get_num_threads() == 1 and not images.is_cuda else time.perf_counter
    times: list[list[float]] = [[], []]
    for _ in range(repeats + 1):
        for run, seconds in zip(ways, times, strict=True):
            start = clock()
            run()
            if images.is_cuda:
                torch.cuda.synchronize(images.device)
            seconds.append(clock() - start)
        optimizer.discard_gradient()
    optimizer.zero_grad()
    measured, needed = (median(seconds[1:]) for seconds in times)  # the first round warms up
    return measured / needed - 1
