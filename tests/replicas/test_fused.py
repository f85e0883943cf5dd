"""The fused kernel: gradients and paths equal PyTorch's, and each replica is alone in the world."""

from __future__ import annotations

import copy
import pickle
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from chain_nets import NETS, Case, gradient, mlp, plain_run
from simd import AVAILABLE, simd_level, torch_threads
from torch import Tensor, nn
from torch.nn import functional as F

from svag_fast.replicas import fused
from svag_fast.replicas.chain import chain_of
from svag_fast.replicas.fused import FusedRuns, memory_needed
from svag_fast.replicas.sampling import batch_indices


def runs_of(case: Case, **changes: Any) -> FusedRuns:
    arguments: dict[str, Any] = {"inputs": case.inputs, "targets": case.labels, "lr": 0.05, "batch_size": 3}
    arguments |= {"seeds": range(len(case.weights)), "weights": case.weights, "frozen": case.frozen} | changes
    return FusedRuns(case.chain, **arguments)


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {name: Case(name) for name in NETS}


# ---- against PyTorch


@pytest.mark.parametrize("size", [1, 3, 50])
@pytest.mark.parametrize("level", AVAILABLE)
@pytest.mark.parametrize("name", NETS)
def test_gradient_is_as_near_to_float64_as_pytorchs(cases: dict[str, Case], name: str, level: str, size: int) -> None:
    case = cases[name]
    some = torch.arange(size) * 7 % len(case.inputs)
    with simd_level(level):
        grads = runs_of(case).gradient(some)
    for model, got in zip(case.models, grads, strict=True):
        exact = gradient(model, case.inputs[some], case.labels[some])
        theirs = gradient(model, case.inputs[some], case.labels[some], torch.float32)
        assert (got - exact).norm() <= 2 * (theirs - exact).norm() + 1e-6 * exact.norm()


@pytest.mark.parametrize("level", AVAILABLE)
@pytest.mark.parametrize("name", ["mlp", "odd", "partly frozen"])
def test_squared_error_is_pytorchs(cases: dict[str, Case], name: str, level: str) -> None:
    case = cases[name]
    targets = torch.randn(len(case.inputs), case.outputs)
    with simd_level(level):
        runs = runs_of(case, targets=targets, loss="squared_error")
        grads, evaluation = runs.gradient(range(20)), runs.evaluate(case.inputs, targets)
    assert evaluation.accuracy is None
    for s, model in enumerate(case.models):
        torch.testing.assert_close(
            grads[s].double(), gradient(model, case.inputs[:20], targets[:20]), rtol=2e-5, atol=2e-6
        )
        assert float(evaluation.loss[s]) == pytest.approx(F.mse_loss(model(case.inputs), targets).item(), rel=1e-5)


# Relative to |x|; a step rounds each weight by 2^-24 of itself.
PATH_ROUNDING = 1e-6


@pytest.mark.parametrize(
    ("name", "l", "batch_size"),
    [("mlp", 1, 3), ("mlp", 4, 33), ("digits-net", 2.5, 3), ("odd", 3, 1), ("partly frozen", 1, 3)],
)
def test_path_and_statistics_are_those_of_a_plain_loop(
    cases: dict[str, Case], name: str, l: float, batch_size: int
) -> None:
    case = cases[name]
    settings: dict[str, Any] = {"batch_size": batch_size, "l": l, "lr": 0.05, "weight_decay": 0.01}
    seed = 2**64 - 3
    runs = [runs_of(case, seeds=[1, seed, 2**33], stat_every=stat_every, **settings) for stat_every in (0, 1)]
    plain = plain_run(case.models[1], case.inputs, case.labels, seed=seed, steps=(1, 10, 100), **settings)
    for step, exact, means in plain:
        for some in runs:
            some.advance(step)
            assert (some.weights[1] - exact).norm() <= PATH_ROUNDING * exact.norm()
        measured = torch.stack(list(runs[1].sums.means()))[:, 1]
        scale = means.abs()
        scale[4] = (means[2] * means[3]).sqrt()  # an inner product may cancel
        assert ((measured - means).abs() <= 2e-5 * scale).all(), (measured, means)


@pytest.mark.parametrize("level", AVAILABLE)
def test_levels_differ_by_rounding(cases: dict[str, Case], level: str) -> None:
    case = cases["odd"]
    settings: dict[str, Any] = {"batch_size": 3, "l": 2, "lr": 0.05, "weight_decay": 0.1}
    with simd_level(level):
        runs = runs_of(case, stat_every=2, **settings)
        runs.advance(20)
    [(_, exact, _)] = plain_run(case.models[0], case.inputs, case.labels, seed=0, steps=(20,), **settings)
    assert (runs.weights[0] - exact).norm() <= PATH_ROUNDING * exact.norm()


