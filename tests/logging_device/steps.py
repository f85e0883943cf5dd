"""A training step of the experiments' nets, in the ways a user may write it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svag_fast import SVAG, pair_pass, per_sample_sq_norms
from svag_fast.experiments.models import build_model

BATCH, CLASSES = 2, 10
# Small: what is launched doesn't depend on it, but for the choice in ops/weight_grad/triton.py, which for few samples
# is always the direct way.
PIXELS = {"digits-net": 8, "vgg16-gn": 16}


def images_of(net: str, device: str) -> tuple[Tensor, Tensor]:
    """Both batches' images and labels."""
    generator = torch.Generator("cpu").manual_seed(1)
    side = PIXELS.get(net, 8)
    images = torch.randn((2 * BATCH, 3, side, side), generator=generator)
    return images.to(device), (torch.arange(2 * BATCH) % CLASSES).to(device)


def model_of(net: str, device: str) -> nn.Module:
    return build_model(net, in_channels=3, num_classes=CLASSES).to(device)


def by_two_passes(model: nn.Module, optimizer: SVAG, images: Tensor, labels: Tensor, *, norms: bool) -> list[Tensor]:
    """Backward, hold_gradient(), backward, step(): returns the norms' tensors."""
    totals = []
    optimizer.zero_grad()
    for batch in range(2):
        rows = slice(batch * BATCH, (batch + 1) * BATCH)
        context: Any = per_sample_sq_norms(model) if norms else contextlib.nullcontext()
        with context as found:
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
        if norms:
            totals.append(found.total)
        if batch == 0:
            optimizer.hold_gradient()
    optimizer.step()
    return totals


def by_pair_pass(model: nn.Module, optimizer: SVAG, images: Tensor, labels: Tensor, *, norms: bool) -> list[Tensor]:
    """One pass over both."""
    with pair_pass(model, optimizer, norms=norms) as pair:
        pair.backward(F.cross_entropy(model(images), labels, reduction="none"))
    optimizer.step()
    return [pair.norms.total] if norms else []


LOOPS: dict[str, Callable[..., list[Tensor]]] = {"two passes": by_two_passes, "pair_pass": by_pair_pass}


class Steps:
    """A net and its optimizer on a device; called, it takes a step by the loop and returns the norms."""

    def __init__(self, net: str, loop: str, norms: bool, device: str) -> None:
        self.model = model_of(net, device)
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = SVAG(self.params, lr=0.05, l=4, weight_decay=5e-4)
        self._batch = images_of(net, device)
        self._take, self._norms = LOOPS[loop], norms

    def __call__(self) -> list[Tensor]:
        return self._take(self.model, self.optimizer, *self._batch, norms=self._norms)
