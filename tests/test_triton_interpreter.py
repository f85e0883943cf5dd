"""Runs tests/interpreter, the Triton kernels' own tests, in a process where Triton interprets them on the CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreter"
RAN = {
    "test_step.py": ("_step_kernel", "_finish_kernel"),
    "test_weight_step.py": ("_weight_grad_kernel", "_add_chunks_kernel", "_add_norms_kernel", "_finish_kernel"),
    "test_weight_grad.py": ("_weight_grad_kernel", "_add_chunks_kernel", "_add_norms_kernel"),
}


def test_every_file_of_the_folder_is_run_here() -> None:
    assert {file.name for file in FOLDER.glob("test_*.py")} == RAN.keys()


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(FOLDER / name, marks=pytest.mark.kernels(*kernels, ran="interpreter"), id=name)
        for name, kernels in RAN.items()
    ],
)
def test_the_triton_kernels_pass_under_the_interpreter(file: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file)]
    result = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert re.search(r"\d+ passed", result.stdout)
