"""`make` builds the environment once, reuses it, and never uses a half-made one. Python is a script that logs."""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")

# In python3's place: `-m venv DIR` copies it into DIR/bin; any call fails whose arguments contain what the file
# named FAIL holds. CXX is tried by the real one.
FAKE_PYTHON = f"""#!/bin/sh
case "$*" in *shlex*) exec {shlex.quote(sys.executable)} "$@" ;; esac
echo "$@" >> "$LOG"
if [ -s "$FAIL" ]; then
    case "$*" in *"$(cat "$FAIL")"*) exit 1 ;; esac
fi
if [ "$2" = venv ]; then
    mkdir -p "$3/bin" && cp "$0" "$3/bin/python"
fi
"""


class Checkout:
    """A folder with the Makefile, a fake Python, and a log of what that was called with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("Makefile", "pyproject.toml", "setup.py"):
            shutil.copy(ROOT / name, folder)
        shutil.copytree(ROOT / "requirements", folder / "requirements")
        (folder / "csrc").mkdir()
        (folder / "csrc" / "a.cpp").touch()
        python = folder / "python"
        python.write_text(FAKE_PYTHON)
        python.chmod(0o755)
        self.log = folder / "log"
        self.fail_on("")
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k != "ARGS"},
            "LOG": str(self.log),
            "FAIL": str(folder / "fail"),
        }

    def fail_on(self, word: str) -> None:
        (self.folder / "fail").write_text(word)

    def make(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        self.log.write_text("")
        command = ["make", f"PYTHON={self.folder / 'python'}", *arguments]
        return subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)

    def steps(self) -> list[str]:
        """Return which of the environment's steps, and which use of it, the last call took."""
        names = {
            "-m venv": "venv",
            "-r requirements/dev.txt": "packages",
            "--editable": "install",
            "-r requirements/bench.txt": "peers",
            "-m pytest": "pytest",
        }
        return [name for line in self.log.read_text().splitlines() for key, name in names.items() if key in line]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_first_call_makes_the_environment_and_the_second_reuses_it(checkout: Checkout) -> None:
    assert checkout.make("test").returncode == 0
    assert checkout.steps() == ["venv", "packages", "install", "pytest"]
    assert checkout.make("test").returncode == 0
    assert checkout.steps() == ["pytest"]


@pytest.mark.parametrize("source", ["csrc/a.cpp", "setup.py", "pyproject.toml"])
def test_changed_source_is_installed_again_without_the_packages(checkout: Checkout, source: str) -> None:
    checkout.make("test")
    later = (checkout.folder / ".venv" / ".installed").stat().st_mtime + 1
    os.utime(checkout.folder / source, (later, later))
    checkout.make("test")
    assert checkout.steps() == ["install", "pytest"]


def test_bench_adds_its_peers_once(checkout: Checkout) -> None:
    checkout.make("test")
    assert checkout.make("bench").returncode == 0
    assert checkout.steps() == ["peers", "pytest"]
    checkout.make("bench")
    assert checkout.steps() == ["pytest"]


def test_changed_pins_are_installed_into_the_same_environment(checkout: Checkout) -> None:
    checkout.make("test")
    later = (checkout.folder / ".venv" / ".packages").stat().st_mtime + 1
    os.utime(checkout.folder / "requirements" / "dev.txt", (later, later))
    checkout.make("test")
    assert checkout.steps()[:2] == ["packages", "install"]


@pytest.mark.parametrize("step", ["-m venv", "dev.txt"])
def test_environment_that_failed_is_begun_again(checkout: Checkout, step: str) -> None:
    checkout.fail_on(step)
    assert checkout.make("test").returncode != 0
    assert "pytest" not in checkout.steps()
    litter = checkout.folder / ".venv" / "half"
    litter.parent.mkdir(exist_ok=True)
    litter.touch()
    checkout.fail_on("")
    assert checkout.make("test").returncode == 0
    assert checkout.steps() == ["venv", "packages", "install", "pytest"]
    assert not litter.exists()


def test_failed_compilation_keeps_the_packages_but_is_not_used(checkout: Checkout) -> None:
    checkout.make("test")
    later = (checkout.folder / ".venv" / ".installed").stat().st_mtime + 1
    os.utime(checkout.folder / "csrc" / "a.cpp", (later, later))
    checkout.fail_on("--editable")
    for _ in range(2):
        assert checkout.make("test").returncode != 0
        assert checkout.steps() == ["install"]


