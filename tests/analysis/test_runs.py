"""Runs are read back as they were written, finished or not, and what is not a run's folder is refused by name."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from make_runs import rising, write_run

from svag_fast.analysis.runs import group_by_batch_size, group_by_l, load_runs


def test_runs_come_back_in_order_with_their_settings_and_values(tmp_path: Path) -> None:
    accuracy = rising()(np.linspace(0, 1, 11))
    for batch_size, l, seed in [(128, 2, 0), (8, 2, 1), (8, 2, 0), (8, 1, 0)]:
        write_run(tmp_path, batch_size=batch_size, l=l, seed=seed, accuracy=accuracy)
    runs = load_runs(tmp_path)
    assert [(r.batch_size, r.l, r.seed) for r in runs] == [(8, 1, 0), (8, 2, 0), (8, 2, 1), (128, 2, 0)]
    assert runs[3].lr == 1.6
    assert all(run.finished for run in runs)
    steps, values = runs[0].series("test_accuracy")
    np.testing.assert_array_equal(values, accuracy)
    np.testing.assert_allclose(steps, np.linspace(0, 1504, 11))
    groups = group_by_batch_size(runs)
    assert {key: len(group) for key, group in groups.items()} == {(8, 0.1): 3, (128, 1.6): 1}
    assert {l: len(group) for l, group in group_by_l(groups[8, 0.1]).items()} == {1: 1, 2: 2}


def test_an_empty_cell_is_a_value_that_was_not_measured(tmp_path: Path) -> None:
    write_run(tmp_path)
    (run,) = load_runs(tmp_path)
    steps, values = run.series("grad_sq_norm")
    assert len(steps) == len(values) == 40  # not at step 0
    assert run.series("amplified_loss")[0].size == 0
    with pytest.raises(KeyError, match=r"B8-l1-seed0.*'loss'.*test_loss"):
        run.series("loss")


def test_unfinished_runs_are_read_as_far_as_they_are(tmp_path: Path) -> None:
    write_run(tmp_path, seed=0, fraction=0.5)
    started = write_run(tmp_path, seed=1, fraction=0)
    (started / "metrics.csv").unlink()
    empty = write_run(tmp_path, seed=2)
    (empty / "metrics.csv").write_text("")
    writing = write_run(tmp_path, seed=3)
    text = (writing / "metrics.csv").read_text()
    (writing / "metrics.csv").write_text(text[:-30])  # the last line is half there
    runs = load_runs(tmp_path)
    assert [run.finished for run in runs] == [False] * 4
    assert [len(run.metrics["effective_step"]) for run in runs] == [20, 0, 0, 40]
    assert math.isnan(runs[1].first_phase_mean("lr"))


@pytest.mark.parametrize("column", ["train_loss", "amplified_loss", "test_loss", "grad_sq_norm", "weight_sq_norm"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_run_has_diverged_at_the_first_row_with_a_number_that_is_not_finite(
    tmp_path: Path, column: str, value: str
) -> None:
    """An empty cell was only not measured; N/G may be infinite where G is 0."""
    metrics = write_run(tmp_path) / "metrics.csv"
    assert load_runs(tmp_path)[0].diverged_at is None
    header, *rows = [line.split(",") for line in metrics.read_text().splitlines()]
    rows[20][header.index("nsr")] = "inf"
    for row in rows[30:]:
        row[header.index(column)] = value
    metrics.write_text("".join(",".join(row) + "\n" for row in [header, *rows]))
    assert load_runs(tmp_path)[0].diverged_at == pytest.approx(30 / 40 * 1504)


def test_a_run_has_finished_when_no_whole_step_is_left(tmp_path: Path) -> None:
    """122 steps of l = 1.3 are 93.85 effective steps, the nearest to 94."""
    for seed, steps in enumerate((121, 122)):
        run = write_run(tmp_path, l=1.3, seed=seed, batch_size=128)
        lines = (run / "metrics.csv").read_text().splitlines()
        last = lines[-1].split(",")
        (run / "metrics.csv").write_text("\n".join([*lines[:-1], ",".join(["", f"{steps / 1.3}", *last[2:]]), ""]))
    assert [run.finished for run in load_runs(tmp_path)] == [False, True]


def test_first_phase_is_averaged_over_its_later_half(tmp_path: Path) -> None:
    run = write_run(tmp_path, accuracy=np.linspace(0, 1, 101))  # rate drops at 0.8: accuracies 0.40 to 0.79
    (loaded,) = load_runs(tmp_path)
    assert loaded.first_phase_mean("test_accuracy") == pytest.approx(np.arange(40, 80).mean() / 100)
    assert math.isnan(loaded.first_phase_mean("amplified_loss"))
    assert run.name == loaded.name


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        ("no folder", FileNotFoundError, "no such folder"),
        ("no runs", FileNotFoundError, "no run in it"),
        ("not json", ValueError, r"config\.json: not JSON"),
        ("not a config", ValueError, r"config\.json: no batch_size, lr, weight_decay, l, seed, effective_steps"),
        ("no column", ValueError, r"metrics\.csv: no column 'effective_step'"),
        ("not a number", ValueError, r"metrics\.csv, line 3: test_accuracy is not a number"),
        ("short line", ValueError, r"metrics\.csv, line 2: 1 cells, but 16 columns"),
        ("goes back", ValueError, r"metrics\.csv: effective_step goes back"),
        ("same run twice", ValueError, r"copy and B8-l1-seed0|B8-l1-seed0 and copy"),
        ("other model", ValueError, r"B8-l1-seed0 has model 'digits' and B8-l2-seed0 'vgg'"),
        ("other decay", ValueError, r"weight_decay 0.02 and B8-l2-seed0 0.1"),
    ],
)
def test_bad_folders_are_refused_by_name(tmp_path: Path, damage: str, error: type[Exception], message: str) -> None:
    folder = tmp_path / "runs"
    run = write_run(folder)
    metrics = run / "metrics.csv"
    lines = metrics.read_text().splitlines(keepends=True)
    match damage:
        case "no folder":
            folder = tmp_path / "elsewhere"
        case "no runs":
            folder = run
        case "not json":
            (run / "config.json").write_text("{")
        case "not a config":
            (run / "config.json").write_text("[1]")
        case "no column":
            metrics.write_text("a,b\n1,2\n")
        case "not a number":
            cells = lines[2].split(",")
            metrics.write_text("".join([*lines[:2], ",".join([*cells[:7], "high", *cells[8:]])]))
        case "short line":
            metrics.write_text(lines[0] + "1\n")
        case "goes back":
            metrics.write_text("".join(lines + lines[1:]))
        case "same run twice":
            copy = folder / "copy"
            copy.mkdir()
            (copy / "config.json").write_text((run / "config.json").read_text())
        case "other model":
            write_run(folder, l=2, model="vgg")
        case "other decay":
            write_run(folder, l=2, weight_decay=0.1)
    with pytest.raises(error, match=message):
        load_runs(folder)


def test_config_may_say_more_than_is_needed(tmp_path: Path) -> None:
    run = write_run(tmp_path, threads=1)
    assert load_runs(tmp_path)[0].config["threads"] == 1
    assert json.loads((run / "config.json").read_text())["threads"] == 1
