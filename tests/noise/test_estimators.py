"""The noise estimators are unbiased, exactly by enumeration and statistically."""

import itertools
import math

import pytest
import torch

from svag_fast.noise import estimators as noise

N_DATA, B, DIM = 6, 3, 4


@pytest.fixture
def data():
    """Per-sample gradients [n, d] with a mean that is neither small nor large against their spread."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N_DATA, DIM, dtype=torch.float64, generator=generator).exp() + 0.3


def exact(grads, batch_size, *, replacement):
    """G, N_B and Tr Σ₁ of the whole data set, by their definitions."""
    mean = grads.mean(0)
    sample = (grads - mean).square().sum(1).mean()
    n = len(grads)
    batch = sample / batch_size * (1.0 if replacement else (n - batch_size) / (n - 1))
    return mean.square().sum(), batch, sample


def all_batches(*, replacement, size=B):
    return list(
        itertools.product(range(N_DATA), repeat=size) if replacement else itertools.permutations(range(N_DATA), size)
    )


def mean_estimate(estimates):
    return [torch.stack([e[i] for e in estimates]).mean() for i in range(3)]


@pytest.mark.parametrize("replacement", [True, False])
def test_per_sample_estimator_is_unbiased_by_enumeration(data, replacement):
    estimates = []
    for batch in all_batches(replacement=replacement):
        g = data[list(batch)]
        population = None if replacement else N_DATA
        estimates.append(noise.from_sample_norms(g.square().sum(1), g.mean(0).square().sum(), population=population))
    torch.testing.assert_close(
        mean_estimate(estimates), list(exact(data, B, replacement=replacement)), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("replacement", [True, False])
def test_two_batch_estimator_is_unbiased_by_enumeration(data, replacement):
    means = [data[list(batch)].mean(0) for batch in all_batches(replacement=replacement, size=2)]
    estimates = [
        noise.from_two_batches(
            a.square().sum(), b.square().sum(), a @ b, batch_size=2, population=None if replacement else N_DATA
        )
        for a in means
        for b in means
    ]
    torch.testing.assert_close(
        mean_estimate(estimates), list(exact(data, 2, replacement=replacement)), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("replacement", [True, False])
def test_two_batches_of_samples_are_unbiased_by_enumeration(data, replacement):
    estimates = []
    for one in all_batches(replacement=replacement, size=2):
        for other in all_batches(replacement=replacement, size=2):
            g = data[list(one + other)]
            a, b = g[:2].mean(0), g[2:].mean(0)
            estimates.append(
                noise.from_two_batches_of_samples(
                    g.square().sum(1), a @ a, b @ b, a @ b, population=None if replacement else N_DATA
                )
            )
    torch.testing.assert_close(
        mean_estimate(estimates), list(exact(data, 2, replacement=replacement)), rtol=1e-12, atol=0
    )


def test_with_replacement_g_of_two_batches_of_samples_is_the_mean_over_all_pairs():
    g = torch.randn(10, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, b = g[:5].mean(0), g[5:].mean(0)
    estimate = noise.from_two_batches_of_samples(g.square().sum(1), a @ a, b @ b, a @ b)
    gram = g @ g.T
    torch.testing.assert_close(estimate.grad_sq_norm, (gram.sum() - gram.trace()) / 90)


def test_two_halves_of_one_draw_are_unbiased_by_enumeration(data):
    """The authors' sampling: 2B distinct samples cut in half; the halves are negatively correlated."""
    estimates, raw = [], []
    for batch in itertools.permutations(range(N_DATA), 4):
        a, b = data[list(batch[:2])].mean(0), data[list(batch[2:])].mean(0)
        args = (a.square().sum(), b.square().sum(), a @ b)
        estimates.append(noise.from_two_batches(*args, batch_size=2, population=N_DATA, disjoint=True))
        raw.append(noise.from_two_batches(*args, batch_size=2, population=N_DATA))
    truth = list(exact(data, 2, replacement=False))
    torch.testing.assert_close(mean_estimate(estimates), truth, rtol=1e-12, atol=0)
    assert not torch.allclose(torch.stack(mean_estimate(raw)), torch.stack(truth), rtol=1e-3)


