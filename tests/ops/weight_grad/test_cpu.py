"""The CPU's ways: every SIMD level and loop order that this machine runs, any number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from draws import close, same_bits
from hypothesis import given, settings
from layer_cases import CONVOLUTION, LINEAR, make
from layer_strategies import convolutions
from simd import AVAILABLE, simd_level, torch_threads

from svag_fast.ops.weight_grad.cpu import SAMPLES_OUTSIDE, TILES_OUTSIDE, choose, direct, gram, pixel_gram, serve
from svag_fast.ops.weight_grad.gram_cpu import gram_sq_norms
from svag_fast.ops.weight_grad.op import reference, unchecked_weight_grads, weight_grad_and_sq_norms
from svag_fast.ops.weight_grad.shapes import Geometry, LayerProduct, layer_product

LOOP_ORDERS = (SAMPLES_OUTSIDE, TILES_OUTSIDE)
CASES = {**{f"linear, {name}": (*case, {}) for name, case in LINEAR.items()}, **CONVOLUTION}


def products(case: str) -> Iterator[LayerProduct]:
    """The case in both memory formats, with weights, and with and without segments, one of them empty."""
    input_shape, shape, options = CASES[case]
    x, dy = make(input_shape, shape, **options)
    weights = torch.linspace(-1, 2, len(x), dtype=torch.float64)
    segments = 3 * (torch.arange(len(x)) % 2)
    for memory_format in (torch.contiguous_format, torch.channels_last) if x.dim() == 4 else (None,):
        if memory_format is not None:
            x, dy = x.contiguous(memory_format=memory_format), dy.contiguous(memory_format=memory_format)
        yield layer_product(x, dy, shape, weights, **options)
        yield layer_product(x, dy, shape, weights, segments, **options)


NOT_EMPTY = [name for name, (x, shape, _) in CASES.items() if all(x) and all(shape)]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("case", NOT_EMPTY)
def test_each_level_and_loop_order_matches_the_reference(case: str) -> None:
    for product in products(case):
        exact = reference(product)
        for level in AVAILABLE:
            for loop_order in LOOP_ORDERS:
                with simd_level(level):
                    ours = direct(product, loop_order)
                    single = direct(
                        product._replace(inputs=product.inputs.float(), output_grads=product.output_grads.float()),
                        loop_order,
                    )
                for i, result in enumerate(exact):
                    if result.numel():
                        close(ours[i], result, 1e-12)
                        close(single[i].double(), result, 1e-5)


@pytest.mark.parametrize("loop_order", LOOP_ORDERS, ids=["samples outside", "tiles outside"])
@pytest.mark.parametrize("shape", [[40, 33, 3, 3], [16, 3, 3, 3]], ids=["several tiles", "few channels"])
def test_same_bits_for_any_number_of_threads(loop_order: int, shape: list[int]) -> None:
    x, dy = make([37, shape[1], 9, 9], shape, padding=1, dtype=torch.float32)
    segments = torch.arange(37) % 3
    results = []
    for threads in (1, 2, 3, 8):
        with torch_threads(threads):
            for _ in range(3):
                results.append(direct(layer_product(x, dy, shape, None, segments, padding=1), loop_order))
    assert same_bits(*results)


@pytest.mark.parametrize("loop_order", LOOP_ORDERS, ids=["samples outside", "tiles outside"])
def test_one_samples_nan_and_inf_stay_in_its_norm(loop_order: int) -> None:
    x, dy = make([5, 6, 7, 7], [11, 6, 3, 3], padding=1, dtype=torch.float32)
    clean = direct(layer_product(x, dy, [11, 6, 3, 3], padding=1), loop_order)[1]
    x[1, 2, 3, 3], dy[3, 4, 6, 6] = float("nan"), float("inf")
    norms = direct(layer_product(x, dy, [11, 6, 3, 3], padding=1), loop_order)[1]
    assert torch.equal(norms.isfinite(), torch.tensor([True, False, True, False, True]))
    assert torch.equal(norms[[0, 2, 4]], clean[[0, 2, 4]])


def test_a_batch_that_ends_at_a_page_is_not_read_beyond() -> None:
    """Inputs at the very end of their storage, next to NaN: what follows them never enters."""
    for channels in (1, 3, 16, 17):
        shape = [5, channels, 3, 3]
        x, dy = make([3, channels, 5, 5], shape, padding=1)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            guarded = []
            for t in (x.contiguous(memory_format=memory_format), dy.contiguous(memory_format=memory_format)):
                storage = torch.full((t.numel() + 200,), float("nan"), dtype=t.dtype)
                inner = storage[100 : 100 + t.numel()].as_strided(t.shape, t.stride(), 100)
                guarded.append(inner.copy_(t))
            exact = reference(layer_product(x, dy, shape, padding=1))
            for loop_order in LOOP_ORDERS:
                ours = direct(layer_product(*guarded, shape, padding=1), loop_order)
                close(ours[0], exact[0], 1e-12)
                close(ours[1], exact[1], 1e-12)


@pytest.mark.parametrize("case", [name for name in NOT_EMPTY if name.startswith("linear")])
def test_gram_form_matches_the_reference(case: str) -> None:
    for product in products(case):
        for ours, exact in zip(gram(product), reference(product), strict=True):
            if exact.numel():
                close(ours, exact, 1e-12)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("case", NOT_EMPTY)
def test_norms_from_products_match_the_reference_at_each_level(case: str) -> None:
    for product in products(case):
        exact = reference(product)
        single = product._replace(inputs=product.inputs.float(), output_grads=product.output_grads.float())
        rounded = reference(single._replace(inputs=single.inputs.double(), output_grads=single.output_grads.double()))
        for level in AVAILABLE:
            with simd_level(level):
                close(gram_sq_norms(product), exact[1], 1e-12)
                close(gram_sq_norms(single), rounded[1], 1e-7)
                if product.inputs.dim() == 4:
                    for ours, result in zip(pixel_gram(product), exact, strict=True):
                        if result.numel():
                            close(ours, result, 1e-12)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=convolutions(), channels_last=st.booleans())
def test_pixel_gram_of_generated_shapes(case: tuple[list[int], list[int], dict[str, Any]], channels_last: bool) -> None:
    input_shape, shape, options = case
    x, dy = make([max(input_shape[0], 1), *input_shape[1:]], shape, **options)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    product = layer_product(x, dy, shape, **options)
    for ours, exact in zip(pixel_gram(product)[:2], reference(product)[:2], strict=True):
        close(ours, exact, 1e-12)


def test_weights_of_zero_leave_the_norms() -> None:
    """Trap: at l = 1 SVAG's second half has weight 0, and its norms don't follow from weighted rows."""
    for shape, x_shape in (([40, 48, 3, 3], [6, 48, 2, 2]), ([8, 4, 3, 3], [6, 4, 9, 9]), ([5, 7], [6, 3, 7])):
        options = {"padding": 1} if len(shape) == 4 else {}
        x, dy = make(x_shape, shape, **options)
        segments = torch.arange(6) // 3
        weighted = serve(layer_product(x, dy, shape, 1.0 - segments, segments, **options))
        plain = serve(layer_product(x, dy, shape, **options))
        close(weighted[1], plain[1], 1e-12)
        close(weighted[0], serve(layer_product(x[:3], dy[:3], shape, **options))[0], 1e-12)
        assert float(weighted[2][1, 1]) == 0


def test_pixel_gram_sums_many_samples_in_the_segments_order() -> None:
    """Runs of samples that end at a segment's end, with more samples than a run holds."""
    x, dy = make([70, 9, 4, 4], [11, 9, 3, 3], padding=1)
    weights = torch.linspace(-1, 2, 70, dtype=torch.float64)
    segments = torch.randint(0, 4, (70,), generator=torch.Generator().manual_seed(0)) * 2
    product = layer_product(x, dy, [11, 9, 3, 3], weights, segments, padding=1)
    for ours, exact in zip(pixel_gram(product), reference(product), strict=True):
        close(ours, exact, 1e-12)


