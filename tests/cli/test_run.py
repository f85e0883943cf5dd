"""`svag-fast run`: its options are the settings, and its help says their true defaults."""

from __future__ import annotations

import dataclasses
import re

import pytest

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
