"""A folder's summary, tables and picture, from the library and from the command line."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from make_runs import rising, write_process, write_run
from rich.console import Console

from svag_fast.analysis.margins import Margin
from svag_fast.analysis.report import make_report
from svag_fast.analysis.verdict_text import sentences, shared_limit_sentence
from svag_fast.cli.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two batch sizes: the verdict of the paper's Figure 4."""
    folder = tmp_path_factory.mktemp("digits")
    rng = np.random.default_rng(0)
    for l in (1, 2, 4):
        write_process(folder, rising(), seeds=3, sd=0.003, rng=rng, batch_size=8, l=l, nsr=1.2)
        write_process(folder, rising(2 * l, 0.5 + 0.1 * l), seeds=3, sd=0.01, rng=rng, batch_size=128, l=l, nsr=0.1)
    return folder


CELL_KEYS = {
    "limit", "limit_interval", "distance", "distance_interval", "margin", "answer", "converged_by", "regime_reached",
    "seeds_needed", "slope", "fitted_l", "distances", "means", "missing",
}  # fmt: skip


def test_summary_has_the_keys_that_scripts_rely_on(folder: Path) -> None:
    """docs/verdict.md documents them; whoever changes one raises the version."""
    summary = json.loads(json.dumps(make_report(folder).as_dict(), allow_nan=False))
    assert summary["version"] == 1
    assert {"headline", "confidence", "batch_sizes", "shared_limit", "noise", "prediction"} < set(summary)
    assert list(summary["batch_sizes"]) == ["8", "128"]
    for batch_size, answer in (("8", "matches"), ("128", "departs")):
        found = summary["batch_sizes"][batch_size]
        assert found["answer"] == answer
        assert found["runs"] == {"total": 9, "finished": 9, "diverged": 0}
        assert list(found["metrics"]) == ["test_accuracy", "test_loss"]
        for parts in found["metrics"].values():
            assert list(parts) == ["phase 1", "phase 2", "end"]
            for cell in parts.values():
                assert set(cell) == CELL_KEYS
                assert cell["limit_interval"][0] < cell["limit"] < cell["limit_interval"][1]
                assert cell["distance_interval"][0] < cell["distance"] < cell["distance_interval"][1]
                assert cell["answer"] in ("matches", "departs", "open")
                assert cell["distances"]["1"]["distance"] == cell["distance"]
    cell = summary["batch_sizes"]["8"]["metrics"]["test_accuracy"]["end"]
    assert cell["limit"] == pytest.approx(0.97, abs=0.002)  # in the metric's units, not in percent
    assert (cell["margin"], cell["converged_by"], cell["regime_reached"], cell["seeds_needed"]) == (0.02, 2, True, None)
    assert cell["means"]["4"]["runs"] == 3
    shared = summary["shared_limit"]
    assert shared["answer"] == shared["batch_sizes"]["128"]["answer"] == "open"
    assert shared["batch_sizes"]["128"]["reference"] == 8
    assert set(shared["batch_sizes"]["128"]["metrics"]["test_loss"]["end"]) == {
        "distance", "distance_interval", "margin", "answer", "seeds_needed",
    }  # fmt: skip


def test_two_rates_of_one_batch_size_have_names_of_their_own(tmp_path: Path) -> None:
    for i, lr in enumerate((0.1, 0.2)):
        write_run(tmp_path / str(i), lr=lr)
        (tmp_path / str(i) / "B8-l1-seed0").rename(tmp_path / f"run{i}")
    assert list(make_report(tmp_path).as_dict()["batch_sizes"]) == ["8 lr 0.1", "8 lr 0.2"]


