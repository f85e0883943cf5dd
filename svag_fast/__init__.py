"""svag_fast: fused SVAG steps, gradient-noise measurement, and the theory of SGD as an SDE, for PyTorch."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> the module that defines it, imported when the name is first used.
_LAZY: dict[str, str] = {
    "SVAGAdam": "svag_fast.adaptive",
    "SVAGRMSprop": "svag_fast.adaptive",
    "RunningMean": "svag_fast.noise",
    "RunningNoise": "svag_fast.running_noise",
    "SampleNorms": "svag_fast.sample_norms",
    "UnsupportedModule": "svag_fast.sample_norms",
    "by_vmap": "svag_fast.sample_norms",
    "mean_standard_error": "svag_fast.noise",
    "SVAG": "svag_fast.optim",
    "svag_loss": "svag_fast.optim",
    "per_sample_sq_norms": "svag_fast.sample_norms",
    "register_rule": "svag_fast.sample_norms",
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
