"""The benchmarks still run: each contender once, untimed, on its file's smallest sizes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"

# What of each file is run; torch.compile is left out, which compiles for half a minute.
SMALLEST = {
    "test_fused_replicas.py": "mlp-2-1- or net-2-1-",
    "test_host_overhead.py": "34 or weight",
    "test_norm_relu.py": "8x8-nchw",
    "test_replicas.py": "mlp-4-2] or mlp-2-4",
    "test_sample_norms.py": "digits8-",
    "test_sde.py": "test_euler_maruyama or test_ngd_step",
    "test_step.py": "preresnet32 and not torch.compile",
    "test_training_step.py": "digits and not 128",
    "test_two_batches.py": "8] and not 128]",
    "test_weight_grad.py": "2x2 or test_linear or 4x4-product or test_step_per_sample",
}


def test_every_file_of_benchmarks_is_run_here() -> None:
    assert {file.name for file in BENCH.glob("test_*.py")} == SMALLEST.keys()


@pytest.mark.nightly
@pytest.mark.parametrize("file", SMALLEST)
def test_every_contender_runs_or_says_why_it_is_skipped(file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--benchmark-disable", "-k", SMALLEST[file], str(BENCH / file)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert re.search(r"\d+ passed", result.stdout)
    skipped = [line for line in result.stdout.splitlines() if line.startswith("SKIPPED")]
    assert all(re.search(r"could not import '\w+|can't", line) for line in skipped), skipped