def test_environment_of_somebody_else_is_left_alone(checkout: Checkout) -> None:
    (checkout.folder / ".venv").mkdir()
    kept = checkout.folder / ".venv" / "kept"
    kept.touch()
    result = checkout.make("test")
    assert result.returncode != 0
    assert "was not made by this Makefile" in result.stderr
    assert kept.exists()
    assert checkout.make("test", "VENV=other").returncode == 0


def test_environment_with_a_space_in_its_name_is_refused(checkout: Checkout) -> None:
    result = checkout.make("test", "VENV=my env")
    assert result.returncode != 0
    assert "VENV=my env: make takes no folder whose name has a space" in result.stderr


@pytest.mark.parametrize(
    ("fail_on", "arguments", "message"),
    [
        ("ensurepip", [], "python3-venv"),
        ("version_info", [], "Python 3.10 or newer is needed"),
        ("Python.h", [], "python3-dev"),
        ("", ["PYTHON=no-such-python"], "no 'no-such-python' on the PATH"),
        ("", ["CXX=no-such-compiler"], "CXX=no-such-compiler does not compile C++17: [Errno 2]"),
        ("", ["CXX=env no-such-compiler"], "CXX=env no-such-compiler does not compile C++17: env:"),
        ("", ["CXX=/bin/false"], "CXX=/bin/false does not compile C++17: exit status 1"),
        ("", ["CXX=g++ -std=c++98 -fno-such-option"], "-fno-such-option"),
        ("", ['CXX="g++'], "No closing quotation"),
    ],
)
def test_missing_tool_is_named_with_its_package(
    checkout: Checkout, fail_on: str, arguments: list[str], message: str
) -> None:
    checkout.fail_on(fail_on)
    result = checkout.make("test", *arguments)
    assert result.returncode != 0
    assert message in result.stderr
    assert not (checkout.folder / ".venv").exists()


@pytest.mark.parametrize(
    "command", ["", "g++ -O1", "ccache g++", "{} -g", "{folder}/a b/g++", "ccache '{folder}/a b/g++' -g"]
)
def test_the_compiler_may_have_a_launcher_options_and_spaces_in_its_path(checkout: Checkout, command: str) -> None:
    gxx = shutil.which("g++")
    if gxx is None or ("ccache" in command and shutil.which("ccache") is None):
        pytest.skip("needs g++ (and ccache)")
    (checkout.folder / "a b").mkdir()
    (checkout.folder / "a b" / "g++").symlink_to(gxx)
    checkout.environment["CXX"] = command.format(shlex.quote(gxx), folder=checkout.folder)
    done = checkout.make(".venv/.packages")
    assert done.returncode == 0, done.stderr


def test_run_passes_its_arguments_on(checkout: Checkout) -> None:
    result = checkout.make("--dry-run", "run", "ARGS=--seeds 1")
    assert ".venv/bin/svag-fast run --seeds 1" in result.stdout


def test_gpu_report_takes_the_users_python_and_dry_the_environments(checkout: Checkout) -> None:
    result = checkout.make("gpu-report", "ARGS=--commit abc")
    assert result.returncode == 0
    assert checkout.log.read_text() == "bench/gpu/gpu_report.py --commit abc\n"
    assert not (checkout.folder / ".venv").exists()
    assert checkout.make("gpu-report", "DRY=1").returncode == 0
    assert checkout.steps() == ["venv", "packages", "install"]
    assert checkout.log.read_text().endswith("bench/gpu/gpu_report.py --dry\n")


def test_every_dependency_is_pinned() -> None:
    pins = "".join((ROOT / "requirements" / f"{name}.txt").read_text() for name in ("dev", "bench"))
    pinned = {canonicalize_name(Requirement(line).name) for line in pins.splitlines()}
    requirements = [Requirement(r) for r in importlib.metadata.requires("svag_fast") or []]
    # The tests download nothing, so what only downloads data is not installed for them.
    needed = {canonicalize_name(r.name) for r in requirements if "vision" not in str(r.marker)}
    assert needed
    assert needed - pinned == set(), "run requirements/lock.sh"
