"""`svag-fast weak`: the runs, a table, weak.png and summary.json."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import rich_click as click
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from svag_fast.cli.options import setting_options, setting_panel
from svag_fast.cli.stopped import Stopped, failure
from svag_fast.experiments.config import HOW, LENGTH, WHAT
from svag_fast.experiments.ranges import ConfigError
from svag_fast.experiments.task_error import TaskError
from svag_fast.experiments.task_file import hash_of, load_task, parse_target, short_name, source_of
from svag_fast.experiments.weak import WeakSettings
from svag_fast.files import replace_file
from svag_fast.numeric import shown
from svag_fast.replicas.errors import NotReplicable

if TYPE_CHECKING:
    from svag_fast.analysis.weak import WeakReport
    from svag_fast.experiments.weak import Array, Trainable

VALUES = "values.npz"


@click.command()
@click.argument("target", required=False)
@setting_panel(WeakSettings, WHAT)
@setting_panel(WeakSettings, LENGTH, "--budget")
@setting_panel(WeakSettings, HOW, "--out", "--help")
@setting_options(WeakSettings)
@click.option(
    "--budget",
    type=click.FloatRange(min=1),
    metavar="SECONDS",
    help="Plan the runs at each l for so many seconds, from the variances and times of a pilot of 16 runs at each l, "
    "instead of --replicas. The pilot is never cut short.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs", "weak"),
    show_default=True,
    help="Folder for weak.png, summary.json and values.npz; runs of the same settings in it are kept and added to.",
)
def weak(target: str | None, out: Path, budget: float | None, **given: Any) -> None:
    """See Theorem 4.3 on a net: does the mean of test functions go to its limit as 1/l?

    TARGET is a task of your own, FILE.py[:NAME] or package.module:NAME (docs/tasks.md). Without it, it is the digits.

    Trains many runs from one initialisation at each l. Fits each test function's limit, and the slope of its difference
    from that limit in log l. Theory says -1. docs/weak.md says how the slope and its interval are made. After Ctrl-C
    the runs that are complete are judged; the same command continues. Exit status 130 then.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if budget is not None and "replicas" in given:
        raise click.UsageError("--budget plans the replicas: expected it or --replicas, not both")
    console = Console()
    try:
        if "l" in given and "replicas" not in given:
            given["replicas"] = (256,)
        if target is not None:
            given |= _own(target, given)
        settings = WeakSettings(**given)
        source = source_of(settings.task) if settings.task else ""
        identity = _identity(settings, source)
        had = _read(out, settings, identity)
        task = _trainable(settings, source)
        out.mkdir(parents=True, exist_ok=True)
        values, stopped = _train(task, settings, budget, had, out, identity, console)
        if not values:
            raise Stopped("interrupted before every l had its first runs: nothing was written", signal.SIGINT)
        _tell(values, settings, task.functions, out, console)
        if stopped:
            raise Stopped("interrupted: the same command continues", signal.SIGINT)
    except ConfigError as error:
        raise click.UsageError(str(error)) from error
    except (OSError, MemoryError, TaskError, NotReplicable) as error:
        raise failure(str(error)) from error


def _own(target: str, given: Mapping[str, Any]) -> dict[str, str]:
    """Return the setting of a task of one's own."""
    found = parse_target(target)
    if "task" not in found:
        raise ConfigError(f"TARGET must be FILE.py[:NAME] or package.module:NAME, got {shown(target)}")
    for name in ("model", "label_noise"):
        if name in given:
            option = name.replace("_", "-")
            raise ConfigError(f"--{option} must be left out beside {target}, got {shown(given[name])}")
    if "lr" not in given:
        raise ConfigError(f"--lr must be given beside {target}, as the default is of the digits, got nothing")
    return found


