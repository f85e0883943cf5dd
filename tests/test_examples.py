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


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each example prints. One process of their own for all: importing torch takes longer than most of them."""
    names = sorted(path.name for path in EXAMPLES.glob("*.py"))
    one = f"runpy.run_path(f'{EXAMPLES}/{{name}}', run_name='__main__')"
    run = f"import runpy\nfor name in {names}:\n    {one}\n    print(chr(0))"
    done = subprocess.run(
        [sys.executable, "-c", run],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
        cwd=tmp_path_factory.mktemp("examples"),
    )
    outputs = done.stdout.split("\0\n")
    assert done.returncode == 0, f"{names[len(outputs) - 1]}: {done.stderr}"
    return dict(zip(names, outputs, strict=False))


@pytest.mark.parametrize("example", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_it_runs(example: str, printed: dict[str, str]) -> None:
    assert re.search(PRINTED[example], printed[example]), printed[example]


def test_they_are_short() -> None:
    assert sum(len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")) <= 150
