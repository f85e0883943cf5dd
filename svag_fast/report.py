"""What a folder of runs says: summary.json, a table, the verdict in words, and convergence.png.

``svag-fast report runs/digits`` makes them anew from what the runs have written, finished or not.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import rich_click as click

from svag_fast import plots
from svag_fast.convergence_plot import convergence_figure
from svag_fast.curves import Run, group_by_batch_size, group_by_l, load_runs
from svag_fast.estimate import Estimate
from svag_fast.files import replace_file
from svag_fast.predict import Prediction, predict_if_possible
from svag_fast.theory import Norms, c_closeness
from svag_fast.verdict import Difference, Verdict, judge
from svag_fast.verdict_text import headline, sentences, shown

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One l of one batch size: means over the finished seeds, with the standard deviation of one run where it says sd.

    ``grad_sq_norm``, ``noise_trace``, ``weight_sq_norm`` (G, N, R; mean over seeds, with its standard error) and
    ``nsr`` are of the later half of the first phase, and ``closeness`` is the least C for which this l and the largest
    are C-close there (Definition 5.1). None stands where nothing was measured, or there are too few seeds.
    """

    l: float
    seeds: int
    unfinished: int
    final_accuracy: float | None
    final_accuracy_sd: float | None
    final_train_loss: float | None
    final_train_loss_sd: float | None
    grad_sq_norm: Estimate | None
    noise_trace: Estimate | None
    weight_sq_norm: Estimate | None
    nsr: float | None
    closeness: Estimate | None
    distance: Difference | None
    end_distance: Difference | None
    samples_per_second: float | None


@dataclass(frozen=True)
class Report:
    """Verdicts and the rows behind them, a list of rows for each verdict."""

    runs: Sequence[Run]
    verdicts: Sequence[Verdict]
    rows: Sequence[Sequence[Row]]
    confidence: float
    prediction: Prediction | None
    """What the smallest batch's SGD runs alone foretell of linear scaling; None where they are too few or short."""

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as plain numbers, texts, lists and dicts; what was not measured is None."""
        return {
            "headline": headline(self.verdicts),
            "metric": self.verdicts[0].metric,
            "confidence": self.confidence,
            "runs": len(self.runs),
            "finished": sum(run.finished for run in self.runs),
            "noise": self.noise_sentences(),
            "prediction": None if self.prediction is None else self.prediction.as_dict(),
            "batch_sizes": [
                {
                    "batch_size": verdict.batch_size,
                    "lr": verdict.lr,
                    "effective_steps": verdict.effective_steps,
                    "largest_l": verdict.largest_l,
                    "convergence": verdict.convergence,
                    "converged_by": verdict.converged_by,
                    "sgd": verdict.sgd,
                    "agreement": {f"{l:g}": c.agreement for l, c in verdict.comparisons.items()},
                    "sentences": sentences(verdict),
                    "rows": [asdict(row) for row in rows],
                }
                for verdict, rows in zip(self.verdicts, self.rows, strict=True)
            ],
        }

    def table(self) -> Table:
        """Return the rows as a table for the terminal."""
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)  # fits 80 columns
        points = "points" if self.verdicts[0].metric.endswith("accuracy") else "rms"
        for name in ("\nB", "\nl", "\nruns", "final test\naccuracy, %", "train\nloss", "\nG", "\nN", "\nnsr"):
            table.add_column(name, justify="right", no_wrap=True)
        for name in (f"distance,\n{points}", "C-\nclose", "sam-\nple/s"):
            table.add_column(name, justify="right", no_wrap=True)
        for verdict, rows in zip(self.verdicts, self.rows, strict=True):
            for i, row in enumerate(rows):
                table.add_row(
                    str(verdict.batch_size) if i == 0 else "",
                    f"{row.l:g}",
                    f"{row.seeds}" + (f"/{row.seeds + row.unfinished}" if row.unfinished else ""),
                    _accuracy(row.final_accuracy, row.final_accuracy_sd),
                    f"{row.final_train_loss:.3f}" if row.final_train_loss is not None else "",
                    *(_number(e.value if e else None) for e in (row.grad_sq_norm, row.noise_trace)),
                    _number(row.nsr),
                    shown(row.distance.size, verdict.metric, unit_name=False) if row.distance else "",
                    _number(row.closeness.value if row.closeness else None),
                    f"{row.samples_per_second / 1000:.3g}k" if row.samples_per_second is not None else "",
                )
            table.add_section()
        return table

    def noise_sentences(self) -> list[str]:
        """Say for each batch size what N was estimated from, and what that cost."""
        sentences = []
        for (batch_size, _), runs in group_by_batch_size(self.runs).items():
            sources = {run.noise_source for run in runs} - {None}
            costs = [float(run.metrics["noise_cost"][0]) for run in runs if len(run.metrics.get("noise_cost", ()))]
            if len(sources) == 1 and costs and all(map(math.isfinite, costs)):
                names = {"per_sample": "per-sample norms of the same backward pass", "two_batches": "pairs of batches"}
                source = names.get(str(*sources), str(*sources))
                sentences.append(
                    f"N at B = {batch_size} from {source}; measuring it added {100 * median(costs):.0f} % "
                    "to the gradients' time (median of runs)."
                )
        return sentences

    def print(self, console: Console) -> None:
        """Print the table, then the verdict for each batch size in plain words."""
        from rich.padding import Padding

        console.print(self.table())
        for sentence in self.noise_sentences():
            console.print(sentence, highlight=False)
        for verdict in self.verdicts:
            console.print(f"[bold]B = {verdict.batch_size}, lr = {verdict.lr:g}[/bold]", highlight=False)
            for sentence in sentences(verdict):
                console.print(Padding(sentence, (0, 0, 0, 2)))
        if self.prediction is not None:
            console.print("[bold]Predicted from the smallest batch's SGD runs alone[/bold]", highlight=False)
            for sentence in self.prediction.sentences():
                console.print(Padding(sentence, (0, 0, 0, 2)))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``summary.json`` and ``convergence.png`` into ``folder``, each in one step.

        Raises:
            OSError: The folder is missing or not writable, or the disk is full; no file is left half-written.
        """
        text = json.dumps(self.as_dict(), indent=2, allow_nan=False)
        with replace_file(Path(folder) / "summary.json") as file:
            file.write(text.encode() + b"\n")
        with plots.style():
            plots.save(convergence_figure(self.runs, self.verdicts), Path(folder) / "convergence.png")


