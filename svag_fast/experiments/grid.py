"""A grid of runs over the machine's cores: a process a run, resumable, with progress.

The parent process starts workers and keeps the books; it needs no torch for that.
"""

from __future__ import annotations

import math
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from svag_fast import __version__
from svag_fast.experiments.config import ExperimentConfig, RunConfig
from svag_fast.experiments.experiment_folder import ExperimentError, check_facts
from svag_fast.experiments.ranges import check_range
from svag_fast.experiments.signals import kept_from_children, termination_as_interrupt
from svag_fast.experiments.task_file import known_hashes, load_task
from svag_fast.versions import package_version

PATIENCE = 20.0  # seconds that an interrupted worker gets to save its run
PRELOADED = [
    "svag_fast.experiments.training",
    "svag_fast.cli.main",
    "sklearn.datasets",
]  # imported once, in the process that workers are forked from


class ExperimentInterruptedError(ExperimentError):
    """A signal said to stop: all workers are ended, what is done is kept."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number
        """The signal's."""


@dataclass
class _Worker:
    runs: list[RunConfig]
    out: Path
    process: BaseProcess
    messages: Connection
    steps_done: list[int]
    error: str | None = None

    @property
    def cost_done(self) -> float:
        return sum(run.cost * steps / run.steps for run, steps in zip(self.runs, self.steps_done, strict=True))


def run_experiment(
    config: ExperimentConfig,
    out: Path,
    *,
    jobs: int,
    console: Console,
    checkpoint_seconds: float = 5.0,
    tensorboard: bool = False,
    on_run_end: Callable[[], None] = lambda: None,
) -> None:
    """Train every run of `config` that isn't complete in `out` by `jobs` processes at a time, the longest first.

    Args:
        config: the grid.
        out: the experiment's folder, by `prepare_folder`; each run gets a folder in it.
        jobs: worker processes at a time.
        console: where the progress goes.
        checkpoint_seconds: see `svag_fast.experiments.training.train`.
        tensorboard: see there.
        on_run_end: called after each run, while the others run.

    Raises:
        ConfigError: jobs or checkpoint_seconds is out of range.
        ExperimentError: a run failed; the others were stopped and saved.
        ExperimentInterruptedError: Ctrl-C, a polite kill or a lost terminal; all were stopped and saved.
    """
    check_range("jobs", jobs)
    check_range("checkpoint_seconds", checkpoint_seconds)
    # `pop` takes the longest first: a long run that starts last would keep one core busy alone.
    waiting = sorted(_groups(config, jobs), key=lambda group: sum(run.cost for run in group))
    total, count = sum(run.cost for run in config.runs()), len(config.runs())
    options: dict[str, Any] = {"checkpoint_seconds": checkpoint_seconds, "tensorboard": tensorboard}
    options["provenance"] = provenance()
    if config.task:
        options["provenance"]["task_sha256"] = known_hashes(out)[-1]
    workers: list[_Worker] = []
    done: list[RunConfig] = []
    context = start_fork_server()
    # Nobody writes to it. It ends with this process, however that ends, and with it the workers.
    lifeline, ours = context.Pipe(duplex=False)
    progress = progress_bar(console)
    with progress, termination_as_interrupt():
        bar = progress.add_task(f"0 of {count} runs", total=total)
        try:
            while waiting or workers:
                while waiting and len(workers) < jobs:
                    workers.append(_start(context, waiting.pop(), out, options, lifeline))
                # A second at most, so that the bar moves between messages.
                for messages in wait([worker.messages for worker in workers], timeout=1.0):
                    worker = next(w for w in workers if w.messages is messages)
                    if _listen(worker):
                        continue
                    workers.remove(worker)
                    if worker.process.exitcode != 0:
                        raise ExperimentError(_post_mortem(worker))
                    for run in worker.runs:
                        done.append(run)
                        if not console.is_terminal:
                            console.print(f"{len(done)} of {count} runs: {run.name} is complete")
                    progress.update(bar, description=f"{len(done)} of {count} runs")
                    on_run_end()
                # By cost, not by runs: one at l = 8 takes eight times one at l = 1.
                progress.update(bar, completed=sum(r.cost for r in done) + sum(w.cost_done for w in workers))
        except KeyboardInterrupt as stop:
            number = stop.args[0] if stop.args else signal.SIGINT
            raise ExperimentInterruptedError(f"stopped: {len(done)} of {count} runs are complete", number) from None
        finally:
            try:
                _stop(workers)
            finally:
                ours.close()
                lifeline.close()


