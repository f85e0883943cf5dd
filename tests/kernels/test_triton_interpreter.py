"""Runs tests/interpreter, the Triton kernels' own tests, in a process where Triton interprets them on the CPU."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from gpu_build import lay_out
from packaging.requirements import Requirement

FOLDER = Path(__file__).parents[1] / "interpreter"
KERNELS = ("_step_kernel", "_finish_kernel", "_weight_grad_kernel", "_finish_layer_kernel")


@pytest.mark.kernels(*KERNELS, ran="interpreter")
def test_the_triton_kernels_pass_under_the_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(FOLDER)]
    result = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert int(re.findall(r"(\d+) passed", result.stdout)[-1]) > 100


@pytest.fixture
def oldest_torch(request: pytest.FixtureRequest) -> Path:
    """The Python of an environment with the oldest torch that pyproject.toml allows, and the Triton that it asks for.

    Made once, in pytest's cache; gigabytes, where the registry's torch is the CUDA build.
    """
    needs = [Requirement(r) for r in importlib.metadata.requires("svag_fast") or []]
    (torch,) = (need for need in needs if need.name == "torch")
    (oldest,) = (limit.version for limit in torch.specifier if limit.operator == ">=")
    folder = request.config.cache.mkdir("oldest_torch") / oldest
    python = folder / "bin" / "python"
    if not (folder / "finished").exists():
        venv.create(folder, clear=True, with_pip=True)
        # An older numpy with them: even the interpreter of Triton 3.6 does not take numpy 2.5.
        wanted = [f"torch=={oldest}", "numpy<2.3", "setuptools", "pytest", "pytest-timeout"]
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted]
        done = subprocess.run(pip, capture_output=True, text=True, check=False)
        has_triton = [python, "-c", "import torch, triton"]
        if done.returncode == 0:
            done = subprocess.run(has_triton, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"torch {oldest} with its Triton can't be installed here: {done.stderr.strip()[-300:]}")
        (folder / "finished").touch()
    return python


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_the_triton_kernels_pass_with_the_oldest_torch_and_its_triton(oldest_torch: Path, tmp_path: Path) -> None:
    lay_out(tmp_path / "site")
    root = FOLDER.parent.parent
    command = [oldest_torch, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", root / "pyproject.toml"]
    command += ["--rootdir", root, FOLDER]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(tmp_path / "site")}
    result = subprocess.run(
        [*command, "--rootdir", root, FOLDER],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert int(re.findall(r"(\d+) passed", result.stdout)[-1]) > 100
