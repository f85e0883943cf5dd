"""Batches by counter: which samples they hold depends on (seed, step, batch) alone, so a resumed run needs no state."""

from __future__ import annotations

import torch
from torch import Tensor

from svag_fast.numeric import integer
from svag_fast.ops.philox_normal import philox


def batch_indices(seed: int, step: int, batch: int, batch_size: int, population: int) -> Tensor:
    """Return the samples of batch 1 or 2 of a step, drawn with replacement: int64 [batch_size].

    Samples 2i and 2i + 1 are made of the four words of the Philox4x32-10 counter ``(i, step mod 2^32, step div 2^32,
    batch)`` under the key ``(seed mod 2^32, seed div 2^32)``: a pair of words is a number u in [0, 2^64), low word
    first, and the sample is ``floor(u population / 2^64)``. No sample is more likely than another by more than
    population / 2^64. The normals of :mod:`svag_fast.ops.philox_normal` have batch 0.

    Args:
        seed: in [0, 2^64).
        step: in [0, 2^63).
        batch: 1 or 2.
        batch_size: at least 1.
        population: how many samples there are.

    Raises:
        TypeError, ValueError: one of these is out of range.
    """
    seed, step = integer("seed", seed, least=0, most=2**64 - 1), integer("step", step, least=0, most=2**63 - 1)
    batch, batch_size = integer("batch", batch, least=1, most=2), integer("batch_size", batch_size, least=1, most=2**31)
    population = integer("population", population, least=1)
    pairs = torch.arange((batch_size + 1) // 2, dtype=torch.int64, device="cpu")
    rest = torch.tensor([step % 2**32, step >> 32, batch], dtype=torch.int64, device="cpu")
    words = philox(torch.cat([pairs[:, None], rest.expand(len(pairs), 3)], dim=1), (seed % 2**32, seed >> 32))
    drawn = [(low | high << 32) * population >> 64 for low, high in words.reshape(-1, 2).tolist()]
    return torch.tensor(drawn[:batch_size], dtype=torch.int64, device="cpu")
