"""Runs backend ``cuda`` by nvcc's PTX: the host code that nvcc makes as it is, each launch by the simulator.

The launches' tensors are known from the call's own descriptors: whatever else a kernel touches is a fault.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import math
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from cuda_on_host.backend import KERNEL_SOURCES, cuda_on_host
from cuda_on_host.build import CSRC, ROOT, alone
from ptx.memory import FaultError
from ptx.parser import Program, parse
from ptx.simulator import Part, Simulator
from setup_module import load_setup

RUNTIME = Path(__file__).parent / "runtime.cpp"
ARCH = "80"
_BYTES = (4, 8, 2, 2)  # of csrc/tensor_list.h's dtypes
_LAUNCH_FAILURE = 719
_LAUNCHED = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    *[ctypes.POINTER(ctypes.c_uint)] * 2,
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
)


@cache
def why_unavailable() -> str | None:
    """Why nothing can be compiled here, or None."""
    try:
        _cuda()
    except _setup().NoCudaError as error:
        return str(error)
    return None


_setup = cache(load_setup)


@cache
def _cuda() -> Any:
    """What setup.py compiles with."""
    return _setup().Cuda.find("g++")


class PtxKernels:
    """CUDA sources compiled by nvcc for sm_80, without its machine code. ``run`` calls an ``extern "C"`` function.

    In the place of :class:`cuda_on_host.build.HostKernels`.
    """

    def __init__(self, sources: list[Path], cache: Path) -> None:
        folder = _build(sources, cache)
        self.library = ctypes.CDLL(str(folder / "kernels.so"))
        self.ptx = "\n".join(path.read_text() for path in sorted(folder.glob("*.ptx")))
        self.launches: list[tuple[int, int, int, int]] = []
        """Device, stream, blocks and threads of each."""
        self.simulator, self.spans = Simulator(), list[Part]()
        self._error: Exception | None = None
        self._callback = _LAUNCHED(self._launched)
        self.library.set_launched(self._callback)

    def run(self, function: str, *arguments: Any) -> int:
        """Call one of the steps' functions and return its status; raises what the simulator found wrong."""
        self.spans = _spans(self, *arguments)
        return self.call(function, *arguments)

    def call(self, function: str, *arguments: Any) -> int:
        """Call any function, whose launches may touch ``spans``."""
        status: int = getattr(self.library, function)(*arguments)
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return status

    def _launched(self, name: bytes, grid: Any, block: Any, device: int, stream: int | None, arguments: Any) -> int:
        try:
            program = _program(self.ptx, name.decode())
            if block[1] != 1 or block[2] != 1 or block[0] > (program.threads or 1024):
                raise FaultError(f"{program.name}: {block[:3]} threads, {program.threads} at most")
            self.launches.append((device, stream or 0, math.prod(grid[:3]), block[0]))
            values = [ctypes.string_at(arguments[k], p.size) for k, p in enumerate(program.parameters)]
            kernel = re.findall(r"\d([a-z_]+_kernel)", program.name)
            program = replace(program, threads=block[0])
            self.simulator.run(kernel[-1] if kernel else program.name, program, tuple(grid[:3]), values, self.spans)
        except Exception as error:  # raised again by whoever called the library: C can't pass it on
            self._error = self._error or error
            return _LAUNCH_FAILURE
        return 0


