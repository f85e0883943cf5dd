"""The gradients of two batches at the same parameters, with every sample's own squared norm where the model has it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from svag_fast.experiments.models import FixedHeadNet, PreActBlock
from svag_fast.ops.weight_grad.op import unchecked_weight_grads
from svag_fast.ops.weight_grad.shapes import Geometry

# Modules that treat each sample of a batch by itself, each forward using a weight once.
_SAMPLE_BY_SAMPLE = (nn.Sequential, nn.GroupNorm, nn.ReLU, nn.Identity, nn.AvgPool2d, FixedHeadNet, PreActBlock)

ONE_PASS_ELEMENTS = 64 * 64  # of both batches' images, on a CPU


class BatchGradients(NamedTuple):
    """What :class:`TwoBatchGradients` returns.

    Attributes:
        losses: [2], each batch's mean loss.
        grads1, grads2: each batch's gradients, in the order of ``TwoBatchGradients.params``.
        sq_norms: [2B] float64, |g_i|² of each sample's own gradient, or None where the model is not separable.
    """

    losses: Tensor
    grads1: list[Tensor]
    grads2: list[Tensor]
    sq_norms: Tensor | None


class TwoBatchGradients:
    """Cross-entropy gradients of two batches, by the cheapest way that is exact for the model.

    Where no module mixes samples and every trained weight is a plain convolution's, both batches go through one
    forward and one backward pass, in which each convolution forms its weight gradient once for each half, with its
    samples' squared norms. Otherwise, as with BatchNorm, whose statistics belong to one batch: two passes, one after
    the other, and no norms. On a CPU large batches take two passes as well: there is no overhead left to save, and half
    the activations fit better into the cache.

    Args:
        model: maps images to logits. Its modules must stay the same while `self` lives.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.separable = _halves_are_separable(model)
        self._convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]

    def __call__(self, images: Tensor, labels: Tensor, *, freeze_statistics: bool = False) -> BatchGradients:
        """Return both batches' losses and gradients.

        Args:
            images: [2B, ...]: the first batch, then the second.
            labels: [2B] int64.
            freeze_statistics: the second batch leaves BatchNorm's running statistics alone.
        """
        if self.separable and self._in_one_pass(images):
            losses, (grads1, grads2), sq_norms = self._by_parts(images, labels, 2)
            return BatchGradients(losses, grads1, grads2, sq_norms)
        half = len(labels) // 2
        first, second = (images[:half], labels[:half]), (images[half:], labels[half:])
        if self.separable:
            loss1, (grads1,), sq_norms1 = self._by_parts(*first, 1)
            loss2, (grads2,), sq_norms2 = self._by_parts(*second, 1)
            return BatchGradients(torch.cat([loss1, loss2]), grads1, grads2, torch.cat([sq_norms1, sq_norms2]))
        loss1, grads1 = self.one(*first)
        with _running_statistics_frozen(self.model, freeze_statistics):
            # At l = 1 the second batch measures only: SGD's BatchNorm must not see it.
            loss2, grads2 = self.one(*second)
        return BatchGradients(torch.stack([loss1, loss2]), grads1, grads2, None)

    def one(self, images: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the mean loss (0-d) and the gradients of a single batch, by PyTorch alone."""
        loss = F.cross_entropy(self.model(images), labels)
        return loss.detach(), list(torch.autograd.grad(loss, self.params))

    @staticmethod
    def _in_one_pass(images: Tensor) -> bool:
        return images.is_cuda or images.numel() <= ONE_PASS_ELEMENTS

    def measuring_cost(self, images: Tensor, labels: Tensor, *, both: bool, repeats: int = 5) -> float:
        """Return the time that measuring adds to the gradient that a step needs, as a fraction of that one's time.

        A step that combines both batches needs the gradient of a weighted mean of their losses, by PyTorch alone in as
        many passes as `self` takes; one on the first batch alone (SGD) needs that batch's. Measured here and now, in
        alternation, medians. Only if separable.

        Args:
            images, labels: both batches, as in a call.
            both: whether the step needs both.
            repeats: of the measurement, after one that warms up.
        """
        half = len(labels) // 2

        def plain() -> None:
            if both and self._in_one_pass(images):
                self.one(images, labels)
                return
            self.one(images[:half], labels[:half])
            if both:
                self.one(images[half:], labels[half:])

        ways: list[Callable[[], object]] = [plain, lambda: self(images, labels)]
        # On one thread its own time: a busy machine takes a thread off its core in the middle of a pass.
        clock = time.thread_time if torch.get_num_threads() == 1 and not images.is_cuda else time.perf_counter
        times: list[list[float]] = [[], []]
        for _ in range(repeats + 1):
            for way, seconds in zip(ways, times, strict=True):
                start = clock()
                way()
                if images.is_cuda:
                    # A GPU's kernels are only queued when `way` returns.
                    torch.cuda.synchronize(images.device)
                seconds.append(clock() - start)
        without, with_norms = (median(seconds[1:]) for seconds in times)  # the first round warms up
        return with_norms / without - 1

    def _by_parts(self, images: Tensor, labels: Tensor, parts: int) -> tuple[Tensor, list[list[Tensor]], Tensor]:
        """The mean losses [parts] and gradients of equal parts of a batch, and |g_i|² [B], from one pass."""
        tape = _Tape(parts)
        with _taped(self._convolutions, tape):
            logits = self.model(images)
        losses = F.cross_entropy(logits, labels, reduction="none")
        rows = len(labels) // parts
        # Backward from the losses of all samples, each with the weight 1/rows of its part's mean.
        torch.autograd.backward(losses, torch.full_like(losses, 1 / rows))  # of each part's mean
        grads = [[part[p] for p in self.params] for part in tape.grads]
        return losses.detach().view(parts, -1).mean(1), grads, torch.stack(tape.sq_norms).sum(0) * float(rows) ** 2


class _Tape:
    """What one backward pass leaves: each part's weight gradients, and each layer's squared norms of all samples."""

    def __init__(self, parts: int) -> None:
        self.grads: list[dict[Tensor, Tensor]] = [{} for _ in range(parts)]
        self.sq_norms: list[Tensor] = []


class _TapedConvolution(torch.autograd.Function):
    """conv2d whose weight gradients go to the tape, a part of the batch at a time, and not to the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, module: nn.Conv2d, tape: _Tape) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.tape = weight, tape  # the very parameter: it is a key
        ctx.geometry = (module.stride, module.padding, module.dilation, module.groups)
        return F.conv2d(x, weight, None, *ctx.geometry)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None, None]:
        (b,) = grad_outputs
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        tape: _Tape = ctx.tape
        geometry = Geometry(stride, padding, dilation, groups)
        grads, sq_norms = unchecked_weight_grads(x, b, weight.shape, geometry, len(tape.grads))
        for part, grad in zip(tape.grads, grads, strict=True):
            part[ctx.weight] = grad
        tape.sq_norms.append(sq_norms)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        x_grad: Tensor = torch.ops.aten.convolution_backward.default(
            b, x, weight, None, stride, padding, dilation, False, (0, 0), groups, (True, False, False)
        )[0]
        return x_grad, None, None, None


