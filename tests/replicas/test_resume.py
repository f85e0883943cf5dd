"""Replicas in PyTorch's engine, killed without warning and resumed from a checkpoint: the same to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("resumed_training.py")


def test_killed_and_resumed_it_is_the_run_that_was_never_stopped_to_the_bit(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path / "checkpoint.pt")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        assert process.stdout is not None
        reached = [process.stdout.readline() for _ in range(4)]
        process.kill()
    assert reached[-1] == "step 4\n"
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    first, *_, verdict = again.stdout.splitlines()
    assert 4 <= int(first.removeprefix("resumed at step ")) < 30
    assert verdict == "the same bits"
