"""RunningNoise: G, N, R and nsr of a training loop with errors that autocorrelation does not fool."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import svag_fast
from svag_fast.noise.running import RunningNoise
from svag_fast.noise.running_mean import RunningMean
from svag_fast.ops import svag_step_
from svag_fast.ops.step_stats import StepStats

STEPS, SERIES = 1500, 50


def ar1(phi: float, seed: int) -> Tensor:
    """[SERIES, STEPS] of mean 0 and variance 1, correlation phi^k at lag k: autocorrelation time (1+φ)/(1−φ)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(STEPS, SERIES, dtype=torch.float64, generator=generator)
    x[1:] *= math.sqrt(1 - phi * phi)
    for k in range(1, STEPS):
        x[k] += phi * x[k - 1]
    return x.T


def feed(running: RunningNoise, grads: Tensor, noises: Tensor) -> RunningNoise:
    """Give it steps with these G and N, out of two gradients of equal norm; R = 1."""
    ones = torch.ones(len(grads), dtype=torch.float64)
    rows = torch.stack([grads + noises, grads + noises, grads, ones, ones], 1).double()
    for raw in rows.unbind():
        running.update(StepStats(raw, True))
    return running


@pytest.mark.parametrize("phi", [0.0, 0.8])
def test_errors_and_effective_samples_are_calibrated_on_ar1(phi: float) -> None:
    """The true means are within 1.96 standard errors in 95 % of the series, to 4 standard errors of that frequency; the
    effective sample size is n (1−φ)/(1+φ), to 4 standard errors of its mean and 5 % for what is left of its bias.
    """
    a, b = ar1(phi, 0), ar1(phi, 1)
    # G and N share half of their fluctuation: the ratio's error must know of it.
    grads, noises = 5 + a, 20 + 4 * (a + b)
    results = [feed(RunningNoise(), g, n) for g, n in zip(grads, noises, strict=True)]
    scale = STEPS * (1 - phi) / (1 + phi)
    for name, true in (("grad_sq_norm", 5.0), ("noise_trace", 20.0), ("nsr", 4.0)):
        estimates = [getattr(r, name) for r in results]
        z = torch.tensor([(e.mean - true) / e.standard_error for e in estimates])
        covered = float((z.abs() < 1.96).double().mean())
        assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / SERIES), (name, covered)
        ratio = torch.tensor([e.effective_samples for e in estimates]) / scale
        assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / math.sqrt(SERIES) + 0.05, (name, ratio.mean())


@pytest.mark.parametrize(("steps", "phi", "least"), [(12, 0.0, 0.89), (12, 0.9, 0.65), (60, 0.5, 0.9)])
def test_intervals_of_few_steps_are_students_and_say_whether_to_trust_them(
    steps: int, phi: float, least: float
) -> None:
    """The interval of N/G, of 400 short series; with a normal distribution's 12 steps at 0.9 covered 52 %. Those at 0.9
    hold less than one independent value: that is hardly ever called trusted."""
    a, b = (torch.cat([ar1(phi, seed)[:, k * steps : (k + 1) * steps] for k in range(8)]) for seed in (7, 8))
    found = [feed(RunningNoise(), 5 + a_, 20 + 4 * (a_ + b_)).nsr for a_, b_ in zip(0.2 * a, 0.2 * b, strict=True)]
    intervals = [e.interval() for e in found]
    assert sum(low <= 4 <= high for low, high in intervals) / len(found) > least
    assert all(0 < (e.degrees_of_freedom or 0) < steps for e in found)
    if phi == 0.9:
        assert sum(e.trusted for e in found) < 0.05 * len(found)


def test_means_are_those_of_the_steps() -> None:
    generator = torch.Generator().manual_seed(2)
    rows = torch.rand(700, 4, dtype=torch.float64, generator=generator) + torch.tensor([1.0, 1, 0, 5])
    running = RunningNoise()
    for row in rows:
        running.update(StepStats(torch.cat([row, torch.ones(1)]), True))
    N = (rows[:, 0] + rows[:, 1]) / 2 - rows[:, 2]
    assert running.steps == 700
    assert running.grad_sq_norm.mean == pytest.approx(float(rows[:, 2].mean()), rel=1e-12)
    assert running.noise_trace.mean == pytest.approx(float(N.mean()), rel=1e-12)
    assert running.weight_sq_norm.mean == pytest.approx(float(rows[:, 3].mean()), rel=1e-12)
    assert running.nsr.mean == pytest.approx(float(N.mean() / rows[:, 2].mean()), rel=1e-12)
    residual = (N - running.nsr.mean * rows[:, 2]).var()
    expected = float(residual) / (running.nsr.standard_error * running.grad_sq_norm.mean) ** 2
    assert running.nsr.effective_samples == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("optimizer", ["SVAG", "SVAGAdam"])
def test_a_training_loop_feeds_it(optimizer: str) -> None:
    """Two gradients a + noise with known |a|² and noise: both are within 4 of the reported standard errors."""
    generator = torch.Generator().manual_seed(3)
    true, deviation = torch.full((30,), 0.5), 0.7
    weight = torch.zeros(30, requires_grad=True)
    steps = getattr(svag_fast, optimizer)([weight], lr=1e-3, l=4)
    noise = svag_fast.RunningNoise()
    for _ in range(400):
        grads = [true + deviation * torch.randn(30, generator=generator) for _ in range(2)]
        weight.grad = grads[0].clone()
        steps.hold_gradient()
        weight.grad = grads[1].clone()
        noise.update(steps.step())
    assert noise.steps == 400
    for estimate, exact in ((noise.grad_sq_norm, 30 * 0.25), (noise.noise_trace, 30 * 0.49), (noise.nsr, 1.96)):
        assert abs(estimate.mean - exact) < 4 * estimate.standard_error
        assert 200 < estimate.effective_samples < 800


