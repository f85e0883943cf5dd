"""An experiment from Python: the same grid, files and report as by `svag-fast run`."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from svag_fast.analysis.compared import check_judging
from svag_fast.analysis.margins import Margin
from svag_fast.analysis.report import Report, final_report
from svag_fast.experiments.config import ExperimentConfig, RunConfig, cores
from svag_fast.experiments.experiment_folder import (
    check_experiment,
    check_task_file,
    free_folder,
    prepare_folder,
    with_size,
)
from svag_fast.experiments.grid import ExperimentInterruptedError, progress_bar, provenance, run_experiment
from svag_fast.experiments.ranges import ConfigError, check_range
from svag_fast.experiments.signals import stop_requests
from svag_fast.experiments.task_error import TaskError
from svag_fast.experiments.task_file import load_task, parse_target
from svag_fast.numeric import must_be, shown
from svag_fast.plots.report import save

if TYPE_CHECKING:
    from svag_fast.experiments.task import Task


def study(
    task: Task | str,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    jobs: int | None = None,
    metrics: str | Sequence[str] | None = None,
    margins: Mapping[str, Margin] | None = None,
    checkpoint_seconds: float = 5.0,
    tensorboard: bool = False,
    progress: bool = True,
    **settings: Any,
) -> Report:
    """Train a task over a grid of batch sizes, l and seeds, and judge: does SVAG converge, does SGD match its limit?

        report = svag_fast.study(task, l=(1, 4, 16), batch_size=(64, 1024), lr=0.4, weight_decay=0, seeds=4)
        report.verdicts[0].answer

    A :class:`svag_fast.Task` trains in this process, a run after the other. The text of a target, such as "my_task.py",
    trains in processes of its own, `jobs` at a time.

    Args:
        task: a task, or a target as `svag-fast run` takes it.
        out: the experiment's folder; None: a new one in runs.
        resume: continue the experiment in `out`, or start it where there is none yet. Another task is refused: by its
            file, its data, and what it makes of a fixed seed.
        force: with `resume`: continue although the task has changed.
        jobs: processes at a time, for a target; None: cores / threads.
        metrics: columns of metrics.csv to judge by; None: the task's first metric, if any, and the loss.
        margins: by column; see `svag-fast run --margin`.
        checkpoint_seconds: save this often.
        tensorboard: write events into each run's folder.
        progress: show a bar.
        settings: the options of `svag-fast run` by their names in Python, such as ``effective_steps=5120``. A single
            number is a list of one. ``threads`` of a large net may be more than the default of 1.

    Returns:
        What `svag-fast report` prints; its files, summary.json and convergence.png, are in `out`.

    Raises:
        ConfigError: a setting or the task is wrong; nothing was written.
        TaskError: the task's own code failed.
        ExperimentError, OSError: see `svag_fast.experiments.grid.run_experiment`.
        KeyboardInterrupt: Ctrl-C, or a notebook's stop button: the step was ended and the run saved; the message says
            how to continue. A second one stops at once.
    """
    from svag_fast.experiments.task import Task

    named: dict[str, Any]
    if isinstance(task, Task):
        named = {"task": f"<{task.name}>"}
    elif isinstance(task, str):
        named = parse_target(task)
    else:
        raise TypeError(must_be("task", "a svag_fast.Task or a target such as 'my_task.py'", shown(task)))
    config = ExperimentConfig.from_dict(named | settings)
    check_range("jobs", jobs or 1)
    check_range("checkpoint_seconds", checkpoint_seconds)
    if resume and out is None:
        raise ConfigError(must_be("out", "the experiment's folder, with resume=True", "None"))
    folder = free_folder(config) if out is None else Path(out)
    metrics = [metrics] if isinstance(metrics, str) else metrics
    made = task if isinstance(task, Task) else None
    if made is None and config.task:
        made = load_task(config.task, check_task_file(folder, config.task, force=force))
    config = with_size(config, made)
    check_experiment(config, made)
    check_judging(["accuracy"] if made is None else list(made.metrics), metrics, margins)
    prepare_folder(folder, config, made, resume=resume, force=force)
    console = Console(quiet=not progress)
    console.print(f"in {folder}", markup=False)
    options: dict[str, Any] = {"checkpoint_seconds": checkpoint_seconds, "tensorboard": tensorboard}
    try:
        if isinstance(task, Task):
            _run_here(config, task, folder, console, options)
        else:
            run_experiment(config, folder, jobs=jobs or max(1, cores() // config.threads), console=console, **options)
    except ExperimentInterruptedError as stop:
        said = f"{stop}. Continue with: svag_fast.study(..., out={str(folder)!r}, resume=True)"
        if stop.number == signal.SIGINT:  # not an error, which a loop over studies might catch and continue after
            raise KeyboardInterrupt(said) from None
        raise ExperimentInterruptedError(said, stop.number) from None
    report = final_report(folder, metrics, margins)
    save(report, folder)
    return report


def _run_here(config: ExperimentConfig, task: Task, out: Path, console: Console, options: dict[str, Any]) -> None:
    """Train the runs that aren't complete in this process, for tasks that no other process can be given."""
    from svag_fast.experiments.training import train

    runs = config.runs()
    with _torch_as_before(), progress_bar(console) as bar, stop_requests() as asked:
        row = bar.add_task(f"0 of {len(runs)} runs", total=sum(run.cost for run in runs))
        before = 0.0
        for number, run in enumerate(runs, 1):

            def show(step: int, run: RunConfig = run, before: float = before) -> None:
                bar.update(row, completed=before + run.cost * step / run.steps)

            options |= {"on_progress": show, "should_stop": lambda: asked.number is not None}
            try:
                done = train(run, out / run.name, task=task, provenance=provenance(), **options)
            except TaskError as error:
                raise TaskError(f"run {run.name} failed (in {out / run.name}): {error}") from error
            if asked.number is not None:
                complete = f"{number if done else number - 1} of {len(runs)} runs are complete"
                raise ExperimentInterruptedError(f"stopped: {complete}", asked.number)
            before += run.cost
            bar.update(row, completed=before, description=f"{number} of {len(runs)} runs")


@contextmanager
def _torch_as_before() -> Iterator[None]:
    """Context behind which the settings that a run makes for its process are as before."""
    import torch

    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
    flags = cudnn.deterministic, cudnn.benchmark
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        cudnn.deterministic, cudnn.benchmark = flags
