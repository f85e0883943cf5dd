"""svag_step_per_sample_ against the means of the gradients followed by the fused step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from draws import close, same_bits
from simd import torch_threads
from torch import Tensor

from svag_fast.ops import step_per_sample, svag_step_, svag_step_per_sample_
from svag_fast.ops.backends import BackendError

SHAPES = [(), (1,), (0, 3), (5, 7), (3, 2, 3, 3), (2048,), (16385,), (40000,)]
STEP: dict[str, Any] = {"lr": 0.3, "weight_decay": 0.1}


def make(
    samples1: int, samples2: int, dtype: torch.dtype = torch.float64, shapes: list[tuple[int, ...]] = SHAPES
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(samples1)
    draw = [
        [torch.randn((*n, *s), generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
        for n in ((), (samples1,), (samples2,))
    ]
    return draw[0], draw[1], draw[2]


def norms(grads: list[Tensor]) -> Tensor:
    return torch.stack([torch.stack([g[i].square().sum() for g in grads]).sum() for i in range(len(grads[0]))])


@pytest.mark.parametrize("l", [1, 3, 1e6])
@pytest.mark.parametrize(("samples1", "samples2"), [(1, 1), (3, 5), (8, 8)])
def test_equals_the_means_and_the_fused_step(backend: str, l: float, samples1: int, samples2: int) -> None:
    params, grads1, grads2 = make(samples1, samples2)
    expected = [p.clone() for p in params]
    stats = svag_step_(
        expected, [g.mean(0) for g in grads1], [g.mean(0) for g in grads2], l=l, backend="reference", **STEP
    )
    result = svag_step_per_sample_(params, grads1, grads2, l=l, backend=backend, **STEP)
    for ours, exact in zip(params, expected, strict=True):
        close(ours, exact)
    close(result.sq_norms1, norms(grads1))
    assert result.sq_norms2 is not None
    close(result.sq_norms2, norms(grads2))
    close(result.stats.raw, stats.raw)


def test_without_a_second_batch_it_is_sgd(backend: str) -> None:
    params, grads1, _ = make(4, 1)
    expected = [p - STEP["lr"] * (g.mean(0) + STEP["weight_decay"] * p) for p, g in zip(params, grads1, strict=True)]
    result = svag_step_per_sample_(params, grads1, None, l=1, backend=backend, **STEP)
    for ours, exact in zip(params, expected, strict=True):
        close(ours, exact)
    assert result.sq_norms2 is None
    assert result.stats.inner is None


def test_at_l_1_an_inf_of_the_second_batch_never_reaches_the_params(backend: str) -> None:
    params, grads1, grads2 = make(2, 2)
    grads2[3][1, 0, 0] = float("inf")
    result = svag_step_per_sample_(params, grads1, grads2, l=1, backend=backend, **STEP)
    assert all(bool(p.isfinite().all()) for p in params)
    assert not bool(result.stats.finite)
    assert result.sq_norms2 is not None
    assert result.sq_norms2.isfinite().tolist() == [True, False]


def test_float32_within_twice_pytorchs_error(backend: str) -> None:
    params, grads1, grads2 = make(64, 64, torch.float32)
    exact, plain = [p.double() for p in params], [p.clone() for p in params]
    svag_step_(
        exact,
        [g.double().mean(0) for g in grads1],
        [g.double().mean(0) for g in grads2],
        l=4,
        backend="reference",
        **STEP,
    )
    svag_step_(plain, [g.mean(0) for g in grads1], [g.mean(0) for g in grads2], l=4, backend="reference", **STEP)
    result = svag_step_per_sample_(params, grads1, grads2, l=4, backend=backend, **STEP)

    def error(tensors: list[Tensor]) -> float:
        return sum(float((t - e).square().sum()) for t, e in zip(tensors, exact, strict=True)) ** 0.5

    assert error(params) <= 2 * error(plain)
    close(result.sq_norms1, norms([g.double() for g in grads1]), 1e-6)


def test_squares_beyond_float32_are_finite(backend: str) -> None:
    params, grads = [torch.zeros(100)], [torch.full((2, 100), 1e25)]
    result = svag_step_per_sample_(params, grads, None, lr=1e-25, l=1, backend=backend)
    close(result.sq_norms1, torch.full((2,), 1e52, dtype=torch.float64), 1e-6)
    assert bool(result.stats.finite)


def test_params_in_another_memory_order(backend: str) -> None:
    params, grads1, grads2 = make(3, 3, shapes=[(4, 3, 5, 5), (6, 7)])
    expected = [p.clone() for p in params]
    svag_step_per_sample_(expected, grads1, grads2, l=3, backend=backend, **STEP)
    turned = [params[0].contiguous(memory_format=torch.channels_last), params[1].t().contiguous().t()]
    svag_step_per_sample_(turned, grads1, grads2, l=3, backend=backend, **STEP)
    for ours, exact in zip(turned, expected, strict=True):
        assert torch.equal(ours, exact)


def test_same_bits_for_any_number_of_threads() -> None:
    results = []
    for threads in (1, 2, 3):
        params, grads1, grads2 = make(5, 6, torch.float32)
        with torch_threads(threads):
            result = svag_step_per_sample_(params, grads1, grads2, l=4, backend="cpu", **STEP)
        results.append([*params, result.sq_norms1, result.sq_norms2, result.stats.raw])
    assert same_bits(*results)


P, G = torch.randn(3, 4), torch.randn(5, 3, 4)
BAD: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "no second batch": (ValueError, "grads2 must be .* got None", {"grads2": None}),
    "lengths": (ValueError, "grads1 must be 1 tensors, as params is, got 2", {"grads1": [G, G]}),
    "shape": (ValueError, r"grads2\[0\] must be of shape \[B, 3, 4\] to fit params\[0\], got", {"grads2": [G.mT]}),
    "no samples": (ValueError, r"grads1\[0\] must be of as many samples as grads1\[0\] and at", {"grads1": [G[:0]]}),
    "dtype": (TypeError, r"grads1\[0\] must be torch\.float32, got torch\.float64", {"grads1": [G.double()]}),
    "device": (ValueError, r"grads1\[0\] must be on cpu, as params\[0\] is, got one on", {"grads1": [G.to("meta")]}),
    "sparse": (TypeError, r"grads1\[0\] must be a dense \(strided\) tensor, got", {"grads1": [G.to_sparse()]}),
    "empty list": (ValueError, "params must be one tensor or more,", {"params": [], "grads1": [], "grads2": []}),
    "backend": (BackendError, "backend must be one of auto, cuda, triton, cpu, reference, got", {"backend": "gpu"}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_nothing_is_written(case: str) -> None:
    error, message, change = BAD[case]
    param = P.clone()
    arguments: dict[str, Any] = {"params": [param], "grads1": [G], "grads2": [G.clone()], "lr": 0.1, "l": 2}
    with pytest.raises(error, match=message):
        svag_step_per_sample_(**{**arguments, **change})
    assert torch.equal(param, P)


def test_numbers_of_samples_that_differ_in_a_list_are_refused() -> None:
    with pytest.raises(ValueError, match=r"grads1\[1\] must be of as many samples as grads1\[0\] and at least 1,"):
        svag_step_per_sample_([P.clone(), P.clone()], [G, G[:4]], [G, G], lr=0.1, l=2)


def test_half_precision_goes_to_the_reference() -> None:
    param = P.to(torch.bfloat16)
    result = svag_step_per_sample_([param], [G.to(torch.bfloat16)], None, lr=0.1, l=1)
    close(result.sq_norms1, norms([G.to(torch.bfloat16).double()]))
    with pytest.raises(BackendError, match=r"params\[0\] is torch.bfloat16"):
        svag_step_per_sample_([param], [G.to(torch.bfloat16)], None, lr=0.1, l=1, backend="cpu")


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_opcheck(name: str) -> None:
    params, grads1, grads2 = make(3, 2, shapes=[(4, 3), (5,)])
    torch.library.opcheck(step_per_sample._op, (params, grads1, grads2, 0.1, 2.0, 0.1, name))
