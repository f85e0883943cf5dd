"""Estimators of the gradient noise: G = |∇L|² and N = Tr Σ, each with its error."""

from typing import TYPE_CHECKING, Any

from svag_fast import moved
from svag_fast.noise.estimators import (
    BatchMoments,
    NoiseEstimate,
    from_batches,
    from_sample_norms,
    from_two_batches,
    from_two_batches_of_samples,
)
from svag_fast.noise.running import RunningNoise
from svag_fast.noise.running_mean import RunningMean, mean_standard_error
from svag_fast.stats.estimate import Estimate

__all__ = [
    "BatchMoments",
    "Estimate",
    "NoiseEstimate",
    "RunningMean",
    "RunningNoise",
    "from_batches",
    "from_sample_norms",
    "from_two_batches",
    "from_two_batches_of_samples",
    "mean_standard_error",
]


if not TYPE_CHECKING:  # else a type checker would take every unknown name for Any

    def __getattr__(name: str) -> Any:
        return moved.old_name(__name__, {"MeanError": "Estimate"}, name)
