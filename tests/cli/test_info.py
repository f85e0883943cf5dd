"""`svag-fast info` tells the truth about this machine, and never fails for what a machine lacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import svag_fast
from svag_fast import _C
from svag_fast.ops import svag_step_
from svag_fast.ops.backends import BACKENDS, BackendError


def info(*arguments: str, module: str = "svag_fast.cli.info", **environment: str) -> str:
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def as_json() -> dict[str, Any]:
    return json.loads(info("--json", SVAG_FAST_BACKEND="auto"))


def test_versions_and_processor_are_those_of_this_process(as_json: dict[str, Any]) -> None:
    assert as_json["svag_fast"]["version"] == svag_fast.__version__
    assert as_json["packages"]["torch"] == torch.__version__
    assert as_json["cpu"]["simd"]["best"] == _C.best_simd_level()
    assert as_json["cpu"]["cores"] == os.cpu_count()
    assert as_json["environment"]["SVAG_FAST_BACKEND"] == "auto"


def test_each_backend_is_listed_in_order_and_its_reason_is_the_one_that_a_call_gives(as_json: dict[str, Any]) -> None:
    assert [row["name"] for row in as_json["backends"]] == list(BACKENDS)
    for row in as_json["backends"]:
        assert row["available"] == (row["why_not"] is None)
        if row["available"]:
            continue
        device = "cuda" if "cpu" not in BACKENDS[row["name"]].device_types else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            continue  # no tensor to call it with
        x = [torch.ones(3, device=device)]
        with pytest.raises(BackendError) as error:
            svag_step_(x, [torch.ones(3)], None, lr=0.1, l=1, backend=row["name"])
        assert row["why_not"] in str(error.value)


def test_available_backend_serves_the_ops_it_lists(as_json: dict[str, Any]) -> None:
    for name in ("cpu", "reference"):
        row = next(row for row in as_json["backends"] if row["name"] == name)
        assert "svag_step_" in row["ops"]
        x = [torch.ones(3)]
        svag_step_(x, [torch.ones(3)], None, lr=0.25, l=1, backend=name)
        assert torch.equal(x[0], torch.full((3,), 0.75))


def test_both_spellings_print_the_same_text() -> None:
    text = info()
    assert text == info("info", module="svag_fast")
    for name in BACKENDS:
        assert f"\n  {name} " in text
    assert torch.__version__ in text


def test_broken_torch_is_reported_rather_than_fatal(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch.so: no such file')")
    text = info(PYTHONPATH=str(tmp_path))
    assert "threads     error ImportError: libtorch.so: no such file" in text
    assert svag_fast.__version__ in text


def test_wrong_simd_level_is_reported_rather_than_fatal() -> None:
    row = next(r for r in json.loads(info("--json", SVAG_FAST_SIMD="mmx"))["backends"] if r["name"] == "cpu")
    assert row["why_not"].startswith("SVAG_FAST_SIMD=mmx: this machine runs portable")
