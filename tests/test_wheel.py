"""sdist -> wheel -> an empty environment outside the checkout: what users install works there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SMOKE = Path(__file__).with_name("wheel_smoke.py")

# Builds the package several times; continuous integration runs it beside `make test`.
pytestmark = [pytest.mark.nightly, pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")]


def run(*command: str | Path, **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


def build(folder: Path, *options: str, **environment: str) -> tuple[Path, Path]:
    """Build the sdist, and from the sdist the wheel; return both."""
    command = [sys.executable, "-m", "build", "--outdir", str(folder), *options, str(ROOT)]
    run(*command, env={**os.environ, **environment}, cwd=folder)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Sdist and wheel, compiled without optimisation and without a network: packaging is what is tested."""
    folder = tmp_path_factory.mktemp("dist")
    compiler = folder / "unoptimised"
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    compiler.chmod(0o755)
    return build(folder, "--no-isolation", CXX=str(compiler), SVAG_CUDA="0")


def install(wheel: Path, folder: Path) -> Path:
    """Install the wheel alone in an empty environment; its dependencies are lent by the environment of the tests."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # A line of a .pth file is searched after the environment's own packages, and its own .pth files (such as that of
    # an editable svag_fast) are not read.
    lent = {sysconfig.get_path("purelib"), *(p for p in sys.path if p.endswith("site-packages"))}
    (site / "lent.pth").write_text("\n".join(sorted(lent)))
    return python


def check(wheel: Path, folder: Path) -> None:
    python = install(wheel, folder / "environment")
    shutil.copy(SMOKE, folder)
    assert "smoke test passed" in run(python, folder / SMOKE.name, cwd=folder)
    info = run(python.with_name("svag-fast"), "info", cwd=folder)
    assert f"path {folder / 'environment'}" in info
    assert "\n  cpu        yes" in info


def test_sdist_holds_every_tracked_file(dist: tuple[Path, Path]) -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a checkout")
    tracked = run("git", "ls-files", cwd=ROOT).split()
    with tarfile.open(dist[0]) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    needless = {".gitignore"}
    assert {name for name in tracked if (ROOT / name).exists()} - packed - needless == set()


def test_wheel_holds_every_module_and_nothing_of_the_checkout(dist: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(dist[1]) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {str(p.relative_to(ROOT)) for p in (ROOT / "svag_fast").rglob("*.py")}
    expected |= {f"svag_fast/{p.relative_to(ROOT)}" for p in (ROOT / "kernels").rglob("*.py")}
    expected |= {"svag_fast/py.typed", "svag_fast/_C.pyi"}
    extension = {name for name in names if name.startswith("svag_fast/_C.") and name.endswith(".so")}
    assert len(extension) == 1
    assert names == expected | extension


def test_wheel_works_in_an_empty_environment(dist: tuple[Path, Path], tmp_path: Path) -> None:
    check(dist[1], tmp_path)


def test_isolated_optimised_build_works_in_an_empty_environment(tmp_path: Path) -> None:
    (tmp_path / "dist").mkdir()
    _, wheel = build(tmp_path / "dist")
    check(wheel, tmp_path)
