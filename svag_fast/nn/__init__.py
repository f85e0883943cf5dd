"""Layers and contexts that take both batches of a SVAG step through a model at once."""

from __future__ import annotations

from svag_fast.nn.fuse import FusedSequential, fuse_, norm_then_relu, unfuse_
from svag_fast.nn.pair_batch_norm import (
    CoupledSamples,
    PairBatchNorm1d,
    PairBatchNorm2d,
    PairBatchNorm3d,
    pair_,
    unpair_,
)

__all__ = [
    "CoupledSamples",
    "FusedSequential",
    "PairBatchNorm1d",
    "PairBatchNorm2d",
    "PairBatchNorm3d",
    "fuse_",
    "norm_then_relu",
    "pair_",
    "unfuse_",
    "unpair_",
]