@pytest.mark.parametrize("shape", [[40, 33, 3, 3], [16, 3, 1, 1]], ids=["windows", "single pixels"])
def test_pixel_gram_gives_the_same_bits_for_any_number_of_threads(shape: list[int]) -> None:
    x, dy = make([37, shape[1], 5, 5], shape, dtype=torch.float32)
    product = layer_product(x, dy, shape, None, torch.arange(37) % 3)
    results = []
    for threads in (1, 2, 3, 8):
        with torch_threads(threads):
            results.append(pixel_gram(product))
    assert same_bits(*results)


def cancelling(way: str) -> LayerProduct:
    """Rows alike at all positions, output gradients that sum to nearly 0 over them: as a normalisation leaves them."""
    generator = torch.Generator().manual_seed(1)
    x = 3 + 0.03 * torch.randn(20, 96, 4, 4, generator=generator)
    dy = torch.randn(20, 64, 4, 4, generator=generator)
    dy -= dy.mean((2, 3), keepdim=True)
    if way == "linear":
        return layer_product(x.flatten(2).mT.contiguous(), dy.flatten(2).mT.contiguous(), [64, 96])
    return layer_product(x, dy, [64, 96, 1, 1])


@pytest.mark.parametrize("way", ["linear", "convolution"])
def test_gradients_that_cancel_keep_their_digits(way: str) -> None:
    """Products of rows lose |a|²|b|²/|g|², here 10⁴, in float32: where that shows they are formed in float64."""
    product = cancelling(way)
    exact = reference(product._replace(inputs=product.inputs.double(), output_grads=product.output_grads.double()))[1]
    close(gram_sq_norms(product), exact, 1e-10)


