"""Put svag_fast into a folder with no more than a GPU machine has: no pip, no network, perhaps no pybind11 package.

python bench/gpu/gpu_build.py SITE            SVAG_CUDA, SVAG_CUDA_ARCHS, CUDA_HOME and CXX as in setup.py
python bench/gpu/gpu_build.py SITE --quick    the C++ unoptimised, to try the build and not what it makes

The Python package comes first, so that the Triton kernels are there whatever becomes of the build; then setup.py builds
_C beside it. All of it happens on copies: the checkout stays as it was.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import shutil
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def lay_out(site: Path) -> None:
    """Copy the Python package as it is installed, kernels/ inside, without anything compiled."""
    shutil.rmtree(site, ignore_errors=True)
    unwanted = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "svag_fast", site / "svag_fast", ignore=unwanted)
    shutil.copytree(ROOT / "kernels", site / "svag_fast" / "kernels", ignore=unwanted)
    # An editable install of svag_fast would answer for a missing _C with its own. An extension module goes before this.
    (site / "svag_fast" / "_C.py").write_text('raise ImportError("its build failed")\n')


def stand_in_for_pybind11() -> None:
    """Where the pybind11 package is missing, give setup.py the headers that torch carries."""
    if importlib.util.find_spec("pybind11") is not None:
        return
    torch = importlib.util.find_spec("torch")
    headers = Path(str(torch and torch.origin)).parent / "include"
    if not (headers / "pybind11" / "pybind11.h").exists():
        raise SystemExit(f"there is no pybind11: neither the package nor torch's headers in {headers}")
    print(f"no pybind11 package: its headers are taken from {headers}", flush=True)
    from setuptools import Extension

    class Pybind11Extension(Extension):  # type: ignore[misc]
        def __init__(self, *args: object, cxx_std: int = 17, **options: object) -> None:
            super().__init__(*args, **options, language="c++")
            self.include_dirs.append(str(headers))
            self.extra_compile_args += [f"-std=c++{cxx_std}", "-fvisibility=hidden", "-g0"]

    helpers = types.ModuleType("pybind11.setup_helpers")
    helpers.Pybind11Extension = Pybind11Extension  # type: ignore[attr-defined]
    sys.modules |= {"pybind11": types.ModuleType("pybind11"), "pybind11.setup_helpers": helpers}


def build(site: Path) -> None:
    """Run setup.py's build_ext on a copy of the sources, without pyproject.toml: any setuptools will do."""
    scratch = site.parent / "build"
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(ROOT / "csrc", scratch / "csrc")
    shutil.copy(ROOT / "setup.py", scratch)
    sys.argv = ["setup.py", "-q", "build_ext", "--build-lib", str(site), "--build-temp", str(scratch / "temp")]
    os.chdir(scratch)
    runpy.run_path("setup.py", run_name="__main__")


def do_not_optimise(scratch: Path) -> None:
    """Name a compiler in CXX that is the one there, told -O0 after all else; tell nvcc the same."""
    wrapper = scratch / "g++"
    wrapper.parent.mkdir(parents=True, exist_ok=True)
    wrapper.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "g++")} "$@" -O0\n')
    wrapper.chmod(0o755)
    os.environ["CXX"] = str(wrapper)
    os.environ["NVCC_APPEND_FLAGS"] = "-Xcicc -O0 -Xptxas -O0"


def has_cuda(site: Path) -> bool:
    """Load what was built, and say whether the CUDA kernels are in it."""
    path = next((site / "svag_fast").glob("_C.*.so"))
    spec = importlib.util.spec_from_file_location("svag_fast._C", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return hasattr(module, "cuda_step")


def main() -> None:
    site, quick = Path(sys.argv[1]).resolve(), "--quick" in sys.argv
    lay_out(site)
    if quick:
        do_not_optimise(site.parent / "unoptimised")
    stand_in_for_pybind11()
    build(site)
    print(f"built svag_fast._C {'with' if has_cuda(site) else 'WITHOUT'} CUDA kernels")


if __name__ == "__main__":
    main()
