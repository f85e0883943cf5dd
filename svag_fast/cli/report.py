"""`svag-fast report FOLDER`: the report of the runs in it, made from what they have written, finished or not."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import rich_click as click

from svag_fast.analysis.margins import Margin
from svag_fast.analysis.report import make_report
from svag_fast.cli.options import margin_option, metric_option
from svag_fast.plots.report import save

ALL_DIVERGED = 3  # the commands' exit status where there is no verdict since every run diverged


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@metric_option
@margin_option
@click.option("--confidence", default=0.95, show_default=True, help="Of the intervals that the answers rest on.")
def report(folder: Path, metrics: Sequence[str], margins: dict[str, Margin], confidence: float) -> None:
    """Judge the runs in FOLDER: does SGD match its limit, has SVAG converged, do batch sizes share the limit?

    Prints a table and the verdict, and writes summary.json and convergence.png. Exit status 3: every run diverged.
    """
    from rich.console import Console

    try:
        found = make_report(folder, metrics=metrics or None, margins=margins, confidence=confidence)
        save(found, folder)
    except (OSError, ValueError, KeyError) as error:
        raise click.ClickException(str(error.args[0]) if isinstance(error, KeyError) else str(error)) from error
    console = Console()
    found.print(console)
    console.print(f"{folder / 'summary.json'}, {folder / 'convergence.png'}", highlight=False, markup=False)
    if found.all_diverged:
        sys.exit(ALL_DIVERGED)
