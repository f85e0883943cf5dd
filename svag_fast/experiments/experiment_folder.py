"""An experiment's folder: what must be so before its runs are trained in it."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from svag_fast.experiments.config import UNSAID, ExperimentConfig
from svag_fast.experiments.ranges import ConfigError
from svag_fast.experiments.run_folder import read_config, read_metrics, require_comparable
from svag_fast.experiments.settings_file import read_settings
from svag_fast.experiments.task_file import (
    BOOK,
    COPY,
    FACTS,
    difference,
    hash_of,
    keep_copy,
    known_hashes,
    place_of,
    same_task,
    short_name,
    source_of,
)
from svag_fast.files import is_leftover, remove_leftovers, replace_file

if TYPE_CHECKING:
    from svag_fast.experiments.config import RunConfig
    from svag_fast.experiments.task import Task
    from svag_fast.experiments.task_facts import Facts


class ExperimentError(RuntimeError):
    """The experiment can't continue; the message says what to do."""


def prepare_folder(
    out: Path, config: ExperimentConfig, task: Task | None = None, *, resume: bool, force: bool = False
) -> None:
    """Make `out` the folder of the experiment that `config` describes or, with `resume`, check that it is.

    With `resume` too a folder that is missing or empty is made: one command line starts a job and continues it.
    With `force` a task may have changed since: runs from here on are of the new one.

    Args:
        out: the folder.
        config: the grid.
        task: the task that it names.
        resume: continue what is there.
        force: whatever task it was.

    Raises:
        ConfigError: a task's file isn't there.
        ExperimentError: without `resume`, it holds something already; with it, another experiment, none, one of a
            task that has changed, or runs that can't be continued or reported beside its own.
        TaskError: the task's own code failed.
        OSError: it can't be written.
    """
    in_file = config.task and not config.task.startswith("<")
    source = source_of(config.task) if in_file else None
    if holds_something(out):
        if not resume:
            raise ExperimentError(f"{out} is not empty: --resume continues it, and --out chooses another folder.")
        if in_file:
            check_task_file(out, config.task, force=force)
        theirs, ours = read_experiment(out).to_dict(), config.to_dict()
        # A resumed experiment with other settings would mix two experiments' runs in one report.
        if differing := [key for key in ours if not _alike(key, ours[key], theirs[key])]:
            details = ", ".join(f"{key} is {theirs[key]!r} there and {ours[key]!r} here" for key in differing)
            raise ExperimentError(f"{out} holds another experiment: {details}. Leave these options out to resume it.")
        facts = None if task is None else _facts(out, config, task, force)
        _check_runs(out, config)
        remove_leftovers(out)
        if source is not None:
            _renew_copy(out, config.task, source)
        _write_facts(out, facts)
        if theirs != ours:  # the task's file was moved
            _write_experiment(out, config)
        return
    facts = None if task is None else _facts(out, config, task, force)
    out.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out)
    _write_facts(out, facts)
    if source is not None:
        keep_copy(out, config.task, source)
    _write_experiment(out, config)


def check_facts(out: Path, config: ExperimentConfig | RunConfig, task: Task) -> Facts:
    """Return what a task is, by numbers; refuse another one than the experiment's in `out`.

    Raises:
        ExperimentError: it is another one, in what the message says, or the folder's facts can't be read.
        TaskError: the task's own code failed.
    """
    from svag_fast.experiments.task_facts import differences, facts_of, read_facts

    found = facts_of(task, config.device)
    try:
        known = read_facts(out)
    except ValueError as error:
        raise ExperimentError(str(error)) from error
    if known is not None and (changes := differences(known, found)):
        raise ExperimentError(
            f"{out} was begun with another task of this name, by its data or by what comes of a fixed seed:\n\n"
            + "\n".join(changes)
            + "\n\nRuns of two tasks don't belong in one report. Does its code make the same data each time?"
        )
    return found


def _facts(out: Path, config: ExperimentConfig, task: Task, force: bool) -> Facts:
    if force:
        from svag_fast.experiments.task_facts import facts_of

        return facts_of(task, config.device)
    try:
        return check_facts(out, config, task)
    except ExperimentError as error:
        raise ExperimentError(
            f"{error} Or choose another --out. --force continues with the new task anyway."
        ) from error


def _write_facts(out: Path, facts: Facts | None) -> None:
    if facts is not None:
        from svag_fast.experiments.task_facts import write_facts

        write_facts(out, facts)


def _write_experiment(out: Path, config: ExperimentConfig) -> None:
    with replace_file(out / "experiment.json") as file:
        file.write(json.dumps(config.to_dict(), indent=2).encode() + b"\n")


def _alike(key: str, one: object, other: object) -> bool:
    return same_task(one, other) if key == "task" else one == other


