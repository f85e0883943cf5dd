"""Means of autocorrelated series, of a whole one and of a stream, with standard errors that know about it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from svag_fast.numeric import integer, real
from svag_fast.stats.estimate import Estimate
from svag_fast.stats.series import mean_estimate, refuse_masked

Scalar: TypeAlias = float | Tensor


def mean_standard_error(series: ArrayLike | Tensor | Sequence[float]) -> Estimate:
    """Mean of a stationary, possibly autocorrelated series, with its standard error and effective sample size.

    The variance of the mean is c₀ τ/n, τ the integrated autocorrelation time (`stats.series` says how it is found, and
    in how many of 100 cases the interval holds the true mean).

    ``effective_samples`` is n/τ, ``degrees_of_freedom`` half as many. One value has the error nan,
    a constant series 0.

    Raises:
        ValueError: an empty series, or one that is not 1-D.
    """
    if isinstance(series, Tensor):
        series = (
            series.detach().cpu() if series.is_complex() else series.detach().double().cpu()
        )  # NumPy has no bfloat16
    refuse_masked("series", series)
    values = np.asarray(series)
    if values.dtype.kind not in "fiub":
        raise TypeError(f"series must be real numbers, got {values.dtype}")
    x: NDArray[np.float64] = values.astype(np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"series must be 1-D and not empty, got shape {list(x.shape)}")
    return mean_estimate(x)


class RunningMean:
    """Mean of a stream with its autocorrelation-aware error, in constant memory; `add` never synchronises a device.

    Keeps at most 512 averages of 2^j consecutive values, j growing with the stream, and gives them to
    `mean_standard_error`: batch means whose remaining autocorrelation is measured rather than assumed away. Mean and
    variance of the values themselves are float64 Welford sums. Tensors are folded in 256 at a time, or when something
    is read. A NaN stays: the mean is NaN from there on.
    """

    _MAX_BLOCKS = 512
    _MAX_PENDING = 256

    def __init__(self) -> None:
        self._pending: list[Scalar] = []
        self._count = 0
        self._mean = 0.0
        self._scatter = 0.0
        self._block_size = 1
        self._blocks: list[float] = []
        self._open_mean = 0.0
        self._open_count = 0

    def add(self, value: Scalar) -> None:
        """Take the next value: a number, or a tensor of one element on any device."""
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"value must be one element, got shape {list(value.shape)}")
            if value.is_complex():
                raise TypeError(f"value must be real, got {value.dtype}")
            value = value.detach().to(torch.float64, copy=True).reshape(())
        else:
            value = real("value", value)
        self._pending.append(value)
        if len(self._pending) >= self._MAX_PENDING:
            self._fold()

    @property
    def count(self) -> int:
        """How many values were added."""
        return self._count + len(self._pending)

    @property
    def mean(self) -> float:
        """Mean of the values so far; NaN before the first."""
        self._fold()
        return self._mean if self._count else math.nan

    @property
    def variance(self) -> float:
        """Unbiased variance of the values themselves (as if independent); NaN before the second."""
        self._fold()
        return self._scatter / (self._count - 1) if self._count > 1 else math.nan

    @property
    def standard_error(self) -> float:
        """Standard error of `mean`; NaN before the second value."""
        return self.estimate().standard_error

    @property
    def effective_samples(self) -> float:
        """How many independent values would have given the same standard error."""
        effective = self.estimate().effective_samples
        assert effective is not None
        return effective

    def estimate(self) -> Estimate:
        """Mean, standard error and effective samples together."""
        self._fold()
        if self._count < 2:
            return Estimate(self.mean, math.nan, effective_samples=float(self._count))
        covered = len(self._blocks) * self._block_size
        blocks = mean_estimate(np.array(self._blocks))
        error = blocks.standard_error * math.sqrt(covered / self._count)
        # Not variance / error², of which small values' squares may vanish.
        effective = (math.sqrt(self.variance) / error) ** 2 if error != 0.0 else float(self._count)
        return Estimate(self._mean, error, blocks.degrees_of_freedom, effective)

    def state_dict(self) -> dict[str, Any]:
        """The whole state in plain Python numbers and lists."""
        self._fold()
        return {name: _copy(getattr(self, "_" + name)) for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state_dict(); refused unchanged where an entry is missing, unknown, or can't be one's."""
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a state_dict() of a RunningMean, got {type(state).__name__}")
        if set(state) != set(_STATE):
            wrong = sorted(set(state) ^ set(_STATE))
            raise ValueError(
                f"state must be one with the entries {list(_STATE)}, got these missing or unknown: {wrong}"
            )
        if not isinstance(state["blocks"], list):
            raise TypeError(f"blocks must be a list, got {type(state['blocks']).__name__}")
        for name in ("mean", "scatter", "open_mean"):  # nan and inf stay what they are
            real(name, state[name])
        for i, block in enumerate(state["blocks"]):
            real(f"blocks[{i}]", block)
        if state["scatter"] < 0:
            raise ValueError(f"scatter must be >= 0, got {state['scatter']}")
        count, size, left = (integer(name, state[name], least=0) for name in ("count", "block_size", "open_count"))
        if size == 0 or size & (size - 1) or left >= size or len(state["blocks"]) >= self._MAX_BLOCKS:
            raise ValueError(
                f"block_size must be a power of 2 above open_count, with fewer than {self._MAX_BLOCKS} blocks, got "
                f"block_size {size}, open_count {left} and {len(state['blocks'])} blocks"
            )
        if count != len(state["blocks"]) * size + left:
            raise ValueError(
                f"count must be block_size times the number of blocks plus open_count, {size} times "
                f"{len(state['blocks'])} plus {left}, got {count}"
            )
        _check_mean(state)
        self._pending = []
        for name in _STATE:
            setattr(self, "_" + name, _copy(state[name]))

    def _fold(self) -> None:
        for value in _to_floats(self._pending):
            self._count += 1
            before = value - self._mean
            self._mean += before / self._count
            self._scatter += before * (value - self._mean)
            self._open_count += 1
            self._open_mean += (value - self._open_mean) / self._open_count
            if self._open_count == self._block_size:
                self._blocks.append(self._open_mean)
                self._open_mean, self._open_count = 0.0, 0
                if len(self._blocks) == self._MAX_BLOCKS:
                    pairs = zip(self._blocks[::2], self._blocks[1::2], strict=True)
                    self._blocks = [(a + b) / 2 for a, b in pairs]
                    self._block_size *= 2
        self._pending = []

    def __repr__(self) -> str:
        return f"RunningMean({self.estimate()}, {self.count} values, {self.effective_samples:.3g} effective)"


