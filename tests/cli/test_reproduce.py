"""`svag-fast reproduce`: every preset at smoke scale goes from its settings to the figure and the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from svag_fast.cli.main import main
from svag_fast.cli.reproduce import tell
from svag_fast.experiments.presets import PRESETS
from svag_fast.experiments.training import train

TRAINED = [name for name, preset in PRESETS.items() if preset.kind != "paths"]


@pytest.fixture
def quick_pictures(monkeypatch):
    """Figures are laid out and written, but with few pixels."""

    def save(figure, path):
        figure.savefig(path, dpi=30)

    monkeypatch.setattr("svag_fast.plots.style.save", save)


def run(*arguments: str):
    return CliRunner().invoke(main, ["reproduce", *arguments])


@pytest.mark.parametrize("name", TRAINED)
def test_a_preset_is_trained_drawn_and_tabled(name: str, tmp_path: Path, quick_pictures: None) -> None:
    """In this process: the grid's own processes are tested with the grid."""
    preset = PRESETS[name]
    for part, config in preset.experiments("smoke").items():
        assert config.dataset == "digits"
        for settings in config.runs():
            assert train(settings, tmp_path / part / settings.name)
    console = Console(record=True, width=200)
    found = tell(preset, "smoke", tmp_path, console)
    said = console.export_text()
    assert "on digits" in said
    assert "Smoke scale: its numbers mean nothing" in said
    assert "The paper's own setting: " in said
    assert (tmp_path / f"{name}.png").stat().st_size > 1000
    saved = json.loads((tmp_path / f"{name}.json").read_text())
    assert saved["answer"] == found.answer
    assert {row["quantity"] for row in saved["table"]} == {row.quantity for row in found.rows}


def test_the_command_trains_in_processes_and_a_second_time_only_draws(tmp_path: Path) -> None:
    folder = tmp_path / "fig1"
    first = run("fig1", "--scale", "smoke", "--out", str(folder))
    assert first.exit_code == 0, first.output
    assert all(word in first.output for word in ("89.4 %", "89.3 %", "75.5 %"))
    trained = {path: path.stat().st_mtime_ns for path in folder.glob("*/*/checkpoint.pt")}
    assert len(trained) == 3
    answer = (folder / "fig1.json").read_bytes()
    assert run("fig1", "--scale", "smoke", "--out", str(folder)).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in trained} == trained
    assert (folder / "fig1.json").read_bytes() == answer
    other = run("fig1", "--scale", "smoke", "--seeds", "2", "--out", str(folder))
    assert other.exit_code == 1
    assert "seeds" in other.output


def test_figure_2_is_drawn_from_simulations(tmp_path: Path) -> None:
    result = run("fig2", "--scale", "smoke", "--l", "4", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "SVAG, l = 4" in result.output
    assert (tmp_path / "fig2.png").exists()


def test_the_list_has_a_row_for_each_figure() -> None:
    result = run("--list", "--scale", "paper")
    assert result.exit_code == 0, result.output
    assert all(name in result.output for name in PRESETS)
    assert "vgg19-gn on cifar10" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "NAME must be a figure's (--list"),
        (("fig9",), "NAME must be one of fig1"),
        (("fig1", "--probe"), "--probe must be given with --list"),
        (("fig2", "--seeds", "2"), "--seeds must be left out of fig2"),
        (("fig2", "--l", "1.01"), "must be a whole number"),
        (("fig4-left", "--l", "0.5"), "l must be"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(arguments, message, tmp_path):
    result = run(*arguments, "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", "").split())
    assert not (tmp_path / "out").exists()
