"""SVAG over replicas: each one's path and statistics are those of an optimizer of its own."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from svag_fast import SVAG, Replicas, RunningNoise, SVAGAdam
from svag_fast.ops.step_stats import StepStats

S = 5
SHAPES = [(), (3, 7), (0,), (33,)]
LR, L, WEIGHT_DECAY = [0.1, 0.05, 0.2, 0.1, 0.3], [1.0, 4.0, 2.0**20, 1.5, 16.0], [0.1, 0.0, 0.2, 0.1, 0.5]
OF_EACH: dict[str, Any] = {"lr": LR, "l": L, "weight_decay": WEIGHT_DECAY}
CLOCKS = ("effective_steps", "time")


def drawn(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(S, *shape, generator=generator) for shape in SHAPES]


def parameters(s: int | None = None) -> list[nn.Parameter]:
    return [nn.Parameter(t if s is None else t[s].clone()) for t in drawn(0)]


def give(params: list[nn.Parameter], seed: int, s: int | None, change: Callable[[list[Tensor]], None]) -> None:
    grads = drawn(seed)
    change(grads)
    for p, g in zip(params, grads, strict=True):
        p.grad = g if s is None else g[s].clone()


def nothing(_: list[Tensor]) -> None:
    pass


def step(
    opt: SVAG,
    params: list[nn.Parameter],
    k: int,
    s: int | None = None,
    change: Callable[[list[Tensor]], None] = nothing,
) -> StepStats:
    give(params, 2 * k + 1, s, change)
    if s is None or opt.l != 1:
        opt.hold_gradient()
        give(params, 2 * k + 2, s, change)
    stats = opt.step()
    assert isinstance(stats, StepStats)
    return stats


def alone(s: int, backend: str = "auto", **options: Any) -> tuple[SVAG, list[nn.Parameter]]:
    params = parameters(s)
    own = {name: values[s] for name, values in OF_EACH.items()}
    return SVAG(params, **own, backend=backend, **options), params


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9, "momentum_rule": "fixed"},
    "momentum in time": {"momentum": 0.5},
    "compensated": {"compensated": True},
    "maximize": {"maximize": True},
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_path_is_that_of_an_optimizer_of_its_own_to_the_bit(variant: str, backend: str) -> None:
    options = {**VARIANTS[variant], "backend": backend}
    params = parameters()
    opt = SVAG(params, **OF_EACH, replicas=S, **options)
    separate = [alone(s, **options) for s in range(S)]

    def diverged(grads: list[Tensor]) -> None:
        grads[1][3] = math.inf

    for k in range(4):
        change = diverged if k == 2 else nothing
        stats = step(opt, params, k, change=change)
        for s, (own, own_params) in enumerate(separate):
            theirs = step(own, own_params, k, s, change)
            assert stats.weight_sq_norm.shape == (S,)
            shown = slice(None) if own.l != 1 else slice(0, 1)  # at l = 1 it takes one gradient
            torch.testing.assert_close(stats.raw[s][shown], theirs.raw[shown], rtol=0, atol=0, equal_nan=True)
            for p, q in zip(params, own_params, strict=True):
                torch.testing.assert_close(p[s], q, rtol=0, atol=0, equal_nan=True)
                for name, kept in own.state[q].items():
                    torch.testing.assert_close(opt.state[p][name][s], kept, rtol=0, atol=0, equal_nan=True)
    assert [bool(p[3].isfinite().all()) for p in params] == [True, False, True, True]
    assert all(bool(p[s].isfinite().all()) for p in params for s in range(S) if s != 3)
    for name in CLOCKS:
        assert opt.param_groups[0][name].tolist() == [getattr(own, name) for own, _ in separate]


def test_a_real_net_s_estimates_are_each_replica_s() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    replicas = Replicas(build, seeds=range(3), engine="stacked")
    opt = SVAG(replicas.parameters(), lr=0.1, l=4, replicas=3)
    models = [replicas.unstack(s) for s in range(3)]
    opts = [SVAG(model.parameters(), lr=0.1, l=4) for model in models]
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        batches = torch.randn(2, 3, 4, 6, generator=generator), torch.randint(3, (2, 3, 4), generator=generator)
        for k, (x, y) in enumerate(zip(*batches, strict=True)):
            opt.zero_grad()
            nn.functional.cross_entropy(replicas(x).flatten(0, 1), y.flatten(), reduction="sum").div(4).backward()
            for s, (model, own) in enumerate(zip(models, opts, strict=True)):
                own.zero_grad()
                nn.functional.cross_entropy(model(x[s]), y[s]).backward()
                if k == 0:
                    own.hold_gradient()
            if k == 0:
                opt.hold_gradient()
        stats = opt.step()
        theirs = [own.step() for own in opts]
        for name in ("grad_sq_norm", "noise_trace", "weight_sq_norm", "nsr", "noise_trace_rounding"):
            expected = torch.stack([getattr(their, name) for their in theirs])
            torch.testing.assert_close(getattr(stats, name), expected, rtol=1e-3, atol=1e-5)


def test_groups_step_together_and_their_statistics_add_up() -> None:
    params, whole = parameters(), parameters()
    one = SVAG(whole, lr=LR, l=4, weight_decay=0.1, replicas=S)
    two = SVAG([{"params": params[:2]}, {"params": params[2:]}], lr=LR, l=4, weight_decay=0.1, replicas=S)
    for opt, listed in ((one, whole), (two, params)):
        give(listed, 1, None, nothing)
        opt.hold_gradient()
        give(listed, 2, None, nothing)
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(params, whole, strict=True))
    assert one.stats is not None
    assert two.stats is not None
    torch.testing.assert_close(two.stats.raw, one.stats.raw, rtol=1e-12, atol=0)


def test_each_replica_is_clipped_by_its_own_norm() -> None:
    params = parameters()
    opt = SVAG(params, **OF_EACH, replicas=S)
    separate = [alone(s) for s in range(S)]

    def uneven(grads: list[Tensor]) -> None:
        grads[1][2] *= 100
        grads[3][4] = math.nan

    for listed, own, s in [(params, opt, None), *((q, o, s) for s, (o, q) in enumerate(separate))]:
        give(listed, 1, s, uneven)
        own.hold_gradient()
        give(listed, 2, s, uneven)
    held = opt._pair.first()
    with pytest.raises(RuntimeError, match="is inf or nan, of replica 4"):
        opt.clip_grad_norm_(5.0, error_if_nonfinite=True)
    norms = opt.clip_grad_norm_(5.0)
    assert norms.shape == (2, S)
    for s, (own, listed) in enumerate(separate):
        torch.testing.assert_close(norms[:, s], own.clip_grad_norm_(5.0), equal_nan=True, rtol=1e-6, atol=0)
        firsts = own._pair.first()
        for g, p, first, q in zip(held, params, firsts, listed, strict=True):
            assert p.grad is not None
            torch.testing.assert_close(g[s], first, equal_nan=True, rtol=1e-6, atol=0)
            torch.testing.assert_close(p.grad[s], q.grad, equal_nan=True, rtol=1e-6, atol=0)
    assert norms[0, 2] > 100
    opt.step()


def saved_and_loaded(state: dict[str, Any]) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("way", ["state_dict", "file", "pickle", "deepcopy"])
@pytest.mark.parametrize("given", [list, tuple, torch.tensor], ids=["list", "tuple", "tensor"])
def test_a_checkpoint_continues_to_the_bit(way: str, given: Callable[[Any], Any]) -> None:
    options = {**{name: given(values) for name, values in OF_EACH.items()}, "momentum": 0.9, "momentum_rule": "fixed"}
    params = parameters()
    opt = SVAG(params, replicas=S, **options)
    for k in range(2):
        step(opt, params, k)
    if way in ("pickle", "deepcopy"):
        opt2 = pickle.loads(pickle.dumps(opt)) if way == "pickle" else copy.deepcopy(opt)
        params2 = opt2.param_groups[0]["params"]
    else:
        params2 = [nn.Parameter(p.detach().clone()) for p in params]
        opt2 = SVAG(params2, lr=1.0, replicas=S)
        opt2.load_state_dict(opt.state_dict() if way == "state_dict" else saved_and_loaded(opt.state_dict()))
    for k in range(2, 4):
        raws = [step(o, p, k).raw for o, p in ((opt, params), (opt2, params2))]
        assert torch.equal(*raws)
    assert all(torch.equal(a, b) for a, b in zip(params, params2, strict=True))
    for name in CLOCKS:
        assert torch.equal(opt.param_groups[0][name], opt2.param_groups[0][name])


def test_the_state_of_torch_s_sgd_is_taken_over() -> None:
    params = parameters()
    theirs = torch.optim.SGD(params, lr=0.25, momentum=0.0)
    opt = SVAG(parameters(), lr=0.1, l=L, replicas=S)
    opt.load_state_dict(theirs.state_dict())
    assert (opt.param_groups[0]["lr"], opt.param_groups[0]["l"], opt.param_groups[0]["replicas"]) == (0.25, L, S)
    moving = torch.optim.SGD(params, lr=0.25, momentum=0.9)
    with pytest.raises(ValueError, match="must be of moments at l = "):
        opt.load_state_dict(moving.state_dict())


def test_a_rate_set_between_steps_is_the_next_step_s() -> None:
    params, same = parameters(), parameters()
    opt, fresh = SVAG(params, lr=0.5, l=4, replicas=S), SVAG(same, lr=LR, l=4, replicas=S)
    for rate in (list(LR), tuple(LR), torch.tensor(LR, dtype=torch.float64)):
        opt.param_groups[0]["lr"] = rate
        step(opt, params, 0)
        step(fresh, same, 0)
        assert all(torch.equal(a, b) for a, b in zip(params, same, strict=True))


def test_a_scheduler_sets_one_rate_of_all() -> None:
    params = parameters()
    opt = SVAG(params, lr=0.5, l=4, replicas=S)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    for _ in range(2):
        step(opt, params, 0)
        scheduler.step()
    assert opt.time == 0.5 / 4 + 0.25 / 4
    assert opt.effective_steps == 0.5
    assert opt.l == 4


def test_a_closure_is_called_for_both_batches_where_any_l_is_above_1() -> None:
    for l, calls in ([1] * S, 1), ([1, 1, 2, 1, 1], 2):
        params, called = parameters(), []

        def closure(params: list[nn.Parameter] = params, called: list[int] = called) -> None:
            give(params, len(called), None, nothing)
            called.append(1)

        SVAG(params, lr=0.1, l=l, replicas=S).step(closure)
        assert len(called) == calls


def test_what_was_given_one_batch_has_no_estimates_and_is_warned_of() -> None:
    params = parameters()
    opt = SVAG(params, lr=0.1, l=4, replicas=S)
    give(params, 1, None, nothing)
    opt.hold_gradient()
    give(params, 2, None, nothing)
    for p, g in zip(params, drawn(1), strict=True):
        assert p.grad is not None
        p.grad[2] = g[2]
    with pytest.warns(UserWarning, match="SVAG of replica 2: both gradients are the same to the bit"):
        stats = opt.step()
    assert stats.is_one_batch()
    for value in (stats.grad_sq_norm, stats.noise_trace, stats.nsr):
        assert value.isnan().tolist() == [s == 2 for s in range(S)]


def test_without_gradients_nothing_moves_and_the_statistics_keep_their_shape() -> None:
    opt = SVAG(parameters(), lr=0.1, replicas=S)
    assert opt.step().raw.shape == (S, 5)


def test_without_replicas_the_statistics_have_no_dimension() -> None:
    params = parameters()
    assert step(SVAG(params, lr=0.1, l=4), params, 0).grad_sq_norm.shape == ()  # type: ignore[union-attr]


def refused(**options: Any) -> Callable[[], Any]:
    return lambda: SVAG(parameters(), **{"lr": 0.1, "replicas": S, **options})


def with_scaler() -> None:
    params = parameters()
    opt, scaler = SVAG(params, lr=0.1, replicas=S), torch.amp.GradScaler("cpu")
    scaler.scale(torch.stack([p.sum() for p in params]).sum()).backward()
    before = [p.detach().clone() for p in params]
    try:
        scaler.step(opt)
    finally:
        assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


def with_unscale() -> None:
    SVAG(parameters(), lr=0.1, replicas=S).unscale_(torch.amp.GradScaler("cpu"))


def loaded(theirs: int | None, ours: int | None) -> None:
    state = SVAG(parameters(), lr=0.1, replicas=theirs).state_dict()
    SVAG(parameters(), lr=0.1, replicas=ours).load_state_dict(state)


def loaded_clock(value: Any) -> None:
    opt = SVAG(parameters(), lr=0.1, replicas=S)
    state = opt.state_dict()
    state["param_groups"][0]["time"] = value
    opt.load_state_dict(state)


def changed(**options: Any) -> None:
    params = parameters()
    opt = SVAG([{"params": params[:2]}, {"params": params[2:]}], lr=0.1, replicas=S)
    opt.param_groups[1].update(options)
    give(params, 1, None, nothing)
    opt.step()


def noise() -> None:
    params = parameters()
    RunningNoise().update(step(SVAG(params, lr=0.1, l=4, replicas=S), params, 0))


def a_property(name: str) -> None:
    params = parameters()
    opt = SVAG(params, **OF_EACH, replicas=S)
    step(opt, params, 0)
    getattr(opt, name)


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "of a wrong number": (
        lambda: SVAG(parameters(), lr=0.1, replicas=4),
        ValueError,
        r"params\[0\] of the group must be \[4, ...\] with replicas=4, got \[5\]",
    ),
    "none": (refused(replicas=0), ValueError, "replicas must be an integer >= 1, got 0"),
    "no integer": (refused(replicas="5"), TypeError, "replicas must be an integer, got '5'"),
    "too few rates": (refused(lr=[0.1] * 4), ValueError, "lr must be .* one for each of the 5 replicas, got 4"),
    "too few rates in a tensor": (refused(lr=torch.ones(4)), ValueError, "lr must be one number"),
    "l below 1": (refused(l=[1, 1, 1, 0, 1]), ValueError, "replica 3: l must be a finite number >= 1, got 0"),
    "rates without replicas": (refused(lr=LR, replicas=None), TypeError, "Invalid learning rate"),
    "an l of each without replicas": (refused(l=L, replicas=None), TypeError, "l must be a number"),
    "innermost": (
        lambda: SVAG([nn.Parameter(torch.ones(3, S).T)], lr=0.1, replicas=S),
        ValueError,
        "replicas' dimension outermost",
    ),
    "capturable": (refused(capturable=True), ValueError, "capturable must be False with replicas"),
    "Adam": (lambda: SVAGAdam(parameters(), lr=0.1, replicas=S), TypeError, "replicas"),  # type: ignore[call-arg]
    "a group of Adam": (
        lambda: SVAGAdam([{"params": parameters(), "replicas": S}], lr=0.1), TypeError, "must be SVAG, got SVAGAdam"
    ),
    "groups of other numbers": (
        lambda: SVAG([{"params": parameters()}, {"params": parameters(), "replicas": None}], lr=0.1, replicas=S),
        ValueError,
        "replicas must be 5, as in the other param groups, got None",
    ),
    "groups of other l": (
        lambda: SVAG([{"params": parameters()}, {"params": parameters(), "l": L}], lr=0.1, replicas=S),
        ValueError,
        "l must be .*, as in the other param groups",
    ),
    "a group's l set later": (lambda: changed(l=L), ValueError, "l must be .*, as in the other param groups"),
    "a group's replicas set later": (lambda: changed(replicas=None), ValueError, "replicas must be 5, as in the other"),
    "a GradScaler": (with_scaler, RuntimeError, "a GradScaler has one scale for all replicas"),
    "unscale_": (with_unscale, RuntimeError, "a GradScaler has one scale for all replicas"),
    "another number's state": (lambda: loaded(S, None), ValueError, "must be None, as this optimizer's, got 5"),
    "one run's state": (lambda: loaded(None, S), ValueError, "must be 5, as this optimizer's, got None"),
    "a clock of others": (lambda: loaded_clock(torch.ones(4)), TypeError, "time must be a "),
    "a clock of nan": (lambda: loaded_clock(torch.full((S,), math.nan)), ValueError, "time must be a "),
    "a running mean": (noise, ValueError, "must be of one run, got those of 5 replicas"),
    "l as one number": (lambda: a_property("l"), ValueError, r"param_groups\[0\]\['l'\]"),
    "time as one number": (lambda: a_property("time"), ValueError, r"param_groups\[0\]\['time'\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_replicas_do_not_serve_is_refused_by_name(case: str) -> None:
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()
