"""Means of an optimizer's step statistics over training, with standard errors that know about autocorrelation.

noise = svag_fast.RunningNoise()
for ...:
    noise.update(optimizer.step())
noise.nsr.mean, noise.nsr.interval(), noise.nsr.trusted
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from svag_fast.noise.running_mean import RunningMean
from svag_fast.numeric import integer, number
from svag_fast.ops.step_stats import StepStats, is_one_batch
from svag_fast.stats.estimate import Estimate
from svag_fast.stats.sampling import noise_factor
from svag_fast.stats.series import mean_estimate

_SERIES = ("grad_sq_norm", "noise_trace", "weight_sq_norm")


class RunningNoise:
    """G, N, R and nsr = N/G over the steps whose `StepStats` it was given, in constant memory.

    `update` does not synchronise a device: 256 steps' statistics are fetched at a time, or when something is read. A
    step with an inf or nan gradient (`StepStats.finite` false, as where a gradient scaler overflowed) is counted in
    `skipped` and enters no mean. Where an optimizer at l > 1 was given the same gradient twice, to the bit, as of one
    batch, every estimate raises RuntimeError. Start a new object where the learning rate changes: the errors are those
    of a stationary series.
    """

    _MAX_PENDING = 256

    def __init__(self) -> None:
        self._pending: list[tuple[Tensor, bool]] = []
        self._rounding = 0.0
        self._means = {name: RunningMean() for name in _SERIES}
        self._co_scatter = 0.0
        self._skipped = 0
        self._one_batch = 0

    def update(self, stats: StepStats) -> None:
        """Take one step's statistics.

        Raises:
            TypeError: not a StepStats.
            ValueError: the step had no second gradient (l = 1 without one), so that nothing tells noise from signal; or
                it was one of replicas.
        """
        if not isinstance(stats, StepStats):
            raise TypeError(f"stats must be the StepStats that step() returns, got a {type(stats).__name__}")
        if not stats.has_second:
            raise ValueError("stats must be of two batches' gradients, which G and N need, got one gradient")
        if stats.raw.dim() != 1:
            raise ValueError(f"stats must be of one run, got those of {len(stats.raw)} replicas")
        self._pending.append((stats.raw.detach().clone(), stats.two_batches))
        self._rounding = max(self._rounding, stats.rounding)
        if len(self._pending) >= self._MAX_PENDING:
            self._fold()

    @property
    def steps(self) -> int:
        """How many steps entered the means."""
        self._fold()
        return self._means["noise_trace"].count

    @property
    def skipped(self) -> int:
        """How many steps were left out for an inf or nan."""
        self._fold()
        return self._skipped

    @property
    def grad_sq_norm(self) -> Estimate:
        """G = |∇L|²: mean of the unbiased ⟨g1, g2⟩."""
        return self._estimate("grad_sq_norm")

    @property
    def noise_trace(self) -> Estimate:
        """N = Tr Σ of a batch gradient: mean of the unbiased |g1 − g2|²/2.

        Its error takes in what rounding may have done to a difference of norms (`StepStats.noise_trace_rounding`).
        """
        N = self._estimate("noise_trace")
        return replace(N, standard_error=math.hypot(N.standard_error, self._rounding_error()))

    @property
    def weight_sq_norm(self) -> Estimate:
        """R = |x|² before the steps."""
        return self._estimate("weight_sq_norm")

    @property
    def nsr(self) -> Estimate:
        """N/G as the ratio of the two means (a mean of ratios would be biased).

        Its error is that of the mean of N_t − nsr G_t, divided by |G| (delta method): trust it where G is several of
        its own standard errors away from 0.
        """
        G, N = self.grad_sq_norm, self.noise_trace
        steps = self.steps
        if steps == 0 or G.mean == 0.0:
            return Estimate(math.nan, math.nan, effective_samples=float(steps))
        ratio = N.mean / G.mean
        if steps < 2:
            return Estimate(ratio, math.nan, effective_samples=float(steps))
        grad, noise = (self._means[name] for name in _SERIES[:2])
        # Both have the same blocks of steps.
        states = grad.state_dict(), noise.state_dict()
        residuals = [n - ratio * g for g, n in zip(states[0]["blocks"], states[1]["blocks"], strict=True)]
        covered = len(residuals) * states[0]["block_size"]
        of_blocks = mean_estimate(np.array(residuals))
        error = of_blocks.standard_error * math.sqrt(covered / steps)
        covariance = self._co_scatter / (steps - 1)
        variance = noise.variance - 2 * ratio * covariance + ratio**2 * grad.variance
        effective = (math.sqrt(max(variance, 0.0)) / error) ** 2 if error > 0 else float(steps)
        error = math.hypot(error, self._rounding_error()) / abs(G.mean)
        return Estimate(ratio, error, of_blocks.degrees_of_freedom, effective)

    def noise_scale(self, batch_size: int, *, population: int | None = None) -> Estimate:
        """B_simple = Tr Σ₁/|∇L|² = B·N/G (McCandlish et al. 2018), with `nsr`'s error.

        Args:
            batch_size: B, of each of a step's two batches.
            population: n, where each batch was made of distinct samples of n: then times (n − 1)/(n − B), since their
                N is smaller by that. None for independent draws.

        Raises:
            TypeError, ValueError: no such batch can be drawn, or it would hold all samples and have no noise.
        """
        factor = noise_factor(batch_size, population)
        if factor == 0:
            raise ValueError(
                "batch_size must be below population, since a batch of all samples has no noise to give B_simple, got "
                f"{batch_size}"
            )
        return self.nsr.affine(batch_size / factor)

    def state_dict(self) -> dict[str, Any]:
        """The whole state in plain Python numbers, lists and dicts."""
        self._fold()
        means = {name: mean.state_dict() for name, mean in self._means.items()}
        counts = {"skipped": self._skipped, "one_batch": self._one_batch}
        return {**means, "co_scatter": self._co_scatter, **counts, "rounding": self._rounding}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state_dict(); refused unchanged where an entry is missing, unknown, or can't be one's."""
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a state_dict() of a RunningNoise, got {type(state).__name__}")
        state = {"one_batch": 0, "rounding": 0.0, **state}  # before there were these
        entries = {*_SERIES, "co_scatter", "skipped", "one_batch", "rounding"}
        if set(state) != entries:
            raise ValueError(
                f"state must be one with the entries {sorted(entries)}, got these missing or unknown: "
                f"{sorted(set(state) ^ entries)}"
            )
        for name in ("skipped", "one_batch"):
            integer(name, state[name], least=0)
        number("co_scatter", state["co_scatter"])
        number("rounding", state["rounding"], least=0)
        means = {name: RunningMean() for name in _SERIES}
        for name, mean in means.items():
            mean.load_state_dict(state[name])
            if mean.count:  # steps with an inf or nan enter none
                number(f"{name}: mean", mean.mean)
        blocks = {name: (state[name]["count"], state[name]["block_size"]) for name in _SERIES}
        if len(set(blocks.values())) > 1:
            raise ValueError(f"the series must be of the same steps, got the counts and block sizes {blocks}")
        self._pending = []
        self._means, self._co_scatter = means, state["co_scatter"]
        self._skipped, self._one_batch = state["skipped"], state["one_batch"]
        self._rounding = state["rounding"]

    def _rounding_error(self) -> float:
        # |g1|² + |g2|² = 2 (G + N), of the means too.
        return 2 * self._rounding * abs(self._means["grad_sq_norm"].mean + self._means["noise_trace"].mean)

    def _fault(self) -> str | None:
        self._fold()
        if self._one_batch == 0:
            return None
        return f"in {self._one_batch} of {self._one_batch + self.steps} steps {StepStats.ONE_BATCH}"

    def _estimate(self, name: str) -> Estimate:
        if fault := self._fault():
            raise RuntimeError(fault)
        return self._means[name].estimate()

    def _fold(self) -> None:
        if not self._pending:
            return
        # One transfer; StepStats.raw's own order.
        device = self._pending[0][0].device
        rows = torch.stack([raw.to(device) for raw, _ in self._pending]).tolist()
        asked_for_two = [two_batches for _, two_batches in self._pending]
        self._pending = []
        grad, noise, weight = (self._means[name] for name in _SERIES)
        for row, two_batches in zip(rows, asked_for_two, strict=True):
            sq_norm1, sq_norm2, inner, weight_sq_norm, finite = row
            if not finite:
                self._skipped += 1
                continue
            if two_batches and is_one_batch([row]):
                self._one_batch += 1
                continue
            # Each difference by itself: exact where the norms are close.
            trace = ((sq_norm1 - inner) + (sq_norm2 - inner)) / 2
            grad_before = grad.mean if grad.count else 0.0
            grad.add(inner)
            noise.add(trace)
            weight.add(weight_sq_norm)
            self._co_scatter += (inner - grad_before) * (trace - noise.mean)

    def __repr__(self) -> str:
        if fault := self._fault():
            return f"RunningNoise(no estimates: {fault})"
        return f"RunningNoise({self.steps} steps: G = {self.grad_sq_norm}, N = {self.noise_trace}, nsr = {self.nsr})"
