"""Estimators of the gradient noise: G = |∇L|² and N = Tr Σ, each with its error."""

from svag_fast.noise.estimators import (
    BatchMoments,
    MeanError,
    NoiseEstimate,
    RunningMean,
    from_batches,
    from_sample_norms,
    from_two_batches,
    from_two_batches_of_samples,
    mean_standard_error,
)
from svag_fast.noise.running import RunningNoise

__all__ = [
    "BatchMoments",
    "MeanError",
    "NoiseEstimate",
    "RunningMean",
    "RunningNoise",
    "from_batches",
    "from_sample_norms",
    "from_two_batches",
    "from_two_batches_of_samples",
    "mean_standard_error",
]
