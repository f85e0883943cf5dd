"""Unbiased estimators of the gradient noise Tr Σ and of |∇L|².

Throughout: B samples a batch, g_i one sample's gradient, ḡ the batch's mean gradient, Σ₁ the covariance of one
sample's gradient over the data, N_B = Tr Cov(ḡ) the noise of a batch, G = |∇L|². A finite data set of n samples enters
as `population=n` where batches are drawn without replacement: then N_B = (Tr Σ₁ / B)(n − B)/(n − 1), with
Tr Σ₁ = (1/n) Σ |g_i − ∇L|².

Every estimate is unbiased, so a single one may well be negative: nothing here clamps. Average over steps first, with
`RunningMean`, and form ratios such as N/G of the averages.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from svag_fast import moved
from svag_fast.noise.running_mean import RunningMean as RunningMean  # the means were in this module
from svag_fast.noise.running_mean import Scalar
from svag_fast.noise.running_mean import mean_standard_error as mean_standard_error
from svag_fast.numeric import real
from svag_fast.stats.estimate import Estimate as Estimate
from svag_fast.stats.sampling import noise_factor, require_drawable


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
    noise = s2 / B * (1.0 if population is None else (population - B) / population)
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
