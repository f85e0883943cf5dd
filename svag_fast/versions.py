"""The versions of installed packages, found out without importing them."""

from __future__ import annotations

import importlib.metadata
import runpy
from pathlib import Path


def package_version(name: str) -> str | None:
    """Return the version that a package states of itself (its ``__version__``), or None where it is not installed.

    torch's metadata leaves out which build it is; its own file says it: ``2.14.1+cu130``, ``2.14.1+cpu``.
    """
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    stated = Path(str(distribution.locate_file("torch/version.py")))
    if name == "torch" and stated.exists():
        return str(runpy.run_path(str(stated))["__version__"])
    return distribution.version
