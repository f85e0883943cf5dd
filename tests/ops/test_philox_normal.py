"""Normals by counter: Philox's known answers, the formula on every backend, and the law they follow."""

import math

import pytest
import scipy.stats
import torch
from simd import AVAILABLE, simd_level

from svag_fast.ops import philox_normal_
from svag_fast.ops.philox_normal import philox

KEY = (0xDEADBEEF, 0x12345678)
DTYPES = [torch.float32, torch.float64]


def normals(n, dtype=torch.float32, **where):
    return philox_normal_(torch.empty(n, dtype=dtype), **{"key": KEY, **where})


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, (2**32 - 1,) * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(counter, key, words):
    assert philox(torch.tensor(counter), key).tolist() == words


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 15, 33, 64, 65, 1000, 70_001])
def test_every_backend_gives_the_formulas_numbers(backend, n, dtype):
    """The polynomials against float64's own functions, to float32's rounding; in float64 the formula's angle, of size
    2 pi and times a length of up to 8, is itself rounded by 32 eps."""
    where = {"first": 64 * 5, "draw": 2**40 + 3}
    expected = normals(n, dtype, backend="reference", **where)
    torch.testing.assert_close(
        normals(n, dtype, backend=backend, **where),
        expected,
        rtol=0,
        atol={torch.float32: 4, torch.float64: 32}[dtype] * torch.finfo(dtype).eps,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_level_gives_the_same_bits(dtype):
    found = []
    for level in AVAILABLE:
        with simd_level(level):
            found.append(normals(10_000, dtype, backend="cpu"))
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_holds_the_numbers_of_its_elements(backend, dtype):
    whole = normals((100, 3), dtype, backend=backend).flatten()
    assert torch.equal(normals(300 - 128, dtype, first=128, backend=backend), whole[128:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_law_is_normal(dtype):
    """2^20 numbers: eight moments and the tail counts at |z| < 4.5 each, Kolmogorov and Smirnov's p > 1e-5."""
    n = 2**20
    z = normals(n, dtype).double()
    power = torch.ones_like(z)
    for p in range(1, 9):
        power *= z
        moment, square = (math.prod(range(q - 1, 0, -2)) for q in (p, 2 * p))
        expected = moment if p % 2 == 0 else 0
        error = math.sqrt((square - expected**2) / n)
        assert abs(power.mean().item() - expected) < 4.5 * error, p
    for bound in (0.01, 0.5, 1, 2, 3, 4, 4.5):
        for tail in (z < -bound, z > bound):
            share = scipy.stats.norm.sf(bound)
            assert abs(tail.sum().item() - n * share) < 4.5 * math.sqrt(n * share), bound
    assert scipy.stats.kstest(z.numpy(), "norm", method="asymp").pvalue > 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_are_uncorrelated_within_and_across_counters_draws_and_keys(dtype):
    """Of z and of z²: correlations of 2^15 groups, all 64 elements against all of this and of three other streams.

    The largest of 32,000 is below 5.5 standard errors with probability 0.999.
    """
    groups = 2**15
    blocks = [
        normals((groups, 64), dtype),
        normals((groups, 64), dtype, draw=1),
        normals((groups, 64), dtype, key=(KEY[0] + 1, KEY[1])),
        normals((groups, 64), dtype).roll(1, 0),
    ]
    for power in (1, 2):
        columns = [b.double() ** power for b in blocks]
        scaled = [(c - c.mean(0)) / c.std(0) for c in columns]
        within = scaled[0].T @ scaled[0] / groups
        within.fill_diagonal_(0)
        for table in (within, *(scaled[0].T @ other / groups for other in scaled[1:])):
            assert table.abs().max().item() * math.sqrt(groups) < 5.5


def test_angles_of_pairs_are_uniform():
    """Box and Muller's pairs are in every direction alike: Kolmogorov and Smirnov over the angle, p > 1e-5."""
    z = normals((2**14, 64)).view(-1, 4, 16)
    angle = torch.atan2(z[:, 1], z[:, 0]).flatten().double() / (2 * math.pi) + 0.5
    assert scipy.stats.kstest(angle.numpy(), "uniform", method="asymp").pvalue > 1e-5


@pytest.mark.parametrize(
    ("out", "change", "error", "message"),
    [
        (torch.empty(4, dtype=torch.float16), {}, TypeError, r"out must be torch\.float32 or torch\.float64, got"),
        (torch.empty(4, 4).T, {}, ValueError, r"out must be contiguous, got strides \[1, 4\]"),
        (torch.empty(4), {"key": (1, 2**32)}, ValueError, "key must be"),
        (torch.empty(4), {"key": (-1, 0)}, ValueError, "key must be"),
        (torch.empty(4), {"draw": -1}, ValueError, "draw must be"),
        (torch.empty(4), {"draw": 2**64}, ValueError, "draw must be"),
        (torch.empty(4), {"first": 32}, ValueError, "first must be"),
        (torch.empty(4), {"first": -64}, ValueError, "first must be"),
        (torch.empty(4), {"first": 2**33}, ValueError, "first must be"),
    ],
)
def test_what_no_stream_can_fill_is_refused_untouched(out, change, error, message):
    before = out.fill_(7).clone()
    with pytest.raises(error, match=message):
        philox_normal_(out, **{"key": KEY, **change})
    assert torch.equal(out, before)
