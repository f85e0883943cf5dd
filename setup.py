"""Build ``svag_fast._C``, the CPU and CUDA kernels behind one small pybind11 module.

torch is not imported and no torch header is used, so build isolation works and one build serves every torch.

Environment variables:
    SVAG_CUDA        auto (default: CUDA kernels where a working nvcc is found), 0 (never) or 1 (fail without)
    SVAG_CUDA_ARCHS  compute capabilities, by default those of "80 90 100 120" that nvcc knows; the newest is also kept
                     as PTX
    CXX              the C++ compiler, perhaps behind a launcher ("ccache g++")
    CUDA_HOME        CUDA's folder, or CUDA_PATH, as for PyTorch: its nvcc goes before the PATH's
    MAX_JOBS         how many compilers run at once; default: the usable cores
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

# CXXFLAGS and CFLAGS come before these. Fast mathematics in them would lose nans. Linked with it, GCC's start-up code
# makes denormal numbers zero in the whole process.
NO_FAST_MATH = "-fno-fast-math"
CXX_FLAGS = ["-std=c++17", "-O3", NO_FAST_MATH, "-fvisibility=hidden", "-fno-math-errno"]
CXX_FLAGS += ["-Wall", "-Wextra", "-Wno-psabi"]
# Elementwise kernels round as PyTorch does, the same at every level; the products of these
# folders and files may fuse multiply and add.
PRODUCTS = {"weight_grad", "replicas"}
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
KERNELS = sorted(str(p) for p in Path("csrc/cpu/kernels").rglob("*.cpp"))
COMMON = [
    "csrc/bindings.cpp",
    "csrc/tensor_reader.cpp",
    *sorted(str(p) for folder in ("csrc/cpu", "csrc/cpu/replicas") for p in Path(folder).glob("*.cpp")),
]
EXPORTS = "csrc/exports.map"
CUDA = sorted(str(p) for p in Path("csrc/cuda").glob("*.cu"))
ARCHS = ["80", "90", "100", "120"]
# Where nvcc is looked for after $CUDA_HOME/bin and the PATH.
CUDA_FOLDERS = ["/usr/local/cuda/bin"]
# Programs that CXX may name before the compiler itself.
LAUNCHERS = ("ccache", "sccache", "distcc", "icecc", "buildcache")


def simd_levels(machine: str | None = None) -> dict[str, list[str]]:
    """Return the compiler flags of every SIMD level that an architecture, by default this one, is built for."""
    if (machine or platform.machine()) in ("x86_64", "AMD64"):
        return {"portable": [], "avx2": AVX2_FLAGS, "avx512": AVX512_FLAGS}
    return {"portable": []}


def compiler_of(command: list[str]) -> list[str]:
    """Return the programs that a compiler's command begins with: its launchers, and last the compiler itself."""
    count = next((i for i, word in enumerate(command) if Path(word).name not in LAUNCHERS), len(command) - 1)
    return command[: count + 1]


def settle_cxx() -> None:
    """Make CXX what setuptools can split into words: unset if blank, and quoted if all of it is one program's path.

    Raises:
        SystemExit: its quotes don't match, or it names launchers alone.
    """
    text = os.environ.get("CXX", "").strip()
    if not text:
        os.environ.pop("CXX", None)
        return
    if shutil.which(text) and Path(text).name not in LAUNCHERS:
        os.environ["CXX"] = shlex.quote(text)
        return
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise SystemExit(f"svag_fast: CXX={text}: {error}") from None
    if all(Path(word).name in LAUNCHERS for word in words):
        raise SystemExit(f"svag_fast: CXX={text} names no compiler. An example: CXX='{words[0]} g++'")


def max_jobs() -> int:
    """Return how many compilers may run at once."""
    text = os.environ.get("MAX_JOBS", "").strip()
    if not text:
        return len(os.sched_getaffinity(0))
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise SystemExit(f"svag_fast: MAX_JOBS must be a number of processes, at least 1, not {text!r}")
    return int(text)


def compile_with_cxx(compiler: Any) -> None:
    """Have C++ compiled by CXX also where setuptools is older than 72.2 and would take CC."""
    if not hasattr(compiler, "compiler_so_cxx"):
        flags = compiler.compiler_so[len(compiler_of(compiler.compiler_so)) :]
        compiler.compiler_so = [*compiler.compiler_cxx, *flags]


class NoCudaError(Exception):
    """Why the CUDA kernels can't be built here."""


