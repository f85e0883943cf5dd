"""svag_fast: fused SVAG steps, gradient-noise measurement, and the theory of SGD as an SDE, for PyTorch."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from svag_fast import moved

if TYPE_CHECKING:  # the names of _LAZY and _MODULES, for editors and type checkers
    from svag_fast import augment as augment
    from svag_fast.experiments.task import Task as Task
    from svag_fast.nn.independence import Independence as Independence
    from svag_fast.nn.independence import check_independence as check_independence
    from svag_fast.nn.pair_pass import pair_pass as pair_pass
    from svag_fast.noise.running import RunningNoise as RunningNoise
    from svag_fast.noise.running_mean import RunningMean as RunningMean
    from svag_fast.noise.running_mean import mean_standard_error as mean_standard_error
    from svag_fast.ops.backends import use_backend as use_backend
    from svag_fast.ops.step import svag_coefficients as svag_coefficients
    from svag_fast.ops.step_stats import StepStats as StepStats
    from svag_fast.optim.adaptive import SVAGAdam as SVAGAdam
    from svag_fast.optim.adaptive import SVAGRMSprop as SVAGRMSprop
    from svag_fast.optim.svag import SVAG as SVAG
    from svag_fast.optim.svag import svag_loss as svag_loss
    from svag_fast.replicas.module import Replicas as Replicas
    from svag_fast.sample_norms.context import SampleNorms as SampleNorms
    from svag_fast.sample_norms.context import UnsupportedModuleError as UnsupportedModuleError
    from svag_fast.sample_norms.context import by_vmap as by_vmap
    from svag_fast.sample_norms.context import per_sample_sq_norms as per_sample_sq_norms
    from svag_fast.sample_norms.context import register_rule as register_rule
    from svag_fast.studies import study as study

__version__ = "0.1.0"

if importlib.util.find_spec("svag_fast.kernels") is None:  # they are elsewhere in the sources
    raise ImportError(
        f"this svag_fast, in {__path__[0]}, is the source folder: nothing is compiled there, and it hides an installed "
        "svag_fast. Start Python in another folder, or install with `pip install -e .`"
    )

moved.install()

# Public name -> the module that defines it, imported when the name is first used.
_LAZY: dict[str, str] = {
    "SVAGAdam": "svag_fast.optim.adaptive",
    "SVAGRMSprop": "svag_fast.optim.adaptive",
    "RunningMean": "svag_fast.noise.running_mean",
    "RunningNoise": "svag_fast.noise.running",
    "SampleNorms": "svag_fast.sample_norms.context",
    "Task": "svag_fast.experiments.task",
    "UnsupportedModuleError": "svag_fast.sample_norms.context",
    "by_vmap": "svag_fast.sample_norms.context",
    "Independence": "svag_fast.nn.independence",
    "check_independence": "svag_fast.nn.independence",
    "mean_standard_error": "svag_fast.noise.running_mean",
    "SVAG": "svag_fast.optim.svag",
    "svag_loss": "svag_fast.optim.svag",
    "pair_pass": "svag_fast.nn.pair_pass",
    "per_sample_sq_norms": "svag_fast.sample_norms.context",
    "Replicas": "svag_fast.replicas.module",
    "register_rule": "svag_fast.sample_norms.context",
    "study": "svag_fast.studies",
    "StepStats": "svag_fast.ops.step_stats",
    "svag_coefficients": "svag_fast.ops.step",
    "use_backend": "svag_fast.ops.backends",
}

# Modules that need no import of their own: svag_fast.augment.crop_flip.
_MODULES = ("augment",)

_RENAMED = {"UnsupportedModule": "UnsupportedModuleError", "backend": "use_backend"}

__all__ = ["__version__", *_LAZY]


if not TYPE_CHECKING:  # else a type checker would take every unknown name for Any

    def __getattr__(name: str) -> Any:
        if name in _LAZY:
            value = getattr(importlib.import_module(_LAZY[name]), name)
            globals()[name] = value
            return value
        if name in _MODULES:
            return importlib.import_module(f"svag_fast.{name}")
        return moved.old_name(__name__, _RENAMED, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_MODULES})
