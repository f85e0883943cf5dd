"""`svag-fast check TARGET`: a task tried before it trains."""

from __future__ import annotations

import sys
from typing import Any

import rich_click as click

from svag_fast.cli.options import data_dir_option, setting_options, setting_panel
from svag_fast.experiments.config import BOOKKEEPING, HOW, LENGTH, WHAT, ExperimentConfig, cores

MARKS = {"ok": "ok   ", "note": "note ", "fails": "FAILS"}


@click.command()
@click.argument("target")
@setting_panel(ExperimentConfig, WHAT)
@setting_panel(ExperimentConfig, LENGTH)
@setting_panel(ExperimentConfig, HOW)
@setting_panel(ExperimentConfig, BOOKKEEPING, "--data-dir", "--jobs", "--help")
@setting_options(ExperimentConfig)
@data_dir_option
@click.option("--jobs", type=click.IntRange(1), metavar="N", help="Runs at a time.  [default: cores / threads]")
def check(target: str, jobs: int | None, **given: Any) -> None:
    """Try what `svag-fast run TARGET` would train, and say what a run of it would be like.

    TARGET is your own task, FILE.py[:NAME] or package.module:NAME, or a built-in data set and perhaps its net, such as
    digits/preresnet8-bn.

    Is the loss one value a sample? Are samples independent? Does the same seed give the same bits? Which layers have
    per-sample norms, and why not the others? Is the loss scale-invariant, and if not, which parameters break it? What
    would the grid of runs cost here? The options are those of `svag-fast run`. Nothing is written. The task's code
    runs. Exit status 1: a run would fail.
    """
    from svag_fast.experiments.experiment_folder import with_size
    from svag_fast.experiments.task import builtin_task
    from svag_fast.experiments.task_error import TaskError
    from svag_fast.experiments.task_file import load_task, parse_target
    from svag_fast.experiments.task_survey import survey

    given = {name: value for name, value in given.items() if value is not None}
    try:
        settings = parse_target(target)
        config = ExperimentConfig.from_dict(given | settings)
        builtin = None if config.task else builtin_task(config.runs()[0])
    except (ValueError, OSError) as error:
        raise click.UsageError(str(error)) from error
    failed = False
    try:
        task = builtin or load_task(config.task)
        config = config if builtin else with_size(config, task)
        for finding in survey(task, config, jobs=jobs or max(1, cores() // config.threads)):
            first, *more = finding.answer.splitlines()
            click.echo(f"{MARKS[finding.state]} {finding.question}: {first}")
            for line in more:
                click.echo(f"      {line}")
            failed = failed or finding.state == "fails"
    except (TaskError, OSError, ValueError, TypeError, RuntimeError, MemoryError) as error:
        click.echo(f"{MARKS['fails']} {error}")
        failed = True
    if failed:
        click.echo("a run would fail")
        sys.exit(1)
