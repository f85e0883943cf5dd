"""Augmentation: every sample is the crop and flip that a loop makes of the same draws, and the draws are uniform."""

import math

import pytest
import torch
from torch.nn import functional as F

import svag_fast
from svag_fast.augment import crop_flip


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some(*shape, dtype=torch.float32):
    values = torch.randint(1, 256, shape, generator=generator(1))
    return values.to(dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 3, 6, 5), (1, 1, 4, 4), (3, 2, 1, 1), (0, 3, 4, 4)])
@pytest.mark.parametrize("padding", [0, 1, 4])
def test_values_against_a_loop(dtype, shape, padding):
    images = some(*shape, dtype=dtype)
    before = images.clone()
    out = crop_flip(padding)(images, generator(3))
    g = generator(3)
    shifts, flips = (
        torch.randint(2 * padding + 1, (2, len(images)), generator=g),
        torch.randint(2, shape[:1], generator=g),
    )
    assert (out.shape, out.dtype) == (images.shape, images.dtype)
    for i, image in enumerate(images):
        down, across = shifts[:, i].tolist()
        crop = F.pad(image, (padding,) * 4)[:, down : down + shape[2], across : across + shape[3]]
        assert torch.equal(out[i], crop.flip(-1) if flips[i] else crop)
    assert torch.equal(images, before)
    assert out.is_contiguous()


def draws(padding, count):
    """The shifts and flips of many samples, read off images whose values say their places."""
    side = 2 * padding + 3  # its middle is in every crop
    image = torch.arange(1, side * side + 1).view(1, 1, side, side).expand(count, 1, side, side)
    out = crop_flip(padding)(image, generator(5))[:, 0]
    middle = out[:, padding + 1, padding + 1] - 1
    flipped = out[:, padding + 1, padding + 2] < out[:, padding + 1, padding + 1]
    return torch.stack([middle // side, middle % side]) - 1, flipped


def test_shifts_and_flips_are_uniform_and_independent_of_each_other_and_of_other_samples():
    """Counts of each cell within 4.5 standard errors of their mean; correlations of neighbours as well."""
    padding, count = 2, 20_000
    shifts, flips = draws(padding, count)
    cells = (shifts[0] * 5 + shifts[1]) * 2 + flips
    p = 1 / 50
    z = (torch.bincount(cells, minlength=50) - count * p) / math.sqrt(count * p * (1 - p))
    assert len(z) == 50
    assert float(z.abs().max()) < 4.5
    for series in (shifts[0], shifts[1], flips):
        x = series.double() - series.double().mean()
        correlation = float((x[1:] * x[:-1]).mean() / x.square().mean())
        assert abs(correlation) * math.sqrt(count - 1) < 4.5


def test_the_same_state_gives_the_same_bits_and_the_next_call_others():
    images, g = some(16, 3, 8, 8), generator()
    crop_flip(4)(images, g)
    state = g.get_state()
    first, second = crop_flip(4)(images, g), crop_flip(4)(images, g)
    g.set_state(state)
    assert torch.equal(crop_flip(4)(images, g), first)
    assert not torch.equal(first, second)


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    crop_flip(4)(some(4, 3, 8, 8), generator())
    assert torch.equal(torch.get_rng_state(), before)


def test_images_of_any_memory_format():
    images = some(5, 3, 8, 8)
    assert torch.equal(
        crop_flip(2)(images.to(memory_format=torch.channels_last), generator()), crop_flip(2)(images, generator())
    )


def test_it_is_public():
    assert svag_fast.augment.crop_flip is crop_flip
    assert crop_flip(3) == crop_flip(3) != crop_flip(4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: crop_flip(-1), ValueError, "padding must be an integer >= 0, got -1"),
        (lambda: crop_flip(1.5), TypeError, "padding must be an integer, got 1.5"),
        (lambda: crop_flip()(torch.ones(3, 8, 8), generator()), ValueError, r"images must .*, got \[3, 8, 8\]"),
        (lambda: crop_flip()([1], generator()), ValueError, r"images must be a tensor \[B, C, H, W\], got list"),
        (lambda: crop_flip()(torch.ones(1, 3, 8, 8), 0), TypeError, "generator must be a torch.Generator, got int"),
    ],
)
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
