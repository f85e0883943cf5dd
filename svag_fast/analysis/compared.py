"""Which columns of metrics.csv runs are judged by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from svag_fast.analysis.margins import METRICS, Margin, choose_margins
from svag_fast.analysis.runs import Run
from svag_fast.experiments.run_folder import columns_of


def default_metrics(columns: Iterable[str]) -> tuple[str, ...]:
    """Return what the verdict is about of runs of a task with these columns: its first metric, if any, and the loss."""
    own = [name for name in columns if name.startswith("test_") and name != "test_loss"]
    return (*own[:1], "test_loss")


def compared_metrics(runs: Sequence[Run]) -> tuple[str, ...]:
    """Return the columns that runs are judged by unless others are asked for."""
    if not runs[0].config.get("task"):
        return METRICS
    # One that has only just started has no columns.
    started = next((run for run in runs if len(run.metrics["effective_step"])), runs[0])
    return default_metrics(started.metrics)


def check_judging(own: Sequence[str], metrics: Sequence[str] | None, margins: Mapping[str, Margin] | None) -> None:
    """Refuse, before runs are trained, what the report on them would refuse.

    Args:
        own: the metrics that the runs measure, but for the loss.
        metrics, margins: as of `make_report`.

    Raises:
        ValueError: no such column, or a margin of one that is not judged.
    """
    columns = [column for column in columns_of(own) if column != "noise_source"]
    metrics = metrics or default_metrics(columns)
    if unknown := [metric for metric in metrics if metric not in columns]:
        raise ValueError(f"metric must be a column of metrics.csv, got {unknown[0]!r}: one of {', '.join(columns)}")
    choose_margins(metrics, margins or {})