def test_update_reads_nothing_and_copies() -> None:
    class Raw(Tensor):
        """Refuses to be read: what a device would have to wait for."""

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func not in (Tensor.item, Tensor.tolist, Tensor.__float__, Tensor.__bool__, Tensor.cpu)
            return super().__torch_function__(func, types, args, kwargs or {})

    raw = torch.tensor([3.0, 3.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    running = RunningNoise()
    for _ in range(100):
        running.update(StepStats(raw.as_subclass(Raw), True))
    running._pending = [(raw.as_subclass(Tensor), two) for raw, two in running._pending]
    raw.fill_(7)  # a captured step writes its statistics to the same place every time
    assert running.noise_trace.mean == 2.0


def test_steps_with_inf_or_nan_enter_no_mean() -> None:
    running = RunningNoise()
    bad = torch.tensor([math.inf, 1.0, math.nan, 1.0, 0.0], dtype=torch.float64)
    for raw in (torch.tensor([3.0, 3, 1, 1, 1], dtype=torch.float64), bad):
        running.update(StepStats(raw, True))
    assert (running.steps, running.skipped) == (1, 1)
    assert running.noise_trace.mean == 2.0


def test_a_stored_state_continues_as_if_never_stopped() -> None:
    a, b = ar1(0.5, 4)[0][:900], ar1(0.5, 5)[0][:900]
    whole, first, second = (
        feed(RunningNoise(), 5 + a, 9 + b),
        feed(RunningNoise(), 5 + a[:500], 9 + b[:500]),
        RunningNoise(),
    )
    second.load_state_dict(first.state_dict())
    feed(second, 5 + a[500:], 9 + b[500:])
    assert second.state_dict() == whole.state_dict()
    assert second.nsr == whole.nsr


def test_a_wrong_state_is_refused_and_nothing_changes() -> None:
    running = feed(RunningNoise(), torch.ones(3), torch.full((3,), 2.0))
    before = running.state_dict()
    diverged = RunningMean()
    for value in (math.nan, 1.0, 2.0)[: before["noise_trace"]["count"]]:
        diverged.add(value)
    shorter = feed(RunningNoise(), torch.ones(2), torch.full((2,), 2.0))
    for change, message in (
        ({"more": 1}, "missing or unknown"),
        ({"skipped": 0.5}, r"skipped must be an integer, got 0\.5 \(float\)"),
        ({"one_batch": -1}, "^one_batch must be"),
        ({"rounding": -1.0}, "^rounding must be"),
        ({"co_scatter": "a"}, "^co_scatter must be"),
        ({"co_scatter": math.nan}, "^co_scatter must be"),
        ({"noise_trace": {**before["noise_trace"], "mean": math.nan}}, "must be those of the values"),
        ({"noise_trace": diverged.state_dict()}, "^noise_trace: mean must be a finite number, got nan"),
        ({"noise_trace": {}}, "missing or unknown"),
        ({"noise_trace": {**before["noise_trace"], "blocks": [1.0]}}, "count must be"),
        ({"noise_trace": shorter.state_dict()["noise_trace"]}, "must be of the same steps"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            running.load_state_dict({**before, **change})
        assert running.state_dict() == before


def test_a_noise_below_the_rounding_of_the_norms_has_its_error() -> None:
    """g2 = g1 + d with |d|² / |g1|² = 2e-8: float32's N is another number, and says so."""
    generator = torch.Generator().manual_seed(0)
    g1 = torch.randn(30_000, generator=generator)
    running, double = RunningNoise(), RunningNoise()
    for k in range(40):
        g2 = g1 + (1e-4 if k % 2 else -1e-4)
        for noise, dtype in ((running, torch.float32), (double, torch.float64)):
            p = torch.zeros(30_000, dtype=dtype)
            noise.update(svag_step_([p], [g1.to(dtype)], [g2.to(dtype)], lr=0.0, l=2))
    N = double.noise_trace
    assert N.standard_error < 0.01 * N.mean
    assert running.noise_trace.standard_error > N.mean
    assert abs(running.noise_trace.mean - N.mean) < 2 * running.noise_trace.standard_error
    assert abs(running.nsr.mean - double.nsr.mean) < 2 * running.nsr.standard_error
    resumed = RunningNoise()
    resumed.load_state_dict(running.state_dict())
    assert resumed.noise_trace == running.noise_trace


def test_bad_input_is_refused() -> None:
    running = RunningNoise()
    with pytest.raises(TypeError, match=r"stats must be the StepStats that step\(\) returns, got a float"):
        running.update(1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one gradient"):
        running.update(StepStats(torch.ones(5, dtype=torch.float64), False))


def test_before_the_first_steps_nothing_is_known() -> None:
    running = RunningNoise()
    assert math.isnan(running.nsr.mean)
    feed(running, torch.tensor([2.0]), torch.tensor([6.0]))
    assert running.nsr.mean == 3.0
    assert math.isnan(running.nsr.standard_error)
    assert "nsr = 3" in repr(running)