@contextmanager
def _taped(convolutions: list[nn.Conv2d], tape: _Tape) -> Iterator[None]:
    def forward(module: nn.Conv2d, x: Tensor) -> Tensor:
        result: Tensor = _TapedConvolution.apply(x, module.weight, module, tape)  # type: ignore[no-untyped-call]
        return result

    try:
        for module in convolutions:
            # On the instance, in front of the class's: other users of the class keep their own.
            module.__dict__["forward"] = MethodType(forward, module)
        yield
    finally:
        for module in convolutions:
            module.__dict__.pop("forward", None)


@contextmanager
def _running_statistics_frozen(model: nn.Module, freeze: bool) -> Iterator[None]:
    norms = [m for m in model.modules() if freeze and isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    try:
        for module in norms:
            # Momentum 0 keeps the running mean as it is; evaluation mode would change what the batch is normalised by.
            module.momentum = 0.0
        yield
    finally:
        for module, momentum in zip(norms, momenta, strict=True):
            module.momentum = momentum


def _halves_are_separable(model: nn.Module) -> bool:
    """Whether no sample's logits depend on another sample, and each trained weight is one plain convolution's own."""
    seen: set[Tensor] = set()
    for module in model.modules():
        trained = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if type(module) is nn.Conv2d:
            if module.bias is not None or module.padding_mode != "zeros" or isinstance(module.padding, str):
                return False
            # A weight used twice has a gradient that is a sum over both uses: its norm isn't the sum of their norms.
            if module.weight in seen or len(trained) != 1:
                return False
            seen.add(module.weight)
        elif trained or not isinstance(module, _SAMPLE_BY_SAMPLE):
            return False
    return True
