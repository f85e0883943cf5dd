"""Both batches' gradients on the digits net, by the way that `TwoBatchGradients` chooses, against each way alone.

"one batch" is what SGD without a measurement pays; "take_step" is the whole step of a run: batches, gradients, update.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from svag_fast.experiments import gradients as two_batches
from svag_fast.experiments.config import RunConfig
from svag_fast.experiments.data import load_dataset
from svag_fast.experiments.training import Training

LIMITS = {"one pass": 10**9, "two passes": 0}


@pytest.mark.parametrize("batch_size", [8, 32, 128])
@pytest.mark.parametrize("contender", ["one pass", "two passes", "one batch", "take_step"])
def test_gradients(
    benchmark: Any, contest: Any, monkeypatch: pytest.MonkeyPatch, batch_size: int, contender: str
) -> None:
    benchmark.group = f"digits-net, B = {batch_size}"
    torch.set_num_threads(1)
    config = RunConfig(batch_size=batch_size, lr=0.1, l=2, seed=0, effective_steps=10**6)
    training = Training(config, load_dataset("digits"))
    images, labels = training._two_batches()
    chosen = two_batches.ONE_PASS_ELEMENTS

    def target() -> None:
        if contender == "take_step":
            training.take_step()
        elif contender == "one batch":
            training.gradients.one(images[:batch_size], labels[:batch_size])
        else:
            monkeypatch.setattr(two_batches, "ONE_PASS_ELEMENTS", LIMITS[contender])
            training.gradients(images, labels)
            monkeypatch.setattr(two_batches, "ONE_PASS_ELEMENTS", chosen)

    contest(target, ours=lambda: training.gradients(images, labels), rounds=200 if batch_size == 8 else 60)
