"""What the GPU report runs on: device, driver, versions, commit, and where CUDA's programs are.

python bench/gpu/gpu_machine.py [COMMIT]     prints it as JSON
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Where CUDA's programs are on machines that don't have them on the PATH.
TOOLS = [
    "/usr/local/cuda/bin",
    "/usr/local/cuda/compute-sanitizer",
    "/usr/local/cuda-*/bin",
    "/opt/nvidia/nsight-compute/*",
]


def search_path() -> str:
    """CUDA_HOME's programs, as setup.py prefers them, the PATH, and the folders where CUDA's programs usually are."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = [str(f) for pattern in TOOLS for f in sorted(Path("/").glob(pattern.lstrip("/")), reverse=True)]
    return os.pathsep.join([*([f"{home}/bin"] if home else []), os.environ.get("PATH", os.defpath), *found])


def identity(commit: str | None) -> dict[str, Any]:
    """What runs the report: device, driver, versions, commit."""
    import torch

    def says(*command: str) -> str | None:
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() or None

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    gpu = torch.cuda.is_available()
    properties = torch.cuda.get_device_properties(0) if gpu else None
    head, changed = says("git", "rev-parse", "HEAD"), says("git", "status", "--porcelain")
    smi = says(
        "nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit", "--format=csv,noheader"
    )
    nvcc = shutil.which("nvcc", path=search_path())
    nvcc_version = re.search(r"V(\d[\d.]+)", says(nvcc, "--version") or "") if nvcc else None
    return {
        "device": properties.name if properties else "no GPU",
        "capability": f"{properties.major}.{properties.minor}" if properties else None,
        "multiprocessors": properties.multi_processor_count if properties else None,
        "memory, GB": round(properties.total_memory / 1e9, 1) if properties else None,
        "L2 cache, MB": round(properties.L2_cache_size / 1e6, 1) if properties else None,
        "driver, clocks, power limit": smi.splitlines()[0] if smi else None,
        "torch": torch.__version__,
        "torch's CUDA": torch.version.cuda,
        "triton": version("triton"),
        "nvcc": f"{nvcc_version[1]} ({nvcc})" if nvcc_version else "not found",
        "pybind11": version("pybind11") or "not installed: torch's headers",
        "python": platform.python_version(),
        "commit": commit or (f"{head}{' with changes' if changed else ''}" if head else "not a git checkout"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def asked_identity(commit: str | None) -> dict[str, Any]:
    """The same from a process of its own: a driver that hangs must not hang the report."""
    command = [sys.executable, __file__, *([commit] if commit else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=90)
    except subprocess.TimeoutExpired:
        raise SystemExit("torch or the GPU's driver gave no answer in 90 s") from None
    if done.returncode:
        raise SystemExit(f"{sys.executable} can't say what it runs on:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    print(json.dumps(identity(sys.argv[1] if len(sys.argv) > 1 else None)))