def test_every_comparison_of_two_rates_of_one_batch_size_is_kept(tmp_path: Path) -> None:
    """lr/B is shared by (8, 0.1) and (16, 0.2), and by (8, 0.2), (16, 0.4) and (32, 0.8)."""
    for batch_size, lr in ((8, 0.1), (8, 0.2), (16, 0.2), (16, 0.4), (32, 0.8)):
        for l in (1, 2):
            for seed in range(2):
                run = write_run(tmp_path / "made", batch_size=batch_size, lr=lr, l=l, seed=seed)
                run.rename(tmp_path / f"B{batch_size}-lr{lr}-l{l}-seed{seed}")
    summary = json.loads(json.dumps(make_report(tmp_path).as_dict(), allow_nan=False))
    found = summary["shared_limit"]["batch_sizes"]
    assert {key: (f["reference"], f["reference_lr"], f["lr"]) for key, f in found.items()} == {
        "16 lr 0.2": (8, 0.1, 0.2), "16 lr 0.4": (8, 0.2, 0.4), "32": (8, 0.2, 0.8),
    }  # fmt: skip
    assert set(found) <= set(summary["batch_sizes"])
    report = make_report(tmp_path)
    said = [shared_limit_sentence(shared) for shared in report.shared]
    assert [s.split(" share")[0] for s in said] == [
        "B = 8 (lr 0.1) and B = 16 (lr 0.2)",
        "B = 8 (lr 0.2) and B = 16 (lr 0.4)",
        "B = 8 (lr 0.2) and B = 32 (lr 0.8)",
    ]
    assert "B = 8 (lr 0.1), 8 (lr 0.2), 16 (lr 0.2), 16 (lr 0.4) and 32" in summary["headline"]
    assert [s.split(" from ")[0] for s in report.noise_sentences()[:2]] == ["N at B = 8 lr 0.1", "N at B = 8 lr 0.2"]
    assert report.prediction is not None
    assert report.prediction.headline().startswith("Linear scaling from B = 8, lr = 0.1 must fail")


@pytest.mark.parametrize("setting", ["optimizer", "momentum", "schedule", "weight_decay", "label_smoothing"])
def test_runs_that_differ_in_more_than_l_are_refused_by_name(tmp_path: Path, setting: str) -> None:
    """Known to this package or not: SGD's distance from the limit would be the other setting's."""
    for l in (1, 2):
        for seed in range(2):
            write_run(tmp_path, l=l, seed=seed, **({setting: 0.9} if l == 2 else {}))
    with pytest.raises(ValueError, match=rf"has {setting} .* and B8-l2-seed0 0\.9: runs that differ in more than"):
        make_report(tmp_path)


def test_how_runs_were_computed_may_differ(tmp_path: Path) -> None:
    for seed in range(2):
        write_run(tmp_path, seed=seed, threads=seed + 1, device=["cpu", "cuda"][seed], commit=str(seed))
    assert len(make_report(tmp_path).runs) == 2


def test_a_copy_of_a_run_under_another_seed_is_refused(tmp_path: Path) -> None:
    """As two values they would have no scatter, and half the variance."""
    first, second = (write_run(tmp_path, seed=seed) for seed in range(2))
    (second / "metrics.csv").write_bytes((first / "metrics.csv").read_bytes())
    with pytest.raises(ValueError, match="B8-l1-seed0 and B8-l1-seed1 have the same numbers in every row"):
        make_report(tmp_path)


def test_another_rate_in_the_rows_than_the_other_runs_is_refused(tmp_path: Path) -> None:
    """The configs agree, but the second phase is at a fifth of the first one's rate and not at a tenth."""
    for l in (1, 2):
        for seed in range(2):
            run = write_run(tmp_path, l=l, seed=seed)
    table = (run / "metrics.csv").read_text()
    assert ",0.010000000000000002," in table
    (run / "metrics.csv").write_text(table.replace(",0.010000000000000002,", ",0.02,"))
    with pytest.raises(ValueError, match=r"has the rate 0.01 in phase 2 .* and B8-l2-seed1 0.02: .* the same schedule"):
        make_report(tmp_path)


def test_numbers_that_differ_have_keys_that_differ(tmp_path: Path) -> None:
    """Six digits tell neither these rates nor these l apart: then all digits are the key."""
    for lr in (0.1, 0.1000001):
        for l in (1, 1.0000001, 2):
            for seed in range(2):
                write_run(tmp_path / "made", lr=lr, l=l, seed=seed).rename(tmp_path / f"lr{lr}-l{l}-seed{seed}")
    sizes = json.loads(json.dumps(make_report(tmp_path).as_dict(), allow_nan=False))["batch_sizes"]
    assert {key: found["lr"] for key, found in sizes.items()} == {"8 lr 0.1": 0.1, "8 lr 0.1000001": 0.1000001}
    for found in sizes.values():
        cell = found["metrics"]["test_loss"]["end"]
        assert list(cell["means"]) == list(cell["distances"]) == ["1", "1.0000001", "2"]


def test_summary_has_every_figure_of_every_l(folder: Path) -> None:
    summary = json.loads(json.dumps(make_report(folder).as_dict(), allow_nan=False))
    assert summary["headline"] == "SGD matches its SDE limit at B = 8 and departs from it at B = 128"
    large = summary["batch_sizes"]["128"]
    assert len(large["sentences"]) >= 2
    assert [row["l"] for row in large["rows"]] == [1, 2, 4]

    sgd, *_ = large["rows"]
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
        f"N at B = {B} from per-sample norms of the same backward pass; in time measuring it added -12 % to SGD's "
        "gradient (a second batch, for it alone) and -12 % to SVAG's, medians of runs."
        for B in (8, 128)
    ]
    assert large["rows"][-1]["closeness"] is None


