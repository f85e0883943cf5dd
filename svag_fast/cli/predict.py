"""`svag-fast predict`: does linear scaling fail, and from which batch size on?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich_click as click
from rich.console import Console
from rich.table import Table

from svag_fast.analysis.prediction import Prediction, from_csv, from_runs
from svag_fast.stats.estimate import ENOUGH, Estimate
from svag_fast.theory.closeness import SQRT2


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path), metavar="RUN...")
@click.option("--C", "C", type=float, default=SQRT2, show_default="√2", help="Closeness asked for (Definition 5.1).")
@click.option("--last", type=float, default=0.25, show_default=True, help="Part of the phase that is averaged.")
@click.option("--tolerance", type=float, default=0.2, show_default=True, help="Relative drift or residual let pass.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Of a CSV's run.")
@click.option("--lr", type=float, help="Of a CSV's run, unless it has a column lr.")
@click.option("--weight-decay", type=float, default=0.0, help="Of a CSV's run (L2, added to the gradient).")
@click.option(
    "--population",
    type=click.IntRange(min=2),
    metavar="N",
    help="Of a CSV's run: its batches are distinct samples of N.  [default: independent draws]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of words.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Write the figure to this PNG.")
def predict(
    runs: Sequence[Path],
    C: float,
    last: float,
    tolerance: float,
    batch_size: int | None,
    lr: float | None,
    weight_decay: float,
    population: int | None,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Predict from SGD runs at one batch size where linear scaling must fail (Theorem 5.6 of the paper).

    RUN is a run's folder, or a folder of runs, whose smallest batch size is the baseline. The runs may be finished or
    still running.

    RUN may also be a CSV file of any other trainer, with the columns step,G,N and optionally R and lr. G is |∇L|², N
    the trace of the batch gradient's covariance, and R the weights' |x|². A CSV needs --batch-size and --lr.
    """
    predictions = []
    for path in runs:
        try:
            if path.is_dir():
                predictions.append(from_runs(path, C=C, last=last, tolerance=tolerance))
                continue
            if batch_size is None or lr is None:
                raise click.UsageError(f"{path} is a file: say its run's --batch-size and --lr")
            told: dict[str, Any] = {"batch_size": batch_size, "lr": lr, "weight_decay": weight_decay}
            predictions.append(from_csv(path, **told, population=population, C=C, last=last, tolerance=tolerance))
        except (ValueError, OSError) as error:
            raise click.ClickException(str(error)) from error
    if plot is not None:
        from svag_fast.plots import prediction as predict_figure

        try:
            predict_figure.save(predictions, plot)
        except (ValueError, OSError) as error:
            raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps([p.as_dict() for p in predictions], indent=2))
        return
    console = Console()
    for prediction in predictions:
        show(prediction, console)
    if plot is not None:
        console.print(f"Figure: {plot}", highlight=False)


def show(prediction: Prediction, console: Console) -> None:
    """Print a table of what was measured at the baseline, then the prediction in words."""
    show_table(prediction, console)
    for sentence in prediction.sentences():
        console.print(sentence, highlight=False, markup=False)


def show_table(prediction: Prediction, console: Console) -> None:
    """Print what was measured at the baseline, and what follows from it."""
    base, found = prediction.baseline, prediction.baseline.equilibrium
    table = Table(
        title=f"B = {base.batch_size}, lr = {base.lr:g}, weight decay = {base.weight_decay:g}: steps {base.first_step} "
        f"to {base.last_step}, {base.rows} rows of {len(base.runs)} run{'s' * (len(base.runs) > 1)}",
        title_justify="left",
    )
    for heading in ("", "mean ± standard error", "drift over the window"):
        table.add_column(heading)
    for name, test in (
        ("R = weight_sq_norm", found.weight_sq_norm),
        ("G = grad_sq_norm", found.grad_sq_norm),
        ("N = noise_trace", found.noise_trace),
    ):
        if test is not None:
            drift = Estimate(100 * test.drift.value, 100 * test.drift.standard_error)
            table.add_row(name, str(test.mean), f"{drift} %, {test.state}")
    if found.nsr is not None:
        table.add_row("nsr = N/G", str(found.nsr), "")
    if found.residual is not None:
        table.add_row("(11): left / right side", str(found.residual.ratio), "")
    if base.relaxation_times is not None:
        table.add_row("relaxation times 1/(4ηλ) before", f"{base.relaxation_times:.3g}", "")
    for form, kappa in prediction.kappa.items():
        star = prediction.batch_size(form)
        table.add_row(f"κ*, {form}", str(kappa), f"B* = {star}")
    if prediction.noise_scale is not None:
        table.add_row(prediction.noise_scale_formula.strip(","), str(prediction.noise_scale), "")
    worth = found.grad_sq_norm.effective_samples
    table.add_row("independent values of G", f"{worth:.3g}", "" if worth >= ENOUGH else "errors are rough ones")
    console.print(table, highlight=False)