@pytest.mark.parametrize("replacement", [True, False])
def test_many_batch_estimator_is_unbiased_by_enumeration(data, replacement):
    """M = 3 independent batches of 2; all triples of a data set of four."""
    small = data[:4]
    draws = itertools.product(range(4), repeat=2) if replacement else itertools.permutations(range(4), 2)
    means = [small[list(batch)].mean(0) for batch in draws]
    population = None if replacement else 4
    estimates, streamed = [], []
    for triple in itertools.product(means, repeat=3):
        g = torch.stack(triple)
        estimates.append(
            noise.from_batches(g.square().sum(1), g.mean(0).square().sum(), batch_size=2, population=population)
        )
        if len(streamed) < 50:
            moments = noise.BatchMoments()
            for row in triple:
                moments.add([row[:1], row[1:]])
            streamed.append((moments.estimate(batch_size=2, population=population), estimates[-1]))
    torch.testing.assert_close(
        mean_estimate(estimates), list(exact(small, 2, replacement=replacement)), rtol=1e-12, atol=0
    )
    for ours, formula in streamed:
        torch.testing.assert_close(list(ours), list(formula), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("kind", ["per-sample", "two-batch", "batches"])
def test_estimators_are_within_4_standard_errors_on_random_batches(kind, replacement):
    """500 samples of 20 skewed gradients, B = 8, 4,000 random estimates of each kind."""
    generator = torch.Generator().manual_seed(1)
    grads = torch.randn(500, 20, dtype=torch.float64, generator=generator).exp()
    size, repeats = 8, 4_000
    if replacement:
        index = torch.randint(0, 500, (repeats, 4, size), generator=generator)
    else:
        index = torch.rand(repeats, 4, 500, generator=generator).topk(size, dim=2).indices
    batches = grads[index]  # [repeats, 4, size, 20]
    means = batches.mean(2)
    population = None if replacement else 500
    rows = []
    for g, m in zip(batches, means, strict=True):
        if kind == "per-sample":
            e = noise.from_sample_norms(g[0].square().sum(1), m[0].square().sum(), population=population)
        elif kind == "two-batch":
            e = noise.from_two_batches(
                m[0].square().sum(), m[1].square().sum(), m[0] @ m[1], batch_size=size, population=population
            )
        else:
            e = noise.from_batches(m.square().sum(1), m.mean(0).square().sum(), batch_size=size, population=population)
        rows.append(torch.stack(list(e)))
    values = torch.stack(rows)
    z = (values.mean(0) - torch.stack(exact(grads, size, replacement=replacement))) / (
        values.std(0) / math.sqrt(repeats)
    )
    assert z.abs().max() < 4, z


def test_negative_estimates_are_not_clamped():
    """Opposite gradients have G below 0; equal norms with a larger mean, which rounding can give, N below 0."""
    assert noise.from_two_batches(1.0, 1.0, -1.0).grad_sq_norm == -1
    assert noise.from_sample_norms(torch.tensor([1.0, 1.0]), 0.0).grad_sq_norm == -1
    assert noise.from_sample_norms(torch.tensor([1.0, 1.0]), 1.5).noise_trace == -0.5


def test_small_differences_of_large_norms_survive():
    """Norms near 1e12 that differ by 1: float32 has no digit left of it, nor has a float64 mean of squares at 1e16."""
    norms = torch.full((1000,), 1e12, dtype=torch.float64) + torch.arange(1000) % 2
    estimate = noise.from_sample_norms(norms, 1e12)
    torch.testing.assert_close(estimate.sample_noise_trace, torch.tensor(0.5 * 1000 / 999, dtype=torch.float64))


def test_streaming_batches_keep_a_small_noise_on_a_large_mean():
    generator = torch.Generator().manual_seed(2)
    small = torch.randn(50, 30, dtype=torch.float64, generator=generator)
    moments = noise.BatchMoments()
    for row in small:
        moments.add([row + 1e7])
    truth = small.var(0).sum()
    torch.testing.assert_close(moments.estimate().noise_trace, truth, rtol=1e-6, atol=0)


def test_nsr_is_the_ratio():
    assert noise.from_two_batches(3.0, 3.0, 1.0).nsr == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: noise.from_sample_norms(torch.ones(1), 1.0), r"B >= 2, got \[1\]"),
        (lambda: noise.from_sample_norms(torch.ones(2, 2), 1.0), r"\[2, 2\]"),
        (lambda: noise.from_sample_norms(torch.ones(4), 1.0, population=3), "got 3"),
        (lambda: noise.from_sample_norms(torch.ones(4), torch.ones(2)), "batch_grad_sq_norm must be one number"),
        (lambda: noise.from_two_batches(1.0, 1.0, torch.ones(2)), "inner must be one number"),
        (lambda: noise.from_two_batches_of_samples(torch.ones(3), 1.0, 1.0, 1.0), r"\[2B\] with B >= 2, got \[3\]"),
        (lambda: noise.from_two_batches_of_samples(torch.ones(2), 1.0, 1.0, 1.0), r"\[2B\] with B >= 2, got \[2\]"),
        (lambda: noise.from_two_batches(1.0, 1.0, 1.0, disjoint=True), "batch_size and population must be numbers"),
        (
            lambda: noise.from_two_batches(1.0, 1.0, 1.0, batch_size=3, population=5, disjoint=True),
            "the 6 samples drawn",
        ),
        (lambda: noise.from_two_batches(1.0, 1.0, 1.0, batch_size=5, population=5), "no noise"),
        (lambda: noise.from_two_batches(1.0, 1.0, 1.0, batch_size=0), "at least 1, got 0"),
        (lambda: noise.from_batches(torch.ones(1), 1.0), "M >= 2"),
        (lambda: noise.BatchMoments().estimate(), "the batches must be at least 2 for the noise, got 0"),
        (lambda: noise.BatchMoments().add([]), "grads must be one gradient or more, got none"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: noise.from_sample_norms([1.0, 2.0], 1.0), r"sq_norms must be a tensor \[B\], got list"),
        (
            lambda: noise.from_sample_norms(torch.ones(3, dtype=torch.complex64), 1.0),
            r"sq_norms must be real numbers, got torch\.complex64",
        ),
        (
            lambda: noise.from_sample_norms(torch.ones(3), None),
            r"batch_grad_sq_norm must be a number, got None \(NoneType\)",
        ),
        (lambda: noise.from_sample_norms(torch.ones(3), "1"), "batch_grad_sq_norm must be a number, got '1'"),
        (lambda: noise.from_sample_norms(torch.ones(3), 1.0, population=3.5), "population must be an int, got float"),
        (lambda: noise.from_sample_norms(torch.ones(3), 1.0, weights=[1, 1, 1]), r"weights .* \[3\], got list"),
        (lambda: noise.from_two_batches(1.0, 1j, 1.0), r"sq_norm2 must be a number, got 1j \(complex\)"),
        (lambda: noise.from_two_batches(1.0, 1.0, torch.ones((), dtype=torch.complex64)), "inner must be real"),
        (lambda: noise.from_two_batches(1.0, 1.0, 1.0, batch_size="8"), "the batch size must be an int, got str"),
        (lambda: noise.from_two_batches(1.0, 1.0, 1.0, batch_size=True), "the batch size must be an int, got bool"),
        (lambda: noise.from_two_batches_of_samples(None, 1, 1, 1), r"sq_norms must be a tensor \[2B\], got NoneType"),
        (lambda: noise.from_batches((1.0, 2.0), 1.0), r"sq_norms must be a tensor \[M\], got tuple"),
        (
            lambda: noise.BatchMoments().add([torch.ones(2), None]),
            r"grads\[1\] must be a tensor, got NoneType: a param",
        ),
        (lambda: noise.BatchMoments().add(torch.ones(2, 2)), "list of tensors, one for each parameter, got one"),
        (lambda: noise.BatchMoments().add([torch.ones(2, dtype=torch.complex64)]), r"grads\[0\] must be real"),
        (lambda: noise.BatchMoments().add([torch.eye(2).to_sparse()]), r"grads\[0\] must be real and dense"),
    ],
)
def test_what_is_no_number_is_refused(call, message):
    """By name, with what was expected and what came; complex numbers do not lose their imaginary part."""
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": torch.ones(4)}, r"weights must be of the shape of sq_norms, \[3\], got \[4\]"),
        ({"weights": torch.ones(3), "population": 9}, "population must be None where samples have weights, got 9"),
        ({"weights": torch.tensor([1.0, 0, 0])}, "at least two not 0"),
        ({"weights": torch.tensor([1.0, -1.0, 0])}, "not add up to 0"),
        ({"weights": torch.tensor([1.0, 1.0, math.nan])}, "finite"),
    ],
)
def test_weights_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        noise.from_sample_norms(torch.ones(3), 1.0, **options)


