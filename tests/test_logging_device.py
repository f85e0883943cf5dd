"""Runs tests/logging_device in a process that has that device: PyTorch keeps a device, and its threads, to the end."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from logging_device.build import build, compiler_of

FOLDER = Path(__file__).parent / "logging_device"


@pytest.fixture(scope="module")
def library(pytestconfig: pytest.Config) -> Path:
    compiler = compiler_of()
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C++ compiler: {compiler[0]} is not here")
    try:
        return build(Path(pytestconfig.cache.mkdir("logging_device")), compiler)
    except subprocess.CalledProcessError as error:
        if "Python.h" in error.stderr or "torch/library.h" in error.stderr:
            pytest.skip(f"no headers to compile against: {error.stderr.splitlines()[0]}")
        raise AssertionError(error.stderr[-4000:]) from error


def test_what_a_gpu_would_be_asked_to_do(library: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER)]
    environment = {**os.environ, "SVAG_LOGGING_DEVICE": str(library)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-2000:]
    assert re.search(r"\d+ passed", result.stdout)
