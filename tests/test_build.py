"""What is built and installed: the extension's symbols, the wheel, and the errors of a build that can't succeed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from svag_fast import _C

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


def dynamic_symbols(option: str) -> list[str]:
    """Return the names that the extension defines for others, or needs from them."""
    if shutil.which("nm") is None:
        pytest.skip("needs nm (binutils)")
    lines = run("nm", "-D", option, _C.__file__).stdout.splitlines()
    return [line.split()[-1].split("@")[0] for line in lines]


def test_extension_shows_its_init_function_alone() -> None:
    assert dynamic_symbols("--defined-only") == ["PyInit__C"]


def test_extension_needs_nothing_of_torch() -> None:
    needed = dynamic_symbols("--undefined-only")
    assert any(name.startswith("Py") for name in needed)
    assert [name for name in needed if "torch" in name or "c10" in name or "at6Tensor" in name] == []


def test_extension_links_no_openmp_torch_or_shared_cudart() -> None:
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf (binutils)")
    libraries = [line for line in run("readelf", "-d", _C.__file__).stdout.splitlines() if "(NEEDED)" in line]
    assert any("libstdc++" in line for line in libraries)
    assert [line for line in libraries if any(x in line for x in ("gomp", "omp5", "torch", "c10", "cudart"))] == []


# What `import svag_fast` must leave for when it is used.
HEAVY = ["matplotlib", "scipy", "sklearn", "click", "rich", "triton", "tensorboard", "torchsde"]


def test_import_loads_no_heavy_module() -> None:
    script = (
        "import sys, torch; before = set(sys.modules); import svag_fast; "
        "print('\\n'.join(sorted(set(sys.modules) - before)))"
    )
    result = run(sys.executable, "-c", script)
    assert result.returncode == 0, result.stderr
    added = result.stdout.split()
    assert "svag_fast" in added
    assert [name for name in added if name.split(".")[0] in HEAVY] == []
    assert len(added) < 50


def test_the_first_optimizer_and_its_step_do_not_import_the_compiler() -> None:
    script = (
        "import sys, torch, svag_fast; p = torch.nn.Parameter(torch.ones(3)); "
        "optimizer = svag_fast.SVAG([p], lr=0.1); p.sum().backward(); optimizer.step(); optimizer.state_dict(); "
        "print('torch._dynamo' in sys.modules, p.tolist()[0] < 1)"
    )
    assert run(sys.executable, "-c", script).stdout.split() == ["False", "True"]


def test_public_names_are_importable() -> None:
    import svag_fast

    assert [name for name in svag_fast.__all__ if not hasattr(svag_fast, name)] == []


def test_kernels_are_importable_from_the_editable_install(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", "import svag_fast.kernels as k; print(k.__file__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).name == "__init__.py"
    assert Path(result.stdout.strip()).parent.name == "kernels"


def build_extension(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", folder / "t", "--build-lib", folder / "l"]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


def test_missing_compiler_is_named_with_how_to_install_one(tmp_path: Path) -> None:
    result = build_extension(tmp_path, CXX="no-such-compiler")
    assert result.returncode != 0
    assert "need a C++17 compiler, and 'no-such-compiler' was not found" in result.stderr
    assert "apt install g++" in result.stderr


def test_cuda_that_is_asked_for_but_missing_is_an_error(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "g++").symlink_to(compiler)
    result = build_extension(tmp_path, CXX="g++", SVAG_CUDA="1", PATH=str(tools), CUDA_HOME=str(tmp_path))
    assert result.returncode != 0
    assert "SVAG_CUDA=1, but nvcc is neither on the PATH nor in $CUDA_HOME/bin" in result.stderr


def test_unknown_cuda_choice_is_an_error(tmp_path: Path) -> None:
    result = build_extension(tmp_path, SVAG_CUDA="yes")
    assert result.returncode != 0
    assert "SVAG_CUDA must be auto, 0 or 1, not 'yes'" in result.stderr