def progress_bar(console: Console) -> Progress:
    """Return the bar of an experiment, whose unit is the runs' cost."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("elapsed,"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        speed_estimate_period=60,
    )


def _groups(config: ExperimentConfig, jobs: int) -> list[list[RunConfig]]:
    """Return the runs in lists, each for one process: alone, or as replicas that differ in the seed alone."""
    if config.engine == "torch":
        return [[run] for run in config.runs()]
    kinds: dict[tuple[int, float, float], list[RunConfig]] = {}
    for run in config.runs():
        kinds.setdefault((run.batch_size, run.lr, run.l), []).append(run)
    if isinstance(config.replicas, int):
        size = config.replicas
    else:
        # Replicas gain nothing from more company: a thread takes one at a time. So there may be lists enough to keep
        # every process busy to the end, and few enough that their start costs little.
        size = math.ceil(config.seeds / max(1, math.ceil(4 * jobs / len(kinds))))
    return [runs[i : i + size] for runs in kinds.values() for i in range(0, len(runs), size)]


def provenance() -> dict[str, Any]:
    """Versions, platform and, where the package runs from a checkout, the commit."""
    packages = ("torch", "numpy", "scipy", "scikit-learn")
    versions = {name: package_version(name) for name in packages}
    return {
        "versions": {"svag_fast": __version__, "python": platform.python_version(), **versions},
        "platform": platform.platform(),
        "commit": _commit(),
    }


def _commit() -> str | None:
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    describe = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None  # no git, or not ours to read


def start_fork_server() -> multiprocessing.context.ForkServerContext:
    """Start the process that workers are forked from; it does its imports while the caller continues.

    It and its workers are deaf to Ctrl-C and to the terminal's end: their parent stops them.
    """
    # Not fork, which copies locks that the parent's threads hold; not spawn, which imports torch in each worker, for
    # seconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # First, since it lets signals through again.
    multiprocessing.resource_tracker.ensure_running()
    # Inherited by the fork server and its workers. A terminal sends Ctrl-C to all of them, and they would die amid a
    # step.
    with kept_from_children():
        multiprocessing.forkserver.ensure_running()
    return context


def _start(
    context: multiprocessing.context.ForkServerContext,
    runs: list[RunConfig],
    out: Path,
    options: dict[str, Any],
    lifeline: Connection,
) -> _Worker:
    ours, theirs = context.Pipe(duplex=False)
    # The fork server has the environment of when it began.
    arguments = (runs, [out / run.name for run in runs], options, theirs, lifeline, dict(os.environ))
    # No daemon, which may have no children of its own, such as those of a task that loads its data in processes.
    process = context.Process(target=_work, args=arguments, name=runs[0].name)
    # A worker would run the script that called `svag_fast.study` again, from which it needs nothing.
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    try:
        process.start()
    finally:
        sys.modules["__main__"] = main
    theirs.close()  # so that the worker's end shows as the end of the messages
    return _Worker(runs, out, process, ours, [0] * len(runs))


def _work(
    runs: list[RunConfig],
    folders: list[Path],
    options: dict[str, Any],
    messages: Connection,
    lifeline: Connection,
    environment: dict[str, str],
) -> None:
    """Train runs in a worker process: messages are a run's place and steps done, or the error that ended it."""
    stop = False

    def ask_to_stop(*_: object) -> None:
        nonlocal stop
        stop = True

    def end_with_parent() -> None:
        # Not PR_SET_PDEATHSIG: this process's parent is the fork server. A pipe's end can't be missed either, where
        # the parent died before this thread began.
        wait([lifeline])
        ask_to_stop()
        time.sleep(PATIENCE)
        os.kill(os.getpid(), signal.SIGKILL)

    def report(place: int, step: int) -> None:
        try:
            messages.send((place, step))
        except BrokenPipeError:  # the parent is gone
            ask_to_stop()

    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGTERM, ask_to_stop)
    _end_children_by_sigterm()
    threading.Thread(target=end_with_parent, daemon=True).start()
    from svag_fast.experiments.training import train_together

    try:
        task = None
        if runs[0].task:
            task = load_task(runs[0].task, options["provenance"]["task_sha256"])
            check_facts(folders[0].parent, runs[0], task)  # its data may be made again in each process
        train_together(runs, folders, task=task, on_progress=report, should_stop=lambda: stop, **options)
    except Exception as error:
        expected = isinstance(error, (OSError, RuntimeError, ValueError))
        with suppress(BrokenPipeError):  # the parent is gone
            messages.send(str(error) if expected else traceback.format_exc())
        raise SystemExit(1) from None


def _end_children_by_sigterm() -> None:
    """Let this process's forked children, such as those of a task's pool, die of SIGTERM, which it handles itself."""

    def in_child() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        unblock()

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    def block() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    # Blocked meanwhile: one that comes before the child is ready would be taken by the handler and lost.
    os.register_at_fork(before=block, after_in_child=in_child, after_in_parent=unblock)


def _listen(worker: _Worker) -> bool:
    """Take one message; False when the worker has ended."""
    try:
        message = worker.messages.recv()
    except EOFError:
        worker.process.join()
        return False
    if isinstance(message, str):
        worker.error = message
    else:
        place, worker.steps_done[place] = message[0], message[1]
    return True


def _post_mortem(worker: _Worker) -> str:
    code = worker.process.exitcode
    if worker.error is None:
        reason = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        worker.error = f"its process ended by {reason} (out of memory?)"
    run = worker.runs[0].name if len(worker.runs) == 1 else f"one of {worker.runs[0].name} to {worker.runs[-1].name}"
    return f"run {run} failed (in {worker.out / worker.runs[0].name}): {worker.error}"


def _stop(workers: list[_Worker]) -> None:
    """Let the workers save their runs and end; whoever doesn't in time, or at a second Ctrl-C, is killed."""
    try:
        for worker in workers:
            worker.process.terminate()
        # One deadline for all: they save at the same time.
        deadline = time.monotonic() + PATIENCE
        for worker in workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
    finally:
        for worker in workers:
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
