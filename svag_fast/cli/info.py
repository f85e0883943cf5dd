"""`svag-fast info` (= `python -m svag_fast.cli.info`): what this machine runs svag_fast with, to read or to report.

It works wherever Python does: what can't be found out is said with its reason in place of the value.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rich_click as click

from svag_fast.versions import package_version

PACKAGES = ("torch", "triton", "numpy", "scipy", "scikit-learn", "matplotlib", "tensorboard", "torchsde")


def collect() -> dict[str, Any]:
    """Return all that `svag-fast info` prints, as plain values ready for JSON."""
    return {
        "svag_fast": _or_reason(_package),
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "cpu": _or_reason(_cpu),
        "threads": _or_reason(_threads),
        "cuda": _or_reason(_cuda),
        "devices": _or_reason(_devices),
        "backends": _or_reason(_backends),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(("SVAG_", "TRITON_", "CUDA_VIS"))},
    }


def _or_reason(section: Callable[[], Any]) -> Any:
    # A half-broken installation is what this report is for: no section may take the others with it.
    try:
        return section()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _package() -> dict[str, Any]:
    import svag_fast

    return {"version": svag_fast.__version__, "path": str(Path(svag_fast.__file__).parent)}


def _cpu() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    usable = _or_reason(_usable_cores)
    return {"model": model, "cores": os.cpu_count(), "usable_cores": usable, "simd": _or_reason(_simd)}


def _usable_cores() -> int:
    from svag_fast.experiments.config import cores

    return cores()


def _simd() -> dict[str, Any]:
    from svag_fast import _C

    return {"level": _C.simd_level(), "best": _C.best_simd_level()}


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _cuda() -> dict[str, Any]:
    import torch

    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [*([f"{home}/bin"] if home else []), os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(places))  # where setup.py looks
    version = None
    if nvcc is not None:
        lines = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=30).stdout.splitlines()
        version = next((line.split("release ")[1].split(",")[0] for line in lines if "release " in line), None)
    return {"driver": _driver(), "torch_built_with": torch.version.cuda, "nvcc": version}


def _driver() -> str | None:
    """Return the newest CUDA version that the driver serves, or None without a driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    status = library.cuDriverGetVersion(ctypes.byref(version))
    if status != 0:
        raise RuntimeError(f"cuDriverGetVersion returned status {status}")
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _devices() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {"name": d.name, "capability": f"{d.major}.{d.minor}", "memory_gib": round(d.total_memory / 2**30, 1)}
        for d in devices
    ]


def _backends() -> list[dict[str, Any]]:
    from svag_fast.ops.backends import BACKENDS, ops_of

    rows = []
    for name, backend in BACKENDS.items():
        try:
            why_not = backend.why_unavailable()
        except Exception as error:
            why_not = str(error)
        rows.append({"name": name, "available": why_not is None, "why_not": why_not, "ops": ops_of(name)})
    return rows


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k.replace('_', ' ')} {_inline(v)}" for k, v in value.items()) or "none"
    return "none" if value is None else str(value)


def _print(info: dict[str, Any]) -> None:
    for key, value in info.items():
        if key == "backends" and isinstance(value, list):
            continue
        if key == "environment":
            value = ", ".join(f"{k}={v}" for k, v in value.items()) or None
        if isinstance(value, list):
            for item in value or ["none"]:
                click.echo(f"{key:<12}{_inline(item)}")
        else:
            click.echo(f"{key:<12}{_inline(value)}")
    if isinstance(info["backends"], list):
        click.echo('\nbackends, in the order in which backend="auto" asks them:')
        for row in info["backends"]:
            state = click.style("yes" if row["available"] else "no ", fg="green" if row["available"] else "red")
            click.echo(f"  {row['name']:<11}{state}  {row['why_not'] or ', '.join(row['ops'])}")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def main(as_json: bool) -> None:
    """Print versions, processor, devices, and every backend with the reason where it isn't available."""
    info = collect()
    if as_json:
        click.echo(json.dumps(info, indent=2))
    else:
        _print(info)


if __name__ == "__main__":
    from svag_fast.cli.main import spell_out_letters

    spell_out_letters()
    main(prog_name="python -m svag_fast.cli.info")
