"""The CUDA step, its own source run on the host: against the formula in float64, in any order of blocks and threads.

Run again in a process with AddressSanitizer (``SVAG_TEST_CUDA=address``) by tests/csrc/test_cuda_on_host.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_on_host.backend import DEVICE, STREAM, HostModule, cuda_on_host, load
from cuda_on_host.build import HostKernels
from draws import DTYPES, clones, dot, normals, same_bits
from scaler_cases import CHECKS as SCALER_CHECKS
from torch import Tensor

from svag_fast import SVAG, svag_coefficients
from svag_fast._C import StepTensors
from svag_fast.ops import StepStats, svag_replicas_step_, svag_step_
from svag_fast.ops.step import step_coefficients
from svag_fast.optim import two_batch

MODE = os.environ.get("SVAG_TEST_CUDA", "race")
ASAN = MODE == "address"  # far slower where each of many threads copies a table of 32 KB
# Around the packs of 2, 4 and 8, and the blocks' span of 4096; empty and one-element tensors.
SHAPES = [(0,), (1,), (), (3,), (7, 5), (4095,), (4096,), (4097,), (31, 0, 2), (8, 3, 3, 3)]

ran_on_host = pytest.mark.kernels("step_kernel", "finish_kernel", ran="host")
ran_replicas_on_host = pytest.mark.kernels("replicas_step_kernel", "replicas_finish_kernel", ran="host")


@pytest.fixture(scope="module")
def built(pytestconfig: pytest.Config) -> HostKernels:
    return load(MODE, Path(pytestconfig.cache.mkdir("cuda_on_host")))


@pytest.fixture
def kernels(built: HostKernels) -> Iterator[HostKernels]:
    built.set_order("shuffled", seed=1)
    built.launches()
    with cuda_on_host(built):
        yield built
        built.check()


def draw(dtype: torch.dtype, seed: int, shapes: list[tuple[int, ...]] = SHAPES, scale: float = 1.0) -> list[Tensor]:
    return normals(dtype, seed, shapes, scale)


def check(params: list[Tensor], start: list[Tensor], grads1: list[Tensor], grads2: list[Tensor], l: float) -> None:
    """Every param is the formula's value (lr 0.3, weight decay 0.02) rounded once, but for the arithmetic's own eps."""
    c1, c2 = svag_coefficients(l)
    for x, before, a, b in zip(params, start, grads1, grads2, strict=True):
        second = c2 * b.double() if c2 else 0
        exact = before.double() - 0.3 / l * (c1 * a.double() + second + 0.02 * before.double())
        arithmetic = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
        bound = exact.abs() * torch.finfo(x.dtype).eps / 2 + 4 * arithmetic * (exact.abs() + 1)
        assert ((x.double() - exact).abs() <= bound).all()


def check_stats(stats: StepStats, params: list[Tensor], grads1: list[Tensor], grads2: list[Tensor]) -> None:
    assert stats.sq_norm2 is not None
    assert stats.inner is not None
    # Float32 sums of at most 4096 squares; the inner product's terms cancel, so its error is that of its terms.
    assert float(stats.sq_norm1) == pytest.approx(dot(grads1, grads1), rel=1e-6)
    assert float(stats.sq_norm2) == pytest.approx(dot(grads2, grads2), rel=1e-6)
    assert float(stats.weight_sq_norm) == pytest.approx(dot(params, params), rel=1e-6)
    assert abs(float(stats.inner) - dot(grads1, grads2)) <= 1e-6 * dot(grads1, grads1)
    assert bool(stats.finite)


@ran_on_host
@pytest.mark.parametrize("l", [65536] if ASAN else [1, 2, 65536])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_step_equals_the_formula_within_one_rounding(
    kernels: HostKernels, dtypes: tuple[torch.dtype, torch.dtype], l: float
) -> None:
    params, grads1, grads2 = draw(dtypes[0], 0), draw(dtypes[1], 1), draw(dtypes[1], 2)
    start = clones(params)
    stats = svag_step_(params, grads1, grads2, lr=0.3, l=l, weight_decay=0.02, backend="cuda")
    check(params, start, grads1, grads2, l)
    check_stats(stats, start, grads1, grads2)


def stacked(dtypes: tuple[torch.dtype, torch.dtype], replicas: int) -> list[list[Tensor]]:
    """Params, both gradients and what is kept; the rows of most begin anywhere in memory."""
    shapes = [(replicas, *shape) for shape in SHAPES]
    wide = torch.float64 if dtypes[0] == torch.float64 else torch.float32
    compensation = [] if wide == torch.float64 else draw(torch.float32, 4, shapes, 1e-6)
    return [draw(dtypes[0], 0, shapes), draw(dtypes[1], 1, shapes), draw(dtypes[1], 2, shapes), draw(wide, 3, shapes),
            compensation]  # fmt: skip


def step_of(lists: list[list[Tensor]], kept: bool, **options: Any) -> tuple[StepStats, list[Tensor]]:
    """Step, and return what was written too; ``kept``: with momentum and compensation."""
    step = svag_replicas_step_ if "replicas" in options else svag_step_
    params, grads1, grads2, buffers, compensation = (clones(listed) for listed in lists)
    if kept:
        options |= {"momentum_buffers": buffers, "momentum": 0.9, "momentum_rule": "fixed"}
        options |= {"compensation": compensation} if compensation else {}
    stats = step(params, grads1, grads2, backend="cuda", **options)
    return stats, [*params, *buffers, *compensation]


@ran_replicas_on_host
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_each_replica_is_its_step_alone_to_the_bit_in_one_launch(
    kernels: HostKernels, dtypes: tuple[torch.dtype, torch.dtype], kept: bool
) -> None:
    lists = stacked(dtypes, 3)
    lr, l, decay = [0.3, 0.0, 0.1], [1.0, 4.0, 65536.0], [0.02, 0.0, 0.5]
    lists[2][5][1, 17] = lists[1][5][0, 4094] = torch.nan
    for skip in (False, True):
        kernels.launches()
        stats, ours = step_of(lists, kept, replicas=3, lr=lr, l=l, weight_decay=decay, skip_nonfinite=skip)
        # Of a replica's tensors of 4097 elements and more one takes two blocks.
        launch = [(DEVICE, STREAM, 3 * 9, 256), (DEVICE, STREAM, 3, 256)]
        assert kernels.launches() == launch * (2 if skip else 1)
        assert stats.finite.tolist() == [False, False, True]
        for s in range(1 if ASAN else 3):  # under ASan others watch the step alone
            rows = [[t[s].clone() for t in listed] for listed in lists]
            own, alone = step_of(rows, kept, lr=lr[s], l=l[s], weight_decay=decay[s], skip_nonfinite=skip)
            both = [stats.raw[s], *(t[s] for t in ours)], [own.raw, *alone]
            assert same_bits(*([t.masked_fill(t.isnan(), 6e4) for t in tensors] for tensors in both))


@ran_replicas_on_host
def test_each_replica_is_the_formula_in_every_order_of_blocks_and_threads(kernels: HostKernels) -> None:
    l, lists, results = [1.0, 2.0, 65536.0], stacked((torch.float32, torch.float32), 3), []
    for order, seed in [("forward", 0), ("reversed", 0), ("shuffled", 1)]:
        kernels.set_order(order, seed)
        stats, written = step_of(lists, False, replicas=3, lr=0.3, l=l, weight_decay=0.02)
        results.append([stats.raw, *written])
    assert same_bits(*results)
    for s in range(3):
        params, start, grads1, grads2 = ([t[s] for t in listed] for listed in (written[: len(SHAPES)], *lists[:3]))
        check(params, start, grads1, grads2, l[s])
        check_stats(StepStats(stats.raw[s], True), start, grads1, grads2)


@ran_replicas_on_host
@pytest.mark.parametrize(("count", "launches"), [(65, 2), (545, 3)][: 1 if ASAN else None])
def test_long_lists_of_replicas_take_a_launch_for_every_540_tensors(
    kernels: HostKernels, count: int, launches: int
) -> None:
    shapes = [(2, 1 + i % 3) for i in range(count)]
    lists = [draw(torch.float32, seed, shapes) for seed in range(3)]
    stats, ours = step_of([*lists, [], []], False, replicas=2, lr=0.3, l=[1, 4], weight_decay=0.02)
    assert len(kernels.launches()) == launches
    for s, l in enumerate((1, 4)):
        params, *rows = ([t[s] for t in listed] for listed in (ours, *lists))
        check(params, *rows, l)  # type: ignore[arg-type]
        check_stats(StepStats(stats.raw[s], True), *rows)


@ran_replicas_on_host
def test_replicas_of_empty_tensors_have_zero_statistics(kernels: HostKernels) -> None:
    nothing = [torch.empty(3, 0), torch.empty(3, 0, 2)]
    stats = svag_replicas_step_(nothing, nothing, nothing, replicas=3, lr=0.3, l=2, backend="cuda")
    assert stats.raw.tolist() == [[0, 0, 0, 0, 1]] * 3


@ran_on_host
def test_the_list_is_one_launch_and_a_finishing_one_on_the_tensors_device_and_stream(kernels: HostKernels) -> None:
    params = [t for d in (torch.float32, torch.bfloat16) for t in draw(d, 0, [(5,), (40_000,)])]
    grads = [torch.randn_like(p) for p in params]
    start = clones(params)
    svag_step_(params, grads, [g.clone() for g in grads], lr=0.3, l=2, weight_decay=0.02, backend="cuda")
    check(params, start, grads, grads, 2)
    assert kernels.launches() == [(DEVICE, STREAM, 2 * (1 + 10), 256), (DEVICE, STREAM, 1, 256)]
    assert kernels.device() == 0, "the current device is restored"


@ran_on_host
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_unaligned_views_are_served(kernels: HostKernels, offset: int) -> None:
    for which in range(3):
        lists = [draw(torch.float32, seed, [(4099,), (66,)]) for seed in range(3)]
        lists[which] = [t[offset:].clone()[: 60 if len(t) < 100 else 4090] for t in lists[which]]
        lists[which] = [torch.cat([t[:offset], t])[offset:] for t in lists[which]]  # not at the storage's start
        params, grads1, grads2 = ([t[: 60 if len(t) < 100 else 4090] for t in ts] for ts in lists)
        start = clones(params)
        stats = svag_step_(params, grads1, grads2, lr=0.3, l=3, weight_decay=0.02, backend="cuda")
        check(params, start, grads1, grads2, 3)
        check_stats(stats, start, grads1, grads2)


@ran_on_host
@pytest.mark.parametrize(("count", "launches"), [(1, 2), (64, 2), (65, 2), (500, 2), (545, 3)][: 3 if ASAN else None])
def test_long_lists_take_a_launch_for_every_540_tensors(kernels: HostKernels, count: int, launches: int) -> None:
    shapes = [(1 + i % 3,) for i in range(count)]
    params, grads1, grads2 = (draw(torch.float32, seed, shapes) for seed in range(3))
    start = clones(params)
    stats = svag_step_(params, grads1, grads2, lr=0.3, l=2, weight_decay=0.02, backend="cuda")
    check(params, start, grads1, grads2, 2)
    check_stats(stats, start, grads1, grads2)
    assert len(kernels.launches()) == launches


@ran_on_host
def test_lists_of_empty_tensors_give_zero_statistics(kernels: HostKernels) -> None:
    nothing = [torch.empty(0), torch.empty(0, 3)]
    stats = svag_step_(nothing, nothing, nothing, lr=0.3, l=2, backend="cuda")
    assert stats.raw.tolist() == [0, 0, 0, 0, 1]
    assert svag_step_([], [], [], lr=0.3, l=2, backend="cuda").raw.tolist() == [0, 0, 0, 0, 1]


@ran_on_host
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[1], DTYPES[3]], ids=str)
def test_bits_do_not_depend_on_the_order_of_blocks_and_threads(
    kernels: HostKernels, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    results = []
    for order, seed in [("forward", 0), ("reversed", 0), ("shuffled", 1), ("shuffled", 2)]:
        kernels.set_order(order, seed)
        params, grads1, grads2 = draw(dtypes[0], 0), draw(dtypes[1], 1), draw(dtypes[1], 2)
        raw = svag_step_(params, grads1, grads2, lr=0.3, l=2, weight_decay=0.02, backend="cuda").raw
        results.append([raw, *params])
    assert same_bits(*results)


@ran_on_host
@pytest.mark.parametrize("bad", [None, float("inf"), float("nan")])
def test_skip_nonfinite_leaves_all_params_and_reads_the_gradients_once_more(
    kernels: HostKernels, bad: float | None
) -> None:
    params, grads1, grads2 = (draw(torch.float32, seed) for seed in range(3))
    compensation, buffers = [torch.full_like(p, 1e-9) for p in params], draw(torch.float32, 3)
    start, kept = clones(params), clones([*compensation, *buffers])
    if bad is not None:
        grads2[5][17] = bad
    stats = svag_step_(
        params, grads1, grads2, lr=0.3, l=2, compensation=compensation, skip_nonfinite=True, backend="cuda",
        momentum_buffers=buffers, momentum=0.9,
    )  # fmt: skip
    assert len(kernels.launches()) == 4
    assert bool(stats.finite) == (bad is None)
    expected = sum(float((x.double() ** 2).sum()) for x in start)
    assert float(stats.weight_sq_norm) == pytest.approx(expected, rel=1e-6)
    after = [*params, *compensation, *buffers]
    same = [torch.equal(x, y) for x, y in zip(after, [*start, *kept], strict=True) if x.numel()]
    assert not any(same) if bad is None else all(same)


@ran_on_host
@pytest.mark.parametrize(("dtypes", "l"), [(DTYPES[0], 1), *((d, 65536) for d in DTYPES)], ids=str)
def test_momentum_moves_the_buffers_and_they_the_params(
    kernels: HostKernels, dtypes: tuple[torch.dtype, torch.dtype], l: float
) -> None:
    params, grads1, grads2 = draw(dtypes[0], 0), draw(dtypes[1], 1), draw(dtypes[1], 2)
    buffers = draw(torch.float64 if dtypes[0] == torch.float64 else torch.float32, 3)
    compensation = [torch.zeros(p.shape) for p in params] if dtypes[0] == torch.float32 else None
    start, before = clones(params), clones(buffers)
    options = {"momentum_buffers": buffers, "momentum": 0.9, "compensation": compensation, "backend": "cuda"}
    coefficients = step_coefficients(0.3, l, 0.02, torch.device("cpu"), momentum=0.9) if l == 1 else None
    lr = 0.3 if coefficients is None else 9.0
    stats = svag_step_(params, grads1, grads2, lr=lr, l=l, weight_decay=0.02, coefficients=coefficients, **options)  # type: ignore[arg-type]
    check_stats(stats, start, grads1, grads2)
    c1, c2 = svag_coefficients(l)
    for x, v, x0, v0, a, b in zip(params, buffers, start, before, grads1, grads2, strict=True):
        moved = (1 - 0.1 / l) * v0.double() + c1 * a.double() + c2 * b.double() + 0.02 * x0.double()
        exact = x0.double() - 0.3 / l**2 * moved
        eps = torch.finfo(v.dtype).eps
        assert ((v.double() - moved).abs() <= 4 * eps * (moved.abs() + 5 * (2 * l) ** 0.5)).all()
        assert (
            (x.double() - exact).abs() <= exact.abs() * torch.finfo(x.dtype).eps / 2 + 4 * eps * (exact.abs() + 1)
        ).all()


@ran_on_host
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compensation_follows_decay_below_one_ulp(kernels: HostKernels, dtype: torch.dtype) -> None:
    params = [torch.full((9,), 1.5, dtype=dtype)]
    zeros, compensation = [torch.zeros(9, dtype=dtype)], [torch.zeros(9)]
    steps, l, lr, weight_decay = 60, 65536, 0.5, 0.01
    for _ in range(steps):
        svag_step_(
            params,
            zeros,
            [torch.zeros_like(zeros[0])],
            lr=lr,
            l=l,
            weight_decay=weight_decay,
            compensation=compensation,
            backend="cuda",
        )
    exact = 1.5 * (1 - lr / l * weight_decay) ** steps
    value = params[0].double() + compensation[0].double()
    assert ((value - exact).abs() <= 1e-6 * (1.5 - exact)).all(), "within 1e-6 of the decay itself"
    assert 1.5 - exact < 4 * torch.finfo(dtype).eps or dtype == torch.float32


@ran_on_host
def test_at_l_1_an_inf_in_the_second_gradient_never_reaches_the_params(kernels: HostKernels) -> None:
    params, grads1, grads2 = (draw(torch.float32, seed) for seed in range(3))
    start = clones(params)
    grads2[5][3] = float("inf")
    stats = svag_step_(params, grads1, grads2, lr=0.3, l=1, weight_decay=0.02, backend="cuda")
    check(params, start, grads1, grads2, 1)
    assert not stats.finite


@ran_on_host
def test_a_missing_second_gradient_is_a_step_of_sgd(kernels: HostKernels) -> None:
    params, grads1 = (draw(torch.float32, seed) for seed in range(2))
    start = clones(params)
    stats = svag_step_(params, grads1, None, lr=0.3, l=1, weight_decay=0.02, backend="cuda")
    check(params, start, grads1, grads1, 1)
    assert stats.sq_norm2 is None
    assert bool(stats.finite)


@ran_on_host
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squares_beyond_float32_are_summed_in_float64(kernels: HostKernels, dtype: torch.dtype) -> None:
    params, grads1, grads2 = draw(dtype, 0), draw(dtype, 1, scale=1e25), draw(dtype, 2, scale=1e25)
    start = clones(params)
    stats = svag_step_(params, grads1, grads2, lr=0.0, l=2, backend="cuda")
    check_stats(stats, start, grads1, grads2)


@ran_on_host
def test_coefficients_on_the_device_replace_the_arguments(kernels: HostKernels) -> None:
    params, grads1, grads2 = (draw(torch.float32, seed) for seed in range(3))
    start = clones(params)
    coefficients = step_coefficients(0.3, 5, 0.02, torch.device("cpu"))
    svag_step_(params, grads1, grads2, lr=9.0, l=2, weight_decay=9.0, coefficients=coefficients, backend="cuda")
    check(params, start, grads1, grads2, 5)


@ran_on_host
def test_what_the_kernel_cannot_serve_is_a_status_and_nothing_is_launched(kernels: HostKernels) -> None:
    x, g = torch.zeros(3), torch.zeros(3, dtype=torch.float64)
    module = HostModule(kernels)
    descriptors = StepTensors([x.data_ptr()], [g.data_ptr()], [], [], [], [3], [0], [1])
    workspace = torch.zeros(module.cuda_step_workspace(descriptors, 1), dtype=torch.float64)
    tail = (0.1, 1.0, 0.0, 0.0, 0.0, 0.0)
    there = workspace.data_ptr()  # the coefficients, and the scale, are not read
    same = StepTensors([x.data_ptr()], [x.data_ptr()], [], [], [], [3], [0], [0])
    for tensors, coefficients, scale, replicas, device, status in [
        (descriptors, 0, 0, 1, 0, 1),
        (same, 0, 0, 1, 5, -101),  # cudaErrorInvalidDevice
        (same, there, 0, 0, 0, -9),  # cudaErrorInvalidConfiguration
        (same, there, 0, 2**31, 0, -9),
        (same, 0, 0, 2, 0, -1),  # cudaErrorInvalidValue
        (same, there, there, 2, 0, -1),
    ]:
        options = coefficients, False, scale, 0, replicas, device, 0, there, there
        with pytest.raises(RuntimeError, match=f"returned {status}$"):
            module.cuda_step(tensors, *tail, *options)
    assert kernels.launches() == []


def steps_under_a_schedule(capturable: bool) -> tuple[list[Tensor], SVAG]:
    """Six steps on fixed gradients under a schedule that halves lr."""
    params = [torch.nn.Parameter(p) for p in draw(torch.float32, 0)]
    grads1, grads2 = (draw(torch.float32, seed) for seed in (1, 2))
    opt = SVAG(params, 0.3, l=4, weight_decay=0.02, capturable=capturable, backend="cuda")
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)

    for _ in range(6):
        for p, g in zip(params, grads1, strict=True):
            p.grad = g
        opt.hold_gradient()
        for p, g in zip(params, grads2, strict=True):
            p.grad = g
        opt.step()
        schedule.step()
    return [p.detach() for p in params], opt


@ran_on_host
def test_a_capturable_step_follows_a_schedule_and_gives_the_same_bits(kernels: HostKernels) -> None:
    expected, plain = steps_under_a_schedule(False)
    params, opt = steps_under_a_schedule(True)
    assert isinstance(opt.param_groups[0]["lr"], Tensor)
    assert same_bits(params, expected)
    assert (opt.effective_steps, opt.time) == (plain.effective_steps, pytest.approx(plain.time))


@pytest.mark.kernels("scaled_step_kernel", "finish_kernel", ran="host")
@pytest.mark.parametrize("check", SCALER_CHECKS.values(), ids=SCALER_CHECKS)
def test_under_a_scaler(kernels: HostKernels, check: Callable[[str], None]) -> None:
    check("cuda")


@ran_on_host
def test_the_kernel_reads_the_scale_itself(kernels: HostKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a pass over the gradients before the step's own")

    monkeypatch.setattr(two_batch, "divide", refuse)
    kernels.launches()
    SCALER_CHECKS["found_inf"]("cuda")
    assert len(kernels.launches()) == 2 + 4  # a plain step, and one that may skip
