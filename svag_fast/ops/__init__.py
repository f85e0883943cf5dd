"""Fused operations: each file holds one op with its checks, its reference in PyTorch and its backends."""
