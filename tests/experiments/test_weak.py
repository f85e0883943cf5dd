"""The runs of `svag-fast weak`: repeatable, independent of how they are cut, and their test functions right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from svag_fast.experiments.ranges import ConfigError
from svag_fast.experiments.weak import Pilot, WeakSettings, digits_task, measure, run_levels
from svag_fast.replicas.fused import FusedRuns
from svag_fast.replicas.sampling import batch_indices

SMALL: dict[str, Any] = {"l": (1, 1.5, 2, 4), "effective_steps": (1, 2), "replicas": (10,), "threads": 1}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"l": (1, 2, 4)}, "l must be at least four"),
        ({"l": (1, 2, 2, 4)}, "l must be at least four"),
        ({"replicas": (100, 200)}, "replicas must be one number or 7"),
        ({"replicas": (1,)}, "replicas must be an integer from 8"),
        ({"effective_steps": (4, 2)}, "effective_steps must be in ascending order"),
        ({"label_noise": 1.5}, "label_noise must be a number from 0 to 1"),
        ({"model": "vgg"}, "model must be one of digits-mlp, digits-net"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"threads": 0}, "threads must be"),
    ],
)
def test_wrong_settings_are_refused_by_name(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WeakSettings(**wrong)


def test_a_run_depends_on_its_number_alone() -> None:
    settings = WeakSettings(**SMALL)
    task = digits_task(settings)
    whole = measure(task, settings, 2, range(6))
    assert whole.shape == (2, len(task.functions), 6)
    assert np.array_equal(measure(task, settings, 2, range(4, 6)), whole[..., 4:])
    assert not np.array_equal(measure(task, WeakSettings(**SMALL, seed=1), 2, range(6))[0], whole[0])


def test_test_functions_are_those_of_the_weights_at_their_time() -> None:
    """One run again, by FusedRuns to the step before the time, then by PyTorch."""
    settings = WeakSettings(**SMALL)
    task = digits_task(settings)
    from svag_fast.experiments.weak import _seed

    seed = _seed(settings.seed, 2, 3)
    runs = FusedRuns(
        task.chain, task.chain.initial().weights[None], inputs=task.inputs, targets=task.targets, seeds=[seed],
        batch_size=32, lr=settings.lr, l=2, weight_decay=settings.weight_decay, stat_every=2, threads=1,
    )  # fmt: skip
    runs.advance(4)
    model = runs.unstack(0)
    logits = model(task.test_inputs)
    grads = []
    for batch in (1, 2):
        drawn = batch_indices(seed, 4, batch, 32, len(task.inputs))
        loss = F.cross_entropy(model(task.inputs[drawn]), task.targets[drawn])
        trained = [p for p in model.parameters() if p.requires_grad]
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)]).double())
    expected = {
        "test loss": F.cross_entropy(logits, task.test_targets),
        "test accuracy": (logits.argmax(1) == task.test_targets).double().mean(),
        "train loss": F.cross_entropy(model(task.inputs), task.targets),
        "|x|²": runs.weights.double().square().sum(),
        "G": grads[0] @ grads[1],
        "N": (grads[0] - grads[1]).square().sum() / 2,
        **{f"loss of test sample {i}": F.cross_entropy(logits[[i]], task.test_targets[[i]]) for i in range(3)},
    }
    found = measure(task, settings, 2, range(3, 4))[1, :, 0]
    assert list(expected) == task.functions
    assert found == pytest.approx([float(value.detach()) for value in expected.values()], rel=2e-4, abs=1e-5)


def test_rounds_train_each_run_once_and_continue_from_what_is_there() -> None:
    settings = WeakSettings(**{**SMALL, "replicas": (20,)})
    task = digits_task(settings)
    *_, values = run_levels(task, settings)
    assert [x.shape[2] for x in values.values()] == [20] * 4
    assert np.array_equal(values[4], measure(task, settings, 4, range(20)))
    *_, again = run_levels(task, settings, had={4: values[4][..., :9]})
    assert all(np.array_equal(again[l], values[l]) for l in values)


def test_a_plan_spends_the_budget_where_variance_over_cost_is_largest() -> None:
    pilot = Pilot(seconds=np.array([1.0, 4.0]), variances=np.array([[1.0], [1.0]]))
    assert pilot.plan(600.0) == [200, 100]  # as the root of 1 over 4
    noisy = Pilot(seconds=np.array([1.0, 1.0]), variances=np.array([[9.0], [1.0]]))
    assert noisy.plan(400.0) == [300, 100]
