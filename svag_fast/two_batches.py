"""The gradients of two batches at the same parameters: in one forward and backward where that is exact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from svag_fast.models import FixedHeadNet, PreActBlock

# Modules that treat each sample of a batch by itself, each forward using a weight once.
_SAMPLE_BY_SAMPLE = (nn.Sequential, nn.GroupNorm, nn.ReLU, nn.Identity, nn.AvgPool2d, FixedHeadNet, PreActBlock)

ONE_PASS_ELEMENTS = 64 * 64  # of both batches' images, on a CPU


class TwoBatchGradients:
    """Cross-entropy gradients of two batches, by the cheapest way that is exact for the model.

    Where no module mixes samples and every trained weight is a plain convolution's, both batches go through one
    forward and one backward pass, in which each convolution forms its weight gradient once for each half. Otherwise,
    as with BatchNorm, whose statistics belong to one batch: two passes, one after the other. On a CPU large batches
    take two passes as well: there is no overhead left to save, and half the activations fit better into the cache.

    Args:
        model: maps images to logits. Its modules must stay the same while `self` lives.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.separable = _halves_are_separable(model)
        self._convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]

    def __call__(
        self, images: Tensor, labels: Tensor, *, freeze_statistics: bool = False
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return the two mean losses [2] and each batch's gradients, in the order of `params`.

        Args:
            images: [2B, ...]: the first batch, then the second.
            labels: [2B] int64.
            freeze_statistics: the second batch leaves BatchNorm's running statistics alone.
        """
        if self.separable and (images.is_cuda or images.numel() <= ONE_PASS_ELEMENTS):
            return self._in_one_pass(images, labels)
        half = len(labels) // 2
        loss1, grads1 = self.one(images[:half], labels[:half])
        with _running_statistics_frozen(self.model, freeze_statistics):
            loss2, grads2 = self.one(images[half:], labels[half:])
        return torch.stack([loss1, loss2]), grads1, grads2

    def one(self, images: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the mean loss (0-d) and the gradients of a single batch."""
        loss = F.cross_entropy(self.model(images), labels)
        return loss.detach(), list(torch.autograd.grad(loss, self.params))

    def _in_one_pass(self, images: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        twins = [p.detach().requires_grad_() for p in self.params]
        with _by_halves(self._convolutions, dict(zip(self.params, twins, strict=True))):
            logits = self.model(images)
        losses = F.cross_entropy(logits, labels, reduction="none").view(2, -1).mean(1)
        grads = torch.autograd.grad(losses.sum(), [*self.params, *twins])
        return losses.detach(), list(grads[: len(twins)]), list(grads[len(twins) :])


class _ConvolutionByHalves(torch.autograd.Function):
    """conv2d whose first weight gets the gradient of the batch's first half, and its twin that of the second."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, twin: Tensor, module: nn.Conv2d) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = (module.stride, module.padding, module.dilation, module.groups)
        return F.conv2d(x, weight, None, *ctx.geometry)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        (grad_output,) = grad_outputs
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        half = len(x) // 2

        def convolution_backward(part: slice, of_input: bool) -> Tensor:
            grads: tuple[Tensor, Tensor, None] = torch.ops.aten.convolution_backward(
                grad_output[part], x[part], weight, None, stride, padding, dilation, False, (0, 0), groups,
                (of_input, not of_input, False),
            )  # fmt: skip
            return grads[0] if of_input else grads[1]

        grad_input = convolution_backward(slice(None), True) if ctx.needs_input_grad[0] else None
        return (
            grad_input,
            convolution_backward(slice(half), False),
            convolution_backward(slice(half, None), False),
            None,
        )


@contextmanager
def _by_halves(convolutions: list[nn.Conv2d], twins: dict[Tensor, Tensor]) -> Iterator[None]:
    def forward(module: nn.Conv2d, x: Tensor) -> Tensor:
        result: Tensor = _ConvolutionByHalves.apply(x, module.weight, twins[module.weight], module)  # type: ignore[no-untyped-call]
        return result

    try:
        for module in convolutions:
            module.forward = MethodType(forward, module)  # type: ignore[method-assign]
        yield
    finally:
        for module in convolutions:
            del module.forward


@contextmanager
def _running_statistics_frozen(model: nn.Module, freeze: bool) -> Iterator[None]:
    norms = [m for m in model.modules() if freeze and isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    try:
        for module in norms:
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
            if module.weight in seen or len(trained) != 1:
                return False
            seen.add(module.weight)
        elif trained or not isinstance(module, _SAMPLE_BY_SAMPLE):
            return False
    return True
