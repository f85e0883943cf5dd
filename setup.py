"""Build ``svag_fast._C``, the CPU and CUDA kernels behind one small pybind11 module.

torch is not imported and no torch header is used, so build isolation works and one build serves every torch.

Environment variables:
    SVAG_CUDA        auto (default: CUDA kernels where nvcc is found), 0 (never) or 1 (fail without nvcc)
    SVAG_CUDA_ARCHS  compute capabilities, default "80 90 100 120"; the newest is also kept as PTX
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

CXX_FLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra", "-Wno-psabi"]
# Elementwise kernels round as PyTorch does, the same at every level; products may fuse multiply and add.
FUSED_MULTIPLY_ADD = "weight_"
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_FLAGS = [
    *AVX2_FLAGS,
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512dq",
    "-mprefer-vector-width=512",
]

# Each kernel file is compiled once for every level; csrc/cpu/simd_level.cpp chooses one when the module is loaded.
KERNELS = sorted(str(p) for p in Path("csrc/cpu/kernels").glob("*.cpp"))
COMMON = ["csrc/bindings.cpp", "csrc/tensor_reader.cpp", *sorted(str(p) for p in Path("csrc/cpu").glob("*.cpp"))]
EXPORTS = "csrc/exports.map"
CUDA = sorted(str(p) for p in Path("csrc/cuda").glob("*.cu"))


def simd_levels(machine: str | None = None) -> dict[str, list[str]]:
    """Return the compiler flags of every SIMD level that an architecture, by default this one, is built for."""
    if (machine or platform.machine()) in ("x86_64", "AMD64"):
        return {"portable": [], "avx2": AVX2_FLAGS, "avx512": AVX512_FLAGS}
    return {"portable": []}


def find_nvcc() -> str | None:
    """Return nvcc's path, or None for a CPU-only build, as SVAG_CUDA asks."""
    wanted = os.environ.get("SVAG_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"svag_fast: SVAG_CUDA must be auto, 0 or 1, not {wanted!r}")
    nvcc = shutil.which("nvcc")
    if nvcc is None and "CUDA_HOME" in os.environ:
        nvcc = shutil.which("nvcc", path=str(Path(os.environ["CUDA_HOME"]) / "bin"))
    if wanted == "1" and nvcc is None:
        raise SystemExit("svag_fast: SVAG_CUDA=1, but nvcc is neither on the PATH nor in $CUDA_HOME/bin")
    return nvcc if wanted != "0" and CUDA else None


class BuildExt(build_ext):
    """Compile each kernel once for every SIMD level, and the CUDA sources with nvcc."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        """Add the kernels' objects to the extension, then build it as usual."""
        self._check_tools()
        nvcc = find_nvcc()
        self.force = True  # file times do not show a changed SVAG_CUDA or CXX, and the kernels are compiled anyway
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = [
                pool.submit(self._compile_kernel, source, level, flags)
                for level, flags in simd_levels().items()
                for source in KERNELS
            ]
            if nvcc is None:
                print("svag_fast: no nvcc (or SVAG_CUDA=0): building the CPU kernels only", flush=True)
            else:
                jobs += [pool.submit(self._compile_cuda, nvcc, source) for source in CUDA]
                ext.define_macros += [("SVAG_WITH_CUDA", None)]
                ext.extra_link_args += [f"-L{lib}" for lib in self._cuda_libraries(nvcc)]
                ext.libraries += ["cudart_static", "rt", "dl", "pthread"]
            ext.extra_objects = [job.result() for job in jobs]
        super().build_extension(ext)

    def _check_tools(self) -> None:
        compiler = self.compiler.compiler_cxx[0]
        if shutil.which(compiler) is None:
            raise SystemExit(
                f"svag_fast: its C++ kernels need a C++17 compiler, and {compiler!r} was not found. "
                "Install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; conda: cxx-compiler) "
                "or name yours in the variable CXX."
            )
        include = Path(sysconfig.get_path("include"))
        if not (include / "Python.h").exists():
            raise SystemExit(
                f"svag_fast: compiling needs Python.h, which is not in {include}. "
                "Install it (Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel)."
            )

    def _compile_kernel(self, source: str, level: str, flags: list[str]) -> str:
        contract = "fast" if Path(source).name.startswith(FUSED_MULTIPLY_ADD) else "off"
        objects = self.compiler.compile(
            [source],
            output_dir=str(Path(self.build_temp) / level),
            include_dirs=["csrc"],
            extra_postargs=[*CXX_FLAGS, *flags, f"-ffp-contract={contract}", f"-DSVAG_SIMD={level}"],
        )
        return str(objects[0])

    def _compile_cuda(self, nvcc: str, source: str) -> str:
        target = Path(self.build_temp) / "cuda" / f"{Path(source).stem}.o"
        target.parent.mkdir(parents=True, exist_ok=True)
        archs = os.environ.get("SVAG_CUDA_ARCHS", "80 90 100 120").split()
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        host = ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-ccbin", self.compiler.compiler_cxx[0]]
        command = [nvcc, "-std=c++17", "-O3", "-Icsrc", *codes, *host, "-c", source, "-o", str(target)]
        subprocess.run(command, check=True)
        return str(target)

    @staticmethod
    def _cuda_libraries(nvcc: str) -> list[str]:
        dryrun = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, check=False).stderr
        top = next(line.split("=", 1)[1] for line in dryrun.splitlines() if line.startswith("#$ TOP="))
        return [str(Path(top) / lib) for lib in ("lib64", "lib") if (Path(top) / lib).is_dir()]


if __name__ == "__main__":
    setup(
        ext_modules=[
            Pybind11Extension(
                "svag_fast._C",
                COMMON,
                include_dirs=["csrc"],
                extra_compile_args=CXX_FLAGS,
                extra_link_args=["-pthread", f"-Wl,--version-script={EXPORTS}"],
                cxx_std=17,
            )
        ],
        cmdclass={"build_ext": BuildExt},
    )
