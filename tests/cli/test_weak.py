"""`svag-fast weak`: writes its files, continues, and refuses what it can't mix."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from svag_fast.cli.main import main
from svag_fast.experiments import weak as experiment

SMALL = ["--l", "1,2,3,4", "--effective-steps", "1,2", "--threads", "1"]


def run(folder: Path, *more: str) -> Any:
    return CliRunner().invoke(main, ["weak", *SMALL, "--out", str(folder), *more])


def test_writes_table_figure_summary_and_values_and_continues(tmp_path: Path) -> None:
    first = run(tmp_path, "--replicas", "8")
    assert first.exit_code == 0, first.output
    assert "|x|²" in first.output
    assert (tmp_path / "weak.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [level["runs"] for level in summary["levels"]] == [8] * 4
    assert len(summary["functions"]) == 2 * 9
    with np.load(tmp_path / "values.npz") as file:
        before = file["4"]
    assert run(tmp_path, "--replicas", "12").exit_code == 0
    with np.load(tmp_path / "values.npz") as file:
        assert np.array_equal(file["4"][..., :8], before)
        assert file["4"].shape[-1] == 12
    other = run(tmp_path, "--replicas", "8", "--lr", "1")
    assert other.exit_code == 2
    assert "must be of these settings" in other.output


def test_budget_and_replicas_together_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    result = run(tmp_path / "new", "--budget", "9", "--replicas", "8")
    assert result.exit_code == 2
    assert not (tmp_path / "new").exists()


def test_a_pilot_longer_than_the_budget_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = experiment.measure

    def slow(*args: Any, **options: Any) -> Any:
        time.sleep(0.3)  # at each of four l
        return real(*args, **options)

    monkeypatch.setattr(experiment, "measure", slow)
    result = run(tmp_path, "--budget", "1")
    assert result.exit_code == 0, result.output
    assert re.search(r"The pilot took \d+ s, more than the budget of 1\.", result.output)
    assert "runs: 16 at l = 1, 16 at l = 2, 16 at l = 3, 16 at l = 4; about 0 s more" in result.output.replace("\n", "")


def test_runs_that_diverge_are_named_and_their_level_is_left_out(tmp_path: Path) -> None:
    result = run(tmp_path, "--replicas", "8", "--lr", "1e12", "--weight-decay", "1e6")
    assert result.exit_code == 0, result.output
    assert "is left out" in result.output
    assert "cannot be told" in result.output


@pytest.mark.parametrize("after", [2, 6])
def test_ctrl_c_ends_with_130_and_judges_what_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    calls = 0
    real = experiment.measure

    def interrupted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(experiment, "measure", interrupted)
    result = run(tmp_path, "--replicas", "20")
    assert result.exit_code == 130, result.output
    assert (tmp_path / "summary.json").exists() == (after > 4)