def make_report(folder: str | os.PathLike[str], *, metric: str = "test_accuracy", confidence: float = 0.95) -> Report:
    """Read the runs in ``folder``, finished or not, and judge them; see `load_runs` and `judge` for what it raises."""
    runs = load_runs(folder)
    verdicts = judge(runs, metric=metric, confidence=confidence)
    rows = [_rows(group, verdict) for group, verdict in zip(group_by_batch_size(runs).values(), verdicts, strict=True)]
    return Report(runs, verdicts, rows, confidence, predict_if_possible(runs, confidence=confidence))


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--metric", default="test_accuracy", show_default=True, help="Column of metrics.csv to compare.")
@click.option("--confidence", default=0.95, show_default=True, help="That no difference is stated where none is.")
def report(folder: Path, metric: str, confidence: float) -> None:
    """Judge the runs in FOLDER anew: table, verdict, summary.json and convergence.png."""
    from rich.console import Console

    try:
        found = make_report(folder, metric=metric, confidence=confidence)
        found.save(folder)
    except (OSError, ValueError, KeyError) as error:
        raise click.ClickException(str(error.args[0]) if isinstance(error, KeyError) else str(error)) from error
    console = Console()
    found.print(console)
    console.print(f"{folder / 'summary.json'}, {folder / 'convergence.png'}", highlight=False)


def _rows(runs: Sequence[Run], verdict: Verdict) -> list[Row]:
    groups = group_by_l(runs)
    finished = {l: [run for run in group if run.finished] for l, group in groups.items()}
    norms = {l: _norms(group) for l, group in finished.items()}
    largest = norms.get(verdict.largest_l) if verdict.largest_l is not None else None
    rows = []
    for l, group in groups.items():
        G, N, R = norms[l] or (None, None, None)
        accuracy, accuracy_sd = _mean_sd(_last(finished[l], "test_accuracy"))
        loss, loss_sd = _mean_sd(_last(finished[l], "train_loss"))
        comparison = verdict.comparisons.get(l)
        rows.append(
            Row(
                l=l,
                seeds=len(finished[l]),
                unfinished=len(group) - len(finished[l]),
                final_accuracy=accuracy,
                final_accuracy_sd=accuracy_sd,
                final_train_loss=loss,
                final_train_loss_sd=loss_sd,
                grad_sq_norm=G,
                noise_trace=N,
                weight_sq_norm=R,
                nsr=N.value / G.value if G and N and G.value > 0 else None,
                closeness=_closeness(norms[l], largest) if l != verdict.largest_l else None,
                distance=comparison.curve if comparison else None,
                end_distance=comparison.end if comparison else None,
                samples_per_second=_mean_sd([_median(run, "samples_per_second") for run in finished[l]])[0],
            )
        )
    return rows


def _norms(runs: Sequence[Run]) -> tuple[Estimate, Estimate, Estimate] | None:
    """G, N and R over the first phase, with standard errors from the seeds; None where one was never measured."""
    estimates = []
    for column in ("grad_sq_norm", "noise_trace", "weight_sq_norm"):
        mean, sd = _mean_sd([run.first_phase_mean(column) for run in runs if column in run.metrics])
        if mean is None:
            return None
        estimates.append(Estimate(mean, (sd or 0.0) / math.sqrt(len(runs))))
    G, N, R = estimates
    return G, N, R


def _closeness(
    a: tuple[Estimate, Estimate, Estimate] | None, b: tuple[Estimate, Estimate, Estimate] | None
) -> Estimate | None:
    if a is None or b is None or min(estimate.value for estimate in (*a, *b)) <= 0:
        return None
    sgd, sde = (Norms(weight_sq_norm=R, grad_sq_norm=G, noise_trace=N) for G, N, R in (a, b))
    return c_closeness(sgd, sde).constant


def _last(runs: Sequence[Run], column: str) -> list[float]:
    """The last measured value of each run that has one."""
    series = [run.series(column)[1] for run in runs if column in run.metrics]
    return [float(values[-1]) for values in series if len(values)]


def _median(run: Run, column: str) -> float:
    if column not in run.metrics:
        return math.nan
    values = run.series(column)[1]
    return float(np.median(values)) if len(values) else math.nan


def _mean_sd(values: Sequence[float]) -> tuple[float | None, float | None]:
    finite = np.array([value for value in values if math.isfinite(value)])
    if len(finite) == 0 or len(finite) < len(values):
        return None, None
    return float(finite.mean()), float(finite.std(ddof=1)) if len(finite) > 1 else None


def _accuracy(mean: float | None, sd: float | None) -> str:
    if mean is None:
        return ""
    return f"{100 * mean:.1f}" + (f" ± {100 * sd:.1f}" if sd is not None else "")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"