WEIGHTS = torch.tensor([0.2, 1.0, 0.0, 3.0], dtype=torch.float64)


def test_weighted_estimators_are_unbiased_by_enumeration(data):
    """Of the weighted mean's gradient; a sample of weight 0 is nowhere, whatever its norm is said to be."""
    data = data[:4]
    truth = exact(data, 1, replacement=True)
    q = float(WEIGHTS.square().sum() / WEIGHTS.sum().square())
    one, two = [], []
    for batch in itertools.product(range(4), repeat=4):
        g = data[list(batch)]
        norms = torch.where(WEIGHTS == 0, math.nan, g.square().sum(1))
        sum1 = WEIGHTS @ g
        one.append(noise.from_sample_norms(norms, sum1.square().sum(), weights=WEIGHTS))
        # Two batches of two samples each, of other total weights.
        w = torch.tensor([0.5, 1.5, 1.0, 3.0], dtype=torch.float64)
        a, b = w[:2] @ g[:2], w[2:] @ g[2:]
        two.append(
            noise.from_two_batches_of_samples(g.square().sum(1), a.square().sum(), b.square().sum(), a @ b, weights=w)
        )
    expected = [truth[0], q * truth[2], truth[2]]
    torch.testing.assert_close(mean_estimate(one), expected, rtol=1e-12, atol=0)
    halves = [float(v.square().sum() / v.sum().square()) for v in (w[:2], w[2:])]
    expected = [truth[0], sum(halves) / 2 * truth[2], truth[2]]
    torch.testing.assert_close(mean_estimate(two), expected, rtol=1e-12, atol=0)


def test_equal_weights_are_none(data):
    norms, batch = data.square().sum(1), data.mean(0).square().sum()
    torch.testing.assert_close(
        noise.from_sample_norms(norms, batch * 9, weights=torch.full((N_DATA,), 3 / N_DATA)),
        noise.from_sample_norms(norms, batch),
        rtol=1e-6,
        atol=0,
    )


def test_batch_moments_refuse_other_shapes_and_stay_as_they_were():
    moments = noise.BatchMoments()
    moments.add([torch.ones(2)])
    with pytest.raises(ValueError, match=r"grads must be of the shapes of the batches before, \[\[2\]\], got"):
        moments.add([torch.ones(3)])
    assert moments.batches == 1
