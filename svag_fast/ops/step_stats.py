"""The statistics that a step's pass brings along, and what they estimate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

# The order of the raw statistics: csrc/tensor_list.h, StatIndex.
_SQ_NORM1, _SQ_NORM2, _INNER, _WEIGHT_SQ_NORM, FINITE = range(5)


@dataclass(frozen=True)
class StepStats:
    """Statistics of a step's two gradients and of the parameters before it, on the params' device.

    Reading a value (``float(stats.nsr)``) synchronises with the device; nothing before does. Every statistic is a
    0-d float64 tensor, of S replicas [S]. Without a second gradient those that need it are None. Float32 sums of 4096
    elements are added in float64.

    The estimators G, N and nsr need independent batches. Where an optimizer at ``l > 1`` was given the same gradient
    twice, to the bit, they raise RuntimeError. On a device, where looking would wait for it, they are nan, and so are
    those of each of S replicas that was.
    """

    ONE_BATCH: ClassVar[str] = (
        "both gradients are the same to the bit, as where a closure backpropagates the same batch at both calls: G and "
        "N can't be told apart, and the step is SGD's at lr / l. Draw a fresh batch for each (l = 1 needs one alone)"
    )

    raw: Tensor
    """[5], float64: sq_norm1, sq_norm2, inner, weight_sq_norm, finite. Of S replicas [S, 5]."""
    has_second: bool
    two_batches: bool = False
    """Whether the two gradients are to be those of two batches, so that the same one twice is a fault."""
    rounding: float = 0.0
    """How far rounding may have put the squared norms and the inner product off, relative to the norms."""

    def is_one_batch(self) -> bool:
        """Whether the same gradient came twice where two batches' were asked for, to any replica; synchronises."""
        return self.two_batches and is_one_batch(self.raw.view(-1, 5).tolist())

    def _on_cpu(self) -> bool:
        return self.raw.device.type == "cpu"

    def _moments(self) -> tuple[Tensor, ...]:
        return self.raw[..., : _INNER + 1].unbind(-1)

    def _estimate(self, value: Tensor) -> Tensor:
        if not self.two_batches:
            return value
        if self.raw.dim() == 1 and self._on_cpu():
            if self.is_one_batch():
                raise RuntimeError(self.ONE_BATCH)
            return value
        sq_norm1, sq_norm2, inner = self._moments()
        return value.where((sq_norm1 != sq_norm2) | (sq_norm1 != inner) | (inner == 0), torch.nan)

    @property
    def sq_norm1(self) -> Tensor:
        """The first gradient's squared norm."""
        return self.raw.select(-1, _SQ_NORM1)

    @property
    def sq_norm2(self) -> Tensor | None:
        """The second gradient's squared norm."""
        return self.raw.select(-1, _SQ_NORM2) if self.has_second else None

    @property
    def inner(self) -> Tensor | None:
        """The two gradients' inner product."""
        return self.raw.select(-1, _INNER) if self.has_second else None

    @property
    def weight_sq_norm(self) -> Tensor:
        """R, the parameters' squared norm before the step."""
        return self.raw.select(-1, _WEIGHT_SQ_NORM)

    @property
    def finite(self) -> Tensor:
        """0-d bool, of S replicas [S]: False where any entry of a gradient was inf or nan.

        Under a GradScaler also where it says so of a gradient that is finite here, as of another process's. The step
        was skipped then; the norms are those of the gradients that there were.
        """
        return self.raw.select(-1, FINITE) != 0

    @property
    def grad_sq_norm(self) -> Tensor | None:
        """G, unbiased: for independent batches E <g1, g2> = |E g|². May be negative."""
        return self._estimate(self.raw.select(-1, _INNER)) if self.has_second else None

    @property
    def noise_trace(self) -> Tensor | None:
        """N, unbiased: E |g1 - g2|² / 2 is the trace of one batch gradient's covariance."""
        if not self.has_second:
            return None
        sq_norm1, sq_norm2, inner = self._moments()
        return self._estimate((sq_norm1 + sq_norm2 - 2 * inner) / 2)

    @property
    def noise_trace_rounding(self) -> Tensor | None:
        """What rounding may have added to N or taken from it; an N below it can't be told from 0.

        N is a difference of the norms, which in float32 have some five digits for certain. It is ``rounding`` times
        their sum, so it matters where N / G is small: below about 3e-5 for float32, 6e-14 for float64.
        """
        if not self.has_second:
            return None
        sq_norm1, sq_norm2, _ = self._moments()
        return (sq_norm1 + sq_norm2) * self.rounding

    @property
    def nsr(self) -> Tensor | None:
        """N / G, the noise-to-signal ratio of this one step: average N and G over steps before you trust it."""
        noise_trace = self.noise_trace
        return None if noise_trace is None else noise_trace / self.raw.select(-1, _INNER)


def is_one_batch(raw: Iterable[Sequence[float]]) -> bool:
    """Whether in any of these rows of raw statistics they are those of one gradient, not zero, given twice."""
    found = [sq_norm1 == sq_norm2 == inner != 0 and finite != 0 for sq_norm1, sq_norm2, inner, _, finite in raw]
    return any(found)


ROUNDING = 256 * 2**-24, 256 * 2**-53
"""``StepStats.rounding`` where params are computed in float32, and where all are in float64.

256 units of rounding of their sums of 4096 elements. The kernels have shown 7 where entries vary and 170 where all are
the same, which is when every addition rounds the same way (tests/ops/test_step_stats.py).
"""


def rounding(params: Iterable[Tensor]) -> float:
    """Return ``StepStats.rounding`` of a step over params."""
    return ROUNDING[all(p.dtype == torch.float64 for p in params)]


def total(raws: Sequence[Tensor]) -> Tensor:
    """Return the raw statistics of several lists (param groups; devices) as of one, on the first one's device."""
    if len(raws) == 1:
        return raws[0]
    raw = torch.stack([raw.to(raws[0].device) for raw in raws])
    return torch.cat([raw[..., :FINITE].sum(0), raw[..., FINITE:].amin(0)], -1)


def nothing_stepped(has_second: bool, shape: tuple[int, ...] = (5,)) -> StepStats:
    """Return the statistics of a step over no params, ``raw`` of this shape."""
    raw = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0], dtype=torch.float64, device="cpu")
    return StepStats(raw.expand(shape).clone(), has_second)


def raw_statistics(params: list[Tensor], grads1: list[Tensor], grads2: list[Tensor] | None) -> Tensor:
    """Return ``StepStats.raw`` by plain PyTorch, in float64."""

    def sum64(terms: list[Tensor]) -> Tensor:
        return torch.stack([t.sum(dtype=torch.float64) for t in terms]).sum()

    def product(a: list[Tensor], b: list[Tensor]) -> Tensor:
        return sum64([s.double() * t.double() for s, t in zip(a, b, strict=True)])

    nothing = torch.zeros((), dtype=torch.float64, device=params[0].device)
    finite = torch.stack([g.isfinite().all() for g in [*grads1, *(grads2 or [])]]).all()
    return torch.stack(
        [
            product(grads1, grads1),
            nothing if grads2 is None else product(grads2, grads2),
            nothing if grads2 is None else product(grads1, grads2),
            product(params, params),
            finite.double(),
        ]
    )