def test_closeness_is_the_worst_ratio_of_g_n_and_r_to_the_largest_l(tmp_path: Path) -> None:
    write_run(tmp_path, l=1, nsr=0.5)
    write_run(tmp_path, l=4, nsr=1.5)
    ((sgd, _),) = make_report(tmp_path).rows
    assert sgd.closeness is not None
    assert sgd.closeness.value == pytest.approx(3)


def test_tables_fit_80_columns_and_verdicts_follow_them(folder: Path) -> None:
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    report = make_report(folder)
    fast = [tuple(replace(row, samples_per_second=13_100.0) for row in rows) for rows in report.rows]
    replace(report, rows=fast).print(console)
    text = console.export_text()
    assert "…" not in text
    rows = [line.split() for line in text.splitlines() if "±" in line and line.rstrip().endswith("13.1k")]
    assert len(rows) == 6
    assert rows[0][:3] == ["8", "1", "3"]
    assert "SGD matches the limit in test accuracy" in text
    assert "SGD departs from the limit in" in text
    assert "Whether B = 8 and B = 128 share their limit is open" in " ".join(text.split())
    (line,) = [line.split() for line in text.splitlines() if "matches" in line and "97.0 ±" in line and "end" in line]
    assert line[0] == "end"
    assert line[-4:-1] == ["matches", "l", "="]


def test_table_fits_80_columns_with_the_longest_values(tmp_path: Path) -> None:
    for l in (1, 2.5, 65536):
        rng = np.random.default_rng(0)
        write_process(tmp_path, rising(), seeds=3, sd=0.3, rng=rng, batch_size=60_000, l=l, nsr=1.2e-5, lr=0.123)
    report = make_report(tmp_path)
    longest = {"samples_per_second": 131_234.0, "final_train_loss": 12.3456, "unfinished": 12}
    rows = [tuple(replace(row, **longest) for row in rows) for rows in report.rows]
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(replace(report, rows=rows).table())
    text = console.export_text()
    assert "…" not in text
    assert text.count("65536 3/15") == 1
    assert text.count("131k") == 3


