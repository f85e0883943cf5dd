"""A task tried on a few samples, on a model of its own: what is wrong with it is refused by name, before it trains."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from svag_fast.experiments.evaluation import checked_losses, evaluate
from svag_fast.experiments.gradients import has_sample_norms, pair_gradients
from svag_fast.experiments.task import Task, pair_of
from svag_fast.experiments.task_data import TaskData, rows_of
from svag_fast.nn.independence import check_independence
from svag_fast.nn.pair_run import Way
from svag_fast.numeric import must_be, shown
from svag_fast.optim.svag import SVAG
from svag_fast.sample_norms.context import per_sample_sq_norms

SAMPLES = 4  # of each of two batches


class TaskFacts(NamedTuple):
    """What was found out about a task.

    Attributes:
        norms: whether each sample's own gradient norm is measured in the backward pass.
        way: how `pair_pass` takes its model.
        reason: why there are no norms, in words; "" where there are.
        coupled: whether that is since the samples are not independent, or may not be.
        model: the one that was tried.
    """

    norms: bool
    way: Way
    reason: str
    coupled: bool
    model: nn.Module


class _Losses(nn.Module):
    """A task's losses as a module's output."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__()
        self.task, self.model = task, model

    def forward(self, batch: Any) -> Tensor:
        return self.task.losses(self.model, batch)


