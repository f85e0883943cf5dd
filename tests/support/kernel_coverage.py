"""Say at the end of a run which GPU kernels were executed, where, and which were only compiled.

A test states what it ran with ``@pytest.mark.kernels("step_kernel", ran="host")``; only a test that passed counts.
Every ``__global__`` function in csrc/cuda/*.cu and every ``@triton.jit`` function named ``*_kernel`` in kernels/*.py
is on the list, so a kernel that no test runs shows too.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
WAYS = ("gpu", "simulator", "interpreter", "host", "compile")
_GLOBAL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(")
_TRITON = re.compile(r"^@triton\.jit[^\n]*\n(?:@[^\n]*\n)*def (\w+_kernel)\(", re.MULTILINE)

_ran: dict[str, set[str]] = {}


def all_kernels() -> set[str]:
    """Return the names of the project's GPU kernels, read from their sources."""
    names = set()
    for folder, suffix, pattern in (("csrc/cuda", "*.cu", _GLOBAL), ("kernels", "*.py", _TRITON)):
        for path in (ROOT / folder).glob(suffix):
            names |= set(pattern.findall(path.read_text()))
    return names


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kernels(*names, ran): the GPU kernels that a test runs, and on what")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    known = all_kernels()
    for item in items:
        for marker in item.iter_markers("kernels"):
            if marker.kwargs.get("ran") not in WAYS or not set(marker.args) <= known:
                raise pytest.UsageError(f"{item.nodeid}: kernels{marker.args} {marker.kwargs}: no such kernel or way")
            ran = marker.kwargs["ran"]
            if ran == "gpu" and not torch.cuda.is_available():  # the tests of tests/gpu tried on a CPU
                ran = "interpreter"
            item.user_properties += [("kernel", (name, ran)) for name in marker.args]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        for key, value in report.user_properties:
            if key == "kernel":
                _ran.setdefault(value[1], set()).add(value[0])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    kernels = all_kernels()
    if not _ran or not kernels:
        return
    executed = set().union(*(_ran.get(way, set()) for way in WAYS if way != "compile"))
    counts = [f"{way} {len(_ran.get(way, set()))}" for way in WAYS if way != "compile"]
    only_compiled = _ran.get("compile", set()) - executed
    terminalreporter.section("GPU kernels")
    terminalreporter.line(f"{len(kernels)} kernels: {', '.join(counts)}, compile only {len(only_compiled)}")
    for text, names in (("compiled, never run", only_compiled), ("not tested in this run", kernels - executed)):
        if missing := names - (only_compiled if text.startswith("not") else set()):
            terminalreporter.line(f"{text}: {', '.join(sorted(missing))}")
