"""The tests of ops and replicas once more, with kernels and bindings under AddressSanitizer and UBSan."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SANITIZE = "-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined -g1"


def run(command: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.nightly
def test_the_tests_pass_under_the_sanitizers(tmp_path: Path) -> None:
    compiler = os.environ.get("CXX", "g++")
    libraries = [
        run([compiler, f"-print-file-name={name}"], tmp_path).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip(f"{compiler} has no sanitizers as shared libraries")
    for folder in ("csrc", "svag_fast", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(ROOT / "kernels", tmp_path / "svag_fast" / "kernels")
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tmp_path)
    build = run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        tmp_path,
        SVAG_CUDA="0",
        CFLAGS=SANITIZE,
        CXXFLAGS=SANITIZE,
        LDFLAGS=SANITIZE,
    )
    assert build.returncode == 0, build.stderr
    under = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(tmp_path)}

    # They are at work: a kernel told of more elements than there are is caught.
    overrun = (
        "import torch; from svag_fast import _C; "
        "t = torch.ones(64); _C.philox_normal(t.data_ptr(), False, 6400, 0, (0, 0), 0)"
    )
    caught = run([sys.executable, "-c", overrun], tmp_path, **under)
    assert "heap-buffer-overflow" in caught.stderr

    tests = run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops", "tests/replicas"],
        tmp_path,
        **under,
    )
    assert tests.returncode == 0, tests.stdout[-5000:] + tests.stderr[-5000:]