def _trainable(settings: WeakSettings, source: str) -> Trainable:
    if not settings.task:
        from svag_fast.experiments.weak import digits_task

        return digits_task(settings)
    from svag_fast.experiments.weak_own import OwnTask

    task = load_task(settings.task, hash_of(source))
    try:
        return OwnTask(task, settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error


def _identity(settings: WeakSettings, source: str) -> str:
    """What decides a run's numbers."""
    kept = {name: value for name, value in settings.to_dict().items() if name not in ("replicas", "l", "threads")}
    if settings.task:
        kept |= {"task": short_name(settings.task), "sha256": hash_of(source)}
    return json.dumps(kept, sort_keys=True)


def _read(out: Path, settings: WeakSettings, identity: str) -> dict[float, Array]:
    """Return the runs that the folder has already, refusing those of other settings."""
    if not (out / VALUES).exists():
        return {}
    try:
        with np.load(out / VALUES, allow_pickle=False) as file:
            there = str(file["settings"])
            had = {l: np.asarray(file[f"{l:.17g}"]) for l in settings.l if f"{l:.17g}" in file.files}
    except (ValueError, KeyError, EOFError) as error:
        raise ConfigError(
            f"{out / VALUES} must be whole, got a damaged one ({error}): choose another folder with --out"
        ) from error
    if there != identity:
        raise ConfigError(f"{out / VALUES} must be of these settings, got {there}: choose another folder with --out")
    return had


def _train(
    task: Trainable,
    settings: WeakSettings,
    budget: float | None,
    had: Mapping[float, Array],
    out: Path,
    identity: str,
    console: Console,
) -> tuple[dict[float, Array], bool]:
    """Return what is complete of each l, and whether Ctrl-C came."""
    from svag_fast.experiments.weak import run_levels

    values: dict[float, Array] = {}
    began = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("pilot", total=None)
        cost: dict[float, float] = {}

        def planned(counts: Sequence[int], todo: Sequence[int], seconds: Mapping[float, float]) -> None:
            cost.update({l: s / settings.effective_steps[-1] for l, s in seconds.items()})
            total = sum(n * seconds[l] for l, n in zip(settings.l, todo, strict=True))
            progress.update(bar, total=total, completed=0, description="training")
            plan = ", ".join(f"{n} at l = {l:g}" for l, n in zip(settings.l, counts, strict=True))
            if budget is not None and (took := time.monotonic() - began) > budget:
                console.print(f"The pilot took {took:.0f} s, more than the budget of {budget:g}.", highlight=False)
            console.print(f"runs: {plan}; about {total:.0f} s more", highlight=False)

        def advanced(l: float, steps: float) -> None:
            if cost:
                progress.update(bar, advance=cost[l] * steps, description=f"l = {l:g}")

        try:
            for values in run_levels(task, settings, had=had, budget=budget, planned=planned, advanced=advanced):
                with replace_file(out / VALUES) as file:
                    arrays: dict[str, Any] = {f"{l:.17g}": x for l, x in values.items()}
                    np.savez(file, settings=identity, **arrays)
        except KeyboardInterrupt:
            return values, True
    return values, False


def _tell(
    values: Mapping[float, Array], settings: WeakSettings, functions: Sequence[str], out: Path, console: Console
) -> None:
    from svag_fast.analysis.weak import weak_report
    from svag_fast.plots import style as plots
    from svag_fast.plots.weak import weak_figure

    report = weak_report(values, settings.effective_steps, functions, seed=settings.seed)
    report.save(out / "summary.json", settings.to_dict())
    digits = f"{settings.model} on digits, {settings.label_noise:.0%} label noise"
    title = (
        f"{short_name(settings.task) or digits}, B = {settings.batch_size}, "
        f"lr {settings.lr:g}, weight decay {settings.weight_decay:g}: {sum(report.runs.values()):,} runs"
    )
    with plots.style():
        plots.save(weak_figure(report, title), out / "weak.png")
    if not console.is_terminal:
        console.width = 150
    console.print(_table(report))
    for l, count in report.diverged.items():
        if count:
            console.print(f"l = {l:g} is left out: {count} of its {report.runs[l]} runs diverged.")
    console.print(report.answer, highlight=False)
    console.print(f"\n{out / 'weak.png'}, {out / 'summary.json'}", highlight=False, markup=False)


def _table(report: WeakReport) -> Table:
    table = Table(title="Differences from the limit: slope against log l (theory: -1)", box=box.SIMPLE, pad_edge=False)
    for column in ("function", "steps", "limit", "a", "b", "slope [95 %]", "left out", "beyond the 1/l regime"):
        table.add_column(column)
    for (at, name), order in report.orders.items():
        figures = [(order.limit, order.limit_error), (order.a, order.a_error), (order.b, order.b_error)]
        slope = (
            f"{order.slope:.2f} [{order.low:.2f}, {order.high:.2f}]"
            if order.told
            else f"cannot be told: {order.reason}"
        )
        out = ", ".join(f"{l:g}" for l in order.ls[~order.fitted])
        beyond = ", ".join(f"{l:g}" for l in order.ls[order.fitted & ~order.regime])
        told = ["" if math.isnan(value) else f"{value:.4g} ({error:.2g})" for value, error in figures]
        table.add_row(name, str(at), *told, slope, out, beyond)
    return table
