"""The error of the mean of a series, and of a stream, is honest about autocorrelation."""

import math
import pickle

import numpy as np
import pytest
import torch

from svag_fast import noise

LENGTH = 8_000


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: noise.mean_standard_error([]), ValueError, "not empty"),
        (lambda: noise.mean_standard_error([[1.0]]), ValueError, r"\[1, 1\]"),
        (lambda: noise.RunningMean().add(torch.ones(2)), ValueError, "one element"),
        (lambda: noise.mean_standard_error(["a", "b"]), TypeError, "series must be real numbers, got <U1"),
        (lambda: noise.mean_standard_error(torch.ones(3, dtype=torch.complex64)), TypeError, "numbers, got complex64"),
        (lambda: noise.mean_standard_error(None), TypeError, "real numbers, got object"),
        (lambda: noise.RunningMean().add("3"), TypeError, r"value must be a number, got '3' \(str\)"),
        (lambda: noise.RunningMean().add(None), TypeError, r"value must be a number, got None \(NoneType\)"),
        (lambda: noise.RunningMean().add(torch.ones(1, dtype=torch.complex64)), TypeError, "value must be real"),
        (lambda: noise.RunningMean().load_state_dict([1]), TypeError, "state must be a state_dict.*got list"),
    ],
)
def test_what_has_no_mean_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def ar1(phi, length, series, seed):
    """Stationary AR(1) paths [series, length] with unit variance; their mean has variance (1+φ)/(1−φ)/n."""
    generator = torch.Generator().manual_seed(seed)
    kicks = torch.randn(length, series, dtype=torch.float64, generator=generator)
    kicks[1:] *= math.sqrt(1 - phi * phi)
    for k in range(1, length):
        kicks[k] += phi * kicks[k - 1]
    return kicks.T


def running(series):
    mean = noise.RunningMean()
    for value in series.tolist():
        mean.add(value)
    return mean.estimate()


@pytest.mark.parametrize(
    ("estimate", "count"), [(noise.mean_standard_error, 200), (running, 80)], ids=["series", "streaming"]
)
@pytest.mark.parametrize("phi", [-0.6, 0.0, 0.5, 0.9])
def test_standard_error_is_calibrated_on_ar1(phi, estimate, count):
    """The true mean 0 is within 1.96 standard errors in 95 % of the series, to 4 standard errors of that frequency;
    the effective sample size is n (1−φ)/(1+φ), to 4 standard errors of its mean and 4 % for what is left of its bias.
    """
    series = ar1(phi, LENGTH, count, seed=3)
    results = [estimate(s) for s in series]
    z = torch.tensor([r.mean / r.standard_error for r in results])
    covered = (z.abs() < 1.96).double().mean()
    assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / count), covered
    ratio = torch.tensor([r.effective_samples for r in results]) / (LENGTH * (1 - phi) / (1 + phi))
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(count) + 0.04, ratio.mean()


def test_running_mean_equals_the_mean_and_variance_of_the_whole_series():
    series = ar1(0.8, 5000, 1, seed=4)[0] + 1e6
    mean = noise.RunningMean()
    for value in series:
        mean.add(value)
    torch.testing.assert_close(mean.mean, series.mean().item(), rtol=1e-14, atol=0)
    torch.testing.assert_close(mean.variance, series.var().item(), rtol=1e-9, atol=0)
    assert mean.count == 5000


def test_short_streams_agree_with_the_series_function():
    series = ar1(0.5, 400, 1, seed=5)[0]
    ours, theirs = running(series), noise.mean_standard_error(series)
    for name in ("mean", "standard_error", "degrees_of_freedom", "effective_samples"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-10, abs=1e-15)


def test_memory_stays_bounded_and_tensors_are_copied():
    mean = noise.RunningMean()
    buffer = torch.zeros(1)
    for k in range(20_000):
        mean.add(buffer.fill_(k))
    assert mean.mean == 19_999 / 2
    state = mean.state_dict()
    assert len(state["blocks"]) <= 512
    assert state["block_size"] == 64