def test_rows_that_cancel_entirely_are_not_negative() -> None:
    x, dy = torch.randn(64, 1, 33).expand(64, 2, 33), torch.randn(64, 1, 17)
    sq_norms = gram_sq_norms(layer_product(x, torch.cat([dy, -dy], 1), [17, 33]))
    assert bool((sq_norms >= 0).all())
    assert float(sq_norms.max()) < 1e-10


def test_products_of_pixels_read_nothing_behind_their_storage() -> None:
    for channels in (1, 3, 16, 17):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            guarded = []
            x, dy = make([3, channels, 5, 5], [5, channels, 3, 3], padding=1, dtype=torch.float32)
            for t in (x.contiguous(memory_format=memory_format), dy.contiguous(memory_format=memory_format)):
                storage = torch.full((t.numel() + 200,), float("nan"))
                guarded.append(storage[100 : 100 + t.numel()].as_strided(t.shape, t.stride(), 100).copy_(t))
            exact = reference(layer_product(x.double(), dy.double(), [5, channels, 3, 3], padding=1))
            close(gram_sq_norms(layer_product(*guarded, [5, channels, 3, 3], padding=1)), exact[1], 1e-12)


def test_nan_and_inf_stay_in_their_samples_norm_in_products_of_pixels() -> None:
    x, dy = make([5, 6, 7, 7], [11, 6, 3, 3], padding=1, dtype=torch.float32)
    clean = gram_sq_norms(layer_product(x, dy, [11, 6, 3, 3], padding=1))
    x[1, 2, 3, 3], dy[3, 4, 6, 6] = float("nan"), float("inf")
    norms = gram_sq_norms(layer_product(x, dy, [11, 6, 3, 3], padding=1))
    assert torch.equal(norms.isfinite(), torch.tensor([True, False, True, False, True]))
    assert torch.equal(norms[[0, 2, 4]], clean[[0, 2, 4]])


@pytest.mark.parametrize("loop_order", LOOP_ORDERS, ids=["samples outside", "tiles outside"])
def test_squares_beyond_float32_come_out_as_inf_and_never_as_nan(loop_order: int) -> None:
    """The gradient is finite, its square is not: the direct way's tiles are float32, the Gram forms' sums float64."""
    x, dy = make([3, 5, 6, 6], [7, 5, 3, 3], padding=1, dtype=torch.float32)
    x[1] *= 1e15
    dy[1] *= 1e10
    product = layer_product(x, dy, [7, 5, 3, 3], padding=1)
    exact = reference(product)
    grad, sq_norms, _ = direct(product, loop_order)
    assert bool(exact[0].isfinite().all())
    close(grad, exact[0], 1e-5)
    assert float(sq_norms[1]) == float("inf")
    close(sq_norms[[0, 2]], exact[1][[0, 2]], 1e-5)
    for result in (pixel_gram(product)[1], gram_sq_norms(product)):
        close(result[1] / exact[1][1], torch.ones((), dtype=torch.float64), 1e-5)
        close(result[[0, 2]], exact[1][[0, 2]], 1e-5)


@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (512, 64, 3, 3), (256, 512, 3, 3)], ids=["samples", "tiles", "pixels"])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_parts_of_a_batch_have_the_gradients_they_have_alone(shape, parts):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, shape[1], 4, 4, dtype=torch.float64, generator=generator)
    b = torch.randn(6, shape[0], 2, 2, dtype=torch.float64, generator=generator)
    grads, sq_norms = unchecked_weight_grads(x, b, torch.Size(shape), Geometry(), parts)
    assert len(grads) == parts
    for i, (grad, rows, some) in enumerate(zip(grads, x.chunk(parts), b.chunk(parts), strict=True)):
        alone = weight_grad_and_sq_norms(rows, some, shape, backend="reference")
        torch.testing.assert_close(grad, alone.grad, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(sq_norms.chunk(parts)[i], alone.sq_norms, rtol=1e-10, atol=1e-10)


def test_the_choice_follows_the_operations() -> None:
    assert choose((512, 512), 1) == "gram"
    assert choose((512, 512), 16) == "gram"
    assert choose((512, 512), 256) == "samples outside"
    assert choose((64, 64), 32) == "samples outside"
    assert choose((64, 64, 3, 3), 64) == "samples outside"
    assert choose((64, 64, 3, 3), 16) == "samples outside"
    assert choose((256, 256, 3, 3), 64) == "tiles outside"
    assert choose((512, 512, 3, 3), 16) == "pixel-gram"
    assert choose((512, 512, 3, 3), 4) == "pixel-gram"


def test_the_choice_counts_every_groups_products() -> None:
    """Depthwise layers have a Gram matrix a channel: no fewer operations than the gradient itself."""
    assert choose((512, 1, 3, 3), 4, groups=512) == "samples outside"
