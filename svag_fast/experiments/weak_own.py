"""`svag-fast weak` on a task of one's own: replicas of its model, trained by SVAG as one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from svag_fast.experiments.config import cores
from svag_fast.experiments.evaluation import checked_losses, evaluate, joined
from svag_fast.experiments.random_state import OwnRandom
from svag_fast.experiments.ranges import ConfigError
from svag_fast.experiments.task import Task, pair_of
from svag_fast.experiments.task_check import augmented, check_task, new_model
from svag_fast.experiments.task_data import TaskData
from svag_fast.experiments.task_error import own_code
from svag_fast.experiments.weak import SINGLES, WeakSettings
from svag_fast.ops.step_stats import StepStats
from svag_fast.optim.svag import SVAG
from svag_fast.replicas import Replicas
from svag_fast.replicas.generators import Generators


class OwnTask:
    """A task's net, with the weights that every run starts from, and its data.

    Args:
        task: whose loss is a function of (outputs, targets).
        settings: batch size, seed and threads are taken.

    Raises:
        ConfigError: the loss takes the model.
        TypeError, ValueError: what is wrong with the task, by name; NotReplicable: no engine serves its model.
        TaskError: its own code failed.
    """

    def __init__(self, task: Task, settings: WeakSettings) -> None:
        if task.takes_model:
            raise ConfigError("loss must be a function of (outputs, targets) for replicas, got one of (model, batch)")
        torch.set_num_threads(settings.threads or cores())
        self.task = task
        self.train, self.test = (TaskData(data, task.collate, "cpu") for data in (task.train, task.test))
        random = OwnRandom(0, "cpu")
        with random.active(), own_code(task.name):
            facts = check_task(task, self.train, self.test, settings.batch_size)
        random.seed(settings.seed)
        with random.active(), own_code(task.name):
            self.model = new_model(task, facts.model)
        self.start(settings, 1, [0, 1]).try_batch()

    @property
    def functions(self) -> list[str]:
        """The names of the test functions."""
        metrics = [f"test {name}" for name in self.task.metrics]
        singles = [f"loss of test sample {i}" for i in range(min(SINGLES, len(self.test)))]
        return ["test loss", *metrics, "train loss", "|x|²", "G", "N", *singles]

    def start(self, settings: WeakSettings, l: float, seeds: Sequence[int]) -> OwnRuns:
        """Return runs at their start, one for each seed of batches.

        Raises:
            NotReplicable, MemoryError: as of :class:`svag_fast.Replicas`.
        """
        return OwnRuns(self, settings, l, seeds)


class OwnRuns:
    """Replicas of a task's model; each draws its batches, and what augments them, from a generator of its own."""

    def __init__(self, own: OwnTask, settings: WeakSettings, l: float, seeds: Sequence[int]) -> None:
        self._own, self._task, self._batch_size = own, own.task, settings.batch_size
        self._replicas = Replicas(lambda: copy.deepcopy(own.model), range(len(seeds)))
        self._params = [p for p in self._replicas.parameters() if p.requires_grad]
        self._optimizer = SVAG(self._params, settings.lr, l=l, weight_decay=settings.weight_decay, replicas=len(seeds))
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._one_gradient = l == 1
        self._step = 0

    def try_batch(self) -> None:
        """Choose the engine, and refuse what draws from the generators that all runs share.

        Raises:
            NotReplicable: no engine serves the model.
            ConfigError: the task draws random numbers for a batch beside ``augment``'s generator.
        """
        before = Generators.now()
        with own_code(self._task.name):
            inputs, targets = self._batch()
        self._replicas.choose_engine(inputs)
        with own_code(self._task.name):
            self._losses(inputs, targets)
        if before != Generators.now():
            raise ConfigError(
                "data and loss must be without random numbers of the global generators, of which each run would need "
                "its own, got a batch that drew some"
            )

    def advance(self, step: int) -> None:
        """Take every run to a step."""
        while self._step < step:
            self._take_step(both=not self._one_gradient)

    def test_functions(self) -> Tensor:
        """Return [functions, runs] float64, not finite where a run diverged; the runs take one step more."""
        columns = [self._evaluated(s) for s in range(len(self._generators))]
        sq_norm = torch.stack([p.detach().double().flatten(1).square().sum(1) for p in self._params]).sum(0)
        stats = self._take_step(both=True)
        losses = torch.tensor(columns, dtype=torch.float64, device="cpu").T
        first = len(self._task.metrics) + 2
        measured = torch.stack([sq_norm, cast(Tensor, stats.grad_sq_norm), cast(Tensor, stats.noise_trace)])
        return torch.cat([losses[:first], measured, losses[first:]])

    def _evaluated(self, s: int) -> list[float]:
        """Test loss, metrics, train loss, losses of single samples, of one replica as an ordinary model."""
        own, model = self._own, self._replicas.unstack(s)
        with own_code(self._task.name), torch.no_grad():
            test = evaluate(self._task, model, own.test)
            train = evaluate(self._task, model, own.train)
            some = own.test.part(range(min(SINGLES, len(own.test))))
            singles = self._task.losses(model.eval(), some)
        return [*test.values(), train["loss"], *singles.tolist()]

    def _take_step(self, *, both: bool) -> StepStats:
        self._optimizer.zero_grad()
        with own_code(self._task.name):
            self._backward()
            if both:
                self._optimizer.hold_gradient()
                self._backward()
        self._step += 1
        return cast(StepStats, self._optimizer.step())

    def _backward(self) -> None:
        losses = self._losses(*self._batch())
        torch.autograd.backward(losses.view(len(self._generators), -1).mean(1).sum())

    def _losses(self, inputs: Any, targets: Any) -> Tensor:
        outputs = tree_map(lambda x: x.flatten(0, 1) if isinstance(x, Tensor) else x, self._replicas(inputs))
        return checked_losses(self._task.loss(outputs, targets), len(self._generators) * self._batch_size)

    def _batch(self) -> tuple[Any, Any]:
        """Return inputs [runs, B, ...] and targets [runs * B, ...]."""
        runs, B = len(self._generators), self._batch_size
        drawn = [torch.randint(len(self._own.train), (B,), generator=g, device="cpu") for g in self._generators]
        if self._task.augment is None:
            inputs, targets = pair_of(self._own.train.take(torch.cat(drawn)))
            return tree_map(lambda x: x.view(runs, B, *x.shape[1:]) if isinstance(x, Tensor) else x, inputs), targets
        parts = [
            augmented(self._task, self._own.train.take(some), generator)
            for some, generator in zip(drawn, self._generators, strict=True)
        ]
        inputs, targets = zip(*map(pair_of, parts), strict=True)
        return tree_map(_stacked, *inputs), tree_map(joined, *targets)


def _stacked(*parts: Any) -> Any:
    return torch.stack(parts) if isinstance(parts[0], Tensor) else parts[0]
