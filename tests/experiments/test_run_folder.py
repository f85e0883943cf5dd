"""One reader of run folders: a damaged file is refused by name and line, what is half written is read so far."""

import json
import math
import os
import random

import numpy as np
import pytest
from click.testing import CliRunner
from make_runs import write_run

from svag_fast.analysis.prediction import from_csv, from_runs
from svag_fast.analysis.runs import load_run
from svag_fast.cli.main import main
from svag_fast.experiments.run_folder import COLUMNS, read_config, read_log, read_metrics, read_table


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path)


def with_cell(run, column, text, *, line=-3, until=None):
    """Put `text` into `column` of a line of metrics.csv, or of all lines from it on to `until`."""
    path = run / "metrics.csv"
    lines = path.read_text().splitlines()
    index = lines[0].split(",").index(column)
    for number in range(len(lines) + line, len(lines) + line + 1 if until is None else len(lines) + until):
        cells = lines[number].split(",")
        cells[index] = text
        lines[number] = ",".join(cells)
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("column", "text"),
    [
        *((c, t) for c in ("lr", "time", "effective_step", "test_accuracy", "step") for t in ("nan", "inf", "-1")),
        ("test_accuracy", "1.5"),
        ("noise_trace", "-1"),
        ("weight_sq_norm", "-1"),
        ("lr", "0"),
        ("time", "0.001"),
        ("grad_sq_norm", "1_000"),
        ("grad_sq_norm", "0x10"),
        ("grad_sq_norm", "1,5"),
        ("grad_sq_norm", "٣"),
        ("effective_step", ""),
    ],
)
def test_a_cell_out_of_its_range_is_refused_by_every_command(run, column, text):
    path = with_cell(run, column, text)
    with pytest.raises(ValueError, match=rf"{path}") as refused:
        read_metrics(path)
    for command in (["report", str(run.parent)], ["predict", str(run)]):
        answer = CliRunner().invoke(main, command)
        assert answer.exit_code == 1
        assert column in answer.output or "cells, but" in answer.output, refused.value
        assert not isinstance(answer.exception, ValueError)


@pytest.mark.parametrize("names", [("grad_sq_norm", "nsr"), ("test_loss", "train_loss")])
def test_interchanged_names_of_columns_are_refused(run, names):
    path = run / "metrics.csv"
    header, rows = path.read_text().split("\n", 1)
    other = dict(zip(names, reversed(names), strict=True))
    path.write_text(",".join(other.get(name, name) for name in header.split(",")) + "\n" + rows)
    with pytest.raises(ValueError, match="were names interchanged"):
        read_metrics(path)


def test_an_estimate_of_g_may_be_negative_and_a_trace_of_0_below_it_by_rounding(run):
    with_cell(run, "grad_sq_norm", "-1.0")
    with_cell(run, "noise_trace", "-1e-9", line=-4)
    assert load_run(run).metrics["grad_sq_norm"][-3] == -1


def test_a_run_that_diverged_says_where_and_its_rows_are_no_gaps(run):
    for column, text in (("test_loss", "nan"), ("grad_sq_norm", "inf"), ("noise_trace", "nan"), ("nsr", "nan")):
        with_cell(run, column, text, line=-3, until=0)
    found = load_run(run)
    steps = found.metrics["effective_step"]
    assert found.diverged_at == steps[-3]
    assert np.isinf(found.series("test_loss")[1][-3:]).all()
    assert np.isfinite(found.series("test_loss")[1][:-3]).all()
    assert np.isnan(found.metrics["nsr"][-3:]).all()
    with pytest.raises(ValueError, match=r"diverged: not finite from step .* on"):
        from_runs(run)


def test_values_that_are_nan_for_a_while_are_damage(run):
    path = with_cell(run, "test_loss", "nan", line=-5, until=-3)
    with pytest.raises(ValueError, match=r"line 38: test_loss is nan or infinite, and line 40 is finite again"):
        read_metrics(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"l": 0}, "l must be a number from 1 to 1e.06, got 0"),
        ({"batch_size": 1e999}, "batch_size must be an integer from 1 to 1,000,000, got inf"),
        ({"batch_size": True}, "batch_size must be"),
        ({"lr": math.nan}, "lr must be"),
        ({"lr": "0.1"}, "lr must be .*, got '0.1'"),
        ({"lr": 10**4000}, "lr must be .*, got an integer of many digits"),
        ({"seed": -1}, "seed must be"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
        ({"effective_steps": 0}, "effective_steps must be"),
        ({"model": ["x"]}, "model must be a short text, got a list"),
        ({"dataset": "a\x1b[2J"}, "dataset must be a short text"),
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_refused_by_name(run, change, message):
    path = run / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        read_config(path)
    assert CliRunner().invoke(main, ["report", str(run.parent)]).exit_code == 1


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"[" * 200_000, "nested too deeply"),
        (b'{"l": ' + b"1" * 5000 + b"}", "config.json"),
        (b"\xff\xfe{", "no UTF-8 text"),
        (b" " * (2 << 20), "larger than"),
        (b"", "not JSON"),
    ],
    ids=["nested", "digits", "UTF-16", "large", "empty"],
)
def test_a_config_of_other_bytes_is_refused(run, raw, message):
    (run / "config.json").write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        read_config(run / "config.json")