@pytest.mark.parametrize("name", NETS)
def test_evaluation_is_pytorchs(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    evaluation = runs_of(case).evaluate(case.inputs, case.labels)
    assert evaluation.accuracy is not None
    for s, model in enumerate(case.models):
        logits = model(case.inputs).detach()
        assert float(evaluation.loss[s]) == pytest.approx(float(F.cross_entropy(logits, case.labels)), rel=1e-5)
        right = (logits.argmax(1) == case.labels).double().mean()
        assert float(evaluation.accuracy[s]) == pytest.approx(float(right))


def test_of_equal_outputs_the_first_counts() -> None:
    model = nn.Sequential(nn.Linear(2, 3, bias=False))
    with torch.no_grad():
        model[0].weight.zero_()
    chain = chain_of(model)
    x, y = torch.ones(3, 2), torch.arange(3)
    runs = FusedRuns(chain, chain.initial().weights[None], inputs=x, targets=y, seeds=[0], batch_size=1, lr=1)
    assert runs.evaluate(x, y).accuracy == pytest.approx([1 / 3])


def test_loss_of_large_logits_is_exact() -> None:
    model = nn.Sequential(nn.Linear(1, 3, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0], [-3.0], [2.0]]))
    chain, x = chain_of(model), torch.tensor([[0.1], [5.0], [60.0], [-1e4], [1e30]])
    for label in range(3):
        y = torch.full((5,), label)
        runs = FusedRuns(chain, chain.initial().weights[None], inputs=x, targets=y, seeds=[0], batch_size=1, lr=1)
        for i in range(5):
            loss = runs.evaluate(x[i : i + 1], y[:1]).loss
            torch.testing.assert_close(
                loss, F.cross_entropy(model(x[i : i + 1]).detach().double(), y[:1])[None], rtol=2e-6, atol=1e-7
            )


@pytest.mark.parametrize("eps", [0.0, 1e-30])
def test_tiny_eps_is_pytorchs_and_a_constant_vector_diverges_at_0(eps: float) -> None:
    torch.manual_seed(0)
    model = mlp(eps)
    chain, x, y = chain_of(model), torch.randn(8, 64), torch.randint(10, (8,))
    settings: dict[str, Any] = {"targets": y, "seeds": [0], "batch_size": 4, "lr": 0.1}
    runs = FusedRuns(chain, chain.initial().weights[None], inputs=x, **settings)
    exact = gradient(model, x, y)
    assert (runs.gradient(range(8))[0] - exact).norm() <= 1e-6 * exact.norm()
    still = FusedRuns(chain, chain.initial().weights[None], inputs=torch.zeros(8, 64), **settings)
    still.advance(5)
    assert bool(still.diverged[0]) == (eps == 0) == bool(model(torch.zeros(1, 64)).isnan().any())
    assert int(still.steps[0]) == (0 if eps == 0 else 5)


# ---- sampling


def test_batches_are_uniform_and_independent_by_seed_step_and_batch() -> None:
    population, drawn = 7, []
    for seed, step, batch in [(0, 0, 1), (0, 0, 2), (0, 1, 1), (2**32, 0, 1), (1, 0, 1), (0, 2**32, 1)]:
        drawn.append(batch_indices(seed, step, batch, 7000, population))
        counts = torch.bincount(drawn[-1], minlength=population).double()
        chi2 = ((counts - 1000) ** 2 / 1000).sum()
        assert chi2 < 22.46  # six degrees of freedom, 99.9 %
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert abs(float((a == b).double().mean()) - 1 / 7) < 4 * (1 / 7 * 6 / 7 / 7000) ** 0.5


def test_a_batch_begins_as_a_larger_one() -> None:
    assert torch.equal(batch_indices(5, 9, 2, 33, 1000)[:8], batch_indices(5, 9, 2, 8, 1000))
    assert int(batch_indices(5, 9, 2, 1, 1)) == 0


# ---- a replica depends on itself alone


@pytest.fixture(scope="module")
def many_of() -> dict[str, Case]:
    return {name: Case(name, replicas=64) for name in ("mlp", "odd")}


