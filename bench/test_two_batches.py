"""Both batches' gradients and all norms of a run on the digits net, against each way alone and what SGD pays.

"one batch" is what SGD without a measurement pays, "both in one" the plain gradient of both batches together;
"take_step" is the whole step of a run: batches, gradients, update.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from svag_fast import pair_pass
from svag_fast.experiments.config import RunConfig
from svag_fast.experiments.data import load_dataset
from svag_fast.experiments.gradients import pair_gradients
from svag_fast.experiments.training import Training


@pytest.mark.parametrize("batch_size", [8, 32, 128])
@pytest.mark.parametrize("contender", ["joint", "halves", "joint, no norms", "one batch", "both in one", "take_step"])
def test_gradients(benchmark: Any, contest: Any, batch_size: int, contender: str) -> None:
    benchmark.group = f"digits-net, B = {batch_size}"
    config = RunConfig(model="digits-net", batch_size=batch_size, lr=0.1, l=2, seed=0, effective_steps=10**6)
    training = Training(config, load_dataset("digits"))
    model, optimizer = training.model, training.optimizer
    images, labels = training._two_batches()

    def plain(images: Tensor, labels: Tensor) -> None:
        torch.autograd.grad(F.cross_entropy(model(images), labels), training.params)

    def by(way: Any, norms: bool = True) -> None:
        with pair_pass(model, optimizer, norms=norms, way=way) as pair:
            pair.backward(F.cross_entropy(model(images), labels, reduction="none"))
        optimizer.discard_gradient()

    def ours() -> None:
        pair_gradients(model, optimizer, (images, labels), norms=True)
        optimizer.discard_gradient()

    targets: dict[str, Callable[[], None]] = {
        "joint": lambda: by("joint"),
        "halves": lambda: by("halves"),
        "joint, no norms": lambda: by("joint", norms=False),
        "one batch": lambda: plain(images[:batch_size], labels[:batch_size]),
        "both in one": lambda: plain(images, labels),
        "take_step": training.take_step,
    }
    torch.set_num_threads(1)
    contest(targets[contender], ours=ours, rounds=200 if batch_size == 8 else 60)
