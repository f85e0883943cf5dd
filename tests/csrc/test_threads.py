"""The kernels' threads: PyTorch's own, and none that a fork has lost."""

import subprocess
import sys
import textwrap

import pytest

_PRELUDE = """
import os, torch
from svag_fast.ops import svag_step_
torch.set_num_threads(2)
params, grads1, grads2 = ([torch.ones(1 << 20) for _ in range(2)] for _ in range(3))
def step():
    return svag_step_(params, grads1, grads2, lr=0.5, l=1, backend="cpu")
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


def test_children_forked_while_another_thread_steps_take_the_same_steps() -> None:
    out = run(
        """
        import threading
        from svag_fast.ops import AffineStep, affine_walk_
        def work(kit):
            svag_step_(*kit[0], lr=0.5, l=1, backend="cpu")
            affine_walk_(kit[1], AffineStep(0.9, 0.1, 0.2, 0.3), 3, key=(1, 2), threads=2)
            return [t[::997].tolist() for t in (*kit[0][0], kit[1])]
        def make():  # before the fork: PyTorch's own threads hang after it
            return [[torch.ones(200_000) for _ in range(2)] for _ in range(3)], torch.zeros(100_000)
        kits = [make() for _ in range(3)]
        expected = work(kits.pop())
        others = [make() for _ in range(50)]
        thread = threading.Thread(target=lambda: [work(kit) for kit in others])
        thread.start()
        for _ in range(5):
            pid = os.fork()
            if pid == 0:
                same = work(kits.pop()) == expected
                grandchild = os.fork()
                if grandchild == 0:
                    os._exit(0 if work(kits.pop()) == expected else 1)
                os._exit(0 if same and os.waitpid(grandchild, 0)[1] == 0 else 1)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        thread.join()
        """
    )
    assert out.split() == ["0"] * 5


def test_a_child_may_be_the_first_to_import() -> None:
    code = (
        "import os, torch; torch.set_num_threads(2); a = torch.randn(512, 512); (a @ a).sum()\n"
        "lists = [[torch.ones(200_000)] for _ in range(3)]\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    from svag_fast.ops import svag_step_\n"
        "    svag_step_(*lists, lr=0.5, l=1, backend='cpu')\n"
        "    os._exit(0 if set(lists[0][0].tolist()) == {0.5} else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["0"]
