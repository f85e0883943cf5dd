"""Versions are those that packages state of themselves, and nothing is imported to learn them."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from svag_fast.versions import package_version

SCRIPT = """
import sys
from svag_fast.versions import package_version
print(package_version("torch"), "torch" in sys.modules)
"""


@pytest.mark.parametrize("name", ["torch", "numpy", "scipy", "triton"])
def test_the_version_is_the_modules_own(name: str) -> None:
    assert package_version(name) == importlib.import_module(name).__version__


def test_a_package_that_is_not_installed_has_none() -> None:
    assert package_version("no-such-package") is None


# The metadata of torch's CUDA builds on PyPI says 2.14.1, the module 2.14.1+cu130.
@pytest.mark.parametrize("stated", ["2.14.1+cu130", "2.14.1+cpu", "2.15.0a0+git123"])
def test_torchs_build_is_part_of_its_version_and_torch_is_not_imported(tmp_path: Path, stated: str) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text(f"__version__ = {stated!r}\n")
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError\n")
    (tmp_path / "torch-2.14.1.dist-info").mkdir()
    (tmp_path / "torch-2.14.1.dist-info" / "METADATA").write_text("Name: torch\nVersion: 2.14.1\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [stated, "False"], done.stderr
