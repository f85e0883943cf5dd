"""Compile device.cpp with torch's headers, or take what was compiled of the same source for the same torch."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import sysconfig
from pathlib import Path

import torch
from cuda_on_host.build import alone

SOURCE = Path(__file__).parent / "device.cpp"
# Not optimised: it computes nothing, and g++ takes torch's headers twice as long otherwise.
FLAGS = ["-std=c++20", "-O0", "-fPIC", "-shared", "-w"]


def build(cache: Path, compiler: list[str]) -> Path:
    """Return the library of the device, built in ``cache``; a subprocess.CalledProcessError says why it can't be."""
    home = Path(torch.__file__).parent
    includes = [home / "include", home / "include/torch/csrc/api/include", sysconfig.get_paths()["include"]]
    command = [*compiler, *FLAGS, *(f"-I{path}" for path in includes), str(SOURCE)]
    command += [f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10"]
    told = repr((command, torch.__version__, platform.python_version())).encode()
    target = cache / f"device-{hashlib.sha256(told + SOURCE.read_bytes()).hexdigest()[:16]}.so"
    with alone(cache):
        if not target.exists():
            for outdated in cache.glob("device-*.so"):
                outdated.unlink()
            partial = target.with_suffix(".partial")
            subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True, check=True)
            partial.rename(target)
    return target


def compiler_of(environment: dict[str, str] | os._Environ[str] = os.environ) -> list[str]:
    """The compiler that the environment names, as for the package itself."""
    return shlex.split(environment.get("CXX", "g++"))