def check_task(task: Task, train: TaskData, test: TaskData, batch_size: int) -> TaskFacts:
    """Try a task on its first samples, by a model of its own; the caller has seeded torch's generators.

    Args:
        task: what is tried.
        train, test: its data, on the run's device.
        batch_size: of the run.

    Raises:
        TypeError, ValueError: what is wrong with the task, by name. What the task's own code raises comes as it is.
    """
    task.check_batch_size(batch_size)
    count = len(train)
    model = new_model(task).to(train.device)
    rows = 2 * min(SAMPLES, batch_size)
    # Spread over the data, which may be sorted by class.
    batch = train.take(torch.arange(rows, dtype=torch.int64, device="cpu") * max(1, count // rows) % count)
    if rows_of(batch) != rows:
        raise ValueError(must_be("a batch", f"a tensor or more with a row a sample, {rows} here", _rows_shown(batch)))
    if task.augment is not None:
        batch = augmented(task, batch, torch.Generator(train.device).manual_seed(0))
    _check_outputs(task, model, batch, rows, (train, test))
    optimizer = SVAG([p for p in model.parameters() if p.requires_grad], 0.1, l=1)
    with warnings.catch_warnings():
        # Of batches that are taken one after the other; `way` says it.
        warnings.filterwarnings("ignore", "pair_pass takes this model's batches")
        way = pair_gradients(model, optimizer, batch, norms=False, losses=task.losses).way
        optimizer.discard_gradient()
        coupled = _coupling(task, model, batch)
        norms, reason = (False, coupled) if coupled else _norms(task, model, optimizer, batch)
    evaluate(task, model, test, limit=rows)
    return TaskFacts(norms, "halves" if way == "halves" else "auto", reason, bool(coupled), model)


def new_model(task: Task, than: nn.Module | None = None) -> nn.Module:
    """Make a task's model.

    Args:
        task: whose.
        than: another one that it made before.

    Raises:
        TypeError, ValueError: it is no module to train, or that one again.
    """
    model = task.model()
    if not isinstance(model, nn.Module):
        raise TypeError(must_be("model", "a function that returns a torch.nn.Module", f"{type(model).__name__}"))
    params = {id(p) for p in model.parameters() if p.requires_grad}
    if not params:
        raise ValueError(must_be("model", "one with a trained parameter", "none"))
    if not model.training:  # as a whole, such as one that was loaded; parts of it are left as they were made
        model.train()
    if than is not None and params & {id(p) for p in than.parameters()}:
        raise ValueError(must_be("model", "a function that makes new weights at each call", "the same ones twice"))
    if than is not None:
        _check_statistics(model, than)
    return model


def _check_statistics(model: nn.Module, than: nn.Module) -> None:
    """Refuse running statistics that two models share: a run would continue with another's."""
    others = {id(b) for b in than.buffers()}
    for place, module in model.named_modules():
        if isinstance(module, _NormBase) and any(id(b) in others for b in module.buffers(recurse=False)):
            expected = "a function that makes new running statistics at each call"
            raise ValueError(must_be("model", expected, f"{place} ({type(module).__name__}) twice"))


def augmented(task: Task, batch: Any, generator: torch.Generator) -> Any:
    """Return a training batch with its inputs augmented.

    Raises:
        ValueError: the augmentation returns another number of samples.
    """
    assert task.augment is not None
    inputs, *rest = batch if isinstance(batch, (tuple, list)) else (batch,)
    changed = task.augment(inputs, generator)
    if rows_of(changed) != rows_of(inputs):
        raise ValueError(must_be("augment", f"a function that keeps the {rows_of(inputs)} rows", _rows_shown(changed)))
    return (changed, *rest) if isinstance(batch, (tuple, list)) else changed


def _rows_shown(batch: Any) -> str:
    rows = rows_of(batch)
    return f"{type(batch).__name__} without a tensor" if rows is None else f"{rows} rows"


def _check_outputs(task: Task, model: nn.Module, batch: Any, rows: int, data: tuple[TaskData, TaskData]) -> None:
    if task.metrics:
        pair_of(batch)
    if task.takes_model:
        checked_losses(task.losses(model, batch), rows)
        return
    inputs, targets = pair_of(batch)
    with torch.no_grad():
        outputs = model(inputs)
    if rows_of(outputs) != rows:
        got = str(list(outputs.shape)) if isinstance(outputs, Tensor) else _rows_shown(outputs)
        raise ValueError(must_be("model", f"one that returns a row a sample, [{rows}, ...]", got))
    # Before the loss: on a GPU a label out of range ends the process's use of it.
    if isinstance(task.loss, (nn.CrossEntropyLoss, nn.NLLLoss)) and isinstance(outputs, Tensor):
        _check_labels(task.loss, outputs, targets, data)
    checked_losses(task.loss(outputs, targets), rows)


def _check_labels(
    loss: nn.CrossEntropyLoss | nn.NLLLoss, outputs: Tensor, targets: Any, data: tuple[TaskData, TaskData]
) -> None:
    if outputs.dim() != 2:
        return
    rows, classes = outputs.shape
    for part, of in zip(("train", "test"), data, strict=True):
        # Of tensors all labels are looked at; a Dataset's would have to be loaded.
        whole = of.data[1] if isinstance(of.data, (tuple, list)) else targets
        if not isinstance(whole, Tensor):
            return
        probable = isinstance(loss, nn.CrossEntropyLoss) and whole.is_floating_point()
        if probable and whole.shape[1:] == (classes,):
            continue
        if whole.dtype not in (torch.int64, torch.uint8) or whole.dim() != 1:  # uint8: torch takes it as well
            expected = f"int64 labels [{rows}], or probabilities [{rows}, {classes}] for CrossEntropyLoss"
            got = f"{str(whole.dtype).removeprefix('torch.')} {[rows, *whole.shape[1:]]}"
            raise ValueError(must_be(f"{part}'s targets", expected, got))
        used = whole[whole != loss.ignore_index]
        wrong = used[(used < 0) | (used >= classes)]
        if len(wrong):
            expected = f"labels from 0 to {classes - 1}, as the model has {classes} outputs"
            raise ValueError(must_be(f"{part}'s targets", expected, shown(int(wrong[0]))))


def _coupling(task: Task, model: nn.Module, batch: Any) -> str:
    """Why samples have no gradients of their own; "" where they have.

    Raises:
        ValueError: the model mixes them otherwise than BatchNorm does, so that a loss is none of one sample.
    """
    wrapped = _Losses(task, model)
    try:
        found = check_independence(wrapped, batch)
    except (RuntimeError, ValueError) as error:
        return str(error)
    if found:
        return ""
    place = (found.module or "").removeprefix("model.")
    modules = dict(model.named_modules())
    if isinstance(modules.get(place), _BatchNorm):
        return found.reason.replace("model.", "", 1)
    if found.module == "":  # not inside of the model
        got = "values that depend on other samples: do outputs and targets broadcast, or is there a mean?"
        raise ValueError(must_be("loss", "one value a sample, of that sample alone", got))
    raise ValueError(
        must_be("model", "one whose samples are independent, but for BatchNorm", f"one where {found.reason}")
    )


def _norms(task: Task, model: nn.Module, optimizer: SVAG, batch: Any) -> tuple[bool, str]:
    """Whether every sample's gradient norm can be measured, compared with gradients formed one by one; else why not."""
    if not has_sample_norms(model):
        return False, "a layer has no rule for its samples' gradient norms"
    try:
        with per_sample_sq_norms(model, check=True) as norms:
            torch.autograd.backward(task.losses(model, batch).mean())
            norms.total  # noqa: B018  (raises what the check found)
        optimizer.zero_grad()
        pair_gradients(model, optimizer, batch, norms=True, losses=task.losses)
    except Exception as error:  # the same losses went well without norms: whatever it is, there are none
        return False, str(error)
    finally:
        optimizer.discard_gradient()
    return True, ""
