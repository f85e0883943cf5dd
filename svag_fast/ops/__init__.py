"""Fused operations: each file holds one op with its checks, its reference in PyTorch and its backends."""

from svag_fast.ops.step import StepStats, svag_coefficients, svag_step_

__all__ = ["StepStats", "svag_coefficients", "svag_step_"]
