"""What a task's model is worth on data: the mean loss and the task's own metrics."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from svag_fast.experiments.task import Task, metric_value, pair_of
from svag_fast.experiments.task_data import TaskData
from svag_fast.numeric import must_be

EVALUATION_BATCH = 128


@torch.no_grad()
def evaluate(task: Task, model: nn.Module, data: TaskData, limit: int | None = None) -> dict[str, float]:
    """Return "loss", the mean over the samples, and each metric of the task, in evaluation mode.

    Args:
        task: whose loss and metrics.
        model: on the data's device.
        data: all of it, or its first `limit` samples.
        limit: at most so many samples.

    Raises:
        TypeError, ValueError: the loss is not one value a sample, or a metric is no number.
    """
    # Each module's: a frozen one may be in evaluation mode while the others train.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return _evaluate(task, model, data, limit)
    finally:
        for module, mode in modes:
            module.training = mode


def _evaluate(task: Task, model: nn.Module, data: TaskData, limit: int | None) -> dict[str, float]:
    total = torch.zeros((), dtype=torch.float64, device=data.device)
    count = 0
    kept: list[tuple[Any, Any]] = []
    # The kernel's own sum, which rounds otherwise than a sum over the samples' losses.
    summed = None
    if type(task.loss) is nn.CrossEntropyLoss:
        summed = copy.copy(task.loss)
        summed.reduction = "sum"
    for numbers in data.slices(EVALUATION_BATCH, limit):
        batch = data.part(numbers)
        if task.takes_model:
            total += checked_losses(task.losses(model, batch), len(numbers)).sum(dtype=torch.float64)
        if task.metrics or not task.takes_model:
            inputs, targets = pair_of(batch)
            outputs = model(inputs)
        if not task.takes_model:
            losses = checked_losses(task.loss(outputs, targets), len(numbers))
            # Sums, since the last batch may be smaller: a mean of means would weigh its samples more.
            total += losses.sum(dtype=torch.float64) if summed is None else summed(outputs, targets)
        if task.metrics:
            # Copies: a model or a `collate` may write each batch over the one before.
            kept.append(tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (outputs, targets)))
        count += len(numbers)
    found = {"loss": float(total) / count}
    if task.metrics:
        outputs, targets = tree_map(joined, *kept)
        # Of all samples at once: a mean over batches is another number for most metrics.
        found |= {name: metric_value(name, metric(outputs, targets)) for name, metric in task.metrics.items()}
    return found


def joined(*parts: Any) -> Any:
    """Return tensors one after the other; of anything else the first."""
    return torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0]


def checked_losses(losses: Any, rows: int) -> Tensor:
    """Return what a task's loss gave for a batch of `rows` samples, which must be one value for each.

    Raises:
        TypeError, ValueError: it is not.
    """
    expected = f"one value a sample, [{rows}]"
    if not isinstance(losses, Tensor) or not losses.is_floating_point():
        raise TypeError(must_be("loss", expected, f"{type(losses).__name__}"))
    if losses.shape != (rows,):
        if losses.dim() == 0:
            raise ValueError(must_be("loss", f'{expected} (reduction="none")', "one number: a mean or a sum"))
        advice = ": take each sample's mean over the rest" if losses.dim() > 1 and len(losses) == rows else ""
        raise ValueError(must_be("loss", expected + advice, str(list(losses.shape))))
    return losses
