"""`svag-fast run`: the settings, the experiment, and what came out."""

from __future__ import annotations

import importlib.util
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click
from rich.console import Console
from rich.table import Table

from svag_fast.analysis.compared import check_judging
from svag_fast.analysis.margins import Margin
from svag_fast.cli.options import data_dir_option, margin_option, metric_option, setting_options, setting_panel
from svag_fast.cli.stopped import Stopped, failure
from svag_fast.experiments.config import BOOKKEEPING, HOW, LENGTH, WHAT, ExperimentConfig, cores
from svag_fast.experiments.data import download as download_dataset
from svag_fast.experiments.data.files import roots
from svag_fast.experiments.experiment_folder import (
    ExperimentError,
    check_experiment,
    check_task_file,
    free_folder,
    holds_something,
    prepare_folder,
    read_experiment,
    with_size,
)
from svag_fast.experiments.grid import ExperimentInterruptedError, run_experiment, start_fork_server
from svag_fast.experiments.ranges import ConfigError, check_range
from svag_fast.experiments.settings_file import read_settings
from svag_fast.experiments.task_error import TaskError
from svag_fast.experiments.task_file import load_task, parse_target, short_name
from svag_fast.numeric import must_be, shown

if TYPE_CHECKING:
    from svag_fast.experiments.task import Task


