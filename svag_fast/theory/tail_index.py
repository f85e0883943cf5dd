r"""The tail-index estimator that others used to call SGD's noise heavy-tailed, and why it does (the paper's App. B.3).

For K = K1 K2 values X and Y_i the sums of K1 consecutive ones (Mohammadi, Mohammadpour, Ogata 2015),

    1/alpha = (mean log|Y| - mean log|X|)/log K1

is 1/2 for i.i.d. Gaussians and 1 for Cauchy variables. For Gaussian coordinates of unequal variances sigma_j^2 it tends
to ``1/2 + (E log(block mean of sigma^2) - E log sigma^2)/(2 log K1)``, which by Jensen's inequality is at least 1/2: an
index below 2, though every value is Gaussian.
"""

from __future__ import annotations

import math

from torch import Tensor


def tail_index(values: Tensor, block: int) -> float:
    """The estimate of alpha from `values` [K] in blocks of `block` consecutive ones.

    What is left over after the last whole block is not used, nor are zeros: their logarithm is minus infinity.

    Raises:
        ValueError: fewer than two blocks, `block` below 2, or nothing but zeros.
    """
    blocks = _blocks(values, block).double()
    difference = _mean_log(blocks.sum(1)) - _mean_log(blocks.flatten())
    return math.log(block) / difference


def gaussian_tail_index(variances: Tensor, block: int) -> float:
    """What :func:`tail_index` estimates for independent Gaussians of mean 0 and the given `variances` [K].

    >>> import torch
    >>> gaussian_tail_index(torch.ones(100), 10)
    2.0
    """
    blocks = _blocks(variances, block).double()
    excess = _mean_log(blocks.mean(1)) - _mean_log(blocks.flatten())
    return 1 / (0.5 + excess / (2 * math.log(block)))


def _blocks(values: Tensor, block: int) -> Tensor:
    if block < 2:
        raise ValueError(f"block must be at least 2, got {block}")
    if values.dim() != 1 or len(values) < 2 * block:
        raise ValueError(f"values must be [K] with at least two blocks of {block}, got shape {tuple(values.shape)}")
    return values.detach()[: len(values) // block * block].view(-1, block)


def _mean_log(values: Tensor) -> float:
    values = values[values != 0].abs()
    if values.numel() == 0:
        raise ValueError("values must be others than zeros alone, got nothing else")
    return values.log().mean().item()
