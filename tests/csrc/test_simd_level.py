"""SVAG_FAST_SIMD chooses the compiled copy of the kernels when the extension is loaded."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from simd import AVAILABLE, LEVELS

from svag_fast import _C


def load(wanted: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from svag_fast import _C; print(_C.simd_level())"]
    return subprocess.run(command, env={**os.environ, "SVAG_FAST_SIMD": wanted}, capture_output=True, text=True)


@pytest.mark.parametrize("level", AVAILABLE)
def test_variable_selects_the_level(level: str) -> None:
    assert load(level).stdout.strip() == level


def test_empty_variable_means_the_best_level() -> None:
    assert load("").stdout.strip() == _C.best_simd_level()


@pytest.mark.parametrize("level", ["avx", "AVX2", *(level for level in LEVELS if level not in AVAILABLE)])
def test_level_that_cannot_run_is_an_error_that_names_those_that_can(level: str) -> None:
    result = load(level)
    assert result.returncode != 0
    assert f"ImportError: SVAG_FAST_SIMD={level}: this machine runs {', '.join(AVAILABLE)}" in result.stderr


def test_level_that_cannot_run_is_not_hidden_by_backend_auto() -> None:
    script = (
        "import torch; from svag_fast.ops import svag_step_; "
        "svag_step_([torch.ones(2)], [torch.ones(2)], None, lr=0.1, l=1)"
    )
    environment = {**os.environ, "SVAG_FAST_SIMD": "mmx"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "BackendError: SVAG_FAST_SIMD=mmx: this machine runs portable" in result.stderr
