"""The Triton step against the reference, on lists of 0, 1 and 500 tensors, all dtypes, and odd sizes."""

from __future__ import annotations

import math

import pytest
import torch
from draws import DTYPES, normals
from scaler_cases import CHECKS as SCALER_CHECKS
from torch import Tensor

from svag_fast.kernels import device_cache
from svag_fast.kernels import step as kernel
from svag_fast.ops import svag_replicas_step_, svag_step_
from svag_fast.ops.backends import select
from svag_fast.ops.step_options import constant_coefficients, step_scalars
from svag_fast.ops.step_stats import StepStats
from svag_fast.optim import two_batch

# Below and above the block of 1024, and above the program's 8 blocks. A program takes the interpreter some 10 ms.
SHAPES: list[tuple[int, ...]] = [(0,), (), (17, 5), (1025,), (8193,)]


def draw(dtype: torch.dtype, seed: int, shapes: list[tuple[int, ...]] = SHAPES, scale: float = 1.0) -> list[Tensor]:
    return normals(dtype, seed, shapes, scale)


def both(
    params: list[Tensor], grads1: list[Tensor], grads2: list[Tensor] | None, compensation: list[Tensor] | None = None,
    momentum_buffers: list[Tensor] | None = None, **options: object,
) -> tuple[StepStats, StepStats, list[Tensor], list[Tensor]]:  # fmt: skip
    """Step by Triton and by the reference; return both's statistics and tensors."""
    results = []
    for backend in ("triton", "reference"):
        p = [t.clone() for t in params]
        e = None if compensation is None else [t.clone() for t in compensation]
        v = None if momentum_buffers is None else [t.clone() for t in momentum_buffers]
        stats = svag_step_(p, grads1, grads2, compensation=e, momentum_buffers=v, backend=backend, **options)  # type: ignore[arg-type]
        results.append((stats, [*p, *(e or []), *(v or [])]))
    (ours, our_tensors), (theirs, their_tensors) = results
    return ours, theirs, our_tensors, their_tensors


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        if a.dtype == torch.bfloat16:
            # The interpreter truncates to bfloat16 where hardware rounds to nearest.
            torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-30)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("dtypes", "l"), [*((d, l) for d in DTYPES for l in (1, 65536)), (DTYPES[0], 1.5), (DTYPES[0], 1e12)], ids=str
)
def test_params_equal_the_reference(dtypes: tuple[torch.dtype, torch.dtype], l: float) -> None:
    lists = draw(dtypes[0], 0), draw(dtypes[1], 1), draw(dtypes[1], 2)
    ours, theirs, a, b = both(*lists, lr=0.3, l=l, weight_decay=0.02)
    assert_same(a, b)
    scale = float(theirs.raw[:4].max())
    torch.testing.assert_close(ours.raw, theirs.raw, rtol=0, atol=scale * (1e-12 if dtypes[0].itemsize == 8 else 1e-6))


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("dtypes", [d for d in DTYPES if d[0] != torch.float64], ids=str)
def test_compensated_params_and_buffers_equal_the_reference(
    dtypes: tuple[torch.dtype, torch.dtype], second: bool
) -> None:
    lists = draw(dtypes[0], 0), draw(dtypes[1], 1), draw(dtypes[1], 2) if second else None
    compensation = draw(torch.float32, 3, scale=1e-4)
    _, _, a, b = both(*lists, compensation=compensation, lr=0.3, l=64 if second else 1, weight_decay=0.02)
    if dtypes[0] == torch.bfloat16:
        half = len(a) // 2
        a = [p.double() + e.double() for p, e in zip(a[:half], a[half:], strict=True)]
        b = [p.double() + e.double() for p, e in zip(b[:half], b[half:], strict=True)]
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
    else:
        assert_same(a, b)


@pytest.mark.parametrize(("dtypes", "l"), [(DTYPES[0], 1), *((d, 65536) for d in DTYPES)], ids=str)
def test_params_and_momentum_buffers_equal_the_reference(dtypes: tuple[torch.dtype, torch.dtype], l: float) -> None:
    lists = draw(dtypes[0], 0), draw(dtypes[1], 1), draw(dtypes[1], 2)
    buffers = draw(torch.float64 if dtypes[0] == torch.float64 else torch.float32, 3)
    compensation = draw(torch.float32, 4, scale=1e-4) if dtypes[0] == torch.float32 else None
    ours, theirs, a, b = both(
        *lists, compensation, buffers, lr=0.3, l=l, weight_decay=0.02, momentum=0.9, maximize=True
    )
    assert_same(a, b)
    scale = float(theirs.raw[:4].max())
    torch.testing.assert_close(ours.raw, theirs.raw, rtol=0, atol=scale * (1e-12 if dtypes[0].itemsize == 8 else 1e-6))


