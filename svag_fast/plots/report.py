"""A report's files: summary.json and the picture."""

from __future__ import annotations

from pathlib import Path

from svag_fast.analysis.report import Report
from svag_fast.plots import style as plots
from svag_fast.plots.convergence import convergence_figure


def save(report: Report, folder: Path) -> None:
    """Write ``summary.json`` and ``convergence.png`` into ``folder``, each in one step.

    Raises:
        OSError: The folder is missing or not writable, or the disk is full; no file is left half-written.
    """
    report.save(folder)
    with plots.style():
        plots.save(convergence_figure(report.runs, report.verdicts), folder / "convergence.png")
