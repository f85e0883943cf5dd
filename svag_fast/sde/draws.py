"""Random numbers for ensembles: seeded streams, filled in place.

Normals on the CPU come by counter (:mod:`svag_fast.ops.philox_normal`): which ones a trajectory gets depends on the
seed and its own number alone, and :func:`svag_fast.ops.affine_walk.affine_walk_` can make the same ones in registers.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from svag_fast.numeric import integer
from svag_fast.ops.philox_normal import Key, philox_normal_


class Draws:
    """Streams of random numbers on one device, determined by ``(seed, stream, first)``.

    Streams of one seed are independent (``numpy.random.SeedSequence``). Two objects of the same seed and stream give
    the same numbers to the same calls: that is what common random numbers are made of.

    Args:
        seed: of everything.
        stream: another one is independent of it.
        device: of the tensors to fill.
        first: number of the first element of each tensor in its ensemble, a multiple of 64. On the CPU the normals of
            a block are those that the same elements of the whole ensemble would get.

    Raises:
        TypeError, ValueError: seed, stream or first is no integer of at least 0.
    """

    def __init__(self, seed: int, stream: int = 0, device: torch.device | str = "cpu", *, first: int = 0) -> None:
        seed = integer("seed", seed, least=0)
        stream = integer("stream", stream, least=0)
        first = integer("first", first, least=0)
        self.device = torch.device(device)
        # Without `first`: the counter carries the element's own number, so that blocks make what the whole would.
        low, high = np.random.SeedSequence(seed, spawn_key=(stream,)).generate_state(2, np.uint32).tolist()
        self.key: Key = (low, high)
        self._first = first
        self._draw = 0
        # The other laws come from a generator, which each block needs for itself.
        self._sequence = np.random.SeedSequence(seed, spawn_key=(stream, first))

    @cached_property
    def _generator(self) -> torch.Generator:
        generator = torch.Generator(self.device)
        # manual_seed takes 63 bits.
        generator.manual_seed(int(self._sequence.generate_state(1, np.uint64)[0]) >> 1)
        return generator

    @cached_property
    def _numpy(self) -> np.random.Generator:
        return np.random.Generator(np.random.SFC64(self._sequence))

    def normal_(self, out: Tensor) -> Tensor:
        """Fill `out` with independent N(0, 1)."""
        if out.device.type != "cpu" or out.dtype not in (torch.float32, torch.float64):
            return out.normal_(generator=self._generator)
        # The kernel fills memory in order.
        to = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device="cpu")
        philox_normal_(to, key=self.key, first=self._first, draw=self._draw)
        self._draw += 1
        return out if to is out else out.copy_(to)

    def gamma_(self, out: Tensor, shape: float) -> Tensor:
        """Fill `out` with independent Gamma(shape), scale 1."""
        if out.device.type == "cpu" and out.dtype == torch.float64 and out.is_contiguous():
            self._numpy.standard_gamma(shape, out=out.numpy())  # in half of torch's time
            return out
        return out.copy_(torch._standard_gamma(torch.full_like(out, shape), generator=self._generator))

    def poisson_(self, out: Tensor, rate: float) -> Tensor:
        """Fill `out` with independent Poisson(rate)."""
        return out.copy_(torch.poisson(torch.full_like(out, rate), generator=self._generator))

    def indices(self, high: int, size: tuple[int, ...]) -> Tensor:
        """Independent uniform integers in [0, high): batches drawn with replacement."""
        return torch.randint(high, size, generator=self._generator, dtype=torch.int64, device=self.device)

    def subsets(self, population: int, rows: int, size: int) -> Tensor:
        """`rows` independent uniform subsets of `size` distinct integers below `population`: int64 [rows, size]."""
        if rows == 1:
            return torch.randperm(population, generator=self._generator, dtype=torch.int64, device=self.device)[
                None, :size
            ]
        # The order of random keys is a random permutation, for all rows at once.
        keys = torch.rand(rows, population, generator=self._generator, dtype=torch.float32, device=self.device)
        return keys.argsort(dim=1)[:, :size]