@pytest.mark.parametrize("count", [1, 500])
def test_lists_of_one_and_of_500_tensors_of_mixed_dtypes(count: int) -> None:
    lists: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for i in range(count):
        param, grad = DTYPES[i % len(DTYPES)]
        for k, dtype in enumerate((param, grad, grad)):
            # Most are empty, as under the interpreter each other one takes 50 ms; each dtype has every size.
            lists[k].extend(draw(dtype, 3 * i + k, [((1 + i % 3) * (i % 5 == 0),)]))
    ours, theirs, a, b = both(*lists, lr=0.3, l=8, weight_decay=0.1)
    assert_same(a, b)
    torch.testing.assert_close(ours.raw, theirs.raw, rtol=1e-5, atol=1e-3)


def test_an_empty_list_and_a_list_of_empty_tensors() -> None:
    assert svag_step_([], [], [], lr=0.1, l=2, backend="triton").raw.tolist() == [0, 0, 0, 0, 1]
    empty = [torch.empty(0), torch.empty(3, 0)]
    assert svag_step_(empty, empty, empty, lr=0.1, l=2, backend="triton").raw.tolist() == [0, 0, 0, 0, 1]


def test_unaligned_views() -> None:
    store = [torch.randn(5000, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    params, grads1, grads2 = ([t[1:2500], t[2501:2504]] for t in store)
    _, _, a, b = both(params, grads1, grads2, lr=0.3, l=8)
    assert_same(a, b)


@pytest.mark.parametrize(("bad", "which"), [(math.inf, 0), (math.nan, 1)])
def test_skip_nonfinite_leaves_params_compensation_and_momentum_untouched(bad: float, which: int) -> None:
    params, grads = draw(torch.float32, 0), [draw(torch.float32, 1), draw(torch.float32, 2)]
    compensation, buffers = draw(torch.float32, 3, scale=1e-4), draw(torch.float32, 4)
    options = {"lr": 0.3, "l": 8, "skip_nonfinite": True, "momentum": 0.9}
    ours, _, a, b = both(params, *grads, compensation, buffers, **options)
    assert bool(ours.finite)
    assert_same(a, b)
    grads[which][-1][-1] = bad
    before = [t.clone() for t in (*params, *compensation, *buffers)]
    stats = svag_step_(params, *grads, compensation=compensation, momentum_buffers=buffers, backend="triton", **options)  # type: ignore[arg-type]
    assert not bool(stats.finite)
    assert_same([*params, *compensation, *buffers], before)


def test_at_l_1_a_bad_second_gradient_never_reaches_the_params() -> None:
    params, grads1, grads2 = draw(torch.float32, 0), draw(torch.float32, 1), draw(torch.float32, 2)
    grads2[-1][0] = math.inf
    stats = svag_step_(params, grads1, grads2, lr=0.1, l=1, backend="triton")
    assert all(p.isfinite().all() for p in params)
    assert not bool(stats.finite)


def test_finite_gradients_whose_squares_overflow_float32_have_finite_statistics() -> None:
    lists = draw(torch.float32, 0), draw(torch.float32, 1, scale=1e25), draw(torch.float32, 2, scale=1e25)
    ours, theirs, _, _ = both(*lists, lr=0.0, l=2)
    torch.testing.assert_close(ours.raw, theirs.raw, rtol=1e-6, atol=0)


def test_what_a_captured_graph_reads_is_kept_and_what_was_not_seen_before_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen, others = [torch.ones(5)], [[torch.ones(3)] for _ in range(65)]
    cpu = torch.device("cpu")

    def step(tensors: list[Tensor], lr: float = 0.1) -> None:
        svag_step_(tensors, tensors, None, lr=lr, l=1, backend="triton")

    def held() -> tuple[int, int]:
        table = kernel._table(seen, seen, None, [], [])[0]
        return table.data_ptr(), constant_coefficients(step_scalars(0.1, 1, 0.0), cpu).data_ptr()

    step(seen)
    before = held()
    with monkeypatch.context() as patch:
        patch.setattr(device_cache, "is_capturing", lambda device: True)
        step(seen)
        with pytest.raises(RuntimeError, match="on addresses it has not seen: run it once before the capture"):
            step(others[0])
        with pytest.raises(RuntimeError, match="on coefficients it has not seen"):
            step(seen, lr=0.3)
    for i, other in enumerate(others):  # more than either cache holds; what a step asks of them, without the step
        kernel._table(other, other, None, [], [])
        constant_coefficients(step_scalars(1.0 + i, 1, 0.0), cpu)
    assert held() == before


def test_auto_never_takes_the_interpreter() -> None:
    assert "triton" not in select("svag_step_", "auto", [torch.ones(1)]).__name__


@pytest.mark.parametrize("name", [n for n in SCALER_CHECKS if "64" not in n and (n[0] != "l" or "float" not in n)])
def test_under_a_scaler(name: str) -> None:
    SCALER_CHECKS[name]("triton")


def test_the_kernel_reads_the_scale_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a pass over the gradients before the step's own")

    monkeypatch.setattr(two_batch, "divide", refuse)
    SCALER_CHECKS["found_inf"]("triton")


REPLICAS, RATES, LS, DECAYS = 3, [0.3, 0.1, 0.2], [1.0, 4.0, 65536.0], [0.02, 0.0, 0.1]
FEW_SHAPES: list[tuple[int, ...]] = [(0,), (3,), (8193,)]  # no program, one and two


def stacked(
    dtype: torch.dtype, seed: int, shapes: list[tuple[int, ...]] = FEW_SHAPES, scale: float = 1.0
) -> list[Tensor]:
    return draw(dtype, seed, [(REPLICAS, *shape) for shape in shapes], scale)


@pytest.mark.parametrize(
    ("dtypes", "skip_nonfinite"), [(DTYPES[0], False), *((d, True) for d in DTYPES if d[1] != torch.float32)], ids=str
)
def test_replicas_are_one_launch_in_which_each_has_the_bits_of_its_step_alone(
    dtypes: tuple[torch.dtype, torch.dtype], skip_nonfinite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists = [stacked(dtypes[k > 0], k) for k in range(3)]
    wide = torch.float64 if dtypes[0] == torch.float64 else torch.float32
    kept = {"momentum_buffers": stacked(wide, 3)}
    if wide == torch.float32:
        kept["compensation"] = stacked(wide, 4, scale=1e-4)
    lists[2][1][1, 2] = math.nan
    options = {"weight_decay": DECAYS, "momentum": 0.9, "skip_nonfinite": skip_nonfinite, "backend": "triton"}

    def row(listed: list[Tensor], s: int) -> list[Tensor]:
        return [t[s].clone() for t in listed]

    alone = []
    for s in range(REPLICAS):
        own = [row(listed, s) for listed in lists], {name: row(listed, s) for name, listed in kept.items()}
        stats = svag_step_(*own[0], lr=RATES[s], l=LS[s], **{**options, **own[1], "weight_decay": DECAYS[s]})  # type: ignore[arg-type]
        alone.append((stats.raw, [*own[0][0], *(t for listed in own[1].values() for t in listed)]))
    programs, launch = [], kernel._step_kernel
    monkeypatch.setattr(kernel, "_step_kernel", Launches(launch, programs))
    stats = svag_replicas_step_(*lists, replicas=REPLICAS, lr=RATES, l=LS, **kept, **options)  # type: ignore[arg-type]
    assert programs == [(3 * REPLICAS,)] * (1 + skip_nonfinite)
    assert stats.finite.tolist() == [True, False, True]
    written = [*lists[0], *(t for listed in kept.values() for t in listed)]
    for s, (raw, tensors) in enumerate(alone):
        torch.testing.assert_close(stats.raw[s], raw, rtol=0, atol=0, equal_nan=True)
        for ours, theirs in zip(written, tensors, strict=True):
            torch.testing.assert_close(ours[s], theirs, rtol=0, atol=0, equal_nan=True)


class Launches:
    """A kernel that notes its grids."""

    def __init__(self, kernel: object, grids: list[tuple[int, ...]]) -> None:
        self.kernel, self.grids = kernel, grids

    def __getitem__(self, grid: tuple[int, ...]) -> object:
        self.grids.append(grid)
        return self.kernel[grid]  # type: ignore[index]


def test_replicas_statistics_are_the_float64_reference_s() -> None:
    lists = [stacked(torch.float64, k) for k in range(3)]
    results = []
    for backend in ("triton", "reference"):
        params = [t.clone() for t in lists[0]]
        options = {"replicas": REPLICAS, "lr": RATES, "l": LS, "weight_decay": DECAYS, "backend": backend}
        results.append((svag_replicas_step_(params, *lists[1:], **options).raw, params))  # type: ignore[arg-type]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-13, atol=1e-9)
    assert_same(results[0][1], results[1][1])


def test_replicas_of_nothing_or_of_one_or_unaligned() -> None:
    nothing = [torch.empty(REPLICAS, 0)]
    raw = svag_replicas_step_(nothing, nothing, nothing, replicas=REPLICAS, lr=0.1, l=2, backend="triton").raw
    assert raw.tolist() == [[0, 0, 0, 0, 1]] * REPLICAS
    for shapes in ([(8,), (4, 4)], [(9,), (4,)]):  # the second's rows begin where no 16 bytes do
        for count in (1, REPLICAS):
            lists = [[t[:count] for t in stacked(torch.float32, k, shapes)] for k in range(3)]
            ours, theirs = ([t.clone() for t in lists[0]] for _ in range(2))
            for params, backend in ((ours, "triton"), (theirs, "reference")):
                svag_replicas_step_(params, *lists[1:], replicas=count, lr=0.3, l=4, backend=backend)
            assert_same(ours, theirs)