def _spans(kernels: PtxKernels, tensors: Any, count: Any, options: Any) -> list[Part]:
    """What a step may touch: its lists, and what its options point to. Nothing wrote its workspace and results."""
    options = options._obj
    replicas, samples = getattr(options, "replicas", 1), getattr(options, "samples1", None)
    rows = (1, replicas, replicas) if samples is None else (1, samples, options.samples2)
    found: list[Part] = []
    sizes = [t.size for t in tensors]
    for t in tensors:
        param, grad, wide = _BYTES[t.param_dtype], _BYTES[t.grad_dtype], 8 if t.param_dtype == 1 else 4
        for name, number, size in (
            ("param", replicas, param),
            ("grad1", rows[1], grad),
            ("grad2", rows[2], grad),
            ("compensation", replicas, 4),
            ("momentum", replicas, wide),
        ):
            if getattr(t, name):
                found.append((name, getattr(t, name), number * t.size * size, None))
    lengths = (ctypes.c_int64 * len(sizes))(*sizes)
    if samples is None:
        size = kernels.library.svag_step_cuda_workspace
        size.restype = ctypes.c_int64
        workspace = replicas * size(lengths, count)
        read = (("coefficients", options.device_coefficients, 56 * replicas), ("scale", options.scale, 4))
        found += [(name, a, n, None) for name, a, n in (*read, ("found_inf", options.found_inf, 4)) if a]
        results = [("stats", options.stats, 40 * replicas)]
    else:
        size = kernels.library.svag_step_per_sample_cuda_workspace
        size.restype = ctypes.c_int64
        dtypes = (ctypes.c_int * len(sizes))(*(t.param_dtype for t in tensors))
        samples += options.samples2
        workspace = size(lengths, dtypes, count, ctypes.c_int64(samples))
        results = [("stats", options.stats, 40), ("sq_norms", options.sq_norms, 8 * samples)]
    results.append(("workspace", options.workspace, 8 * workspace))
    return found + [(name, a, n, np.zeros(n, bool)) for name, a, n in results if a]


@contextlib.contextmanager
def running(kernels: PtxKernels, simulator: Simulator) -> Iterator[None]:
    """Let backend ``cuda`` take CPU tensors while the block runs, its launches by ``simulator``."""
    kernels.simulator = simulator
    with cuda_on_host(kernels):  # type: ignore[arg-type]
        yield


def load(cache: Path) -> PtxKernels:
    """Compile every CUDA kernel of the project."""
    return PtxKernels([s for s in KERNEL_SOURCES if "__global__" in s.read_text()], cache)


def _build(sources: list[Path], cache: Path) -> Path:
    """Return the folder of the PTX and of the host's library, from the cache if nothing has changed."""
    cuda = _cuda()
    headers = [*CSRC.glob("*.h"), *(CSRC / "cuda").glob("*.*h")]
    digest = hashlib.sha256(repr(_command(cuda, "", "")).encode())
    for path in sorted([*headers, *sources, RUNTIME, ROOT / "setup.py"]):
        digest.update(path.read_bytes())
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / f"ptx-{digest.hexdigest()[:16]}"
    with alone(cache), ThreadPoolExecutor(2) as pool:
        if not target.exists():
            partial = target.with_suffix(".partial")
            partial.mkdir(exist_ok=True)
            objects = list(pool.map(lambda source: _compile(cuda, source, partial), [*sources, RUNTIME]))
            command = ["g++", "-shared", "-Wl,-Bsymbolic", *objects, "-o", str(partial / "kernels.so")]
            subprocess.run(command, check=True)
            partial.rename(target)
    return target


def _command(cuda: Any, source: str, target: str) -> list[str]:
    """Return setup.py's own, but to no machine code, and with functions that can be called from outside."""
    words = [word for word in cuda.command(source, target, [ARCH]) if "code=sm_" not in word]
    return [word.replace(",-fvisibility=hidden", "") for word in words]


def _compile(cuda: Any, source: Path, folder: Path) -> str:
    """Compile to an object; the PTX is kept beside it."""
    target = str(folder / f"{source.stem}.o")
    keep = ["--keep", "--keep-dir", str(folder)] if source.suffix == ".cu" else []
    subprocess.run([*_command(cuda, str(source), target), *keep], check=True, cwd=ROOT)
    for path in folder.glob(f"{source.stem}.[!po]*"):  # what nvcc kept besides
        path.unlink()
    return target


@lru_cache(maxsize=64)
def _program(ptx: str, kernel: str) -> Program:
    return parse(ptx, re.escape(kernel))
