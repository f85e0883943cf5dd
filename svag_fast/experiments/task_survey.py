"""What a task is like before it trains: what would fail, what is measured and how, and what a grid of runs costs."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from svag_fast.experiments.config import ExperimentConfig, RunConfig
from svag_fast.experiments.models.invariance import ScaleInvarianceReport, report_of
from svag_fast.experiments.random_state import OwnRandom
from svag_fast.experiments.task import BuiltinTask, Task
from svag_fast.experiments.task_check import TaskFacts, check_task
from svag_fast.experiments.task_data import TaskData
from svag_fast.experiments.task_error import own_code
from svag_fast.experiments.task_facts import from_seed, some_batch
from svag_fast.experiments.training import Engine, make_engine
from svag_fast.nn.replay import differ
from svag_fast.sample_norms.context import UnsupportedModuleError, per_sample_sq_norms

State = Literal["ok", "note", "fails"]
SHOWN = 8  # names in an answer
PROBE_SECONDS, PROBE_STEPS = 1.0, 16  # of each batch size at most, behind one step that warms up


class Finding(NamedTuple):
    """An answer about a task.

    Attributes:
        state: "fails" where a run would; "note" what one should know of; "ok" else.
        question: what was asked.
        answer: in words.
    """

    state: State
    question: str
    answer: str


def survey(task: Task, config: ExperimentConfig, *, jobs: int) -> Iterator[Finding]:
    """Try a task for a grid of runs, and say what is found, as it is found.

    Args:
        task: what is trained.
        config: the grid, with the task's size.
        jobs: runs at a time.

    Raises:
        TypeError, ValueError: a run would fail, by what is wrong; nothing can be said beyond.
        TaskError: the task's own code failed.
    """
    torch.set_num_threads(config.threads)
    runs = config.runs()
    device = config.device
    task.check_batch_size(max(config.batch_size))
    whole, task = task, task.placed(device)
    train, test = (TaskData(data, task.collate, device) for data in (task.train, task.test))
    random = OwnRandom(0, device, task)

    def tried(ask: Callable[[], Any]) -> Any:
        with random.active(), own_code(task.name):
            return ask()

    facts: TaskFacts = tried(lambda: check_task(task, train, test, min(config.batch_size)))
    parameters = sum(p.numel() for p in facts.model.parameters() if p.requires_grad)
    yield Finding(
        "ok", "task", f"{len(train):,} training and {len(test):,} test samples, {parameters:,} trained parameters"
    )
    batch = tried(lambda: some_batch(task, train))
    losses: Tensor = tried(lambda: task.losses(facts.model, batch)).detach()
    finite = bool(losses.isfinite().all())
    got = "" if finite else f", but not finite: {', '.join(f'{v:g}' for v in losses.tolist()[:4])}"
    yield Finding("ok" if finite else "fails", "one loss a sample", f"yes{got}")
    yield _independence(facts)
    yield tried_twice(task, train, test)
    yield _norms(facts)
    yield _invariance(lambda: tried(lambda: report_of(facts.model, lambda m: task.losses(m, batch))))
    yield _cost(whole, config, runs, jobs)


def _independence(facts: TaskFacts) -> Finding:
    question = "samples independent in training mode"
    if not facts.coupled:
        return Finding("ok", question, "yes")
    if not facts.reason.startswith("the samples are coupled"):
        return Finding("note", question, f"can't be told: {facts.reason}")
    return Finding("note", question, f"no: {facts.reason}. Each of the two batches has statistics of its own")


def tried_twice(task: Task, train: TaskData, test: TaskData) -> Finding:
    """Whether the same seed gives the same bits: weights, data, augmentation, losses, gradients, metrics."""
    first, second = (from_seed(task, train, test) for _ in range(2))
    for what, tensors in first.items():
        if len(tensors) != len(second[what]) or any(
            a.shape != b.shape or differ(a, b) for a, b in zip(tensors, second[what], strict=True)
        ):
            answer = f"no: {what} differ when made twice from the same seed, so that runs can't be repeated or resumed"
            return Finding("note", "deterministic", f"{answer} to the bit")
    return Finding("ok", "deterministic", f"yes: {', '.join(first)} are the same twice from the same seed")


def norms_by_layer(model: nn.Module) -> tuple[list[tuple[str, nn.Module]], dict[str, list[str]]]:
    """Return the layers whose samples' gradient norms are served, and the other trained ones by the reason why not."""
    served: list[tuple[str, nn.Module]] = []
    others: dict[str, list[str]] = {}
    for place, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if not own:
            continue
        try:
            with per_sample_sq_norms(model, parameters=own):
                served.append((place, module))
        except UnsupportedModuleError as error:
            others.setdefault(str(error), []).append(f"{place or 'the model'} ({type(module).__name__})")
    return served, others


