"""A task: what is trained. A network, its data, its loss, and the number that runs are compared by."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset as MapDataset
from torch.utils.data import IterableDataset

from svag_fast.augment import crop_flip
from svag_fast.experiments.config import RunConfig
from svag_fast.experiments.data import Dataset, load_dataset
from svag_fast.experiments.measured_run import initial_model
from svag_fast.numeric import must_be, real, shown

_METRIC_NAME = re.compile(r"[A-Za-z]\w*", re.ASCII)
_TASK_NAME = re.compile(r"[^/<>\s][^/<>\n]{0,79}")

Part = Literal["train", "test"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What `svag-fast run FILE.py` and :func:`svag_fast.study` train: a network, data, a loss.

        def task():
            return svag_fast.Task(
                model=lambda: torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3)),
                train=(x_train, y_train),
                test=(x_test, y_test),
                loss=torch.nn.CrossEntropyLoss(reduction="none"),
                metrics={"accuracy": lambda outputs, targets: (outputs.argmax(1) == targets).float().mean()},
            )

    Attributes:
        model: returns a module with fresh initial weights, drawn from torch's global generator, which every run seeds.
        train: the training data: one tensor or a tuple of tensors, whose first dimension is the samples, or a map-style
            `torch.utils.data.Dataset`. Tensors are moved to the device once.
        test: the test data, in the same form.
        loss: one value a sample, [B]. A module or a function of (outputs, targets) gets the model's outputs for the
            first part of a batch and the batch's second part. A function whose first parameter is called ``model``
            gets the model and the whole batch, for a batch that is no pair.
        metrics: by name, a function of (outputs, targets) of all test samples that returns a number. Runs are compared
            by the first one and by the loss; without metrics by the loss alone. One whose name ends in "accuracy" is a
            fraction. Outputs of all samples are kept for it, so leave metrics out where those are large.
        augment: a function (inputs, generator) -> inputs for training batches, on the device, with a generator there.
        collate: makes a batch of a list of a Dataset's items; by default torch's own.
        name: what reports call it; by default a file's own name.

    Raises:
        TypeError, ValueError: a part is none of these. What shows only when the parts are used together, such as a loss
            that is a mean, is refused on first use: see :func:`svag_fast.experiments.task_check.check_task`.
    """

    model: Callable[[], nn.Module]
    train: Any
    test: Any
    loss: Callable[..., Tensor]
    metrics: Mapping[str, Callable[[Any, Any], Any]] = field(default_factory=dict)
    augment: Callable[[Any, torch.Generator], Any] | None = None
    collate: Callable[[list[Any]], Any] | None = None
    name: str = "task"

    def __post_init__(self) -> None:
        _callable("model", self.model, "a function that returns a module with fresh weights")
        if isinstance(self.model, nn.Module):
            raise TypeError(
                must_be(
                    "model", "a function that returns a module with fresh weights", f"a {type(self.model).__name__}"
                )
            )
        for part in ("train", "test"):
            _check_data(part, getattr(self, part))
        _callable("loss", self.loss, "a function of (outputs, targets) or of (model, batch)")
        reduction = getattr(self.loss, "reduction", "none")
        if reduction != "none":
            raise ValueError(must_be("loss", 'of reduction="none", one value a sample', f"reduction={reduction!r}"))
        own = sum(p.requires_grad for p in self.loss.parameters()) if isinstance(self.loss, nn.Module) else 0
        if own:
            expected = "without trained parameters, which no run trains: make them the model's"
            raise ValueError(must_be("loss", expected, f"{own} of {type(self.loss).__name__}"))
        if not isinstance(self.metrics, Mapping):
            raise TypeError(must_be("metrics", "a dict of functions by name", shown(self.metrics)))
        for name, metric in self.metrics.items():
            if not isinstance(name, str) or not _METRIC_NAME.fullmatch(name) or name == "loss":
                raise ValueError(must_be("a metric's name", "letters, digits and _, and not loss", shown(name)))
            _callable(f"metric {name}", metric, "a function of (outputs, targets)")
        for name in ("augment", "collate"):
            if getattr(self, name) is not None:
                _callable(name, getattr(self, name), "a function or None")
        if self.collate is not None and not isinstance(self.train, MapDataset):
            raise ValueError(must_be("collate", "None where the data are tensors", shown(self.collate)))
        if not isinstance(self.name, str) or not _TASK_NAME.fullmatch(self.name):
            raise ValueError(must_be("name", "a short text without < > and /", shown(self.name)))

    @property
    def train_size(self) -> int:
        """The number of training samples."""
        return _count(self.train)

    def check_batch_size(self, batch_size: int) -> None:
        """Refuse batches that are larger than the training data.

        Raises:
            ValueError: they are.
        """
        if batch_size > self.train_size:
            expected = f"at most {self.train_size}, the number of the task's training samples"
            raise ValueError(must_be("batch_size", expected, str(batch_size)))

    @cached_property
    def takes_model(self) -> bool:
        """Whether the loss is a function of (model, batch)."""
        if isinstance(self.loss, nn.Module):
            return False
        try:
            parameters = list(inspect.signature(self.loss).parameters)
        except (TypeError, ValueError):  # of C
            return False
        return parameters[:1] == ["model"]

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Those of its parts that are modules, by name: the loss, metrics, the augmentation."""
        parts = {"loss": self.loss, "augment": self.augment, **{f"metric {n}": m for n, m in self.metrics.items()}}
        return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}

    def placed(self, device: torch.device | str) -> Task:
        """Return the task with copies of its modules on a device: their buffers are one run's, as its model's are."""

        def own(part: Any) -> Any:
            return copy.deepcopy(part).to(device) if isinstance(part, nn.Module) else part

        metrics = {name: own(metric) for name, metric in self.metrics.items()}
        return replace(self, loss=own(self.loss), augment=own(self.augment), metrics=metrics)

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        """Each sample's loss, [B]."""
        if self.takes_model:
            return self.loss(model, batch)
        inputs, targets = pair_of(batch)
        return self.loss(model(inputs), targets)


