"""The CPU kernels' C++ self-test: every SIMD level here, an x86-64 without AVX2 and an aarch64 under emulation."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from setup_module import load_setup

ROOT = Path(__file__).resolve().parents[3]
CHECKS = sorted(Path(__file__).parent.glob("*.cpp"))

COMPILER = load_setup().compiler_of(shlex.split(os.environ.get("CXX", "g++")))[-1]

# qemu-user and ThreadSanitizer themselves die where a forked child of a threaded program starts a thread.
WITHOUT_FORK = [
    *("--without", "pool_works_in_a_forked_child"),
    *("--without", "pool_without_threads_leaves_all_chunks_to_the_caller_in_a_forked_child"),
]


def kernels() -> list[Path]:
    return sorted((ROOT / "csrc/cpu/kernels").rglob("*.cpp"))


def need(*tools: str) -> None:
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool} (Debian, Ubuntu: apt install g++-aarch64-linux-gnu qemu-user binutils)")


# The default run's: compiled in 60 % of the time of setup.py's -O3, at which tests/ops run the kernels at every level.
QUICK = "-O1"
OPTIMISED = pytest.mark.parametrize("optimised", [QUICK, pytest.param("-O3", marks=pytest.mark.nightly)])


class Builder:
    """Compiles with setup.py's own flags and those given; keeps the objects, by what they were made of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.setup = load_setup()
        headers = [*sorted((ROOT / "csrc").rglob("*.h")), *sorted(Path(__file__).parent.glob("*.h"))]
        self.used: set[Path] = set()
        self.headers = b"".join(h.read_bytes() for h in headers)

    def compile(self, compiler: str, source: Path, flags: list[str]) -> Path:
        flags = [*self.setup.CXX_FLAGS, "-Werror", *flags]
        version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
        made_of = [version, self.headers, source.read_bytes(), str(source).encode(), " ".join(flags).encode()]
        target = self.folder / f"{source.stem}-{hashlib.sha256(b'/'.join(made_of)).hexdigest()[:16]}.o"
        if not target.exists():
            fresh = target.with_suffix(f".{os.getpid()}.tmp")
            include = [f"-I{ROOT / 'csrc'}", f"-I{Path(__file__).parent}"]
            command = [compiler, *flags, *include, "-c", str(source), "-o", str(fresh)]
            result = subprocess.run(command, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
            fresh.rename(target)
        self.used.add(target)
        return target

    def kernels(self, compiler: str, machine: str, flags: list[str]) -> dict[tuple[str, str], Path]:
        """Return the object of each kernel at each SIMD level of the architecture, by (kernel, level)."""
        levels = self.setup.simd_levels(machine)
        jobs = {
            (source.stem, level): (compiler, source, [*level_flags, f"-DSVAG_SIMD={level}", *flags])
            for source in kernels()
            for level, level_flags in levels.items()
        }
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return dict(zip(jobs, pool.map(lambda job: self.compile(*job), jobs.values()), strict=True))

    def selftest(self, compiler: str, machine: str, *flags: str, link: tuple[str, ...] = ()) -> Path:
        """Return the self-test's program, statically linked so that an emulator needs no library of its machine."""
        objects = list(self.kernels(compiler, machine, list(flags)).values())
        folders = (ROOT / "csrc/cpu", ROOT / "csrc/cpu/replicas")
        others = [*(source for folder in folders for source in sorted(folder.glob("*.cpp"))), *CHECKS]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects += pool.map(lambda source: self.compile(compiler, source, list(flags)), others)
        program = self.folder / f"selftest-{machine}-{os.getpid()}"
        command = [compiler, *flags, *map(str, objects), "-pthread", *link, "-o", str(program)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return program


@pytest.fixture(scope="module")
def builder(request: pytest.FixtureRequest) -> Iterator[Builder]:
    builder = Builder(request.config.cache.mkdir("svag_objects"))
    yield builder
    for path in set(builder.folder.iterdir()) - builder.used:
        path.unlink()


def run(*command: str | Path) -> list[str]:
    """Run a self-test to its end; return the names of the checks that it passed, each after its level."""
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert lines[-1] == "0 failed"
    return [lines[0], *(line.removeprefix("ok  ").strip() for line in lines if line.startswith("ok "))]


def test_every_kernel_has_its_checks(builder: Builder) -> None:
    assert {k.stem for k in kernels()} <= {c.stem for c in CHECKS}


@OPTIMISED
def test_selftest_passes_at_every_level_of_this_machine(builder: Builder, optimised: str) -> None:
    need(COMPILER)
    program = builder.selftest(COMPILER, platform.machine(), optimised, link=("-static",))
    passed = run(program)
    best = passed[0].removeprefix("best level: ")
    levels = list(builder.setup.simd_levels())
    for level in levels[: levels.index(best) + 1]:
        assert f"{level} step_follows_the_formula" in passed


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64")
@pytest.mark.parametrize(
    ("cpu", "level"),
    [("Nehalem", "portable"), ("qemu64", "portable"), pytest.param("Haswell", "avx2", marks=pytest.mark.nightly)],
)
def test_selftest_passes_on_an_emulated_x86_64(builder: Builder, cpu: str, level: str) -> None:
    need(COMPILER, "qemu-x86_64")
    program = builder.selftest(COMPILER, "x86_64", QUICK, link=("-static",))
    passed = run("qemu-x86_64", "-cpu", cpu, program, *WITHOUT_FORK)
    assert passed[0] == f"best level: {level}"
    assert f"{level} step_follows_the_formula" in passed


@OPTIMISED
def test_selftest_passes_on_an_emulated_aarch64(builder: Builder, optimised: str) -> None:
    need("aarch64-linux-gnu-g++", "qemu-aarch64")
    program = builder.selftest("aarch64-linux-gnu-g++", "aarch64", optimised, link=("-static",))
    passed = run("qemu-aarch64", program, *WITHOUT_FORK)
    assert passed[0] == "best level: portable"
    assert "portable step_follows_the_formula" in passed


# A weak symbol compiled for AVX2 could be the copy that the linker keeps for the portable level as well.
@OPTIMISED
def test_kernel_objects_define_one_strong_symbol_a_kernel_and_no_weak_one(builder: Builder, optimised: str) -> None:
    need(COMPILER, "nm")
    for (_, level), target in builder.kernels(COMPILER, platform.machine(), [optimised]).items():
        lines = subprocess.run(["nm", "--defined-only", target], capture_output=True, text=True, check=True).stdout
        symbols = [line.split()[-2:] for line in lines.splitlines()]
        assert [name for kind, name in symbols if kind in "WVuC"] == []
        shown = [name for kind, name in symbols if kind.isupper()]
        assert shown
        assert all(name.endswith(f"_{level}") for name in shown)


@pytest.mark.nightly
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_selftest_passes_under_sanitizers(builder: Builder, sanitizer: str) -> None:
    need(COMPILER)
    flags = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-g", "-O1"]
    run(builder.selftest(COMPILER, platform.machine(), *flags), *WITHOUT_FORK)
