"""Old module paths give the new modules themselves, with a warning that names the new path."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from svag_fast.moved import MOVED


@pytest.mark.parametrize("old", sorted(MOVED))
def test_the_old_path_is_the_new_module(old: str) -> None:
    sys.modules.pop(f"svag_fast.{old}", None)
    with pytest.warns(DeprecationWarning, match=rf"svag_fast\.{old} is svag_fast\.{MOVED[old]} now"):
        module = importlib.import_module(f"svag_fast.{old}")
    new = importlib.import_module(f"svag_fast.{MOVED[old]}")
    assert module is new
    assert new.__spec__.name == new.__name__ == f"svag_fast.{MOVED[old]}"


def test_from_an_old_path_names_can_be_imported() -> None:
    old, new = ("from svag_fast.estimate import Estimate as a", "from svag_fast.stats.estimate import Estimate as b")
    code = f"{old}\n{new}\nassert a is b"
    subprocess.run([sys.executable, "-W", "error::ImportWarning", "-c", code], check=True)


def test_an_old_path_runs_by_python_m() -> None:
    command = [sys.executable, "-m", "svag_fast.info", "--help"]  # without it torch would be imported
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Usage: python -m svag_fast.cli.info" in done.stdout


def test_other_missing_modules_are_missing() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"svag_fast\.nonesuch"):
        importlib.import_module("svag_fast.nonesuch")