@pytest.mark.parametrize("name", ["mlp", "odd"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_one_replica_is_one_of_64_to_the_bit(many_of: dict[str, Case], name: str, threads: int) -> None:
    case = many_of[name]
    settings: dict[str, Any] = {"l": 3, "weight_decay": 0.01, "stat_every": 3}
    sizes = [1 + s % 5 for s in range(64)]
    with torch_threads(threads):
        many = runs_of(case, batch_size=sizes, **settings)
        many.advance(25)
        evaluations = many.evaluate(case.inputs, case.labels)
    for s in (0, 40, 63):
        one = runs_of(
            case, weights=case.weights[s : s + 1], frozen=case.frozen[s], seeds=[s], batch_size=sizes[s], **settings
        )
        one.advance(25)
        assert torch.equal(one.weights[0], many.weights[s])
        assert all(torch.equal(a[0], b[s]) for a, b in zip(one.sums, many.sums, strict=True))
        assert one.evaluate(case.inputs, case.labels).loss[0] == evaluations.loss[s]


def test_pauses_and_resumed_states_change_no_bit(cases: dict[str, Case], monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases["digits-net"]
    settings: dict[str, Any] = {"l": 2, "stat_every": 3, "lr": [(0, 0.1), (7, 0.01)], "batch_size": [1, 20, 5]}
    whole, paused = runs_of(case, **settings), runs_of(case, **settings)
    whole.advance(20)
    paused.advance([5, 7, 1])
    state = copy.deepcopy(paused.state_dict())
    resumed = runs_of(case, **settings)
    resumed.load_state_dict(state)
    monkeypatch.setattr(fused, "_CALL_OPERATIONS", 1.0)  # a call a step
    resumed.advance(20)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize("way", [copy.deepcopy, lambda runs: pickle.loads(pickle.dumps(runs))], ids=["copy", "pickle"])
def test_a_copy_continues_to_the_same_bits_and_apart(
    cases: dict[str, Case], way: Callable[[FusedRuns], FusedRuns]
) -> None:
    for name, settings in (("mlp", {}), ("digits-net", {"l": 2, "stat_every": 3})):
        runs = runs_of(cases[name], **settings)
        runs.advance(5)
        copied = way(runs)
        before = runs.state_dict()
        copied.advance(12)
        assert all(torch.equal(value, runs.state_dict()[key]) for key, value in before.items())
        runs.advance(12)
        assert all(torch.equal(value, copied.state_dict()[key]) for key, value in runs.state_dict().items())


def test_a_tensor_without_dimensions_is_one_number_for_all(cases: dict[str, Case]) -> None:
    numbers = {"lr": 0.125, "l": 2, "weight_decay": 0.5}
    a, b = runs_of(cases["mlp"], **numbers), runs_of(cases["mlp"], **{k: torch.tensor(v) for k, v in numbers.items()})
    a.advance(3)
    b.advance(3)
    assert torch.equal(a.weights, b.weights)


def test_measuring_does_not_change_sgd(cases: dict[str, Case]) -> None:
    for name, batch_size in (("mlp", 5), ("mlp", 150), ("odd", 40)):
        ends = []
        for stat_every in (0, 1, 4):
            runs = runs_of(cases[name], stat_every=stat_every, batch_size=batch_size, weight_decay=0.01)
            runs.advance(9)
            ends.append(runs.weights)
            assert torch.equal(runs.sums.measured, torch.full((3,), [0.0, 9.0, 3.0][len(ends) - 1]).double())
            assert torch.equal(runs.sums.steps2, runs.sums.measured)
        assert torch.equal(ends[0], ends[1])
        assert torch.equal(ends[0], ends[2])


def test_each_replica_has_its_own_settings(cases: dict[str, Case]) -> None:
    case = cases["mlp"]
    rates = [0.1, [(0, 0.2), (3, 0.02)], 0.3]
    together = runs_of(case, lr=rates, l=[1, 2, 4], weight_decay=[0, 0.1, 0.2], batch_size=[1, 2, 9])
    together.advance([4, 6, 0])
    assert together.steps.tolist() == [4, 6, 0]
    assert torch.equal(together.weights[2], case.weights[2])
    for s, (size, l, decay, steps) in enumerate([(1, 1, 0, 4), (2, 2, 0.1, 6)]):
        alone = runs_of(
            case, weights=case.weights[s : s + 1], frozen=case.frozen[s], seeds=[s], lr=[rates[s]], l=l,
            weight_decay=decay, batch_size=size,
        )  # fmt: skip
        alone.advance(steps)
        assert torch.equal(alone.weights[0], together.weights[s])


@pytest.mark.parametrize("broken", ["rate", "inf", "nan"])
@pytest.mark.parametrize("name", ["mlp", "odd", "two classes"])
def test_a_replica_that_diverges_stops_and_disturbs_no_other(cases: dict[str, Case], name: str, broken: str) -> None:
    case = cases[name]
    weights, rates = case.weights.clone(), [0.05, 0.05, 0.05]
    if broken == "rate":
        rates[1] = 1e37
    else:
        weights[1, ::7] = float(broken)
    with torch_threads(1):  # one work space for all
        runs = runs_of(case, weights=weights, lr=rates, weight_decay=1.0, stat_every=5)
        runs.advance(40)
        runs.advance(70)
    alone = runs_of(case, weight_decay=1.0, stat_every=5)
    alone.advance(70)
    assert runs.diverged.tolist() == [False, True, False]
    assert runs.steps[0] == runs.steps[2] == 70
    assert runs.steps[1] <= 40
    for s in (0, 2):
        assert torch.equal(runs.weights[s], alone.weights[s])
        assert runs.evaluate(case.inputs, case.labels).loss[s] == alone.evaluate(case.inputs, case.labels).loss[s]


def test_an_infinite_weight_behind_a_tanh_is_found() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    chain, weights = chain_of(model), chain_of(model).initial().weights
    weights[12] = torch.inf  # a bias of the first layer
    runs = FusedRuns(
        chain, weights[None], inputs=torch.randn(9, 3), targets=torch.arange(9) % 2, seeds=[0], batch_size=2, lr=0.1
    )
    runs.advance(100)
    assert runs.diverged[0]
    assert runs.steps[0] <= 32


def test_frozen_values_stay_and_models_come_back(cases: dict[str, Case]) -> None:
    case = cases["partly frozen"]
    runs = runs_of(case)
    runs.advance(10)
    model = runs.unstack(2)
    assert torch.equal(case.chain.flatten(model).weights, runs.weights[2])
    for name, p in case.models[2].named_parameters():
        assert torch.equal(dict(model.named_parameters())[name], p) != p.requires_grad, name
    loss = F.cross_entropy(model(case.inputs), case.labels).detach()
    assert float(runs.evaluate(case.inputs, case.labels).loss[2]) == pytest.approx(float(loss), rel=1e-5)
    assert not torch.equal(case.weights, runs.weights)


# ---- the surroundings


def test_ctrl_c_leaves_whole_steps(cases: dict[str, Case]) -> None:
    case = cases["digits-net"]
    runs = runs_of(case, batch_size=8)
    # A shell starts what it puts into the background with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            runs.advance(10**9)
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
    steps = runs.steps.tolist()
    again = runs_of(case, batch_size=8)
    again.advance(steps)
    assert torch.equal(again.weights, runs.weights)


def test_other_threads_run_meanwhile(cases: dict[str, Case]) -> None:
    runs = runs_of(cases["digits-net"], batch_size=16)
    worker = threading.Thread(target=runs.advance, args=[200])
    worker.start()
    turns = 0
    while worker.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 10
    assert runs.steps.tolist() == [200] * 3


def test_memory_is_said_and_checked_before_it_is_taken(cases: dict[str, Case], monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases["digits-net"]
    few, many = (memory_needed(case.chain, case.inputs, replicas=n, threads=1) for n in (1, 1001))
    assert many - few == 1000 * 4 * case.chain.weight_count
    many_weights = case.weights[:1].expand(10**9, -1)
    with pytest.raises(MemoryError, match="1000000000 replicas need"):  # before a list of so many seeds is made
        runs_of(case, weights=many_weights, frozen=case.frozen[0], seeds=range(10**9))
    monkeypatch.setattr(fused, "free_memory", lambda device: 10_000)
    with pytest.raises(MemoryError, match=r"3 replicas need 1 MiB, 0 MiB are free"):
        runs_of(case)


def bad(**changes: Any) -> Callable[[Case], dict[str, Any]]:
    return lambda case: changes


REFUSED: dict[str, tuple[Callable[[Case], dict[str, Any]], str]] = {
    "weights of another width": (
        lambda c: {"weights": c.weights[:, 1:]},
        r"weights must be a dense torch\.float32 \[S, 12288\] on cpu, got torch\.float32 \[3,",
    ),
    "weights of float64": (lambda c: {"weights": c.weights.double()}, r"weights must be a dense torch\.float32 \[S,"),
    "no replica": (lambda c: {"weights": c.weights[:0], "seeds": []}, "weights must be a row for each replica, got"),
    "frozen of another size": (lambda c: {"frozen": c.frozen[:2]}, r"frozen must be a dense torch\.float32 \[640\]"),
    "frozen no tensor": (bad(frozen=3), "frozen must be a tensor, got a int"),
    "loss": (bad(loss="hinge"), "loss must be 'cross_entropy' or 'squared_error', got 'hinge'"),
    "too few seeds": (bad(seeds=[1, 2]), "seeds must be one for each of the 3 replicas, got 2"),
    "negative seed": (bad(seeds=[1, -2, 3]), r"seeds\[1\] must be an integer >= 0 and <= 18446744073709551615, got"),
    "seed that is a float": (bad(seeds=[1, 2.5, 3]), r"seeds\[1\] must be an integer, got 2\.5 \(float\)"),
    "batch size 0": (bad(batch_size=0), "batch_size must be an integer >= 1 and <= 2147483648, got 0"),
    "two batch sizes": (bad(batch_size=[1, 2]), "batch_size must be one for each of the 3 replicas, got 2"),
    "l of text": (bad(l="4"), "l must be a number, got '4'"),
    "l below 1": (bad(l=0.5), r"l must be a finite number >= 1, got 0\.5"),
    "negative rate": (bad(lr=-1.0), "Invalid learning rate: -1.0"),
    "nan rate": (bad(lr=float("nan")), "Invalid learning rate: nan"),
    "a rate too large": (bad(lr=1e39), "Invalid learning rate: 1e\\+39"),
    "schedule from step 1": (bad(lr=[(1, 0.1)]), r"lr\[0\] must be pieces that begin at step 0, then at ascending"),
    "schedule out of order": (bad(lr=[(0, 0.1), (5, 1.0), (5, 2.0)]), r"lr\[0\] must be pieces that begin at step"),
    "empty schedule": (bad(lr=[[], 0.1, 0.1]), r"lr\[0\] must be a number or pairs \(from step, learning rate\),"),
    "weight decay": (bad(weight_decay=[0.0, -0.1, 0.0]), r"weight_decay must be a finite number >= 0, got -0\.1"),
    "stat_every": (bad(stat_every=-1), "stat_every must be an integer >= 0, got -1"),
    "threads": (bad(threads=0), "threads must be an integer >= 1 and <= 32768, got 0"),
    "inputs of float64": (lambda c: {"inputs": c.inputs.double()}, r"inputs must be a dense torch\.float32 \[n,"),
    "inputs of another width": (
        lambda c: {"inputs": c.inputs[:, :9]},
        r"0 \(Linear\)'s samples must be \[64\], got \[9\]",
    ),
    "inputs flat": (lambda c: {"inputs": c.inputs[:, 0]}, r"inputs must be \[n, \.\.\.\], a sample a row, got shape"),
    "no input": (lambda c: {"inputs": c.inputs[:0], "targets": c.labels[:0]}, "inputs must be a dense"),
    "fewer targets": (lambda c: {"targets": c.labels[1:]}, r"targets must be torch\.int64 \[60\] on cpu, got"),
    "targets of int32": (lambda c: {"targets": c.labels.int()}, r"targets must be torch\.int64 \[60\] on cpu, got"),
    "a class too many": (lambda c: {"targets": c.labels + 1}, "targets must be classes from 0 to 9, got 1 to 10"),
    "a negative class": (lambda c: {"targets": c.labels - 1}, "targets must be classes from 0 to 9, got -1 to 8"),
    "classes for squared error": (bad(loss="squared_error"), r"targets must be a dense torch\.float32 \[60, 10\] on"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_refused_by_name(cases: dict[str, Case], what: str) -> None:
    change, message = REFUSED[what]
    case = cases["mlp"]
    case.labels[:10] = torch.arange(10)
    with pytest.raises((TypeError, ValueError), match=message):
        runs_of(case, **change(case))


def test_a_refused_call_changes_nothing(cases: dict[str, Case]) -> None:
    case = cases["mlp"]
    runs = runs_of(case)
    runs.advance(3)
    before = runs.state_dict()
    bad_state: dict[str, Tensor] = before | {"sums": before["sums"][:1]}
    for call in (
        lambda: runs.advance(-1),
        lambda: runs.advance([1, 2]),
        lambda: runs.advance(2.5),  # type: ignore[arg-type]
        lambda: runs.load_state_dict(bad_state),
        lambda: runs.load_state_dict(before | {"weights": "weights"}),  # type: ignore[dict-item]
        lambda: runs.load_state_dict(before | {"steps": before["steps"] - 9}),
        lambda: runs.evaluate(case.inputs[:, 1:], case.labels),
        lambda: runs.evaluate(case.inputs, case.labels + 100),
        lambda: runs.gradient([]),
        lambda: runs.gradient([len(case.inputs)]),
        lambda: runs.unstack(3),
    ):
        with pytest.raises((TypeError, ValueError)):
            call()
    assert all(torch.equal(value, runs.state_dict()[name]) for name, value in before.items())