def test_unfinished_and_missing_values_are_none_and_the_report_still_comes(tmp_path: Path) -> None:
    write_run(tmp_path, l=1, seed=0)
    write_run(tmp_path, l=2, seed=0, fraction=0.4)
    lonely = write_run(tmp_path, l=4, seed=0, fraction=0.4)
    (lonely / "metrics.csv").unlink()
    report = make_report(tmp_path)
    report.save(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    found = summary["batch_sizes"]["8"]
    assert found["answer"] == "open"
    assert found["runs"] == {"total": 3, "finished": 1, "diverged": 0}
    cell = found["metrics"]["test_loss"]["end"]
    assert (cell["limit"], cell["distance"], cell["means"]["1"]["standard_error"]) == (None, None, None)
    assert cell["missing"] == "two l with two finished runs each are needed"
    assert summary["shared_limit"] == {"answer": None, "batch_sizes": {}}
    one, two, four = found["rows"]
    assert (one["seeds"], one["final_accuracy_sd"]) == (1, None)
    for row in (two, four):
        assert (row["seeds"], row["unfinished"], row["final_accuracy"], row["nsr"]) == (0, 1, None, None)


def test_command_writes_both_files_and_says_the_verdict(folder: Path) -> None:
    result = CliRunner().invoke(main, ["report", str(folder)])
    assert result.exit_code == 0, result.output
    assert "SGD departs from the limit" in result.output
    assert json.loads((folder / "summary.json").read_text())["batch_sizes"]["128"]["runs"]["finished"] == 9
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


def test_margins_and_metrics_decide(folder: Path) -> None:
    def answers(**options: Any) -> list[str]:
        return [verdict.answer for verdict in make_report(folder, **options).verdicts]

    assert answers() == ["matches", "departs"]
    assert answers(margins={"test_accuracy": Margin(1e-4)}) == ["open", "departs"]
    assert answers(margins={"test_accuracy": Margin(3.0), "test_loss": Margin(9.0)}) == ["matches", "matches"]
    assert answers(metrics=["train_loss"]) == ["matches", "departs"]


def test_margins_and_metrics_are_options_of_the_command(folder: Path) -> None:
    options = ["--metric", "train_loss", "--margin", "train_loss=0.01"]
    result = CliRunner().invoke(main, ["report", str(folder), *options])
    assert result.exit_code == 0, result.output
    found = json.loads((folder / "summary.json").read_text())["batch_sizes"]["8"]["metrics"]
    assert list(found) == ["train_loss"]
    assert found["train_loss"]["end"]["margin"] == 0.01
    for options, message in (
        (["--margin", "nsr=1"], "judged, test_accuracy, test_loss, got nsr"),
        (["--margin", "test_loss=much"], "a margin must be a number such as 0.02, or 10%, got 'much'"),
    ):
        result = CliRunner().invoke(main, ["report", str(folder), *options])
        assert result.exit_code in (1, 2)
        assert message in " ".join(result.output.replace("│", " ").split())


def test_where_every_run_diverged_the_exit_status_is_3_and_no_number_is_given(tmp_path: Path) -> None:
    for l in (1, 2):
        for seed in range(2):
            write_run(tmp_path, l=l, seed=seed, fraction=0.6, diverged=True)
    result = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert result.exit_code == 3
    assert "Every run diverged: there is no limit and no verdict." in result.output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["headline"] == "Every run diverged: no verdict"
    found = summary["batch_sizes"]["8"]
    assert (found["answer"], found["metrics"]) == ("diverged", {"test_accuracy": {}, "test_loss": {}})
    assert found["runs"] == {"total": 4, "finished": 0, "diverged": 4}
    assert found["diverged_at"]["2"] == [pytest.approx(24 / 40 * 1504)] * 2
    assert summary["prediction"] is None
    assert (tmp_path / "convergence.png").exists()


def test_diverged_runs_are_in_no_mean_of_the_table(tmp_path: Path) -> None:
    write_run(tmp_path, l=1, seed=0)
    write_run(tmp_path, l=1, seed=1, diverged=True)
    ((row,),) = make_report(tmp_path).rows
    assert (row.seeds, row.unfinished) == (1, 1)
    assert row.final_train_loss == pytest.approx(2.3 * 0.03 + 0.05, abs=0.01)


def test_unknown_metric_is_refused_by_name_before_anything_is_written(tmp_path: Path) -> None:
    write_run(tmp_path)
    result = CliRunner().invoke(main, ["report", str(tmp_path), "--metric", "accuracy"])
    assert result.exit_code == 1
    assert "no column 'accuracy'" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["B8-l1-seed0"]


def test_a_metric_that_was_never_measured_is_open_and_says_so(folder: Path) -> None:
    result = CliRunner().invoke(main, ["report", str(folder), "--metric", "amplified_loss"])
    assert result.exit_code == 0, result.output
    assert "it was not measured there in every run" in " ".join(result.output.split())


def test_percents_of_a_mean_of_0_are_no_margin(tmp_path: Path) -> None:
    for l in (1, 2):
        for seed in range(2):
            run = write_run(tmp_path, l=l, seed=seed)
            path = run / "metrics.csv"
            lines = [line.split(",") for line in path.read_text().splitlines()]
            at = lines[0].index("test_loss")
            for cells in lines[1:]:
                cells[at] = "0"
            path.write_text("".join(",".join(cells) + "\n" for cells in lines))
    (verdict,) = make_report(tmp_path, metrics=["test_loss"]).verdicts
    assert verdict.answer == "open"
    assert "10 % of a mean of 0 is no margin: give test_loss one of its own (--margin)" in sentences(verdict)[0]
    (verdict,) = make_report(tmp_path, metrics=["test_loss"], margins={"test_loss": Margin(0.1)}).verdicts
    assert verdict.answer == "matches" or verdict.cells["test_loss"]["end"].regime_reached is None


def test_batch_sizes_are_not_compared_at_other_times_of_the_sde(tmp_path: Path) -> None:
    """B = 16 at twice the rate, and twice as long as linear scaling has it: lr/B is the same, the time is not."""
    for batch_size, steps in ((8, 1504), (16, 1504)):
        for l in (1, 4):
            for seed in range(2):
                write_run(tmp_path, batch_size=batch_size, l=l, seed=seed, effective_steps=steps)
    found = make_report(tmp_path)
    (shared,) = found.shared
    assert (shared.answer, shared.elsewhere) == ("open", ("phase 1", "phase 2", "end"))
    assert all(d is None for parts in shared.cells.values() for d in parts.values())
    assert "Not compared: phase 1, phase 2 and end, which are not at the same times" in shared_limit_sentence(shared)
    saved = json.loads(json.dumps(found.as_dict(), allow_nan=False))["shared_limit"]["batch_sizes"]["16"]
    assert saved["elsewhere"] == ["phase 1", "phase 2", "end"]


def test_an_l_with_a_single_run_is_named_as_left_out(tmp_path: Path) -> None:
    for l, seeds in ((1, 2), (2, 2), (4, 1)):
        for seed in range(seeds):
            write_run(tmp_path, l=l, seed=seed)
    (verdict,) = make_report(tmp_path).verdicts
    assert 4 not in verdict.cells["test_loss"]["end"].distances
    assert "l = 4: one finished run each, two are needed to be in the fit." in sentences(verdict)


def test_a_run_s_own_folder_is_told_from_one_of_runs(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["report", str(write_run(tmp_path))])
    assert result.exit_code == 1
    assert "it is a run itself: name the folder above it" in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize("setting", [{"init": "own"}, {"sampling": "replacement"}], ids=str)
def test_runs_from_other_starts_or_draws_are_not_compared(tmp_path: Path, setting: dict[str, Any]) -> None:
    write_run(tmp_path, l=1)
    write_run(tmp_path, l=2, **setting)
    with pytest.raises(ValueError, match="belong in folders of their own"):
        make_report(tmp_path)


def test_the_smallest_batchs_sgd_predicts_which_batch_size_fails(folder: Path) -> None:
    """The made runs have N/G = 1.2 at B = 8: κ* = 4.4, and 128 is 16 times 8."""
    found = make_report(folder)
    prediction = json.loads(json.dumps(found.as_dict(), allow_nan=False))["prediction"]
    assert prediction["kappa"]["exact"]["value"] == pytest.approx(4.4)
    assert [(o["batch_size"], o["verdict"]) for o in prediction["outlook"]] == [(128, "fails")]
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    found.print(console)
    assert "B = 128 (κ = 16): predicted to fail." in console.export_text()


def test_runs_too_short_to_predict_from_are_reported_all_the_same(tmp_path: Path) -> None:
    write_run(tmp_path, accuracy=np.linspace(0.1, 0.9, 9))
    found = make_report(tmp_path)
    assert found.prediction is None
    assert found.as_dict()["prediction"] is None
    assert found.no_prediction is not None
    assert "rows with G and N" in found.no_prediction


def test_what_cannot_be_predicted_is_said_and_everything_else_is_reported(tmp_path: Path) -> None:
    """At this rate and decay no equilibrium exists that could be measured."""
    for seed in range(2):
        for l in (1, 2):
            write_run(tmp_path, l=l, seed=seed, weight_decay=30.0)
    result = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert result.exit_code == 0, result.output
    said = "lr * weight_decay / l must be below 2"
    assert f"No prediction of linear scaling: {said}" in " ".join(result.output.split())
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["prediction"] is None
    assert said in summary["no_prediction"]
    assert summary["batch_sizes"]["8"]["runs"]["finished"] == 4


@pytest.mark.parametrize("survivors", [0, 1])
def test_where_sgd_runs_diverged_neither_command_predicts(tmp_path: Path, survivors: int) -> None:
    """Not from those left, a biased sample, and not from the next batch size."""
    for seed in range(3):
        write_run(tmp_path, seed=seed, diverged=seed >= survivors)
        write_run(tmp_path, seed=seed, l=2)
        write_run(tmp_path, seed=seed, batch_size=16)
    found = make_report(tmp_path)
    assert found.prediction is None
    assert found.no_prediction is not None
    assert f"{3 - survivors} of 3 SGD runs at B = 8 diverged" in found.no_prediction
    assert ("biased sample" in found.no_prediction) == (survivors > 0)
    console = Console(width=300, record=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    found.print(console)
    assert found.no_prediction in console.export_text()
    refused = CliRunner().invoke(main, ["predict", str(tmp_path)])
    assert refused.exit_code == 1
    assert found.no_prediction.split(" (")[0] in " ".join(refused.output.replace("│", " ").split())


def test_a_run_that_has_written_no_metrics_yet_is_reported_all_the_same(tmp_path: Path) -> None:
    """An early report may find SGD runs of which only config.json is there."""
    for batch_size in (8, 128):
        (write_run(tmp_path, batch_size=batch_size) / "metrics.csv").unlink()
    write_run(tmp_path, l=8)
    assert make_report(tmp_path).prediction is None