def _check_mean(state: Mapping[str, Any]) -> None:
    """Refuse a mean that isn't that of the blocks: of a stream with a nan or inf both may be nan or inf."""
    parts = [*state["blocks"], state["open_mean"]] if state["open_count"] else state["blocks"]
    if not parts or not all(map(math.isfinite, parts)):
        return
    of_blocks = math.fsum(block * (state["block_size"] / state["count"]) for block in state["blocks"])
    of_blocks += state["open_mean"] * (state["open_count"] / state["count"])
    rounding = 1e-6 * max(map(abs, parts)) + 1e-12 * math.sqrt(max(0.0, state["scatter"]))  # of values that cancelled
    if math.isnan(state["scatter"]) or not (
        math.isfinite(state["mean"]) and abs(state["mean"] - of_blocks) <= rounding
    ):
        raise ValueError(
            f"mean and scatter must be those of the values that the blocks hold, whose mean is {of_blocks:g}, got "
            f"{state['mean']} and {state['scatter']}"
        )


_STATE = ("count", "mean", "scatter", "block_size", "blocks", "open_mean", "open_count")


def _copy(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value


def _to_floats(values: list[Scalar]) -> list[float]:
    """One transfer a device for the tensors among the values, order kept."""
    out = [0.0 if isinstance(v, Tensor) else v for v in values]
    by_device: dict[torch.device, list[int]] = {}
    for i, v in enumerate(values):
        if isinstance(v, Tensor):
            by_device.setdefault(v.device, []).append(i)
    for indices in by_device.values():
        stacked = torch.stack([v for i in indices if isinstance(v := values[i], Tensor)])
        for i, number in zip(indices, stacked.tolist(), strict=True):
            out[i] = number
    return out
