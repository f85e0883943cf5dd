"""Old module paths and names, served for one release with a DeprecationWarning that names the new one."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any

# Old path under svag_fast -> the new one. Paths that are packages now, such as svag_fast.theory, keep their names.
MOVED = {
    "adaptive": "optim.adaptive",
    "checkpoint": "experiments.checkpoint",
    "config": "experiments.config",
    "convergence_plot": "plots.convergence",
    "curves": "analysis.runs",
    "data": "experiments.data",
    "equilibrium": "theory.equilibrium",
    "estimate": "stats.estimate",
    "grad_lists": "optim.grad_lists",
    "group_options": "optim.group_options",
    "held_gradient": "optim.held_gradient",
    "info": "cli.info",
    "limit_fit": "stats.limit_fit",
    "loaded_state": "optim.loaded_state",
    "margins": "analysis.margins",
    "models": "experiments.models",
    "ops.cpu_layout": "ops.weight_grad.cpu_layout",
    "ops.layer_product": "ops.weight_grad.shapes",
    "ops.weight_grad_cpu": "ops.weight_grad.cpu",
    "ops.weight_grad_triton": "ops.weight_grad.triton",
    "ops.weight_gram_cpu": "ops.weight_grad.gram_cpu",
    "optimizer_methods": "optim.optimizer_methods",
    "phases": "analysis.phases",
    "predict": "analysis.prediction",
    "predict_command": "cli.predict",
    "predict_figure": "plots.prediction",
    "report": "analysis.report",
    "run_command": "cli.run",
    "run_folder": "experiments.run_folder",
    "run_output": "experiments.run_output",
    "running_noise": "noise.running",
    "sample_norm_checks": "sample_norms.checks",
    "sample_norm_dispatch": "sample_norms.dispatch",
    "sample_norm_products": "sample_norms.layers.products",
    "sample_norm_rules": "sample_norms.rule",
    "sample_norm_tables": "sample_norms.tables",
    "sample_norm_tape": "sample_norms.tape",
    "sample_norm_watch": "sample_norms.watch",
    "scaling_rules": "theory.scaling_rules",
    "sde.affine": "sde.problems.affine",
    "sde.circle_toy": "sde.problems.circle",
    "sde.network": "sde.problems.network",
    "sde.problem": "sde.problems.base",
    "sde.regression": "sde.problems.regression",
    "sde.scale_invariant": "sde.problems.scale_invariant",
    "series": "stats.series",
    "tail_index": "theory.tail_index",
    "training": "experiments.training",
    "two_batch": "optim.two_batch",
    "two_batches": "experiments.gradients",
    "verdict": "analysis.verdict",
    "verdict_text": "analysis.verdict_text",
    "verify.battery": "verify.suite",
    "verify.command": "cli.verify",
    "verify.figure": "plots.verification",
    "verify.norms": "verify.equilibrium",
}


class _Alias(Loader):
    """Gives the module at the new path itself: its classes exist once."""

    def __init__(self, new: str) -> None:
        self.new = new

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Import the new path."""
        warnings.warn(
            f"{spec.name} is {self.new} now: the old path goes with the next release", DeprecationWarning, stacklevel=2
        )
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


def old_name(module: str, names: Mapping[str, str], name: str) -> Any:
    """Serve ``name`` from the ``__getattr__`` of a module some of whose names have changed.

    Args:
        module: the module's ``__name__``.
        names: old name -> the new one, in the same module.
        name: what was asked for.

    Raises:
        AttributeError: it is no old name either.
    """
    if name not in names:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    new = names[name]
    warnings.warn(f"{module}.{name} is {new} now; the old name goes in 0.3", DeprecationWarning, stacklevel=3)
    return getattr(sys.modules[module], new)
