"""A grid of runs over the machine's cores: a process a run, resumable, with progress.

The parent process starts workers and keeps the books; it needs no torch for that.
"""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing.forkserver
import platform
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from svag_fast import __version__
from svag_fast.config import ConfigError, ExperimentConfig, RunConfig, read_settings
from svag_fast.files import remove_leftovers, replace_file

PATIENCE = 20.0  # seconds that an interrupted worker gets to save its run
PRELOADED = [
    "svag_fast.training",
    "svag_fast.cli",
    "sklearn.datasets",
]  # imported once, in the process that workers are forked from


class ExperimentError(RuntimeError):
    """The experiment can't go on; the message says what to do."""


class ExperimentInterruptedError(ExperimentError):
    """Ctrl-C: all workers are ended, what is done is kept."""


@dataclass
class _Worker:
    run: RunConfig
    process: BaseProcess
    messages: Connection
    steps_done: int = 0
    error: str | None = None

    @property
    def cost_done(self) -> float:
        return self.run.cost * self.steps_done / self.run.steps


def prepare_folder(out: Path, config: ExperimentConfig, *, resume: bool) -> None:
    """Make `out` the folder of the experiment that `config` describes or, with `resume`, check that it is.

    Raises:
        ExperimentError: without `resume`, it holds something already; with it, another experiment or none.
        OSError: it can't be written.
    """
    if resume:
        theirs, ours = read_experiment(out).to_dict(), config.to_dict()
        if differing := [key for key in ours if ours[key] != theirs[key]]:
            details = ", ".join(f"{key} is {theirs[key]!r} there and {ours[key]!r} here" for key in differing)
            raise ExperimentError(f"{out} holds another experiment: {details}. Leave these options out to resume it.")
        remove_leftovers(out)
        return
    if out.exists() and any(out.iterdir()):
        raise ExperimentError(f"{out} is not empty: --resume goes on with it, and --out chooses another folder.")
    out.mkdir(parents=True, exist_ok=True)
    with replace_file(out / "experiment.json") as file:
        file.write(json.dumps(config.to_dict(), indent=2).encode() + b"\n")


def read_experiment(out: Path) -> ExperimentConfig:
    """Read the settings of the experiment in `out`.

    Raises:
        ExperimentError: there is none.
        ConfigError: its settings can't be read.
    """
    book = out / "experiment.json"
    if not book.exists():
        raise ExperimentError(f"{out} holds no experiment to resume: there is no {book}.")
    return ExperimentConfig.from_dict(read_settings(book))


def check_experiment(config: ExperimentConfig) -> None:
    """Fail now, before anything is written, where every run would: on the data, the model, the device, the backend.

    Raises:
        ConfigError: what isn't there, with what is.
    """
    from svag_fast.data import load_dataset
    from svag_fast.training import Training

    run = min(config.runs(), key=lambda run: run.batch_size)
    try:
        Training(run, load_dataset(run.dataset).to(run.device)).take_step()
    except (OSError, ValueError, RuntimeError, AssertionError) as error:
        raise ConfigError(str(error)) from error


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
    """Train every run of `config` that isn't complete in `out`, `jobs` at a time, the longest first.

    Args:
        config: the grid.
        out: the experiment's folder, by `prepare_folder`; each run gets a folder in it.
        jobs: worker processes at a time.
        console: where the progress goes.
        checkpoint_seconds: see `svag_fast.training.train`.
        tensorboard: see there.
        on_run_end: called after each run, while the others go on.

    Raises:
        ExperimentError: a run failed; the others were stopped and saved.
        ExperimentInterruptedError: Ctrl-C or a polite kill; all were stopped and saved.
    """
    waiting = sorted(config.runs(), key=lambda run: run.cost)
    total, count = sum(run.cost for run in waiting), len(waiting)
    options = {"checkpoint_seconds": checkpoint_seconds, "tensorboard": tensorboard, "provenance": provenance()}
    workers: list[_Worker] = []
    done: list[RunConfig] = []
    context = start_fork_server()
    progress = Progress(
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
    with progress, _termination_as_interrupt():
        bar = progress.add_task(f"0 of {count} runs", total=total)
        try:
            while waiting or workers:
                while waiting and len(workers) < jobs:
                    workers.append(_start(context, waiting.pop(), out, options))
                for messages in wait([worker.messages for worker in workers], timeout=1.0):
                    worker = next(w for w in workers if w.messages is messages)
                    if _listen(worker):
                        continue
                    workers.remove(worker)
                    if worker.process.exitcode != 0:
                        raise ExperimentError(_post_mortem(worker))
                    done.append(worker.run)
                    progress.update(bar, description=f"{len(done)} of {count} runs")
                    if not console.is_terminal:
                        console.print(f"{len(done)} of {count} runs: {worker.run.name} is complete")
                    on_run_end()
                progress.update(bar, completed=sum(r.cost for r in done) + sum(w.cost_done for w in workers))
        except KeyboardInterrupt:
            raise ExperimentInterruptedError(f"stopped: {len(done)} of {count} runs are complete") from None
        finally:
            _stop(workers)


def provenance() -> dict[str, Any]:
    """Versions, platform and, where the package runs from a checkout, the commit."""
    packages = ("torch", "numpy", "scipy", "scikit-learn")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "versions": {"svag_fast": __version__, "python": platform.python_version(), **versions},
        "platform": platform.platform(),
        "commit": _commit(),
    }


def _commit() -> str | None:
    folder = Path(__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return None
    describe = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None  # no git, or not ours to read


def start_fork_server() -> multiprocessing.context.ForkServerContext:
    """Start the process that workers are forked from; it does its imports while the caller goes on.

    It and its workers are deaf to Ctrl-C: their parent stops them.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)
    return context


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM, as of a batch system or a container that ends, like Ctrl-C."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _start(
    context: multiprocessing.context.ForkServerContext, run: RunConfig, out: Path, options: dict[str, Any]
) -> _Worker:
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(run, out / run.name, options, theirs), name=run.name, daemon=True)
    process.start()
    theirs.close()  # so that the worker's end shows as the end of the messages
    return _Worker(run, process, ours)


def _work(run: RunConfig, folder: Path, options: dict[str, Any], messages: Connection) -> None:
    """Train one run in a worker process: messages are steps done, or the error that ended it."""
    from svag_fast.training import train

    stop = False

    def ask_to_stop(*_: object) -> None:
        nonlocal stop
        stop = True

    def report(step: int) -> None:
        try:
            messages.send(step)
        except BrokenPipeError:  # the parent is gone
            ask_to_stop()

    signal.signal(signal.SIGTERM, ask_to_stop)
    try:
        train(run, folder, on_progress=report, should_stop=lambda: stop, **options)
    except Exception as error:
        expected = isinstance(error, (OSError, RuntimeError, ValueError))
        messages.send(str(error) if expected else traceback.format_exc())
        raise SystemExit(1) from None


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
        worker.steps_done = message
    return True


def _post_mortem(worker: _Worker) -> str:
    code = worker.process.exitcode
    if worker.error is None:
        reason = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        worker.error = f"its process ended by {reason} (out of memory?)"
    return f"run {worker.run.name} failed: {worker.error}"


def _stop(workers: list[_Worker]) -> None:
    """Let the workers save their runs and end; whoever doesn't in time, or at a second Ctrl-C, is killed."""
    try:
        for worker in workers:
            worker.process.terminate()
        deadline = time.monotonic() + PATIENCE
        for worker in workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
    finally:
        for worker in workers:
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
