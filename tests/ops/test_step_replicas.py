"""The step of replicas in one list: each is its own step alone, to the bit, whatever the others are and hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from draws import DTYPES, normals
from simd import torch_threads
from torch import Tensor

from svag_fast.ops import StepStats, svag_replicas_step_, svag_step_
from svag_fast.ops.backends import BackendError

S = 5
# A replica's: one element, empty, odd, around a vector and a block, and several chunks.
SHAPES = [(), (0,), (1,), (3, 5), (31,), (2, 0), (4097,)]
LARGE = (65537,)
LR = [0.1, 0.0, 0.3, 0.2, 0.1]
L = [1.0, 3.0, 2.0**100, 1.5, 4.0]
WEIGHT_DECAY = [0.1, 0.0, 0.5, 0.1, 0.2]

Lists = dict[str, list[Tensor]]


def drawn(dtypes: tuple[torch.dtype, torch.dtype], kept: str = "", shapes: list[tuple[int, ...]] = SHAPES) -> Lists:
    stacked = [(S, *shape) for shape in shapes]
    lists = {name: normals(dtypes[k > 0], k, stacked) for k, name in enumerate(("params", "grads1", "grads2"))}
    if kept:
        wide = torch.float64 if dtypes[0] == torch.float64 else torch.float32
        lists[kept] = normals(wide, 3, stacked, 1e-4 if kept == "compensation" else 1.0)
    return lists


def row(lists: Lists, s: int) -> Lists:
    return {name: [t[s].clone() for t in listed] for name, listed in lists.items()}


def copied(lists: Lists) -> Lists:
    return {name: [t.clone() for t in listed] for name, listed in lists.items()}


def same(a: Tensor, b: Tensor) -> bool:
    return bool(torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()))


def assert_each_is_its_step_alone(lists: Lists, backend: str, **options: Any) -> StepStats:
    scalars = {"lr": LR, "l": L, "weight_decay": WEIGHT_DECAY}
    ours = copied(lists)
    stats = svag_replicas_step_(**ours, replicas=S, **scalars, backend=backend, **options)  # type: ignore[arg-type]
    for s in range(S):
        alone = row(lists, s)
        own = {name: values[s] for name, values in scalars.items()}
        theirs = svag_step_(**alone, **own, backend=backend, **options)  # type: ignore[arg-type]
        assert same(stats.raw[s], theirs.raw), s
        for name, listed in alone.items():
            assert all(same(a[s], b) for a, b in zip(ours[name], listed, strict=True)), (s, name)
    return stats


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("kept", ["", "compensation", "momentum_buffers"])
def test_each_replica_is_its_step_alone_to_the_bit(
    backend: str, dtypes: tuple[torch.dtype, torch.dtype], kept: str
) -> None:
    if kept == "compensation" and dtypes[0] == torch.float64:
        pytest.skip("not for float64 params")
    options = {"momentum": 0.9, "momentum_rule": "fixed"} if kept == "momentum_buffers" else {}
    stats = assert_each_is_its_step_alone(drawn(dtypes, kept), backend, maximize=kept == "momentum_buffers", **options)
    assert stats.noise_trace is not None
    assert stats.noise_trace.shape == stats.finite.shape == stats.weight_sq_norm.shape == (S,)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_no_bit_of_a_large_replica(threads: int) -> None:
    lists = drawn((torch.float32, torch.float32), "momentum_buffers", [LARGE, (7,), (4096,)])
    results = []
    for count in (1, threads):
        ours = copied(lists)
        with torch_threads(count):
            stats = svag_replicas_step_(**ours, replicas=S, lr=LR, l=8, momentum=0.9, backend="cpu")  # type: ignore[arg-type]
        results.append([stats.raw, *ours["params"], *ours["momentum_buffers"]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with torch_threads(threads):
        assert_each_is_its_step_alone(lists, "cpu", momentum=0.9, momentum_rule="fixed")


@pytest.mark.parametrize("skip_nonfinite", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_replica_that_diverges_changes_no_bit_of_another(backend: str, bad: float, skip_nonfinite: bool) -> None:
    lists = drawn((torch.float32, torch.float32), "momentum_buffers")
    lists["grads2"][3][1, 2, 3] = lists["grads1"][0][3] = bad
    options = {"momentum": 0.9, "momentum_rule": "fixed", "skip_nonfinite": skip_nonfinite}
    stats = assert_each_is_its_step_alone(lists, backend, **options)
    assert stats.finite.tolist() == [True, False, True, False, True]
    if skip_nonfinite:
        ours = copied(lists)
        svag_replicas_step_(**ours, replicas=S, lr=0.1, l=2, backend=backend, **options)  # type: ignore[arg-type]
        for name in ("params", "momentum_buffers"):
            for now, before in zip(ours[name], lists[name], strict=True):
                stood = [torch.equal(now[s], before[s]) for s in range(S)]
                assert stood == [not before[0].numel() or s in (1, 3) for s in range(S)]


def test_the_float64_step_is_the_formula(backend: str) -> None:
    lists = drawn((torch.float64, torch.float64))
    ours = copied(lists)
    l = [1.0, 3.0, 1e6, 1.5, 4.0]
    stats = svag_replicas_step_(**ours, replicas=S, lr=LR, l=l, weight_decay=0.1, backend=backend)  # type: ignore[arg-type]
    for s in range(S):
        x, g1, g2 = (torch.cat([t[s].flatten() for t in lists[name]]) for name in ("params", "grads1", "grads2"))
        root = math.sqrt(2 * l[s] - 1)
        expected = x - LR[s] / l[s] * ((1 + root) / 2 * g1 + (1 - root) / 2 * g2 + 0.1 * x)
        found = torch.cat([t[s].flatten() for t in ours["params"]])
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
        sums = torch.stack([g1 @ g1, g2 @ g2, g1 @ g2, x @ x, torch.ones((), dtype=torch.float64)])
        torch.testing.assert_close(stats.raw[s], sums, rtol=1e-12, atol=1e-9)


def test_one_replica_has_statistics_of_one(backend: str) -> None:
    lists = {name: [t[:1] for t in listed] for name, listed in drawn((torch.float32, torch.float32)).items()}
    stats = svag_replicas_step_(**copied(lists), replicas=1, lr=[0.1], l=torch.tensor([4.0]), backend=backend)  # type: ignore[arg-type]
    assert stats.raw.shape == (1, 5)


def test_one_number_is_as_many_of_the_same(backend: str) -> None:
    lists, results = drawn((torch.float32, torch.float32)), []
    for lr, l in ((0.1, 4), ([0.1] * S, torch.full((S,), 4.0)), (torch.tensor(0.1, dtype=torch.float64), (4,) * S)):
        ours = copied(lists)
        stats = svag_replicas_step_(**ours, replicas=S, lr=lr, l=l, backend=backend)  # type: ignore[arg-type]
        results.append([stats.raw, *ours["params"]])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("replicas", [1, S])
def test_no_params_give_statistics_of_nothing(replicas: int) -> None:
    stats = svag_replicas_step_([], [], [], replicas=replicas, lr=0.1, l=2)
    assert stats.raw.tolist() == [[0, 0, 0, 0, 1]] * replicas


def test_a_second_gradient_has_no_weight_where_l_is_1(backend: str) -> None:
    p, g1, g2 = torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3)
    g2[0] = math.inf
    svag_replicas_step_([p], [g1], [g2], replicas=2, lr=0.5, l=[1, 2], backend=backend)
    assert torch.equal(p[0], torch.full((3,), 0.5))
    assert p.isfinite().all()


def test_a_memory_order_with_the_replicas_outermost_is_served(backend: str) -> None:
    lists = drawn((torch.float32, torch.float32), shapes=[(4, 3, 5, 2)])
    last = {name: [listed[0].to(memory_format=torch.channels_last_3d)] for name, listed in lists.items()}
    assert not last["params"][0].is_contiguous()
    results = []
    for given in (lists, last, {**last, "grads1": lists["grads1"]}):
        ours = copied(given)
        stats = svag_replicas_step_(**ours, replicas=S, lr=LR, l=2, backend=backend)  # type: ignore[arg-type]
        results.append((ours["params"][0], stats.raw))
    for params, raw in results[1:]:
        assert torch.equal(params, results[0][0])
        torch.testing.assert_close(raw, results[0][1], rtol=1e-5, atol=1e-4)


def ones(*shape: int) -> list[Tensor]:
    return [torch.ones(shape)]


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no replica": ({"replicas": 0}, ValueError, "replicas must be an integer >= 1, got 0"),
    "no integer": ({"replicas": 2.0}, TypeError, "replicas must be an integer, got 2.0"),
    "another number of them": ({"replicas": 4}, ValueError, r"params\[0\] must be \[4, ...\] with replicas=4"),
    "no dimension": ({"params": [torch.ones(())]}, ValueError, r"params\[0\] must be \[3, ...\]"),
    "innermost": (
        {"params": [torch.ones(2, 3).T]},
        ValueError,
        r"params\[0\] must be in memory with the replicas' dimension outermost",
    ),
    "too few rates": ({"lr": [0.1, 0.2]}, ValueError, "lr must be one number or one for each of the 3 replicas, got 2"),
    "rates in rows": ({"lr": torch.ones(3, 1)}, ValueError, r"lr must be one number or \[3\], got the shape \[3, 1\]"),
    "a negative rate": ({"lr": [0.1, -0.2, 0.1]}, ValueError, "replica 1: Invalid learning rate: -0.2"),
    "l below 1": ({"l": (4, 4, 0.5)}, ValueError, "replica 2: l must be a finite number >= 1, got 0.5"),
    "l of nan": ({"l": [1, math.nan, 1]}, ValueError, r"l\[1\] must be a finite number, got nan"),
    "l of text": ({"l": "4"}, TypeError, "l must be a number, got '4'"),
    "a decay of None": ({"weight_decay": [0.1, None, 0.1]}, TypeError, r"weight_decay\[1\] must be a number, got None"),
    "one that float32 can't hold": ({"l": [1, 1, 1e300]}, ValueError, "l must be at most 8.51e.*got 1e"),
    "no second gradient": ({"grads2": None, "l": [1, 1, 2]}, ValueError, "grads2 must be"),
    "momentum without buffers": ({"momentum": 0.5}, ValueError, "momentum_buffers must be"),
    "another backend": ({"backend": "cuda"}, BackendError, "svag_replicas_step_"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name_and_nothing_is_written(case: str) -> None:
    options, error, message = REFUSED[case]
    given: dict[str, Any] = {"params": ones(3, 2), "grads1": ones(3, 2), "grads2": ones(3, 2), **options}
    if "params" in options:
        given |= {name: [torch.ones_like(options["params"][0])] for name in ("grads1", "grads2")}
    before = [t.clone() for t in given["params"]]
    with pytest.raises(error, match=message):
        svag_replicas_step_(**{"replicas": 3, "lr": 0.1, "l": 4, **given})
    assert all(torch.equal(a, b) for a, b in zip(given["params"], before, strict=True))


def test_the_dispatcher_takes_the_same_step() -> None:
    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    lists, seen = drawn((torch.float32, torch.float32), "momentum_buffers"), list[str]()
    options = {"replicas": S, "lr": LR, "l": L, "weight_decay": 0.1, "momentum": 0.9, "momentum_rule": "fixed"}
    ours, theirs = copied(lists), copied(lists)
    raw = svag_replicas_step_(**ours, **options).raw  # type: ignore[arg-type]
    with Watch():
        watched = svag_replicas_step_(**theirs, **options).raw  # type: ignore[arg-type]
    assert any("svag_replicas_step_" in name for name in seen)
    assert torch.equal(raw, watched)
    assert all(torch.equal(a, b) for name in ours for a, b in zip(ours[name], theirs[name], strict=True))
