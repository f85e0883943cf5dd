"""A folder's summary, table and picture, from the library and from the command line."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from make_runs import rising, write_process, write_run
from rich.console import Console

from svag_fast.cli import main
from svag_fast.report import make_report


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two batch sizes: the verdict of the paper's Figure 4."""
    folder = tmp_path_factory.mktemp("digits")
    rng = np.random.default_rng(0)
    for l in (1, 2, 4):
        write_process(folder, rising(), seeds=3, sd=0.04, rng=rng, batch_size=8, l=l, nsr=1.2)
        write_process(folder, rising(2 * l, 0.5 + 0.1 * l), seeds=3, sd=0.04, rng=rng, batch_size=128, l=l, nsr=0.1)
    return folder


def test_summary_has_every_figure_of_every_l(folder: Path) -> None:
    summary = json.loads(json.dumps(make_report(folder).as_dict(), allow_nan=False))
    assert summary["headline"] == "SGD stays with its SDE limit at B = 8 and leaves it at B = 128"
    assert (summary["runs"], summary["finished"], summary["metric"]) == (18, 18, "test_accuracy")
    small, large = summary["batch_sizes"]
    assert (small["convergence"], small["converged_by"], small["sgd"]) == ("converged", 2, "matches")
    assert (large["convergence"], large["converged_by"], large["sgd"]) == ("not converged", None, "departs")
    assert large["agreement"] == {"1": "differs", "2": "differs"}
    assert len(large["sentences"]) == 2
    assert [row["l"] for row in large["rows"]] == [1, 2, 4]

    sgd, _, limit = large["rows"]
    assert (sgd["seeds"], sgd["unfinished"]) == (3, 0)
    assert sgd["final_accuracy"] == pytest.approx(0.1 + 0.5 * (1 - np.exp(-2)), abs=0.01)
    assert 0 < sgd["final_accuracy_sd"] < 0.02
    assert sgd["final_train_loss"] == pytest.approx(2.3 * (1 - sgd["final_accuracy"]) + 0.05)
    late = 0.5 + 2 * np.exp(-10 * np.arange(16, 32) / 40)  # G at the rows of the first phase's later half
    assert sgd["grad_sq_norm"]["value"] == pytest.approx(late.mean())
    assert sgd["noise_trace"]["value"] == pytest.approx(0.1 * late.mean())
    assert (sgd["weight_sq_norm"]["value"], sgd["weight_sq_norm"]["standard_error"]) == (100.0, 0.0)
    assert sgd["nsr"] == pytest.approx(0.1)
    assert sgd["closeness"]["value"] == pytest.approx(1)
    assert sgd["samples_per_second"] == 3000
    assert summary["noise"] == [
        f"N at B = {B} from per-sample norms of the same backward pass; measuring it added -12 % to the gradients' "
        "time (median of runs)."
        for B in (8, 128)
    ]
    assert sgd["distance"]["size"]["value"] > 10 * sgd["distance"]["size"]["standard_error"]
    assert sgd["distance"]["low"] < sgd["distance"]["size"]["value"] < sgd["distance"]["high"]
    assert limit["distance"] is limit["end_distance"] is limit["closeness"] is None


def test_closeness_is_the_worst_ratio_of_g_n_and_r_to_the_largest_l(tmp_path: Path) -> None:
    write_run(tmp_path, l=1, nsr=0.5)
    write_run(tmp_path, l=4, nsr=1.5)
    ((sgd, _),) = make_report(tmp_path).rows
    assert sgd.closeness is not None
    assert sgd.closeness.value == pytest.approx(3)


def test_table_fits_80_columns_and_verdicts_follow_it(folder: Path) -> None:
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    report = make_report(folder)
    fast = [tuple(replace(row, samples_per_second=13_100.0) for row in rows) for rows in report.rows]
    replace(report, rows=fast).print(console)
    text = console.export_text()
    assert "…" not in text
    rows = [line.split() for line in text.splitlines() if "±" in line and line.rstrip().endswith("13.1k")]
    assert len(rows) == 6
    assert rows[0][:3] == ["8", "1", "3"]
    assert "SVAG has converged by l = 2" in text
    assert "SGD departs from the limit" in text


def test_unfinished_and_missing_values_are_none_and_the_report_still_comes(tmp_path: Path) -> None:
    write_run(tmp_path, l=1, seed=0)
    write_run(tmp_path, l=2, seed=0, fraction=0.4)
    lonely = write_run(tmp_path, l=4, seed=0, fraction=0.4)
    (lonely / "metrics.csv").unlink()
    report = make_report(tmp_path)
    report.save(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    one, two, four = summary["batch_sizes"][0]["rows"]
    assert (one["seeds"], one["final_accuracy_sd"], one["distance"]) == (1, None, None)
    for row in (two, four):
        assert (row["seeds"], row["unfinished"], row["final_accuracy"], row["nsr"]) == (0, 1, None, None)


def test_command_writes_both_files_and_says_the_verdict(folder: Path) -> None:
    result = CliRunner().invoke(main, ["report", str(folder)])
    assert result.exit_code == 0, result.output
    assert "SGD departs from the limit" in result.output
    assert json.loads((folder / "summary.json").read_text())["finished"] == 18
    assert (folder / "convergence.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nowhere"], "no such folder"), (["."], "no run in it"), ([".", "--metric", "x"], "no run in it")],
)
def test_command_refuses_what_is_no_folder_of_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["report", *arguments])
    assert result.exit_code == 1
    assert message in result.output
    assert not list(tmp_path.iterdir())


def test_unknown_metric_is_refused_by_name_before_anything_is_written(tmp_path: Path) -> None:
    write_run(tmp_path)
    result = CliRunner().invoke(main, ["report", str(tmp_path), "--metric", "accuracy"])
    assert result.exit_code == 1
    assert "no column 'accuracy'" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["B8-l1-seed0"]


def test_the_smallest_batchs_sgd_foretells_which_batch_size_fails(folder: Path) -> None:
    """The made runs have N/G = 1.2 at B = 8: κ* = 4.4, and 128 is 16 times 8."""
    found = make_report(folder)
    prediction = json.loads(json.dumps(found.as_dict(), allow_nan=False))["prediction"]
    assert prediction["kappa"]["exact"]["value"] == pytest.approx(4.4)
    assert [(o["batch_size"], o["verdict"]) for o in prediction["outlook"]] == [(128, "fails")]
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    found.print(console)
    assert "B = 128 (κ = 16): predicted to fail." in console.export_text()


def test_runs_too_short_to_foretell_from_are_reported_all_the_same(tmp_path: Path) -> None:
    write_run(tmp_path, accuracy=np.linspace(0.1, 0.9, 9))
    found = make_report(tmp_path)
    assert found.prediction is None
    assert found.as_dict()["prediction"] is None


def test_a_run_that_has_written_no_metrics_yet_is_reported_all_the_same(tmp_path: Path) -> None:
    """An early report may find SGD runs of which only config.json is there."""
    for batch_size in (8, 128):
        (write_run(tmp_path, batch_size=batch_size) / "metrics.csv").unlink()
    write_run(tmp_path, l=8)
    assert make_report(tmp_path).prediction is None