def _callable(name: str, value: object, expected: str) -> None:
    if not callable(value):
        raise TypeError(must_be(name, expected, shown(value)))


def _check_data(part: str, data: object) -> None:
    kinds = "a tensor, a tuple of tensors or a map-style torch Dataset"
    if isinstance(data, IterableDataset):
        raise TypeError(must_be(part, f"{kinds}, of which samples are drawn by number", "an IterableDataset"))
    if not isinstance(data, MapDataset):
        tensors = (data,) if isinstance(data, Tensor) else data
        if not isinstance(tensors, (tuple, list)) or not tensors or not all(isinstance(t, Tensor) for t in tensors):
            raise TypeError(must_be(part, kinds, shown(type(data).__name__ if not isinstance(data, tuple) else data)))
        lengths = [len(t) if t.dim() else 0 for t in tensors]
        if len(set(lengths)) > 1:
            raise ValueError(must_be(part, "tensors with one row a sample each", f"{_listed(lengths)} rows"))
    if isinstance(data, MapDataset) and not hasattr(data, "__len__"):
        raise TypeError(must_be(part, "a Dataset with a length", type(data).__name__))
    if _count(data) < 1:
        raise ValueError(must_be(part, "data with a sample or more", "none"))


def _count(data: Any) -> int:
    if isinstance(data, MapDataset):
        return len(data)  # type: ignore[arg-type]
    tensor = data if isinstance(data, Tensor) else data[0]
    return len(tensor) if tensor.dim() else 0


def _listed(values: Sequence[object]) -> str:
    return ", ".join(map(str, values[:-1])) + f" and {values[-1]}"


def pair_of(batch: Any) -> tuple[Any, Any]:
    """A batch's inputs and targets.

    Raises:
        ValueError: it is no pair.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    raise ValueError(
        must_be(
            "a batch",
            "a pair (inputs, targets) for a loss of (outputs, targets); a loss whose first parameter is called model "
            "takes any",
            f"{type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""),
        )
    )


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """The part of the targets [n] that is the largest output [n, classes]."""
    return int((outputs.argmax(1) == targets).sum()) / len(targets)


@dataclass(frozen=True, kw_only=True)
class BuiltinTask(Task):
    """A built-in net on a built-in data set: nothing of it draws from the global generators."""

    def check_batch_size(self, batch_size: int) -> None:
        """Nothing to refuse: a config knows its data set's size, and draws with repetition may be of more."""


def builtin_task(config: RunConfig, dataset: Dataset | None = None) -> BuiltinTask:
    """Return the config's net on its data set as a task; the net's initial weights are this run's own.

    Args:
        config: names both.
        dataset: the data set, where it is loaded already.

    Raises:
        ValueError, DatasetNotFoundError: see :func:`svag_fast.experiments.data.load_dataset`.
    """
    data = load_dataset(config.dataset, label_noise=config.label_noise) if dataset is None else dataset
    return BuiltinTask(
        model=lambda: _standardising(initial_model(config, data), data),
        train=(data.train_images, data.train_labels),
        test=(data.test_images, data.test_labels),
        loss=nn.CrossEntropyLoss(reduction="none"),
        metrics={"accuracy": accuracy},
        augment=crop_flip(4) if config.augment == "crop-flip" else None,
        name=f"{config.model} on {Path(config.dataset).name}",
    )


def _standardising(model: nn.Module, data: Dataset) -> nn.Module:
    """The model, which then takes the data set's images as they are in memory: augmentation comes before."""
    if data.pixels is not None:
        for name, values in zip(("pixel_mean", "pixel_deviation"), data.pixels, strict=True):
            model.register_buffer(name, values, persistent=False)
        model.register_forward_pre_hook(lambda model, args: ((args[0] - model.pixel_mean) / model.pixel_deviation,))
    return model


def metric_value(name: str, value: object) -> float:
    """Return what a metric returned as a float; nan is one, but for an accuracy.

    Raises:
        TypeError: it is no number.
        ValueError: an accuracy that is no fraction.
    """
    result = real(f"metric {name}", value)
    if name.endswith("accuracy") and not 0 <= result <= 1:
        raise ValueError(must_be(f"metric {name}", "a fraction from 0 to 1", f"{result:g}"))
    return result