@click.command()
@click.argument("target", required=False)
@setting_panel(ExperimentConfig, WHAT)
@setting_panel(ExperimentConfig, LENGTH)
@setting_panel(ExperimentConfig, HOW)
@setting_panel(ExperimentConfig, "The verdict", "--metric", "--margin")
@setting_panel(
    ExperimentConfig,
    BOOKKEEPING,
    "--data-dir",
    "--download",
    "--jobs",
    "--out",
    "--config",
    "--resume",
    "--force",
    "--checkpoint-seconds",
    "--tensorboard",
    "--help",
)
@setting_options(ExperimentConfig)
@data_dir_option
@click.option(
    "--download", is_flag=True, help="Let torchvision download what is missing into --data-dir.  [default: data]"
)
@click.option("--jobs", type=click.IntRange(1), metavar="N", help="Runs at a time.  [default: cores / threads]")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Folder of the experiment.  [default: runs/NAME]"
)
@click.option(
    "--config",
    "file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="TOML or JSON with these options' values (effective_steps = 5120); the command line overrides it.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Continue the experiment in --out, or start it where there is none yet. Without --out: the newest in runs.",
)
@click.option("--force", is_flag=True, help="With --resume: continue although the task has changed.")
@click.option("--checkpoint-seconds", type=float, default=5.0, show_default=True, help="Save this often.")
@metric_option
@margin_option
@click.option("--tensorboard", is_flag=True, help="Write TensorBoard events into each run's folder.")
def run(
    target: str | None,
    download: bool,
    out: Path | None,
    file: Path | None,
    resume: bool,
    force: bool,
    jobs: int | None,
    checkpoint_seconds: float,
    tensorboard: bool,
    metrics: Sequence[str],
    margins: dict[str, Margin],
    **given: Any,
) -> None:
    """Train with SGD and SVAG: does SVAG converge, and does SGD match its limit?

    TARGET is what to train: your own task, FILE.py[:NAME] or package.module:NAME (docs/tasks.md); or a built-in data
    set, such as digits, and perhaps its net, such as digits/preresnet8-bn. A task is code, which runs with your rights.

    Without options this is the paper's Figure 4 in small, on scikit-learn's digits with 20 % label noise. Batch sizes
    are 4, and 32 and 256 by the linear scaling rule. l is 1, 2, 4 and 8, at 256 also 16, with 24 seeds. It takes little
    more than a minute on two cores.

    Each run writes its config, metrics and checkpoint into a folder of its own. The experiment's folder gets
    summary.json and convergence.png. After any interruption, --resume continues. With --resume and --out from the
    first, one command line serves a job that a batch system starts again. Exit status 3: every run diverged, so there
    is no verdict. A signal that stops it gives 128 + its number: 130 by Ctrl-C, 143 by SIGTERM.
    """
    console = Console()
    given = {name: value for name, value in given.items() if value is not None}
    judging = {"metrics": metrics or None, "margins": margins}
    try:
        if target is not None:
            given = _with_target(target, given)
        if resume:
            out = out or _newest_experiment()
            there = read_experiment(out).to_dict() if holds_something(out) else {}
            task = str(there.get("task", ""))
            if task and target is None and not task.startswith("<"):
                expected = f"named again, since no file of settings has code run: {_again(task, out)}"
                raise ConfigError(must_be("TARGET", expected, "none"))
            config = ExperimentConfig.from_dict(there | _from_file(file) | given)
        else:
            config = ExperimentConfig.from_dict(_from_file(file) | given)
            out = out or free_folder(config)
        start_fork_server()  # its imports and ours run side by side
        made = load_task(config.task, check_task_file(out, config.task, force=force)) if config.task else None
        config = with_size(config, made)
        if tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ConfigError("--tensorboard needs a package that is not there: pip install tensorboard")
        check_range("jobs", jobs or 1)
        check_range("checkpoint_seconds", checkpoint_seconds)
        if download:
            _download(config.dataset)
        check_experiment(config, made)
        _check_judging(made, metrics, margins)
        prepare_folder(out, config, made, resume=resume, force=force)
        console.print(_plan(config))
        console.print(f"in {out}\n", markup=False)
        run_experiment(
            config,
            out,
            jobs=jobs or max(1, cores() // config.threads),
            console=console,
            checkpoint_seconds=checkpoint_seconds,
            tensorboard=tensorboard,
            on_run_end=_EarlyReport(out, judging, console).refresh,
        )
        _tell(out, judging, console)
    except ConfigError as error:
        raise click.UsageError(str(error)) from error
    except ExperimentInterruptedError as error:
        again = _again(config.task, out)
        raise Stopped(f"{error}. Continue with: {again}", error.number) from error
    except TaskError as error:  # before the experiment began: a worker's comes as an ExperimentError
        raise failure(f"{error}\nNothing was written.") from error
    except (ExperimentError, OSError) as error:
        raise failure(str(error)) from error


def _again(task: str, out: Path | None) -> str:
    return shlex.join(["svag-fast", "run", *([task] if task else []), "--resume", "--out", str(out)])


def _with_target(target: str, given: dict[str, Any]) -> dict[str, Any]:
    settings = parse_target(target)
    for name in settings.keys() & given.keys():
        expected = f"left out beside {target}, which says it"
        raise ConfigError(must_be(f"--{name}", expected, shown(given[name])))
    return given | settings


def _check_judging(task: Task | None, metrics: Sequence[str], margins: dict[str, Margin]) -> None:
    """Refuse now what the report would refuse after hours of training."""
    try:
        check_judging(["accuracy"] if task is None else list(task.metrics), metrics, margins)
    except ValueError as error:
        raise ConfigError(str(error)) from error


class _EarlyReport:
    """Keeps the picture and the summary up to date while runs end, at 3 % of one core's time at most."""

    def __init__(self, folder: Path, judging: dict[str, Any], console: Console) -> None:
        self.folder, self.judging, self.console = folder, judging, console
        self.not_before = 0.0

    def refresh(self) -> None:
        from svag_fast.analysis.report import make_report
        from svag_fast.plots.report import save

        start = time.monotonic()
        if start < self.not_before:
            return
        try:
            save(make_report(self.folder, **self.judging), self.folder)
        except (OSError, ValueError) as error:  # what the runs write matters more than a picture of it on the way
            self.console.print(f"No early report: {error}", highlight=False, markup=False)
        end = time.monotonic()
        self.not_before = end + 30 * (end - start)


def _tell(out: Path, judging: dict[str, Any], console: Console) -> None:
    """Save and print the verdict, and what the smallest batch size's SGD runs alone would have predicted."""
    from svag_fast.analysis.prediction import from_runs
    from svag_fast.analysis.report import final_report
    from svag_fast.cli.predict import show_table
    from svag_fast.cli.report import ALL_DIVERGED
    from svag_fast.plots.report import save

    report = final_report(out, **judging)
    save(report, out)
    report.print(console)
    if report.prediction is not None:  # the report has said it in words
        show_table(report.prediction, console)
    else:
        try:
            from_runs(out)
        except ValueError as error:  # no SGD among the runs, or too few rows
            console.print(f"No prediction from the smallest batch size: {error}", highlight=False, markup=False)
    console.print(f"\n{out / 'convergence.png'}, {out / 'summary.json'}", highlight=False, markup=False)
    if report.all_diverged:
        sys.exit(ALL_DIVERGED)


def _download(dataset: str) -> None:
    try:
        download_dataset(dataset, roots()[0])
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error


def _from_file(file: Path | None) -> dict[str, Any]:
    settings = {} if file is None else read_settings(file)
    if task := settings.get("task"):
        raise ConfigError(
            must_be("task", "named on the command line, since no file of settings has code run", shown(task))
        )
    return settings


def _newest_experiment() -> Path:
    books = sorted(Path("runs").glob("*/experiment.json"), key=lambda book: book.stat().st_mtime)
    if not books:
        raise ExperimentError("there is no experiment in the folder runs to resume: name its folder with --out.")
    return books[-1].parent


def _plan(config: ExperimentConfig) -> Table:
    noise = f" with {100 * config.label_noise:g} % label noise" if config.label_noise else ""
    what = short_name(config.task) if config.task else f"{config.model} on {config.dataset}{noise}"
    table = Table(title=f"{what}, weight decay {config.weight_decay:g}, {config.schedule} lr")
    for column in ("batch size", "lr", "effective steps", "l", "seeds", "runs"):
        table.add_column(column, justify="right")
    runs = config.runs()
    kinds = dict.fromkeys((r.batch_size, r.lr, r.effective_steps) for r in runs)
    for (batch_size, lr, steps), levels in zip(kinds, config.levels, strict=True):
        ls = " ".join(f"{l:g}" for l in levels)
        count = len(levels) * config.seeds
        table.add_row(str(batch_size), f"{lr:g}", str(steps), ls, str(config.seeds), str(count))
    return table
