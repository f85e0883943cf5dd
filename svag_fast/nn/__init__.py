"""Layers and contexts that take both batches of a SVAG step through a model at once."""

from __future__ import annotations

from svag_fast.nn.pair_batch_norm import (
    CoupledSamples,
    PairBatchNorm1d,
    PairBatchNorm2d,
    PairBatchNorm3d,
    pair_,
    unpair_,
)

__all__ = ["CoupledSamples", "PairBatchNorm1d", "PairBatchNorm2d", "PairBatchNorm3d", "pair_", "unpair_"]
