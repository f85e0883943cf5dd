"""svag_fast: fused SVAG steps, gradient-noise measurement, and the theory of SGD as an SDE, for PyTorch."""

from __future__ import annotations

import importlib
from typing import Any

from svag_fast import moved

__version__ = "0.1.0"

moved.install()

# Public name -> the module that defines it, imported when the name is first used.
_LAZY: dict[str, str] = {
    "SVAGAdam": "svag_fast.optim.adaptive",
    "SVAGRMSprop": "svag_fast.optim.adaptive",
    "RunningMean": "svag_fast.noise.estimators",
    "RunningNoise": "svag_fast.noise.running",
    "SampleNorms": "svag_fast.sample_norms.context",
    "UnsupportedModule": "svag_fast.sample_norms.context",
    "by_vmap": "svag_fast.sample_norms.context",
    "Independence": "svag_fast.nn.independence",
    "check_independence": "svag_fast.nn.independence",
    "mean_standard_error": "svag_fast.noise.estimators",
    "SVAG": "svag_fast.optim.svag",
    "svag_loss": "svag_fast.optim.svag",
    "pair_pass": "svag_fast.nn.pair_pass",
    "per_sample_sq_norms": "svag_fast.sample_norms.context",
    "register_rule": "svag_fast.sample_norms.context",
    "StepStats": "svag_fast.ops.step",
    "backend": "svag_fast.ops.backends",
    "svag_coefficients": "svag_fast.ops.step",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
