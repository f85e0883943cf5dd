"""Old module paths, served for one release with a DeprecationWarning that names the new one."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType

# Old path under svag_fast -> the new one. svag_fast.theory and others that are packages now hold their names as before.
MOVED = {
    "adaptive": "optim.adaptive",
    "config": "experiments.config",
    "data": "experiments.data",
    "equilibrium": "theory.equilibrium",
    "estimate": "stats.estimate",
    "info": "cli.info",
    "models": "experiments.models",
    "predict": "analysis.prediction",
    "report": "analysis.report",
    "running_noise": "noise.running",
    "scaling_rules": "theory.scaling_rules",
    "series": "stats.series",
    "tail_index": "theory.tail_index",
    "training": "experiments.training",
    "verdict": "analysis.verdict",
}


class _Alias(Loader):
    """Gives the module at the new path itself: its classes exist once."""

    def __init__(self, new: str) -> None:
        self.new = new

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Import the new path."""
        warnings.warn(f"{spec.name} is {self.new} now; the old path goes in 0.3", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(self.new)
        self.own_spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to run; importlib has put the old path's spec into the module: undo that."""
        module.__spec__ = self.own_spec

    def get_code(self, name: str) -> CodeType | None:
        """Return the new path's code, for ``python -m`` of the old one."""
        loader = importlib.util.find_spec(self.new).loader  # type: ignore[union-attr]
        return loader.get_code(self.new)  # type: ignore[union-attr, no-any-return]


class Finder(MetaPathFinder):
    """Finds the old paths, once everything else has not."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of an old path, None for anything else."""
        package, _, old = name.partition(".")
        if package != "svag_fast" or old not in MOVED:
            return None
        return ModuleSpec(name, _Alias(f"svag_fast.{MOVED[old]}"))


def install() -> None:
    """Serve the old paths from now on."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.append(Finder())
