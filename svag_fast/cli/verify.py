"""``svag-fast verify``: the battery with a progress bar, a table and verify.png."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import rich_click as click
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from svag_fast.files import replace_file
from svag_fast.plots.verification import draw
from svag_fast.verify.check import Group, Outcome, SuiteSettings, failures
from svag_fast.verify.suite import GROUPS, run


@click.command()
@click.option("--fast", is_flag=True, help="Fewer trajectories and nets: under a minute on two cores.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of the tables.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(),
    show_default="the current folder",
    help="Folder for verify.png and verify.json; made if it is not there.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of every random number.")
@click.option(
    "--only", multiple=True, type=click.Choice(list(GROUPS)), help="Run this group alone (may be given several times)."
)
def verify(fast: bool, as_json: bool, out: Path, seed: int, only: tuple[str, ...]) -> None:
    """Check the paper's lemmas, theorems and equations by closed form and simulation.

    Each check is a number with an error bar against the formula. Exit code 1 if any fails.
    """
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    outcomes = _with_progress(SuiteSettings(fast, seed), list(only))
    seconds = time.monotonic() - began
    report = _as_json(outcomes, SuiteSettings(fast, seed), seconds)
    draw(outcomes, out / "verify.png")
    with replace_file(out / "verify.json") as file:
        file.write(report.encode())
    if as_json:
        click.echo(report)
    else:
        _print(outcomes, seconds, out)
    sys.exit(1 if any(failures(list(outcomes.values()))) else 0)


def _with_progress(settings: SuiteSettings, names: list[str]) -> dict[str, Outcome]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=sum(GROUPS[name].cost for name in names or GROUPS))

        def started(group: Group) -> None:
            progress.update(task, description=group.title)

        def finished(group: Group) -> None:
            progress.advance(task, group.cost)

        return run(settings, names, started=started, finished=finished)


def _print(outcomes: Mapping[str, Outcome], seconds: float, out: Path) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a log or a pipe: rows rather than columns of words
    for name, outcome in outcomes.items():
        table = Table(
            title=GROUPS[name].title, title_justify="left", title_style="bold", box=box.SIMPLE, pad_edge=False
        )
        for column in ("", "source", "check", "measured", "expected", "z"):
            table.add_column(column, overflow="fold")
        for check in outcome.checks:
            mark = "[green]ok[/]" if check.passed else "[bold red]FAIL[/]"
            z = "" if check.z is None else f"{check.z:+.1f}"
            table.add_row(mark, check.source, check.name, check.measured, check.expected, z)
        console.print(table)
        if name == "certificates":
            for key, title in (("rows", "SGD against its SDE"), ("pairs", "linear scaling from batch size `base`")):
                console.print(_grid(title, outcome.data[key]))
    checks = [check for outcome in outcomes.values() for check in outcome.checks]
    failed = list(failures(list(outcomes.values())))
    passed = f"{len(checks) - len(failed)} of {len(checks)} checks pass"
    console.print(
        f"[bold {'red' if failed else 'green'}]{passed}[/] in {seconds:.0f} s; picture in {out / 'verify.png'}"
    )
    for check in failed:
        console.print(f"[red]FAIL[/] {check.source}, {check.name}: {check.measured}, expected {check.expected}")


def _grid(title: str, rows: list[dict[str, object]]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    return table


def _as_json(outcomes: Mapping[str, Outcome], settings: SuiteSettings, seconds: float) -> str:
    checks = [
        {
            "group": name,
            "source": check.source,
            "name": check.name,
            "measured": check.measured,
            "expected": check.expected,
            "z": check.z if check.z is not None and math.isfinite(check.z) else None,
            "passed": bool(check.passed),
        }
        for name, outcome in outcomes.items()
        for check in outcome.checks
    ]
    report = {
        "passed": all(check["passed"] for check in checks),
        "fast": settings.fast,
        "seed": settings.seed,
        "seconds": round(seconds, 1),
        "checks": checks,
        "data": {name: outcome.data for name, outcome in outcomes.items() if outcome.data},
    }
    return json.dumps(report, indent=1, allow_nan=False) + "\n"
