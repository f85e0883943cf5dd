"""`svag-fast run`: its options are the settings, and its help says their true defaults."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from svag_fast.analysis.runs import load_runs
from svag_fast.cli.run import run
from svag_fast.experiments.config import ExperimentConfig

OPTIONS = {option.name: option for option in run.params}
FIELDS = [field for field in dataclasses.fields(ExperimentConfig) if field.metadata]  # TARGET says the others


def default_shown(name: str) -> str | None:
    found = re.search(r"\[default: (.*)\]$", OPTIONS[name].help)
    return found and found[1]


def test_the_defaults_that_the_help_shows_are_those_of_the_experiment() -> None:
    """Given on the command line, every shown default leaves the runs as they are without options."""
    shown = {f"--{f.name.replace('_', '-')}": default_shown(f.name) for f in FIELDS}
    assert [name for name, default in shown.items() if default is None] == ["--epochs"]
    arguments = [part for name, default in shown.items() if default is not None for part in (name, default)]
    given = run.make_context("run", arguments).params
    settings = {f.name: given[f.name] for f in FIELDS if f.name != "epochs"}
    assert ExperimentConfig.from_dict(settings).runs() == ExperimentConfig().runs()


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_every_setting_has_an_option_in_a_panel_with_its_help(field: dataclasses.Field[object]) -> None:
    assert OPTIONS[field.name].help.startswith(field.metadata["help"])
    panels = [panel for panel in run.panels if OPTIONS[field.name].opts[0] in panel.options]
    assert [panel.name for panel in panels] == [field.metadata["panel"]]


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    images = {f"x_{part}": rng.integers(0, 256, (20, 8, 8), dtype=np.uint8) for part in ("train", "test")}
    np.savez(tmp_path / "own.npz", **images, y_train=np.arange(20) % 10, y_test=np.arange(20) % 10)
    return tmp_path / "own.npz"


def test_images_of_your_own_train_in_shuffled_epochs_with_a_schedule_of_milestones(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = f"--dataset {npz} --sampling shuffle --schedule warmup:0.2+milestones:0.5,3/4*0.2 --l 1,2 --seeds 1 "
    words += "--batch-size 4 --effective-steps 20 --jobs 1"
    done = CliRunner().invoke(run, words.split(), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    runs = load_runs(tmp_path / "runs" / "own")
    assert {(one.config["sampling"], one.population) for one in runs} == {("shuffle", 20)}
    assert [one.metrics["lr"][-1] for one in runs] == pytest.approx([0.4 * 0.04] * 2)
    npz.unlink()  # the runs stay readable
    assert {(one.population, one.unsized) for one in load_runs(tmp_path / "runs" / "own")} == {(None, True)}


def refused(*words: str) -> str:
    done = CliRunner().invoke(run, [*words, "--seeds", "1", "--l", "1"])
    assert done.exit_code == 2
    return re.sub(r"[\s│]+", " ", done.output)


def test_data_dir_is_searched_first_and_named_where_nothing_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SVAG_FAST_DATA", "elsewhere")
    monkeypatch.setattr("svag_fast.experiments.data.files.Path.is_file", lambda self: False)
    said = refused("--dataset", "cifar10", "--model", "preresnet8-bn", "--data-dir", "here")
    assert "cifar10's files (cifar-10-batches-py or cifar-10-python.tar.gz) are in none of" in said
    assert f"{tmp_path}/here".replace(" ", "") in said.replace(" ", "")
    assert not (tmp_path / "runs").exists()


def test_a_download_goes_into_data_dir_and_one_that_can_t_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SVAG_FAST_DATA", "elsewhere")
    asked = []
    monkeypatch.setattr("svag_fast.cli.run.download_dataset", lambda name, folder: asked.append((name, folder)))
    assert "svhn's files" in refused("--dataset", "svhn", "--download", "--data-dir", "here")
    monkeypatch.setenv("SVAG_FAST_DATA", "")
    assert "svhn's files" in refused("--dataset", "svhn", "--download")
    assert asked == [("svhn", tmp_path / "here"), ("svhn", Path("data"))]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert "dataset must be one that torchvision has" in refused("--download")