@pytest.mark.parametrize("how", ["pickle", "state_dict"])
def test_a_stored_stream_continues_as_if_never_stopped(how):
    series = ar1(0.7, 3001, 1, seed=6)[0].tolist()
    whole, first = noise.RunningMean(), noise.RunningMean()
    for value in series:
        whole.add(value)
    for value in series[:1234]:
        first.add(value)
    if how == "pickle":
        second = pickle.loads(pickle.dumps(first))
    else:
        second = noise.RunningMean()
        second.load_state_dict(first.state_dict())
    for value in series[1234:]:
        second.add(value)
    assert second.state_dict() == whole.state_dict()
    assert second.estimate() == whole.estimate()


def test_a_wrong_state_is_refused_and_nothing_changes():
    mean = noise.RunningMean()
    mean.add(3.0)
    whole = mean.state_dict()
    for state, message in [
        ({"count": 1}, "missing or unknown"),
        (dict(whole, count=1.5), "count must be an integer"),
        (dict(whole, count=True), "count must be an integer"),
        (dict(whole, count=-3), "count must be an integer >= 0"),
        (dict(whole, count=2), "count must be block_size times"),
        (dict(whole, blocks=["a"]), r"^blocks\[0\] must be a number"),
        (dict(whole, blocks=3.0), "blocks must be a list"),
        (dict(whole, block_size=0), "power of 2"),
        (dict(whole, block_size=3), "power of 2"),
        (dict(whole, open_count=1), "power of 2 above open_count"),
        (dict(whole, blocks=[1.0] * 600, count=600), "fewer than 512 blocks"),
        (dict(whole, mean="3"), "^mean must be a number"),
        (dict(whole, scatter=-1.0), "scatter must be >= 0"),
        (dict(whole, mean=math.nan), "must be those of the values that the blocks hold, whose mean is 3"),
        (dict(whole, mean=math.inf), "must be those of the values"),
        (dict(whole, mean=2.9), "must be those of the values"),
        (dict(whole, scatter=math.nan), "must be those of the values"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            mean.load_state_dict(state)
        assert mean.state_dict() == whole


@pytest.mark.parametrize("count", [1, 5, 600, 1500])
@pytest.mark.parametrize("special", [[], [math.nan], [math.inf], [1e300, -1e300]])
def test_every_stream_can_be_continued(count, special):
    mean, other = noise.RunningMean(), noise.RunningMean()
    for value in [*np.random.default_rng(0).standard_normal(count), *special]:
        mean.add(float(value))
    other.load_state_dict(mean.state_dict())
    assert repr(other.estimate()) == repr(mean.estimate())


def test_edge_cases_of_the_mean():
    empty = noise.RunningMean()
    assert math.isnan(empty.mean)
    assert math.isnan(empty.standard_error)
    empty.add(2.0)
    assert empty.mean == 2.0
    assert math.isnan(empty.standard_error)
    empty.add(2.0)
    assert empty.estimate() == noise.Estimate(2.0, 0.0, 1.0, effective_samples=2.0)
    one = noise.mean_standard_error([5.0])
    assert (one.mean, one.effective_samples, str(one)) == (5.0, 1.0, "5 ± nan")
    assert noise.mean_standard_error([4.0] * 10) == noise.Estimate(4.0, 0.0, 5.0, effective_samples=10.0)
    assert repr(empty) == "RunningMean(2, 2 values, 2 effective)"


def test_not_a_number_is_not_hidden():
    mean = noise.RunningMean()
    for value in (1.0, math.nan, 2.0):
        mean.add(value)
    assert math.isnan(mean.mean)
    assert math.isnan(mean.standard_error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int32])
def test_a_series_may_be_a_tensor_of_any_real_dtype(dtype):
    found = noise.mean_standard_error(torch.tensor([1, 2, 3, 2, 1, 2], dtype=dtype))
    assert found == noise.mean_standard_error([1.0, 2, 3, 2, 1, 2])


def test_the_mean_of_a_stream_of_tiny_values_has_an_error():
    mean = noise.RunningMean()
    for value in (1e-200, 2e-200, 4e-200, 3e-200):
        mean.add(value)
    assert 0 < mean.standard_error < 4e-200
    assert not mean.estimate().trusted
