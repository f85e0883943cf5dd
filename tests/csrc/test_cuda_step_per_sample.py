"""The CUDA step from per-sample gradients, its own source run on the host, against float64.

Run again in a process with AddressSanitizer (``SVAG_TEST_CUDA=address``) by tests/csrc/test_cuda_on_host.py.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from cuda_on_host.backend import DEVICE, STREAM, HostModule, cuda_on_host, load
from cuda_on_host.build import HostKernels
from draws import same_bits
from torch import Tensor

from svag_fast import svag_coefficients
from svag_fast.ops.step_per_sample import svag_step_per_sample_

MODE = os.environ.get("SVAG_TEST_CUDA", "race")
CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# Around a block's 512, 1024 and 2048 columns, whole packs and none; empty and one-element tensors.
SIZES = [0, 1, 3, 8, 510, 1024, 1025, 2056]
LR, WEIGHT_DECAY = 0.3, 0.02

ran_on_host = pytest.mark.kernels("per_sample_step_kernel", "finish_norms_kernel", "finish_kernel", ran="host")


@pytest.fixture(scope="module")
def built(pytestconfig: pytest.Config) -> HostKernels:
    return load(MODE, Path(pytestconfig.cache.mkdir("cuda_on_host")))


@pytest.fixture
def kernels(built: HostKernels) -> HostKernels:
    built.set_order("shuffled", seed=1)
    built.launches()
    return built


def draw(dtype: torch.dtype, seed: int, samples: int | None, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n,) if samples is None else (samples, n) for n in SIZES]
    return [(torch.randn(s, generator=generator, dtype=torch.float64) * scale).to(dtype) for s in shapes]


def step(
    kernels: HostKernels, params: list[Tensor], grads1: list[Tensor], grads2: list[Tensor] | None, l: float
) -> tuple[Tensor, Tensor]:
    module = HostModule(kernels)
    sizes, codes = [p.numel() for p in params], [CODES[p.dtype] for p in params]
    samples = [len(grads1[0]), 0 if grads2 is None else len(grads2[0])]
    sq_norms, stats = (torch.empty(n, dtype=torch.float64) for n in (sum(samples), 5))
    workspace = torch.empty(module.cuda_step_per_sample_workspace(sizes, codes, sum(samples)), dtype=torch.float64)
    addresses = [[t.data_ptr() for t in tensors or []] for tensors in (params, grads1, grads2)]
    module.cuda_step_per_sample(
        *addresses,
        sizes,
        codes,
        *samples,
        LR / l,
        *svag_coefficients(l),
        WEIGHT_DECAY,
        DEVICE,
        STREAM,
        workspace.data_ptr(),
        sq_norms.data_ptr(),
        stats.data_ptr(),
    )
    return sq_norms, stats


def check(
    params: list[Tensor],
    start: list[Tensor],
    grads1: list[Tensor],
    grads2: list[Tensor] | None,
    l: float,
    sq_norms: Tensor,
    stats: Tensor,
) -> None:
    batches = [grads1] if grads2 is None else [grads1, grads2]
    exact_norms = torch.cat([sum(g.double().square().sum(1) for g in grads) for grads in batches])  # type: ignore[arg-type]
    torch.testing.assert_close(sq_norms, exact_norms, rtol=1e-6, atol=0)
    means = [torch.cat([g.double().mean(0) for g in grads]) for grads in batches]
    x, before = (torch.cat(ts).double() for ts in (params, start))
    c1, c2 = svag_coefficients(l)
    combined = c1 * means[0] + (c2 * means[1] if c2 else 0)
    exact = before - LR / l * (combined + WEIGHT_DECAY * before)
    arithmetic = torch.finfo(torch.float64 if params[0].dtype == torch.float64 else torch.float32).eps
    bound = exact.abs() * torch.finfo(params[0].dtype).eps / 2 + 8 * arithmetic * (exact.abs() + 1)
    assert ((x - exact).abs() <= bound).all()
    second = means[1] if len(means) == 2 else torch.zeros(())
    scale = float(means[0].norm() ** 2 + second.norm() ** 2)
    expected = [means[0] @ means[0], second.square().sum(), (means[0] * second).sum(), before @ before]
    for value, wanted in zip(stats[:3], expected[:3], strict=True):
        assert abs(float(value - wanted)) <= 1e-6 * scale
    assert float(stats[3]) == pytest.approx(float(expected[3]), rel=1e-6)
    assert stats[4] == 1


@ran_on_host
@pytest.mark.parametrize(("samples1", "samples2", "l"), [(1, 1, 2), (5, 33, 65536), (34, 3, 1), (4, None, 1)])
@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_step_and_norms_equal_float64s(
    kernels: HostKernels, dtype: torch.dtype, samples1: int, samples2: int | None, l: float
) -> None:
    params, grads1 = draw(dtype, 0, None), draw(dtype, 1, samples1)
    grads2 = None if samples2 is None else draw(dtype, 2, samples2)
    start = [p.clone() for p in params]
    check(params, start, grads1, grads2, l, *step(kernels, params, grads1, grads2, l))
    launches = kernels.launches()
    assert [launch[:2] for launch in launches] == [(DEVICE, STREAM)] * 3
    assert launches[1][2] == samples1 + (samples2 or 0), "a finishing block for each sample"


@ran_on_host
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squares_beyond_float32_are_summed_in_float64(kernels: HostKernels, dtype: torch.dtype) -> None:
    params, grads1, grads2 = draw(dtype, 0, None), draw(dtype, 1, 3, scale=1e25), draw(dtype, 2, 2)
    sq_norms, stats = step(kernels, params, grads1, grads2, 2)
    exact = torch.cat([sum(g.double().square().sum(1) for g in grads) for grads in (grads1, grads2)])  # type: ignore[arg-type]
    torch.testing.assert_close(sq_norms, exact, rtol=1e-6, atol=0)
    mean = torch.cat([g.double().mean(0) for g in grads1])
    assert float(stats[0]) == pytest.approx(float(mean @ mean), rel=1e-6)


@ran_on_host
def test_a_nonfinite_gradient_shows_in_the_flag_and_at_l_1_never_reaches_the_params(kernels: HostKernels) -> None:
    params, grads1, grads2 = draw(torch.float32, 0, None), draw(torch.float32, 1, 3), draw(torch.float32, 2, 3)
    grads2[5][1, 7] = float("inf")
    sq_norms, stats = step(kernels, params, grads1, grads2, 1)
    assert stats[4] == 0
    assert torch.isfinite(sq_norms).tolist() == [True, True, True, True, False, True]
    assert all(p.isfinite().all() for p in params)


@ran_on_host
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bits_do_not_depend_on_the_order_of_blocks_and_threads(kernels: HostKernels, dtype: torch.dtype) -> None:
    results = []
    for order, seed in [("forward", 0), ("reversed", 0), ("shuffled", 1), ("shuffled", 2)]:
        kernels.set_order(order, seed)
        params, grads1, grads2 = draw(dtype, 0, None), draw(dtype, 1, 3), draw(dtype, 2, 4)
        results.append([*step(kernels, params, grads1, grads2, 2), *params])
    assert same_bits(*results)


@ran_on_host
def test_a_list_longer_than_a_table_takes_several_launches(kernels: HostKernels) -> None:
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(1 + i % 3, generator=generator) for i in range(100)]
    grads1, grads2 = ([torch.randn(2, len(p), generator=generator) for p in params] for _ in range(2))
    start = [p.clone() for p in params]
    check(params, start, grads1, grads2, 2, *step(kernels, params, grads1, grads2, 2))
    assert [launch[2] for launch in kernels.launches()] == [64, 36, 4, 1]


@ran_on_host
@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_the_op_gives_what_its_reference_gives(kernels: HostKernels, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(s, generator=generator).to(dtype) for s in [(4, 3, 2, 2), (), (0,), (37,)]]
    params[0] = params[0].to(memory_format=torch.channels_last)
    grads1, grads2 = ([torch.randn(b, *p.shape, generator=generator).to(dtype) for p in params] for b in (3, 5))
    results = []
    with cuda_on_host(kernels):
        for backend in ("reference", "cuda"):
            stepped = [p.clone() for p in params]
            sq_norms1, sq_norms2, stats = svag_step_per_sample_(
                stepped, grads1, grads2, lr=LR, l=2, weight_decay=WEIGHT_DECAY, backend=backend
            )
            assert sq_norms2 is not None
            results.append((torch.cat([sq_norms1, sq_norms2, stats.raw]), stepped))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-6, atol=1e-6)
    for mine, reference in zip(results[1][1], results[0][1], strict=True):
        torch.testing.assert_close(mine, reference, rtol=2 * torch.finfo(dtype).eps, atol=2e-6)