def test_a_pipe_in_a_file_s_place_is_refused_and_not_waited_on(run):
    for name in ("config.json", "metrics.csv"):
        (run / name).rename(run / "kept")
        os.mkfifo(run / name)
        with pytest.raises(ValueError, match="no file, but a folder, a pipe or a device"):
            load_run(run)
        (run / name).unlink()
        (run / "kept").rename(run / name)


def log_of(rows, generator):
    lines = [f"{i},{generator.gauss(2, 0.1):.6f},{generator.gauss(3, 0.1):.6f}" for i in range(rows)]
    return "step,G,N\n" + "\n".join(lines) + "\n"


def test_the_same_table_comes_in_other_clothes(tmp_path):
    """A byte order mark, line ends of Windows, columns in another order or more of them, blank lines, half a line."""
    text = log_of(500, random.Random(0))
    path = tmp_path / "log.csv"
    path.write_text(text)
    expected = from_csv(path, batch_size=8, lr=0.1)
    turned = "\n".join(",".join([line.split(",")[i] for i in (2, 0, 1)]) for line in text.splitlines()) + "\n"
    longer = "\n".join(line + (",note" if n == 0 else ',"a, b"') for n, line in enumerate(text.splitlines())) + "\n"
    for other in ("\ufeff" + text, text.replace("\n", "\r\n"), turned, longer, text + "\n\n", text + "500,2.0"):
        path.write_bytes(other.encode())
        assert from_csv(path, batch_size=8, lr=0.1) == expected


def test_every_damage_to_a_long_log_is_refused_or_leaves_only_rows_away(tmp_path):
    """Of 2,000 rows: cuts, rows twice or swapped, bytes replaced. Never another value than one that was there."""
    generator = random.Random(1)
    text = log_of(2000, generator)
    rows = {tuple(map(float, line.split(","))) for line in text.splitlines()[1:]}
    path = tmp_path / "log.csv"
    refused = 0
    for number in range(120):
        lines = text.splitlines(keepends=True)
        i, j = sorted(generator.sample(range(1, len(lines)), 2))
        kind = number % 6
        if kind == 0:
            damaged = text[: generator.randrange(len(text))]
        elif kind == 1:
            damaged = "".join([*lines[:i], lines[i], *lines[i:]])
        elif kind == 2:
            damaged = "".join([*lines[:i], lines[j], *lines[i + 1 : j], lines[i], *lines[j + 1 :]])
        elif kind == 3:
            damaged = text.replace(lines[i], lines[i].replace(",", generator.choice([";", "\t", ",,", " "]), 1))
        elif kind == 4:
            place = generator.randrange(len(lines[0]), len(text))
            damaged = text[:place] + generator.choice('\0\r"_xé\x0c\u2028') + text[place + 1 :]
        else:
            damaged = "".join(lines[:i] + lines[j:])
        path.write_bytes(damaged.encode())
        try:
            table = read_log(path).values
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
            refused += 1
            continue
        assert set(zip(table["step"], table["G"], table["N"], strict=True)) <= rows, (number, damaged[:200])
    assert 40 < refused < 120


def test_random_bytes_are_refused(tmp_path):
    generator = random.Random(2)
    for name in ("log.csv", "metrics.csv"):
        path = tmp_path / name
        for size in (1, 10, 1000, 100_000):
            path.write_bytes(generator.randbytes(size) + b"\n")
            with pytest.raises(ValueError, match=name):
                (read_log if name == "log.csv" else read_metrics)(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step,G,N\n1,2,3\n2,nan,3\n3,2,3\n", "line 3: G is nan or infinite, and line 4 is finite again"),
        ("step,G,N\n1,2,-3\n", "line 2: N is a trace"),
        ("step,G,N,lr\n1,2,3,0\n", "line 2: lr must be a number from 1e-12"),
        ("step,G,N,R\n1,2,3,-4\n", "line 2: R must be"),
        ("step,G,N\n1,2\n", "line 2: 2 cells, but 3 columns"),
        ("step,G,N,G\n1,2,3,4\n", "'G' more than once"),
        ("step;G;N\n1;2;3\n", "no column 'step', 'G', 'N'; its first line is 'step;G;N'"),
        ("step,G,N\r1,2,3\r", "not CSV"),
        ('step,G,N\n1,2,"3\n4"\n', "not CSV"),
        ("step,G,N\n" + "1" * 200_000 + ",2,3\n", "not CSV .field larger"),
    ],
)
def test_a_malformed_log_is_refused_by_line(tmp_path, text, message):
    (tmp_path / "log.csv").write_bytes(text.encode())
    with pytest.raises(ValueError, match=message):
        read_log(tmp_path / "log.csv")


def test_a_log_larger_than_any_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("svag_fast.experiments.run_folder.TABLE_BYTES", 1000)
    (tmp_path / "log.csv").write_text(log_of(100, random.Random(0)))
    with pytest.raises(ValueError, match="larger than 1,000 bytes"):
        read_log(tmp_path / "log.csv")


def test_training_writes_the_columns_that_the_reader_knows(run):
    assert (run / "metrics.csv").read_text().splitlines()[0].split(",") == list(COLUMNS)
    table = read_table(run / "metrics.csv", {"lr": None}, needed=("effective_step",), others=None)
    assert list(table.values) == []
    assert set(table.texts) == {"lr"}
