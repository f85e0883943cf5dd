"""A run of a task by PyTorch, whichever process takes its steps: the task's data, its model, its random numbers."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from svag_fast.experiments.config import RunConfig
from svag_fast.experiments.data import Dataset
from svag_fast.experiments.evaluation import evaluate
from svag_fast.experiments.gradients import has_sample_norms
from svag_fast.experiments.measured_run import EVALUATION_LIMIT, MeasuredRun, Part, own_seed
from svag_fast.experiments.random_state import OwnRandom
from svag_fast.experiments.task import BuiltinTask, Task, builtin_task
from svag_fast.experiments.task_check import check_task, new_model
from svag_fast.experiments.task_data import TaskData
from svag_fast.experiments.task_error import own_code
from svag_fast.nn.pair_run import Way


class TaskRun(MeasuredRun):
    """A run in progress: the net with its initial weights, and the data. A subclass takes the steps, and calls `start`.

    Args:
        config: the run.
        task: what it trains; a data set means the config's net on it.

    Raises:
        TypeError, ValueError: what is wrong with the task, by name.
        TaskError: its own code failed.

    Attributes:
        sums: names of the attributes, tensors, that a row's means are made of; `clear_sums` makes them.
        steps_summed: how many steps they hold.
    """

    sums: tuple[str, ...]
    steps_summed: int

    def __init__(self, config: RunConfig, task: Task | Dataset) -> None:
        own = builtin_task(config, task) if isinstance(task, Dataset) else task
        with own_code(own.name):
            self.task = own.placed(config.device)
        super().__init__(config, tuple(self.task.metrics))
        self.train_data, self.test_data = (
            TaskData(data, self.task.collate, config.device) for data in (self.task.train, self.task.test)
        )
        self.random = None if isinstance(own, BuiltinTask) else OwnRandom(0, config.device, self.task)
        self.way: Way = "auto"
        if self.random is None:
            # Convolutions and BatchNorm are faster with the channels last: bench/test_training_step.py times both.
            self.model = self.task.model().to(config.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.has_sample_norms = has_sample_norms(self.model)
        else:
            self._begin_own_task(self.random)
        self.params = [p for p in self.model.parameters() if p.requires_grad]

    def _begin_own_task(self, random: OwnRandom) -> None:
        """Try the task, then make the model that is trained."""
        config = self.config
        with self.task_code():
            facts = check_task(self.task, self.train_data, self.test_data, config.batch_size)
        self.has_sample_norms, self.way = facts.norms, facts.way
        random.seed(own_seed(config, "initial weights") if config.init == "own" else 0)
        with self.task_code():
            self.model = new_model(self.task, facts.model).to(config.device)
        random.look_into(self.model)

    def start(self) -> None:
        """Add the first row; what is drawn from here on is the training's."""
        self.clear_sums()
        with self.task_code():
            self.begin()
        if self.random is not None:  # what was drawn so far, for the first row, is no part of the training
            self.random.seed(own_seed(self.config, "the task's own random numbers"))

    @contextmanager
    def task_code(self) -> Iterator[None]:
        """Context in which a task's own code runs: with the run's random numbers; its errors are told as such."""
        if self.random is None:
            yield
            return
        with self.random.active(), own_code(self.task.name):
            yield

    @property
    def runs(self) -> Sequence[MeasuredRun]:
        """The runs whose steps `advance` takes: this one."""
        return (self,)

    @abstractmethod
    def take_step(self) -> None:
        """Take one step."""

    def advance(self) -> None:
        """Take one step, and its time."""
        start = time.monotonic()
        self.take_step()
        self.seconds += time.monotonic() - start

    def weight_sq_norm(self) -> float:
        """R of the weights as they are now."""
        return sum(float(p.detach().double().square().sum()) for p in self.params)

    def evaluate(self, part: Part) -> dict[str, float]:
        """Return "loss", the mean, and each of the task's metrics, of the net as it is now."""
        if part == "train":
            return evaluate(self.task, self.model, self.train_data, EVALUATION_LIMIT)
        return evaluate(self.task, self.model, self.test_data)

    def end_row(self) -> None:
        """Add a row: means over the steps since the last one, and the evaluations that fall on it."""
        with self.task_code():
            super().end_row()

    def state_dict(self) -> dict[str, Any]:
        """What every process has: where the run stands, its model, its rows and sums, the task's random numbers."""
        own: dict[str, Any] = {} if self.random is None else {"random": self.random.state_dict()}
        if parts := {name: state for name, part in self.task.modules.items() if (state := part.state_dict())}:
            own["parts"] = parts
        return {
            **own,
            "step": self.step,
            "model": self.model.state_dict(),
            "rows": self.rows,
            "seconds": self.seconds,
            "steps_summed": self.steps_summed,
            **{name: getattr(self, name) for name in self.sums},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError: `state` is none of this run's; `self` may have taken a part.
        """
        if state["rows"][0].keys() != set(self.columns):
            raise ValueError(
                f"rows must be of the columns {', '.join(self.columns)}, got {', '.join(state['rows'][0])}"
            )
        self._load_sums(state)
        self.model.load_state_dict(state["model"])
        # Older versions' have none: what didn't change is as it was made.
        for name, part in state.get("parts", {}).items():
            self.task.modules[name].load_state_dict(part)
        if self.random is not None:
            self.random.load_state_dict(state["random"])
        self.step, self.rows, self.seconds = state["step"], state["rows"], state["seconds"]
        self.steps_summed = state["steps_summed"]

    def _load_sums(self, state: dict[str, Any]) -> None:
        """Continue the sums.

        Raises:
            ValueError: one is of another shape or dtype: what is added to it would be broadcast without a word.
        """
        for name in self.sums:
            theirs, ours = state[name], getattr(self, name)
            if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
                raise ValueError(
                    f"{name} must be {ours.dtype} {list(ours.shape)}, got {theirs.dtype} {list(theirs.shape)}"
                )
            setattr(self, name, theirs.to(self.config.device))
