"""What a task is, told by numbers: its data, and its weights, losses, gradients and metrics from a fixed seed.

An experiment's folder keeps them, so that a task that changed is noticed, whatever it was made of: another function in
a notebook, another file of data, a module that the task's file imports.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset

from svag_fast.experiments.evaluation import evaluate
from svag_fast.experiments.random_state import OwnRandom
from svag_fast.experiments.task import Task
from svag_fast.experiments.task_check import augmented, new_model
from svag_fast.experiments.task_data import TaskData
from svag_fast.experiments.task_error import own_code
from svag_fast.experiments.task_file import FACTS
from svag_fast.files import read_text, replace_file

ROWS = 8  # samples of the batch that is tried
TOLERANCE = 1e-4  # of a number: machines round differently

Facts: TypeAlias = dict[str, tuple[str, list[float]]]
"""By name: what must be the same to the letter, and numbers that must be close."""


def some_batch(task: Task, train: TaskData) -> Any:
    """Some training samples, spread over the data, as a run takes them."""
    count = len(train)
    batch = train.take(torch.arange(ROWS, dtype=torch.int64, device="cpu") * max(1, count // ROWS) % count)
    if task.augment is None:
        return batch
    return augmented(task, batch, torch.Generator(train.device).manual_seed(0))


def from_seed(task: Task, train: TaskData, test: TaskData) -> dict[str, list[Tensor]]:
    """What a task makes of a fixed seed, by name.

    Args:
        task: its modules are on the data's device.
        train, test: its data.

    Raises:
        TaskError: its own code failed.
    """
    random = OwnRandom(1, train.device, task)
    with own_code(task.name):
        with random.active():
            model = new_model(task).to(train.device)
        weights = [t.detach().clone() for t in model.state_dict().values()]
        random.look_into(model)
        random.seed(1)
        with random.active():
            batch = some_batch(task, train)
            losses = task.losses(model, batch)
            trained = [p for p in model.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(losses.mean(), trained, allow_unused=True, materialize_grads=True)
            values = evaluate(task, model, test, ROWS).values()
    return {
        "initial weights": weights,
        "batches": [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)],
        "losses": [losses.detach()],
        "gradients": list(gradients),
        "metrics": [torch.tensor(list(values), dtype=torch.float64, device="cpu")],
    }


def facts_of(task: Task, device: torch.device | str) -> Facts:
    """What is known of a task; what comes out otherwise a second time isn't."""
    task = task.placed(device)
    train, test = (TaskData(data, task.collate, device) for data in (task.train, task.test))
    first, second = (
        {name: (_text(task, name, made), _numbers(name, made)) for name, made in from_seed(task, train, test).items()}
        for _ in range(2)
    )
    facts = {name: fact for name, fact in first.items() if not _unlike(fact, second[name])}
    for part, data in (("training data", task.train), ("test data", task.test)):
        if isinstance(data, Dataset):  # its items may be files: the batch is their sample
            facts[part] = (f"{len(data)} items", [])  # type: ignore[arg-type]
        else:
            tensors = [data] if isinstance(data, Tensor) else data
            facts[part] = (", ".join(f"{_form(t)} of SHA-256 {_hash(t)}" for t in tensors), [])
    return facts


def _text(task: Task, name: str, tensors: list[Tensor]) -> str:
    return ", ".join([*task.metrics, "loss"] if name == "metrics" else map(_form, tensors))


def _numbers(name: str, tensors: list[Tensor]) -> list[float]:
    values = [t.detach().double().cpu() for t in tensors]
    return values[0].tolist() if name in ("losses", "metrics") else [float(v.norm()) for v in values]


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _hash(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()[:16]


def _unlike(one: tuple[str, list[float]], other: tuple[str, list[float]]) -> str:
    """In what two facts differ; "" where they don't."""
    if one[0] != other[0] or len(one[1]) != len(other[1]):
        return f"{one[0]} there and {other[0]} here"
    scale = max((abs(v) for v in one[1] if math.isfinite(v)), default=0.0)
    for place, (a, b) in enumerate(zip(one[1], other[1], strict=True), 1):
        if not (a == b or abs(a - b) <= TOLERANCE * scale or (math.isnan(a) and math.isnan(b))):
            return f"{a:.6g} there and {b:.6g} here" + (f" (number {place})" if len(one[1]) > 1 else "")
    return ""


def differences(facts: Facts, others: Facts) -> list[str]:
    """In what two tasks differ, in words; what is known of one alone is not compared."""
    return [f"{name}: {said}" for name in facts if name in others and (said := _unlike(facts[name], others[name]))]


def read_facts(out: Path) -> Facts | None:
    """Return what an experiment's folder says of its task; None where it says nothing, as an older one.

    Raises:
        ValueError: its file can't be read.
    """
    path = out / FACTS
    try:
        book = json.loads(read_text(path, 1 << 26))
        return {str(name): (str(text), [float(v) for v in numbers]) for name, (text, numbers) in book.items()}
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: no facts of a task in it ({error})") from error


def write_facts(out: Path, facts: Facts) -> None:
    """Write them into an experiment's folder."""
    with replace_file(out / FACTS) as file:
        file.write(json.dumps(facts, indent=1).encode() + b"\n")
