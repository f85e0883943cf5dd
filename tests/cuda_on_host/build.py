"""Compile CUDA sources with g++ so that the CPU runs them, and load the result."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
RUNTIME = HERE / "runtime.cpp"
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"

# "race": every access goes to runtime.cpp's race detector; it answers the calls that -fsanitize=thread puts in.
# "address": AddressSanitizer, which the process has to preload (see asan_environment). Optimising what it puts in
# takes g++ three times as long as the whole compilation without.
MODES = {
    "race": ["-fsanitize=thread"],
    "address": ["-fsanitize=address,alignment,bounds", "-fno-sanitize-recover=all", "-O0"],
}
# Where the checkout is does not matter: one in another place may take over what was built here.
NAMED = "/svag_fast"
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fno-gnu-unique", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]


class CudaOnHostError(AssertionError):
    """The harness found a fault in a kernel; the message lists what and where."""


class HostKernels:
    """A library of kernels built for the host. ``run`` calls one of its ``extern "C"`` functions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path))
        self.library.cuda_on_host_take_report.restype = ctypes.c_char_p
        self.library.cuda_on_host_take_launches.restype = ctypes.c_int64
        self.library.cuda_on_host_set_order.argtypes = [ctypes.c_int, ctypes.c_uint64]

    def set_order(self, order: str, seed: int = 0) -> None:
        """Choose in which order blocks and threads run: "forward", "reversed" or "shuffled"."""
        self.library.cuda_on_host_set_order(["forward", "reversed", "shuffled"].index(order), seed)

    def run(self, function: str, *arguments: object) -> int:
        """Call a function and return its status; raise CudaOnHostError where the harness found a fault."""
        status: int = getattr(self.library, function)(*arguments)
        self.check()
        return status

    def check(self) -> None:
        """Raise CudaOnHostError if a fault was found since the last check."""
        report = self.library.cuda_on_host_take_report().decode()
        if report:
            report = re.sub(r"@(0x[0-9a-f]+)", lambda m: self._source_line(m[1]), report)
            raise CudaOnHostError(report.replace(f"{NAMED}/", ""))

    def launches(self) -> list[tuple[int, int, int, int]]:
        """Return the launches since the last call as (device, stream, blocks, threads a block)."""
        rows = (ctypes.c_int64 * 4 * 1000)()
        count = self.library.cuda_on_host_take_launches(ctypes.byref(rows), 1000)
        return [tuple(row) for row in rows[:count]]  # type: ignore[misc]

    def device(self) -> int:
        """Return the current CUDA device."""
        device = ctypes.c_int()
        self.library.cuda_on_host_get_device(ctypes.byref(device))
        return device.value

    def _source_line(self, offset: str) -> str:
        command = ["addr2line", "-e", str(self.path), offset]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]


def build(sources: list[Path], mode: str, cache: Path) -> Path:
    """Build a shared library from .cu and .cpp sources, or take the one in the cache if nothing has changed."""
    cache.mkdir(parents=True, exist_ok=True)
    with alone(cache), ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: _compile(source, mode, cache), [*sources, RUNTIME]))
        digest = hashlib.sha256("".join(path.name for path in objects).encode()).hexdigest()[:16]
        target = cache / f"{sources[0].stem}-{mode}-{digest}.so"
        if not target.exists():
            link = MODES[mode] if mode == "address" else []
            partial = target.with_suffix(".partial")
            command = ["g++", "-shared", *link, "-Wl,-Bsymbolic", *map(str, objects), "-o", str(partial)]
            subprocess.run(command, check=True)
            partial.rename(target)
    return target


def _compile(source: Path, mode: str, cache: Path) -> Path:
    """Return the object of one source, named by all that it is made of."""
    # The detector itself must not be watched; AddressSanitizer has to know about its fibers.
    flags = [*FLAGS, *([] if mode == "race" and source == RUNTIME else MODES[mode])]
    headers = sorted([*HERE.rglob("*.h"), *CSRC.glob("*.h"), *(CSRC / "cuda").glob("*.*h")])
    digest = hashlib.sha256(repr((flags, os.path.relpath(source, ROOT))).encode())
    for path in [*headers, source]:
        digest.update(path.read_bytes())
    target = cache / f"{source.stem}-{digest.hexdigest()[:16]}.o"
    if not target.exists():
        partial = target.with_suffix(".partial")
        places = [f"-I{HERE / 'include'}", f"-I{CSRC}", f"-ffile-prefix-map={ROOT}={NAMED}"]
        command = ["g++", *flags, *places, "-x", "c++", "-c", str(source), "-o", str(partial)]
        subprocess.run(command, check=True)
        partial.rename(target)
    return target


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Let one process at a time make what is in ``folder``: the workers of `make test` share it."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def asan_environment() -> dict[str, str]:
    """Return the variables under which a process can load a library built in the mode "address"."""
    # The C++ library right behind the sanitizer: it looks there, once, for the `throw` that it wraps, and the first
    # exception in a process that began without (Python's own did) would abort it.
    paths = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    options = "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=1"
    return {"LD_PRELOAD": " ".join(paths), "ASAN_OPTIONS": options}