@dataclass(frozen=True)
class Cuda:
    """An nvcc that works here, with the host compiler that it calls and the architectures to compile for."""

    nvcc: str
    host: str
    archs: list[str]

    @classmethod
    def find(cls, host: str) -> Cuda:
        """Find nvcc, and try it.

        Raises:
            NoCudaError: there is none, or it can't compile.
            SystemExit: SVAG_CUDA_ARCHS names an architecture that it doesn't know.
        """
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        folders = [str(Path(home, "bin"))] if home else []
        path = os.pathsep.join([*folders, os.environ.get("PATH", os.defpath), *CUDA_FOLDERS])
        nvcc = shutil.which("nvcc", path=path)
        if nvcc is None:
            raise NoCudaError(f"nvcc is neither in $CUDA_HOME/bin nor on the PATH or in {' or '.join(CUDA_FOLDERS)}")
        cuda = cls(nvcc, host, _archs(nvcc))
        cuda.libraries()
        with tempfile.TemporaryDirectory() as folder:
            trial = Path(folder, "trial.cu")
            trial.write_text("#include <cstdint>\n__global__ void trial(int64_t* x) { *x = 1; }\n")
            command = cuda.command(str(trial), str(trial.with_suffix(".o")), cuda.archs[-1:])
            if (done := _output(command)).returncode:
                raise NoCudaError(f"{nvcc}, with the host compiler {host}, can't compile: {_error(done)}")
        return cuda

    def command(self, source: str, target: str, archs: list[str]) -> list[str]:
        """Return the command that compiles a source, with the last architecture's PTX for later GPUs."""
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        host = ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-ccbin", self.host]
        return [self.nvcc, "-std=c++17", "-O3", "-Icsrc", *codes, *host, "-c", source, "-o", target]

    def libraries(self) -> list[str]:
        """Return the folders that hold the static CUDA runtime; NoCudaError where none does."""
        done = _output([self.nvcc, "--dryrun", "-ccbin", self.host, "x.cu"])
        found = re.search(r"^#\$ LIBRARIES=(.*)$", done.stderr, re.MULTILINE)
        if found is None:
            raise NoCudaError(f"{self.nvcc} --dryrun names no libraries: {_error(done)}")
        folders = [word[2:] for word in shlex.split(found[1]) if word.startswith("-L")]
        holding = [folder for folder in folders if Path(folder, "libcudart_static.a").exists()]
        if not holding:
            raise NoCudaError(f"libcudart_static.a is in none of {self.nvcc}'s folders: {', '.join(folders)}")
        return holding


def _archs(nvcc: str) -> list[str]:
    """Return the architectures to compile for, in ascending order: those wanted that nvcc knows."""
    done = _output([nvcc, "--list-gpu-arch"])
    known = re.findall(r"compute_(\d+)", done.stdout)
    if done.returncode or not known:
        raise NoCudaError(f"{nvcc} --list-gpu-arch says nothing of use: {_error(done)}")
    asked = os.environ.get("SVAG_CUDA_ARCHS", "").split()
    # A suffix names a variant of an architecture ("90a"), which not every nvcc lists.
    found = [a for a in asked or ARCHS if re.sub("[af]$", "", a) in known]
    if unknown := [a for a in asked if a not in found]:
        raise SystemExit(
            f"svag_fast: SVAG_CUDA_ARCHS: {nvcc} doesn't know {', '.join(unknown)}; it knows {', '.join(known)}"
        )
    if not found:
        raise NoCudaError(
            f"{nvcc} knows none of {', '.join(ARCHS)}; SVAG_CUDA_ARCHS chooses among its {', '.join(known)}"
        )
    return sorted(set(found), key=lambda a: (int(a.rstrip("af")), a))


