"""Generators of a task's own: found wherever they are held, seeded for each run, and resumed to the bit."""

from __future__ import annotations

import functools
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from svag_fast import Task
from svag_fast.experiments.config import RunConfig
from svag_fast.experiments.full_batch import FullBatchTraining
from svag_fast.experiments.own_generators import own_generators
from svag_fast.experiments.random_state import OwnRandom
from svag_fast.experiments.task_data import TaskData
from svag_fast.experiments.task_survey import tried_twice
from svag_fast.experiments.training import train

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(32, 4, generator=GENERATOR), torch.randint(3, (32,), generator=GENERATOR)
GLOBAL = np.random.RandomState(7)


class Items(torch.utils.data.Dataset):
    """Each item with noise of a generator that the object holds, or its class."""

    shared = random.Random(3)

    def __init__(self, draw):
        self.draw = draw

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return X[i] + 0.1 * self.draw(self), Y[i]


class OwnDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x):
        return x * (torch.rand(x.shape, generator=self.generator) < 0.8) if self.training else x


def net(*middle):
    return nn.Sequential(nn.Linear(4, 8), *middle, nn.ReLU(), nn.Linear(8, 3))


def jitter(rng, x, generator):
    return x + torch.from_numpy(rng.normal(size=x.shape)).to(x)


def with_global(x, generator):
    return x + torch.from_numpy(GLOBAL.normal(size=x.shape)).to(x)


def cases():
    own = torch.Generator().manual_seed(5)
    numpys = np.random.default_rng(5)
    return {
        "a closure's": {"augment": lambda x, generator: x + torch.rand(x.shape, generator=own)},
        "a partial's": {"augment": functools.partial(jitter, np.random.Generator(np.random.MT19937(5)))},
        "a global one": {"augment": with_global},
        "a Dataset's": {"train": Items(lambda items: float(numpys.random()))},
        "its class's": {"train": Items(lambda items: items.shared.random())},
        "a method of it": {"train": Items(lambda items, draw=random.Random(4).random: draw())},  # noqa: B008
        "the model's": {"model": lambda: net(OwnDropout())},
    }


def make(**parts):
    some = {"model": net, "train": (X, Y), "test": (X, Y), "loss": nn.CrossEntropyLoss(reduction="none"), "name": "own"}
    return Task(**(some | parts))


def config(**changes):
    settings = {"batch_size": 4, "lr": 0.1, "l": 1, "seed": 0, "effective_steps": 8, "rows": 2, "weight_decay": 0}
    return RunConfig(**(settings | {"task": "<own>", "train_size": 32} | changes))


def weights(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["state"]["model"]


def equal(one, other):
    return all(torch.equal(v, other[k]) for k, v in one.items())


def test_generators_are_in_the_order_in_which_code_names_them():
    """By their order they are seeded and put back, and a set's would be another in each process."""
    named = {f"g{i}": random.Random(i) for i in (3, 7, 1, 5, 0, 6, 2, 4)}
    names = [*named]
    exec(f"def draw(): return {', '.join(names[:5])}, lambda: ({', '.join(names[5:])})", named)
    found = own_generators(named["draw"])
    assert all(a is named[name] for a, name in zip(found, names, strict=True))


@pytest.mark.parametrize("name", cases())
def test_a_task_s_own_generators_go_on_to_the_bit_and_are_each_run_s_own(name, tmp_path):
    parts = cases()[name]
    assert train(config(), tmp_path / "whole", task=make(**parts))
    count = iter(range(1, 100))
    assert not train(config(), tmp_path / "stopped", task=make(**parts), should_stop=lambda: next(count) == 5)
    # Another run in the same process, or one behind a new start, must not matter.
    assert train(config(seed=1), tmp_path / "other", task=make(**parts))
    assert train(config(), tmp_path / "stopped", task=make(**cases()[name]))
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "stopped"))


@pytest.mark.parametrize("name", cases())
def test_a_task_s_own_generators_are_left_as_they_were_and_repeat(name):
    task = make(**cases()[name])
    assert bool(own_generators(task)) == (name != "the model's")
    assert tried_twice(task, *(TaskData(data, None, "cpu") for data in (task.train, task.test))).state == "ok"
    own = OwnRandom(0, "cpu", task)
    process = OwnRandom(0, "cpu", task)
    process.load_state_dict(own._read())
    stood = own.state_dict()
    with own.active():
        task.augment(X, torch.Generator()) if task.augment else task.train[0]
    assert process.stands_at(own._read())
    assert own.stands_at(stood) == (name == "the model's")


def test_only_generators_are_taken_that_a_task_holds():
    assert own_generators(make(), np, torch, random.random, np.random.normal, torch.default_generator, F.relu) == []
    assert own_generators([random.SystemRandom()]) == []
    a = random.Random()
    loop: list[object] = [a, {"b": a}]
    loop.append(loop)
    assert own_generators(loop) == [a]


def test_a_checkpoint_of_other_generators_is_refused(tmp_path):
    train(config(), tmp_path, task=make(), should_stop=lambda: True)
    with pytest.raises(RuntimeError, match="the task must be one of 0 generators of its own, got 1"):
        train(config(), tmp_path, task=make(augment=with_global))


def test_ngd_refuses_a_model_that_draws_from_a_generator_of_its_own():
    with pytest.raises(ValueError, match="model must be one that draws no random numbers where process is ngd"):
        FullBatchTraining(config(process="ngd"), make(model=lambda: net(OwnDropout())))


class Adapts(nn.Module):
    """A loss whose buffer is the mean of the losses so far."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.ones(()))
        self.register_buffer("weight", torch.tensor([1.0, 2.0, 0.5]))

    def forward(self, outputs, targets):
        losses = F.cross_entropy(outputs, targets, weight=self.weight, reduction="none")
        if torch.is_grad_enabled():
            self.mean.mul_(0.9).add_(losses.detach().mean(), alpha=0.1)
        return losses / self.mean.clone()


def test_a_loss_s_buffers_are_each_run_s_own_and_go_on_to_the_bit(tmp_path):
    loss = Adapts()
    assert train(config(), tmp_path / "whole", task=make(loss=loss))
    count = iter(range(1, 100))
    assert not train(config(), tmp_path / "stopped", task=make(loss=loss), should_stop=lambda: next(count) == 5)
    assert train(config(), tmp_path / "stopped", task=make(loss=loss))
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "stopped"))
    assert float(loss.mean) == 1


def test_modules_of_a_task_go_to_the_run_s_device():
    loss = nn.CrossEntropyLoss(weight=torch.ones(3), reduction="none")
    placed = make(loss=loss, metrics={"nll": Adapts()}).placed("meta")
    assert placed.loss.weight.device.type == "meta"
    assert placed.metrics["nll"].mean.device.type == "meta"
    assert loss.weight.device.type == "cpu"
