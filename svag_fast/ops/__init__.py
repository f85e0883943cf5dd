"""Fused operations: each file holds one op with its checks, its reference in PyTorch and its backends."""

import contextlib

from svag_fast.ops.adaptive_step import svag_adaptive_step_
from svag_fast.ops.affine_walk import AffineStep, affine_walk_
from svag_fast.ops.norm_relu import norm_relu
from svag_fast.ops.philox_normal import philox_normal_
from svag_fast.ops.step import svag_step_
from svag_fast.ops.step_options import svag_coefficients
from svag_fast.ops.step_per_sample import PerSampleStep, svag_step_per_sample_
from svag_fast.ops.step_replicas import svag_replicas_step_
from svag_fast.ops.step_stats import StepStats
from svag_fast.ops.weight_grad.op import WeightGrad, weight_grad_and_sq_norms
from svag_fast.ops.weight_step import svag_weight_step_

with contextlib.suppress(ImportError):  # said when a backend needs it; loaded now, so that it sees every later fork
    import svag_fast._C  # noqa: F401

__all__ = [
    "AffineStep",
    "PerSampleStep",
    "StepStats",
    "WeightGrad",
    "affine_walk_",
    "norm_relu",
    "philox_normal_",
    "svag_adaptive_step_",
    "svag_coefficients",
    "svag_replicas_step_",
    "svag_step_",
    "svag_step_per_sample_",
    "svag_weight_step_",
    "weight_grad_and_sq_norms",
]