def _norms(facts: TaskFacts) -> Finding:
    served, others = norms_by_layer(facts.model)
    kinds = Counter(type(module).__name__ for _, module in served)
    counted = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    if facts.norms:
        return Finding("ok", "per-sample norms", f"of all layers: {counted}; G and N come from them")
    lines = [f"no: {facts.reason}; G and N come from pairs of batches"]
    lines += [f"none of {_some(places)}: {reason}" for reason, places in others.items()]
    lines += [f"a rule for {counted}"] if served else []
    return Finding("note", "per-sample norms", "\n".join(lines))


def _invariance(ask: Callable[[], ScaleInvarianceReport]) -> Finding:
    try:
        report = ask()
    except RuntimeError as error:  # such as a model that can't be copied; it trains all the same
        return Finding("note", "scale-invariant", f"can't be told: {error}")
    change = f"loss change {report.loss_change:.2g} at 3 times the weights"
    if report.holds():
        return Finding("ok", "scale-invariant", f"yes: {change}")
    return Finding("note", "scale-invariant", f"no: {change}, broken by {_some([p.name for p in report.breaking])}")


def _some(names: list[str]) -> str:
    more = [f"{len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return ", ".join(names[:SHOWN] + more)


def _cost(task: Task, config: ExperimentConfig, runs: list[RunConfig], jobs: int) -> Finding:
    seconds: dict[int, float] = {}
    evaluations: tuple[float, float] | None = None
    for run in runs:
        if run.batch_size in seconds:
            continue
        what = None if isinstance(task, BuiltinTask) else task
        engine = make_engine([run], what)
        (training,) = engine.runs
        if training.diverged:
            row = training.rows[-1].items()
            wrong = [name for name, value in row if isinstance(value, float) and not math.isfinite(value)]
            answer = f"{', '.join(wrong)} of the initial weights must be finite for a run to take a step, got others"
            return Finding("fails", "first row of metrics", answer)
        if evaluations is None:
            evaluations = _timed(partial(training.evaluate, "test")), _timed(partial(training.evaluate, "train"))
        seconds[run.batch_size] = _step_seconds(engine)
    assert evaluations is not None
    total = 0.0
    for run in runs:
        total += run.steps * seconds[run.batch_size] + len(run.evaluation_steps) * evaluations[0]
        total += len(run.train_evaluation_steps) * evaluations[1]
    steps = sum(run.steps for run in runs)
    each = ", ".join(f"{1000 * s:.3g} ms at B = {batch_size}" for batch_size, s in seconds.items())
    at_once = min(jobs, len(runs))
    return Finding(
        "ok",
        "cost",
        f"about {_duration(total / at_once)} here: {len(runs)} runs of {steps:,} steps in all, {at_once} at a time; a "
        f"step takes {each}",
    )


def _step_seconds(engine: Engine) -> float:
    """The median time of a step."""
    (run,) = engine.runs
    device = run.config.device
    cuda = torch.device(device).type == "cuda"

    def steps() -> float:
        before = run.step
        start = time.perf_counter()
        engine.advance()
        if cuda:
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / (run.step - before)

    times = [steps()]  # this one warms up
    begin = time.monotonic()
    while not run.ended and len(times) <= PROBE_STEPS and time.monotonic() - begin < PROBE_SECONDS:
        times.append(steps())
    return median(times[1:] or times)


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.2g} hours" if seconds >= 360 else f"{seconds:.2g} seconds"