def check_task_file(out: Path, task: str, *, force: bool = False) -> str:
    """Return the hash of a task's file, before any of it is run; refuse another one than the experiment's in `out`.

    Args:
        out: the experiment's folder, perhaps none yet.
        task: the setting.
        force: let it be another one.

    Raises:
        ConfigError: there is no such file.
        ExperimentError: it has changed since; the message shows how.
    """
    source = source_of(task)
    found = hash_of(source)
    try:
        known = known_hashes(out)
        if not known or known[-1] == found or force:
            return found
        changes = difference(out, source)
    except (OSError, ValueError) as error:
        raise ExperimentError(f"{out} has no whole copy of its task's file: {error}") from error
    raise ExperimentError(
        f"{place_of(task).path} has changed since {out} began:\n\n{changes}\n\nRuns of two tasks don't belong in one "
        "report: take the change back, or choose another --out. --force continues with the new file anyway."
    )


def _renew_copy(out: Path, task: str, source: str) -> None:
    known = known_hashes(out)
    if known and known[-1] == hash_of(source):
        return
    if known:
        (out / COPY).rename(out / f"task-{known[-1][:8]}.py")
    keep_copy(out, task, source, known)


def free_folder(config: ExperimentConfig) -> Path:
    """Return a folder in runs that isn't there yet, of what the experiment trains."""
    name = re.sub(r"[^\w.-]+", "-", short_name(config.task)) if config.task else Path(config.dataset).stem
    wanted = Path("runs", name)
    names = [wanted, *(wanted.with_name(f"{wanted.name}-{number}") for number in range(2, 10_000))]
    return next(folder for folder in names if not folder.exists())


def holds_something(out: Path) -> bool:
    """Whether there is anything in the folder `out`, but for what a process left that ended before it had begun."""
    names = {entry.name for entry in os.scandir(out) if not is_leftover(entry)} if out.is_dir() else set()
    # `prepare_folder` writes the facts first and the settings last.
    return bool(names) and not (FACTS in names and names <= {FACTS, COPY, BOOK})


def _check_runs(out: Path, config: ExperimentConfig) -> None:
    """Fail now where a run or the report would fail after all else was trained."""
    from svag_fast.experiments.book import read_state
    from svag_fast.experiments.checkpoint import CheckpointError

    ours = config.runs()
    for run in ours:
        try:
            read_state(out / run.name / "checkpoint.pt", run)
        except CheckpointError as error:
            raise ExperimentError(f"run {run.name} can't continue: {error}") from error
    names = {run.name for run in ours}
    others = [book.parent for book in sorted(out.glob("*/config.json")) if book.parent.name not in names]
    try:
        configs = {run.name: asdict(run) for run in ours}
        for folder in others:
            configs[folder.name] = read_config(folder / "config.json")
            read_metrics(folder / "metrics.csv")
        require_comparable(configs)
    except ValueError as error:
        raise ExperimentError(f"{error}. Move what is no run of this experiment out of {out}.") from error


def read_experiment(out: Path) -> ExperimentConfig:
    """Read the settings of the experiment in `out`.

    Raises:
        ExperimentError: there is none.
        ConfigError: its settings can't be read.
    """
    book = out / "experiment.json"
    if not book.exists():
        raise ExperimentError(f"{out} holds no experiment to resume: there is no {book}.")
    settings = read_settings(book)
    if "label_noise" not in settings:  # an older version's, whose runs had no such thing and another length
        settings |= {"label_noise": UNSAID["label_noise"], "replicas": "off"}
        if settings.get("effective_steps") is None and settings.get("epochs") is None:
            settings["effective_steps"] = 1008
    return ExperimentConfig.from_dict({name: UNSAID[name] for name in ("sampling", "init")} | settings)


def with_size(config: ExperimentConfig, task: Task | None) -> ExperimentConfig:
    """Return the settings with the number of the task's training samples filled in; of no task as they are."""
    return config if task is None else replace(config, train_size=task.train_size)


def check_experiment(config: ExperimentConfig, task: Task | None = None) -> None:
    """Fail now, before anything is written, where every run would: on the data, the model, the device, the backend.

    Args:
        config: the grid.
        task: the task that it names.

    Raises:
        ConfigError: what isn't there, with what is, and what is wrong with the task.
        TaskError: its own code failed.
    """
    from svag_fast.experiments.task_error import TaskError
    from svag_fast.experiments.training import make_engine

    # The first steps of the smallest run cost least, and go through all that may be missing.
    run = min(config.runs(), key=lambda run: run.batch_size)
    try:
        if task is not None:
            task.check_batch_size(max(config.batch_size))
        make_engine([run], task).advance()
    except TaskError:
        raise
    except (OSError, ValueError, RuntimeError, AssertionError, MemoryError, ImportError, TypeError) as error:
        advice = " (--replicas off trains each run alone, by PyTorch)" if run.engine == "fused" else ""
        raise ConfigError(f"{error}{advice}") from error
