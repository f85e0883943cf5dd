"""The kernels' threads: PyTorch's own, and none that a fork has lost."""

import subprocess
import sys
import textwrap

import pytest

_PRELUDE = """
import os, torch
from svag_fast.ops import svag_step_
torch.set_num_threads(2)
params, grads = ([torch.ones(1 << 20) for _ in range(2)] for _ in range(2))
def step():
    return svag_step_(params, grads, grads, lr=0.5, l=1, backend="cpu")
a = torch.randn(512, 512)
"""


def run(script: str) -> str:
    code = textwrap.dedent(_PRELUDE) + textwrap.dedent(script)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels_run_on_the_team_that_torch_has_started() -> None:
    out = run(
        """
        (a @ a).add_(a).sum(), torch.relu(torch.randn(1 << 20))
        before = set(os.listdir("/proc/self/task"))
        step()
        print(len(set(os.listdir("/proc/self/task")) - before), torch.__config__.parallel_info())
        """
    )
    if "ATen parallel backend: OpenMP" not in out:
        pytest.skip("this PyTorch has no OpenMP")
    assert out.split()[0] == "0"


def test_a_child_forked_after_torch_used_its_threads_takes_a_step() -> None:
    out = run(
        """
        (a @ a).sum(), torch.relu(torch.randn(1 << 20))
        pid = os.fork()
        if pid == 0:
            step()
            os._exit(0 if params[1][-1].item() == 0.5 else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        """
    )
    assert out.split() == ["0"]
