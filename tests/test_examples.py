"""Every example runs, and prints what it is about."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PRINTED = {
    "language_model.py": "whether SGD follows its SDE limit at B = 8",
    "own_loop.py": r"accuracy 0\.\d+ after 200 effective steps",
    "noise_scale.py": r"B_simple = Tr Sigma / G = \d+ samples",
    "predict_from_csv.py": r"must fail beyond B\*",
    "sde_vs_sgd.py": r"SVAG, l = 16  E x\^2 = 0\.0\d+ \+- 0\.000\d+",
    "custom_layer_rule.py": r"1\.weight +\[0\.",
}


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_it_runs(example: Path, tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(example)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(PRINTED[example.name], done.stdout), done.stdout


def test_they_are_short() -> None:
    assert sum(len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")) <= 150
