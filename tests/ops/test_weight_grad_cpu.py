"""The direct kernel: every SIMD level and loop order that this machine runs, any number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from layer_cases import CONVOLUTION, LINEAR, make
from torch import Tensor

from svag_fast import _C
from svag_fast.ops.layer_product import LayerProduct, layer_product
from svag_fast.ops.weight_grad import reference
from svag_fast.ops.weight_grad_cpu import SAMPLES_OUTSIDE, TILES_OUTSIDE, choose, direct, gram

LOOP_ORDERS = (SAMPLES_OUTSIDE, TILES_OUTSIDE)
CASES = {**{f"linear, {name}": (*case, {}) for name, case in LINEAR.items()}, **CONVOLUTION}


@contextmanager
def simd_level(name: str) -> Iterator[None]:
    before = _C.simd_level()
    assert _C.select_simd_level(name)
    try:
        yield
    finally:
        assert _C.select_simd_level(before)


def levels() -> list[str]:
    names = ["portable", "avx2", "avx512"]
    return names[: names.index(_C.best_simd_level()) + 1]


def close(ours: Tensor, exact: Tensor, relative: float) -> None:
    torch.testing.assert_close(ours, exact, rtol=0, atol=relative * float(exact.abs().max()))


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
        for level in levels():
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
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            for _ in range(3):
                results.append(direct(layer_product(x, dy, shape, None, segments, padding=1), loop_order))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for ours, first in zip(result, results[0], strict=True):
            assert torch.equal(ours, first)


@pytest.mark.parametrize("loop_order", LOOP_ORDERS, ids=["samples outside", "tiles outside"])
def test_one_samples_nan_and_inf_stay_in_its_norm(loop_order: int) -> None:
    x, dy = make([5, 6, 7, 7], [11, 6, 3, 3], padding=1, dtype=torch.float32)
    clean = direct(layer_product(x, dy, [11, 6, 3, 3], padding=1), loop_order)[1]
    x[1, 2, 3, 3], dy[3, 4, 6, 6] = float("nan"), float("inf")
    norms = direct(layer_product(x, dy, [11, 6, 3, 3], padding=1), loop_order)[1]
    assert torch.equal(norms.isfinite(), torch.tensor([True, False, True, False, True]))
    assert torch.equal(norms[[0, 2, 4]], clean[[0, 2, 4]])


def test_a_batch_that_ends_at_a_page_is_not_read_beyond() -> None:
    """Inputs at the very end of their storage, next to NaN: what lies behind them never enters."""
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


def test_gram_form_of_rows_that_cancel_is_not_negative() -> None:
    x, dy = torch.randn(64, 1, 33).expand(64, 2, 33), torch.randn(64, 1, 17)
    sq_norms = gram(layer_product(x, torch.cat([dy, -dy], 1), [17, 33]))[1]
    assert bool((sq_norms >= 0).all())
    assert float(sq_norms.max()) < 1e-3


def test_the_choice_follows_the_operations() -> None:
    assert choose([512, 512], 1) == "gram"
    assert choose([512, 512], 16) == "gram"
    assert choose([512, 512], 64) == "samples outside"
    assert choose([64, 64, 3, 3], 64) == "samples outside"
    assert choose([512, 512, 3, 3], 16) == "tiles outside"