def _output(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise NoCudaError(f"{command[0]} can't be run: {error}") from None


def _error(done: subprocess.CompletedProcess[str]) -> str:
    """Return the first line of its output that speaks of an error, or else the last."""
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    found = [line for line in lines if re.search("error|fatal|not found|No such file", line)]
    return [*found, *lines[-1:], f"exit status {done.returncode}"][0]


def choose_cuda(host: str) -> Cuda | None:
    """Return what compiles the CUDA kernels, or None, having said why, for a CPU-only build, as SVAG_CUDA asks."""
    wanted = os.environ.get("SVAG_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"svag_fast: SVAG_CUDA must be auto, 0 or 1, not {wanted!r}")
    reason = "SVAG_CUDA=0"
    if wanted != "0":
        try:
            return Cuda.find(host)
        except NoCudaError as error:
            if wanted == "1":
                raise SystemExit(f"svag_fast: SVAG_CUDA=1, but {error}") from None
            reason = str(error)
    print(f"svag_fast: building the CPU kernels only: {reason}", flush=True)
    return None


class BuildExt(build_ext):
    """Compile each kernel once for every SIMD level, and the CUDA sources with nvcc."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        """Compile every source in one pool, the longest first; link as usual."""
        self._check_tools()
        compile_with_cxx(self.compiler)
        jobs_at_once = max_jobs()
        cuda = choose_cuda(compiler_of(self.compiler.compiler_cxx)[-1])
        self.force = True  # file times do not show a changed SVAG_CUDA or CXX
        if cuda is not None:
            ext.define_macros += [("SVAG_WITH_CUDA", None)]
            ext.extra_link_args += [f"-L{folder}" for folder in cuda.libraries()]
            ext.libraries += ["cudart_static", "rt", "dl", "pthread"]
        with ThreadPoolExecutor(jobs_at_once) as pool:
            jobs = [pool.submit(self._compile_cuda, cuda, source) for source in _longest_first(CUDA) if cuda]
            jobs += [
                pool.submit(self._compile, ext, source, "", _flags(source)) for source in _longest_first(ext.sources)
            ]
            jobs += [
                pool.submit(self._compile_kernel, ext, source, level, flags)
                for source in _longest_first(KERNELS)
                for level, flags in simd_levels().items()
            ]
            done = wait(jobs, return_when=FIRST_EXCEPTION).done
            pool.shutdown(cancel_futures=True)  # after an error the rest is in vain
            for job in done:
                job.result()
        ext.sources, ext.extra_objects = [], [job.result() for job in jobs]
        super().build_extension(ext)

    def _check_tools(self) -> None:
        missing = [p for p in compiler_of(self.compiler.compiler_cxx) if shutil.which(p) is None]
        if missing:
            raise SystemExit(
                f"svag_fast: its C++ kernels need a C++17 compiler, and {missing[0]!r} was not found. "
                "Install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; conda: cxx-compiler) "
                "or name yours in the variable CXX."
            )
        include = Path(sysconfig.get_path("include"))
        if not (include / "Python.h").exists():
            raise SystemExit(
                f"svag_fast: compiling needs Python.h, which is not in {include}. "
                "Install it (Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel)."
            )

    def _compile(self, ext: Pybind11Extension, source: str, folder: str = "", flags: tuple[str, ...] = ()) -> str:
        objects = self.compiler.compile(
            [source],
            output_dir=str(Path(self.build_temp, folder)),
            macros=ext.define_macros,
            include_dirs=ext.include_dirs,
            extra_postargs=[*ext.extra_compile_args, *flags],
        )
        return str(objects[0])

    def _compile_kernel(self, ext: Pybind11Extension, source: str, level: str, flags: list[str]) -> str:
        contract = "fast" if _is_product(source) else "off"
        return self._compile(ext, source, level, (*flags, f"-ffp-contract={contract}", f"-DSVAG_SIMD={level}"))

    def _compile_cuda(self, cuda: Cuda, source: str) -> str:
        target = Path(self.build_temp, "cuda", f"{Path(source).stem}.o")
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(cuda.command(source, str(target), cuda.archs), check=True)
        return str(target)


def _flags(source: str) -> tuple[str, ...]:
    # pybind11's templates are a quarter of the build's CPU time, and no loop of ours is among them: 13.8 s become 11.5,
    # a step over 34 one-element tensors costs 1.5 % more on the host.
    return ("-O1",) if Path(source).name == "bindings.cpp" else ()


def _is_product(source: str) -> bool:
    return not PRODUCTS.isdisjoint(Path(source).with_suffix("").parts)


def _longest_first(sources: list[str]) -> list[str]:
    """Return the sources in the order in which a pool is done soonest: what is long takes long to compile."""

    # A product is a short file, whose headers hold a template for each size of tile.
    def key(source: str) -> tuple[bool, int]:
        return not _is_product(source), -Path(source).stat().st_size

    return sorted(sources, key=key)


if __name__ == "__main__":
    settle_cxx()
    setup(
        ext_modules=[
            Pybind11Extension(
                "svag_fast._C",
                COMMON,
                include_dirs=["csrc"],
                extra_compile_args=CXX_FLAGS,
                extra_link_args=["-pthread", NO_FAST_MATH, f"-Wl,--version-script={EXPORTS}"],
                cxx_std=17,
            )
        ],
        cmdclass={"build_ext": BuildExt},
    )
