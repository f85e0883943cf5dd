"""Unbiased estimators of the gradient noise Tr Σ and of |∇L|², and means of autocorrelated series.

Throughout: B samples a batch, g_i one sample's gradient, ḡ the batch's mean gradient, Σ₁ the covariance of one
sample's gradient over the data, N_B = Tr Cov(ḡ) the noise of a batch, G = |∇L|². A finite data set of n samples enters
as `population=n` where batches are drawn without replacement: then N_B = (Tr Σ₁ / B)(n − B)/(n − 1), with
Tr Σ₁ = (1/n) Σ |g_i − ∇L|².

Every estimate is unbiased, so a single one may well be negative: nothing here clamps. Average over steps first, with
`RunningMean`, and form ratios such as N/G of the averages.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from svag_fast import moved
from svag_fast.numeric import integer, real
from svag_fast.stats.estimate import Estimate
from svag_fast.stats.sampling import noise_factor, require_drawable
from svag_fast.stats.series import mean_estimate, refuse_masked

Scalar: TypeAlias = float | Tensor


class NoiseEstimate(NamedTuple):
    """Estimates at one point, each a 0-d float64 tensor on the device of what they were made from.

    grad_sq_norm: G = |∇L|². noise_trace: N_B, the trace of the batch gradient's covariance. sample_noise_trace: Tr Σ₁,
    or None where the batch size was not given.
    """

    grad_sq_norm: Tensor
    noise_trace: Tensor
    sample_noise_trace: Tensor | None

    @property
    def nsr(self) -> Tensor:
        """N_B / G of this one estimate: a ratio of unbiased numbers is biased, prefer the ratio of averages."""
        return self.noise_trace / self.grad_sq_norm


def from_sample_norms(
    sq_norms: Tensor, batch_grad_sq_norm: Scalar, *, population: int | None = None, weights: Tensor | None = None
) -> NoiseEstimate:
    """G, N_B and Tr Σ₁ from one batch's per-sample squared norms |g_i|² [B] and |ḡ|².

    With replacement s² = (B/(B−1)) (mean|g_i|² − |ḡ|²) estimates Tr Σ₁ and N_B = s²/B. Without replacement from n
    samples, s² estimates Tr Σ₁ · n/(n−1), so Tr Σ₁ = s² (n−1)/n and N_B = s² (n−B)/(nB). G = |ḡ|² − N_B.

    With weights the batch gradient is ḡ = Σ w_i g_i, and all estimates are of Σ w_i g_i / Σ w_i. Its noise is
    N_B = q Tr Σ₁ with q = Σ w_i² / (Σ w_i)². Tr Σ₁ = (mean|g_i|² − |ḡ|²/(Σ w_i)²)/(1 − q), the mean over the samples
    with w_i ≠ 0. The weights are taken as given: unbiased where they say nothing about the gradients (numbers of
    tokens), not where they follow from them.

    Args:
        sq_norms: [B], any floating dtype, B >= 2; of each sample's own gradient (not divided by B). Where a weight is 0
            its norm is not looked at.
        batch_grad_sq_norm: squared norm of the mean of the same B gradients; with weights of Σ w_i g_i.
        population: n, where the B samples are distinct and drawn from n; None for sampling with replacement. Not with
            weights.
        weights: [B], each sample's weight in the loss, at least two of them not 0; None for 1/B.

    Raises:
        TypeError: not a tensor, or not of real numbers.
        ValueError: fewer than two samples, sq_norms not 1-D, B > n, or weights that don't fit.
    """
    _check_series(sq_norms, "sq_norms", "B")
    B = sq_norms.numel()
    require_drawable(B, population)
    batch = _float64(batch_grad_sq_norm, "batch_grad_sq_norm", sq_norms.device)
    if weights is not None:
        return _from_weighted(sq_norms, batch, weights, population)
    # Shifted: the mean of the differences, not the difference of two means.
    s2 = (sq_norms.detach().double() - batch).mean() * (B / (B - 1))
    noise = s2 / B * _fraction_left(B, population)
    sample = s2 if population is None else s2 * ((population - 1) / population)
    return NoiseEstimate(batch - noise, noise, sample)


def _from_weighted(sq_norms: Tensor, batch: Tensor, weights: Tensor, population: int | None) -> NoiseEstimate:
    w = _weights(weights, sq_norms, population)
    batch = batch / w.sum().square()
    q = w.square().sum() / w.sum().square()
    differences = torch.where(w == 0, 0.0, sq_norms.detach().double() - batch)
    sample = differences.sum() / (w != 0).sum() / (1 - q)
    return NoiseEstimate(batch - q * sample, q * sample, sample)


def from_two_batches_of_samples(
    sq_norms: Tensor,
    sq_norm1: Scalar,
    sq_norm2: Scalar,
    inner: Scalar,
    *,
    population: int | None = None,
    weights: Tensor | None = None,
    disjoint: bool = False,
) -> NoiseEstimate:
    """G, N_B and Tr Σ₁ from two independent batches of B whose per-sample squared norms are known too.

    N_B and Tr Σ₁ are the means of the batches' own (`from_sample_norms`). G is the mean of ⟨g_i, g_j⟩ over all pairs
    of the 2B samples: B of 2B − 1 pairs are across the batches, G = (B ⟨g1, g2⟩ + (B − 1)(G1 + G2)/2)/(2B − 1).
    For the halves of one draw Tr Σ₁/(n − 1) is added to ⟨g1, g2⟩, see `from_two_batches`.

    Args:
        sq_norms: [2B], of each sample's own gradient: the first batch's, then the second's. B >= 2.
        sq_norm1, sq_norm2, inner: |g1|², |g2|² and ⟨g1, g2⟩ of the batches' mean gradients, as in StepStats.
        population: n, where each batch is made of distinct samples from n; None for sampling with replacement.
        weights: [2B], each sample's weight in its batch's loss, as in `from_sample_norms`. g1 and g2 are then sums
            Σ w_i g_i. The estimates are of these over each batch's Σ w_i.
        disjoint: the two batches have no sample in common, being one draw of 2B; needs population.

    Raises:
        TypeError: not a tensor, or not of real numbers.
        ValueError: sq_norms is not 1-D of an even length >= 4, B > n or 2B > n, or weights that don't fit.
    """
    _check_series(sq_norms, "sq_norms", "2B", least=4, halves=True)
    B = sq_norms.numel() // 2
    if disjoint:
        if population is None:
            raise ValueError("population must be a number at disjoint=True, got None")
        require_drawable(2 * B, population)
    across = _float64(inner, "inner", sq_norms.device)
    w1 = w2 = None
    if weights is not None:
        _check_weights(weights, sq_norms)
        w1, w2 = weights[:B], weights[B:]
        across = across / (w1.double().sum() * w2.double().sum()).to(across.device)
    first = from_sample_norms(sq_norms[:B], sq_norm1, population=population, weights=w1)
    second = from_sample_norms(sq_norms[B:], sq_norm2, population=population, weights=w2)
    within = (first.grad_sq_norm + second.grad_sq_norm) / 2
    assert first.sample_noise_trace is not None
    assert second.sample_noise_trace is not None
    sample = (first.sample_noise_trace + second.sample_noise_trace) / 2
    if disjoint and population is not None:
        across = across + sample / (population - 1)
    return NoiseEstimate(
        (B * across + (B - 1) * within) / (2 * B - 1),
        (first.noise_trace + second.noise_trace) / 2,
        sample,
    )


def from_two_batches(
    sq_norm1: Scalar,
    sq_norm2: Scalar,
    inner: Scalar,
    *,
    batch_size: int | None = None,
    population: int | None = None,
    disjoint: bool = False,
) -> NoiseEstimate:
    """G = ⟨g1, g2⟩ and N_B = |g1 − g2|²/2 from |g1|², |g2|² and ⟨g1, g2⟩ of two batches of the same size.

    These are unbiased for two batches drawn independently of each other, however each was drawn. Two halves of one draw
    of 2B distinct samples from n (`disjoint=True`) are negatively correlated: E⟨g1, g2⟩ = G − Tr Σ₁/(n−1), which is
    put right here: N_B = (|g1 − g2|²/2)(n−B)/n, G = ⟨g1, g2⟩ + |g1 − g2|² B/(2n).

    Args:
        sq_norm1, sq_norm2, inner: as in StepStats, or a row and column of a segment Gram matrix.
        batch_size: B of each of the two; only needed for Tr Σ₁ and for `disjoint`.
        population: n, where each batch is made of distinct samples from n; None for sampling with replacement.
        disjoint: the two batches have no sample in common, being one draw of 2B; needs batch_size and population.

    Raises:
        ValueError: sizes missing or impossible.
    """
    if disjoint and (batch_size is None or population is None):
        raise ValueError("batch_size and population must be numbers at disjoint=True, got None")
    if batch_size is not None:
        require_drawable(batch_size, population)
        require_drawable(2 * batch_size if disjoint else batch_size, population)
    device = next((x.device for x in (sq_norm1, sq_norm2, inner) if isinstance(x, Tensor)), torch.device("cpu"))
    g11, g22, g12 = (
        _float64(x, name, device) for x, name in ((sq_norm1, "sq_norm1"), (sq_norm2, "sq_norm2"), (inner, "inner"))
    )
    # Each difference is formed by itself: exact where the norms are close, when |g1 − g2| is small.
    noise = ((g11 - g12) + (g22 - g12)) / 2
    grad = g12
    if disjoint and batch_size is not None and population is not None:
        grad = g12 + noise * (batch_size / population)
        noise = noise * ((population - batch_size) / population)
    return NoiseEstimate(grad, noise, _one_sample(noise, batch_size, population))


def from_batches(
    sq_norms: Tensor, mean_sq_norm: Scalar, *, batch_size: int | None = None, population: int | None = None
) -> NoiseEstimate:
    """G and N_B from M >= 2 independent batches: m = mean|g_j|² and s = |mean g|² (the authors' form).

    N_B = (M/(M−1)) (m − s), G = (M s − m)/(M − 1). Takes the M squared norms [M] and s; `BatchMoments` gathers the same
    from the gradients themselves.

    Raises:
        ValueError: fewer than two batches, sq_norms not 1-D, or an impossible population.
    """
    _check_series(sq_norms, "sq_norms", "M")
    if batch_size is not None:
        require_drawable(batch_size, population)
    M = sq_norms.numel()
    s = _float64(mean_sq_norm, "mean_sq_norm", sq_norms.device)
    noise = (sq_norms.detach().double() - s).mean() * (M / (M - 1))
    return NoiseEstimate(s - noise / M, noise, _one_sample(noise, batch_size, population))


class BatchMoments:
    """Streams the gradients of M independent batches into `from_batches`' estimates, by Welford's recurrence.

    Keeps one float64 copy of the mean gradient (8 bytes a parameter) and never subtracts large sums.
    """

    def __init__(self) -> None:
        self.batches = 0
        self._mean: list[Tensor] = []
        self._scatter = torch.zeros((), dtype=torch.float64, device="cpu")

    def add(self, grads: Iterable[Tensor]) -> None:
        """Take one batch's gradients, a list of tensors in the same order and shapes each time."""
        new = _gradients(grads)
        if self._mean and [g.shape for g in new] != [m.shape for m in self._mean]:
            raise ValueError(
                f"grads must be of the shapes of the batches before, {[list(m.shape) for m in self._mean]}, got "
                f"{[list(g.shape) for g in new]}"
            )
        if not new:
            raise ValueError("grads must be one gradient or more, got none")
        if not self._mean:
            self._mean = [torch.zeros_like(g) for g in new]
            self._scatter = torch.zeros((), dtype=torch.float64, device=new[0].device)
        self.batches += 1
        for mean, g in zip(self._mean, new, strict=True):
            before = g - mean
            mean += before / self.batches
            self._scatter += (before * (g - mean)).sum()

    def estimate(self, *, batch_size: int | None = None, population: int | None = None) -> NoiseEstimate:
        """The estimates from the batches so far; needs two."""
        if self.batches < 2:
            raise ValueError(f"the batches must be at least 2 for the noise, got {self.batches}")
        if batch_size is not None:
            require_drawable(batch_size, population)
        noise = self._scatter / (self.batches - 1)
        mean_sq_norm = torch.stack([m.square().sum() for m in self._mean]).sum()
        return NoiseEstimate(mean_sq_norm - noise / self.batches, noise, _one_sample(noise, batch_size, population))


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


def _check_series(values: Tensor, name: str, length: str, least: int = 2, halves: bool = False) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a tensor [{length}], got {type(values).__name__}")
    if values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{name} must be real numbers, got {values.dtype}")
    if values.dim() != 1 or values.numel() < least or (halves and values.numel() % 2):
        raise ValueError(f"{name} must be of shape [{length}] with {length[-1]} >= 2, got {list(values.shape)}")


def _check_weights(weights: Tensor, sq_norms: Tensor) -> None:
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights must be a tensor of shape {list(sq_norms.shape)}, got {type(weights).__name__}")
    if weights.is_complex():
        raise TypeError(f"weights must be real, got {weights.dtype}")
    if weights.shape != sq_norms.shape:
        raise ValueError(f"weights must be of the shape of sq_norms, {list(sq_norms.shape)}, got {list(weights.shape)}")


def _weights(weights: Tensor, sq_norms: Tensor, population: int | None) -> Tensor:
    _check_weights(weights, sq_norms)
    if population is not None:
        raise ValueError(f"population must be None where samples have weights, got {population}")
    w = weights.detach().to(sq_norms.device, torch.float64)
    if not bool(w.isfinite().all()) or int((w != 0).sum()) < 2 or float(w.sum()) == 0.0:
        raise ValueError(f"weights must be finite, at least two not 0, and not add up to 0, got {w.tolist()}")
    return w


def _gradients(grads: Iterable[Tensor]) -> list[Tensor]:
    if isinstance(grads, Tensor):
        raise TypeError("grads must be a list of tensors, one for each parameter, got one tensor")
    out: list[Any] = list(grads)
    for i, g in enumerate(out):
        if not isinstance(g, Tensor):
            hint = ": a parameter without gradient is left out, each time" if g is None else ""
            raise TypeError(f"grads[{i}] must be a tensor, got {type(g).__name__}{hint}")
        if g.is_complex() or g.layout != torch.strided:
            raise TypeError(f"grads[{i}] must be real and dense, got {g.dtype}, {g.layout}")
    return [g.detach().double() for g in out]


def _fraction_left(B: int, population: int | None) -> float:
    return 1.0 if population is None else (population - B) / population


def _one_sample(noise: Tensor, batch_size: int | None, population: int | None) -> Tensor | None:
    """Tr Σ₁ from N_B."""
    if batch_size is None:
        return None
    factor = noise_factor(batch_size, population)
    if factor == 0:
        raise ValueError(
            "batch_size must be below population, since a batch of all samples has no noise to give Tr Σ₁, got "
            f"{batch_size}"
        )
    return noise * (batch_size / factor)


def _float64(value: Scalar, name: str, device: torch.device) -> Tensor:
    if not isinstance(value, Tensor):
        value = real(name, value)
    elif value.is_complex():
        raise TypeError(f"{name} must be real, got {value.dtype}")
    out = torch.as_tensor(value, dtype=torch.float64, device=device).detach()
    if out.numel() != 1:
        raise ValueError(f"{name} must be one number, got shape {list(out.shape)}")
    return out.reshape(())


if not TYPE_CHECKING:  # else a type checker would take every unknown name for Any

    def __getattr__(name: str) -> Any:
        return moved.old_name(__name__, {"MeanError": "Estimate"}, name)
