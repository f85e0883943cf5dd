"""What a folder of runs says: summary.json, a table, and the verdict in words."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from svag_fast.analysis.compared import compared_metrics
from svag_fast.analysis.margins import Margin
from svag_fast.analysis.phases import END
from svag_fast.analysis.prediction import Prediction, predict_if_possible
from svag_fast.analysis.runs import Run, group_by_batch_size, load_runs, require_svag
from svag_fast.analysis.shared_limit import SharedLimit, shared_limits
from svag_fast.analysis.summary_row import SummaryRow, summary_rows
from svag_fast.analysis.verdict import Cell, Decision, Mean, Verdict, combine, judge
from svag_fast.analysis.verdict_text import (
    headline,
    name,
    number,
    sentences,
    shared_limit_sentence,
    svag_answer,
    unit,
    with_error,
)
from svag_fast.experiments.experiment_folder import ExperimentError
from svag_fast.files import replace_file

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SUMMARY_VERSION = 1  # of summary.json: raised when a key changes its meaning or goes


@dataclass(frozen=True)
class Report:
    """Verdicts and the rows behind them, a list of rows for each verdict."""

    runs: Sequence[Run]
    verdicts: Sequence[Verdict]
    shared: Sequence[SharedLimit]
    rows: Sequence[Sequence[SummaryRow]]
    confidence: float
    prediction: Prediction | None
    """What the smallest batch's SGD runs alone predict of linear scaling, if anything."""
    no_prediction: str | None
    """Why they don't, in words."""

    @property
    def all_diverged(self) -> bool:
        """Whether there is no verdict, since every run diverged."""
        return all(verdict.answer == "diverged" for verdict in self.verdicts)

    def as_dict(self) -> dict[str, Any]:
        """Return summary.json's content (docs/verdict.md): plain numbers, texts, lists, dicts; None: not measured."""
        names = _verdict_names(self.verdicts)
        return {
            "version": SUMMARY_VERSION,
            "headline": headline(self.verdicts),
            "confidence": self.confidence,
            "batch_sizes": {
                names[v.batch_size, v.lr]: {
                    "answer": v.answer,
                    "metrics": {
                        m: {p: _cell_dict(cell, _number_keys(v.total)) for p, cell in ps.items()}
                        for m, ps in v.cells.items()
                    },
                    "runs": {
                        "total": sum(v.total.values()),
                        "finished": sum(v.finished.values()),
                        "diverged": sum(map(len, v.diverged.values())),
                    },
                    "diverged_at": {_number_keys(v.total)[l]: list(at) for l, at in v.diverged.items()},
                    "lr": v.lr,
                    "sampling": v.sampling,
                    "noise_factor": v.noise_factor,
                    "sentences": sentences(v),
                    "rows": [asdict(row) for row in rows],
                }
                for v, rows in zip(self.verdicts, self.rows, strict=True)
            },
            "shared_limit": {
                "answer": combine([shared.answer for shared in self.shared]) if self.shared else None,
                "batch_sizes": {names[s.batch_size, s.lr]: _shared_dict(s) for s in self.shared},
            },
            "noise": self.noise_sentences(),
            "prediction": None if self.prediction is None else self.prediction.as_dict(),
            "no_prediction": self.no_prediction,
        }

    def table(self) -> Table:
        """Return the rows as a table for the terminal."""
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)  # fits 80 columns
        metric = next(iter(self.verdicts[0].cells))
        part, _, rest = name(metric).partition(" ")
        final = f"final {part}\n{rest}" + (", %" if unit(metric)[0] == 100 else "")
        for heading in ("\nB", "\nl", "\nruns", final, "train\nloss", "\nG", "\nN", "\nnsr"):
            table.add_column(heading, justify="right", no_wrap=True)
        for heading in ("C-\nclose", "samples\nper s"):
            table.add_column(heading, justify="right", no_wrap=True)
        for verdict, rows in zip(self.verdicts, self.rows, strict=True):
            ends = verdict.cells[metric].get(END)
            for i, row in enumerate(rows):
                table.add_row(
                    str(verdict.batch_size) if i == 0 else "",
                    f"{row.l:g}",
                    f"{row.seeds}" + (f"/{row.seeds + row.unfinished}" if row.unfinished else ""),
                    _final(ends.means.get(row.l) if ends else None, metric),
                    "" if row.final_train_loss is None else f"{row.final_train_loss:.3g}",
                    *(_number(e.value if e else None) for e in (row.grad_sq_norm, row.noise_trace)),
                    _number(row.nsr),
                    _number(row.closeness.value if row.closeness else None),
                    f"{row.samples_per_second / 1000:.3g}k" if row.samples_per_second is not None else "",
                )
            table.add_section()
        return table

    def noise_sentences(self) -> list[str]:
        """Say for each batch size what N was estimated from, and what that cost."""
        sentences = []
        sizes = _verdict_names(self.verdicts)
        for key, runs in group_by_batch_size(self.runs).items():
            sources = {run.noise_source for run in runs} - {None}
            measured = [run for run in runs if math.isfinite(_noise_cost(run))]
            sgd = [_noise_cost(run) for run in measured if run.l == 1]
            svag = [_noise_cost(run) for run in measured if run.l > 1]
            if len(sources) == 1 and (sgd or svag):
                names = {"per_sample": "per-sample norms of the same backward pass", "two_batches": "pairs of batches"}
                source = names.get(str(*sources), str(*sources))
                added = []
                if sgd:
                    added.append(f"{100 * median(sgd):.0f} % to SGD's gradient (a second batch, for it alone)")
                if svag:
                    added.append(f"{100 * median(svag):.0f} % to SVAG's")
                costs = " and ".join(added)
                sentences.append(
                    f"N at B = {sizes[key]} from {source}; in time measuring it added {costs}, medians of runs."
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
            if any(cell.limit is not None for parts in verdict.cells.values() for cell in parts.values()):
                console.print(_verdict_table(verdict))
            for sentence in sentences(verdict):
                console.print(Padding(sentence, (0, 0, 0, 2)), highlight=False)
        for shared in self.shared:
            console.print(shared_limit_sentence(shared), highlight=False)
        if self.prediction is not None:
            console.print("[bold]Predicted from the smallest batch's SGD runs alone[/bold]", highlight=False)
            for sentence in self.prediction.sentences():
                console.print(Padding(sentence, (0, 0, 0, 2)))
        else:
            console.print(f"No prediction of linear scaling: {self.no_prediction}.", highlight=False, markup=False)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``summary.json`` into ``folder``.

        Raises:
            OSError: The folder is missing or not writable, or the disk is full; an older file is left as it was.
        """
        # NaN is not JSON, and other readers refuse it: what was not measured is null.
        text = json.dumps(self.as_dict(), indent=2, allow_nan=False)
        with replace_file(Path(folder) / "summary.json") as file:
            file.write(text.encode() + b"\n")


def make_report(
    folder: str | os.PathLike[str],
    *,
    metrics: Sequence[str] | None = None,
    margins: Mapping[str, Margin] | None = None,
    confidence: float = 0.95,
) -> Report:
    """Read the runs in ``folder``, finished or not, and judge them; see `load_runs` and `judge` for what it raises.

    Args:
        folder: of the runs.
        metrics: the columns to judge by; None: accuracy, or a task's own first metric, and the loss, on the test data.
        margins, confidence: see `judge`.
    """
    runs = load_runs(folder)
    require_svag(runs)
    metrics = compared_metrics(runs) if metrics is None else metrics
    verdicts = judge(runs, metrics=metrics, margins=margins, confidence=confidence)
    rows = [
        summary_rows(group, verdict)
        for group, verdict in zip(group_by_batch_size(runs).values(), verdicts, strict=True)
    ]
    found = predict_if_possible(runs, confidence=confidence)
    prediction, missing = (None, found) if isinstance(found, str) else (found, None)
    return Report(runs, verdicts, shared_limits(verdicts), rows, confidence, prediction, missing)


def _number_keys(values: Iterable[float]) -> dict[float, str]:
    """Name each number so that names differ where numbers do: six digits, or all where six are another's too."""
    short = {value: f"{value:g}" for value in values}
    taken = Counter(short.values())
    return {v: text if taken[text] == 1 or float(text) == v else repr(v) for v, text in short.items()}


def _verdict_names(verdicts: Sequence[Verdict]) -> dict[tuple[int, float], str]:
    """Name each verdict by its batch size, and by its rate too where the batch size has two."""
    sizes = Counter(v.batch_size for v in verdicts)
    rates = _number_keys(v.lr for v in verdicts)
    return {
        (v.batch_size, v.lr): f"{v.batch_size}" + (f" lr {rates[v.lr]}" if sizes[v.batch_size] > 1 else "")
        for v in verdicts
    }


def _cell_dict(cell: Cell, keys: Mapping[float, str]) -> dict[str, Any]:
    sgd = cell.sgd
    return {
        "limit": cell.limit,
        "limit_interval": cell.limit_interval,
        "distance": sgd.value if sgd else None,
        "distance_interval": sgd.interval if sgd else None,
        "margin": cell.margin,
        "answer": cell.answer,
        "converged_by": cell.converged_by,
        "regime_reached": cell.regime_reached,
        "seeds_needed": sgd.seeds_needed if sgd else None,
        "slope": cell.slope,
        "fitted_l": list(cell.fitted),
        "distances": {keys[l]: _decision_dict(decision) for l, decision in cell.distances.items()},
        "means": {keys[l]: asdict(mean) for l, mean in cell.means.items()},
        "missing": cell.missing,
    }


def _shared_dict(shared: SharedLimit) -> dict[str, Any]:
    cells = {m: {p: _decision_dict(found) for p, found in parts.items()} for m, parts in shared.cells.items()}
    return {
        "answer": shared.answer,
        "lr": shared.lr,
        "reference": shared.reference,
        "reference_lr": shared.reference_lr,
        "noise_ratio": shared.noise_ratio,
        "elsewhere": list(shared.elsewhere),
        "metrics": cells,
    }


def _decision_dict(decision: Decision | None) -> dict[str, Any] | None:
    if decision is None:
        return None
    return {
        "distance": decision.value,
        "distance_interval": decision.interval,
        "margin": decision.margin,
        "answer": decision.answer,
        "seeds_needed": decision.seeds_needed,
    }


def _verdict_table(verdict: Verdict) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    level = f"± {100 * verdict.confidence:g} %"
    for heading in ("", f"limit\n{level}", f"SGD's distance\n{level}", "\nmargin", "\nSGD", "SVAG con-\nverged by"):
        table.add_column(heading, no_wrap=True)
    for metric, parts in verdict.cells.items():
        table.add_row(name(metric) + (", %" if unit(metric)[0] == 100 else ""))
        for part, cell in parts.items():
            if cell.limit is None or cell.limit_interval is None or cell.margin is None:
                table.add_row(f"  {part}", "", "", "", "open", "open")
                continue
            answer, by = svag_answer([cell])
            words = {"converged": "", "not converged": "not ", "open": "open"}[answer]
            sgd = cell.sgd
            table.add_row(
                f"  {part}",
                with_error(cell.limit, cell.limit_interval, metric),
                with_error(sgd.value, sgd.interval, metric, signed=True) if sgd else "",
                number(cell.margin, metric),
                cell.answer,
                words + ("" if by is None else f"l = {by:g}"),
            )
    return table


def _noise_cost(run: Run) -> float:
    # Measured once, before the first step; older runs don't have it.
    costs = run.metrics.get("noise_cost", np.empty(0))
    return float(costs[0]) if len(costs) else math.nan


def _final(mean: Mean | None, metric: str) -> str:
    """A mean at the end of runs, with the standard deviation of one run."""
    if mean is None:
        return ""
    error = mean.standard_error
    return number(mean.value, metric) + ("" if error is None else f" ± {number(error * math.sqrt(mean.runs), metric)}")


def _number(value: float | None) -> str:
    # 1e+05 as 1e5: the table has 80 columns.
    return "" if value is None else re.sub(r"e([+-])0*", lambda e: f"e{e[1].strip('+')}", f"{value:.2g}")


def final_report(folder: Path, metrics: Sequence[str] | None, margins: Mapping[str, Margin] | None) -> Report:
    """Return the report of an experiment whose runs are complete.

    Raises:
        ExperimentError: there is none of such runs.
    """
    try:
        return make_report(folder, metrics=metrics, margins=margins)
    except ValueError as error:
        raise ExperimentError(f"all runs are complete, but there is no report of them: {error}") from error
