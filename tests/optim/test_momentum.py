"""Momentum and maximize in the optimizers: torch.optim's own steps at l = 1, exact moments, schedules, checkpoints."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import heavy_ball
import pytest
import torch
from started_rmsprop import SVAGRMSprop
from torch import Tensor, nn
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR

from svag_fast import SVAG, SVAGAdam
from svag_fast.optim import svag as optim_module
from svag_fast.optim.svag import TwoBatchOptimizer

RULES = ["time", "fixed"]
DECAY = 5e-4


def two_batch_step(opt: TwoBatchOptimizer, params: list[nn.Parameter], g1: list[Tensor], g2: list[Tensor]) -> None:
    for grads, then in ((g1, opt.hold_gradient), (g2, opt.step)):
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        then()


def regression(seed: int = 0) -> tuple[nn.Parameter, Callable[[nn.Parameter, int], Tensor]]:
    """A parameter [40, 8] and the loss of batch k of a noisy linear regression."""
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(300, 16, 8, generator=generator), torch.randn(300, 16, 40, generator=generator)
    target = torch.randn(8, 40, generator=generator)
    start = nn.Parameter(torch.randn(40, 8, generator=generator))

    def loss(p: nn.Parameter, k: int) -> Tensor:
        return ((x[k] @ (p.T - target) + noise[k]) ** 2).mean()

    return start, loss


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("maximize", [False, True])
def test_at_l_1_it_is_torch_sgd_over_300_steps_in_float32(maximize: bool, rule: str) -> None:
    ours, loss = regression()
    theirs = nn.Parameter(ours.detach().clone())
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": DECAY, "maximize": maximize}
    opt = SVAG([ours], momentum_rule=rule, **options)
    sgd = torch.optim.SGD([theirs], **options)
    for k in range(300):
        for p, optimizer in ((ours, opt), (theirs, sgd)):
            optimizer.zero_grad()
            (loss(p, k) * (-1 if maximize else 1)).backward()
            optimizer.step()
    difference = (ours - theirs).norm() / theirs.norm()
    assert difference <= 1e-7
    buffers = [o.state[p]["momentum_buffer"] for o, p in ((opt, ours), (sgd, theirs))]
    assert (buffers[0] - buffers[1]).norm() <= 1e-6 * buffers[1].norm()


@pytest.mark.parametrize(("rule", "l"), [("time", 2), ("time", 16), ("fixed", 4)])
def test_the_optimizers_path_has_the_exact_moments(rule: str, l: int) -> None:
    opts: list[SVAG] = []
    params: list[nn.Parameter] = []

    def step(x: Tensor, g1: Tensor, g2: Tensor) -> None:
        if not opts:
            params.append(nn.Parameter(x))  # shares its memory
            opts.append(SVAG(params, heavy_ball.LR, l=l, momentum=heavy_ball.MOMENTUM, momentum_rule=rule))
        two_batch_step(opts[0], params, [g1], [g2])

    expected = heavy_ball.exact(l, rule)
    assert heavy_ball.by_steps(l, step, torch.float64) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("compensated", [False, True])
def test_without_momentum_nothing_changes_and_no_buffer_is_made(compensated: bool) -> None:
    results = []
    for options in ({}, {"momentum": 0.0, "momentum_rule": "fixed"}):
        p, loss = regression()
        opt = SVAG([p], 0.1, l=4, weight_decay=DECAY, compensated=compensated, **options)
        for k in range(4):
            grads = [torch.autograd.grad(loss(p, 2 * k + i), p)[0] for i in (0, 1)]
            two_batch_step(opt, [p], grads[:1], grads[1:])
        results.append(p.detach())
        assert "momentum_buffer" not in opt.state[p]
    assert torch.equal(*results)


def make(kind: type[TwoBatchOptimizer], p: nn.Parameter, **options: Any) -> TwoBatchOptimizer:
    return kind([p], lr=0.05, l=4, weight_decay=0.1, **options)


@pytest.mark.parametrize("kind", [SVAG, SVAGAdam, SVAGRMSprop])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("l", [1, 4])
def test_maximize_turns_the_gradients_sign_and_no_statistic(
    kind: type[TwoBatchOptimizer], backend: str, l: float
) -> None:
    options = {"momentum": 0.9} if kind is SVAG else {}
    results = []
    for sign in (1, -1):
        p = nn.Parameter(torch.linspace(-1, 1, 9))
        opt = kind([p], lr=0.05, l=l, weight_decay=0.1, maximize=sign == 1, backend=backend, **options)
        for k in range(3):
            g1, g2 = torch.arange(9.0) - k, torch.ones(9)
            two_batch_step(opt, [p], [sign * g1], [sign * g2])
        assert opt.stats is not None
        results.append([p.detach(), opt.stats.raw])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("kind", "theirs"), [(SVAGAdam, torch.optim.Adam), (SVAGRMSprop, torch.optim.RMSprop)], ids=["Adam", "RMSprop"]
)
def test_adaptive_maximize_is_torch_s_to_the_bit(
    kind: type[TwoBatchOptimizer], theirs: type[torch.optim.Optimizer]
) -> None:
    results = []
    for optimizer, options in ((kind, {"backend": "reference"}), (theirs, {"foreach": False})):
        p = nn.Parameter(torch.linspace(-1, 1, 9))
        opt = optimizer([p], lr=0.05, weight_decay=0.1, maximize=True, **options)  # type: ignore[call-arg]
        for k in range(3):
            p.grad = torch.arange(9.0) - k
            opt.step()
        results.append(p.detach())
    assert torch.equal(*results)


SCHEDULES: dict[str, Callable[[Any], LRScheduler]] = {
    "OneCycleLR": lambda opt: OneCycleLR(opt, max_lr=0.1, total_steps=20),
    "CyclicLR": lambda opt: CyclicLR(opt, base_lr=0.01, max_lr=0.1, step_size_up=5),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize(
    ("kind", "theirs"), [(SVAG, torch.optim.SGD), (SVAGAdam, torch.optim.Adam)], ids=["SVAG", "SVAGAdam"]
)
def test_schedules_of_the_momentum_work_with_their_defaults(
    kind: type[TwoBatchOptimizer], theirs: type[torch.optim.Optimizer], schedule: Callable[[Any], LRScheduler]
) -> None:
    params = []
    for optimizer in (kind, theirs):
        p, loss = regression()
        opt = optimizer([p], lr=0.05)  # type: ignore[call-arg]
        scheduler = schedule(opt)
        for k in range(20):
            opt.zero_grad()
            loss(p, k).backward()
            opt.step()
            if k < 19:
                scheduler.step()
        params.append(p.detach())
    torch.testing.assert_close(*params, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compensated", [False, True])
def test_a_saved_run_continues_to_the_bit(dtype: torch.dtype, compensated: bool) -> None:
    if compensated and dtype == torch.float64:
        pytest.skip("compensation is for the others")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(6, 5, generator=generator).to(dtype) for _ in range(12)]
    p = nn.Parameter(torch.randn(5, 6, generator=generator).to(dtype).T)  # not contiguous
    opt = make(SVAG, p, momentum=0.9, compensated=compensated)
    saved: tuple[Tensor, io.BytesIO] | None = None
    for k in range(6):
        if k == 3:
            saved = p.detach().clone(), io.BytesIO()
            torch.save(opt.state_dict(), saved[1])
        two_batch_step(opt, [p], [grads[2 * k]], [grads[2 * k + 1]])
    assert saved is not None
    other = nn.Parameter(saved[0])
    loaded = make(SVAG, other, compensated=compensated)  # the checkpoint's momentum replaces the default 0
    saved[1].seek(0)
    loaded.load_state_dict(torch.load(saved[1], weights_only=True))
    assert loaded.state[other]["momentum_buffer"].dtype == wide
    for k in range(3, 6):
        two_batch_step(loaded, [other], [grads[2 * k]], [grads[2 * k + 1]])
    assert torch.equal(other.detach(), p.detach())
    assert torch.equal(loaded.state[other]["momentum_buffer"], opt.state[p]["momentum_buffer"])


@pytest.mark.parametrize("kind", [SVAG, SVAGAdam, SVAGRMSprop])
def test_checkpoints_from_before_load_without_momentum(kind: type[TwoBatchOptimizer]) -> None:
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    state = make(kind, p).state_dict()
    for group in state["param_groups"]:
        for name in ("momentum", "momentum_rule", "maximize"):
            group.pop(name, None)
    opt = make(kind, q)
    opt.load_state_dict(state)
    two_batch_step(opt, [q], [torch.ones(3)], [torch.ones(3)])
    two_batch_step(make(kind, p), [p], [torch.ones(3)], [torch.ones(3)])
    assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": -0.1}, "Invalid momentum value: -0.1"),
        ({"momentum": 1.0}, "Invalid momentum value: 1.0"),
        ({"momentum": 0.9, "momentum_rule": "slow"}, "momentum_rule must be .* got 'slow'"),
    ],
    ids=str,
)
def test_a_momentum_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=message):
        SVAG([p], 0.1, **options)
    opt = SVAG([p], 0.1, momentum=0.5)
    opt.param_groups[0].update(options)  # as a scheduler may
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match=message):
        opt.step()
    assert torch.equal(p.detach(), torch.ones(3))
    assert not opt.state


def test_an_amp_step_with_an_inf_leaves_param_and_buffer() -> None:
    p = nn.Parameter(torch.ones(5))
    opt = SVAG([p], 0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    kept: list[Tensor] = []
    for k, factor in enumerate((1.0, torch.inf, 1.0)):
        opt.zero_grad()
        scaler.scale((p * p).sum() * factor).backward()
        scaler.step(opt)
        scaler.update()
        now = [p.detach().clone(), opt.state[p]["momentum_buffer"].clone()]
        assert all(torch.equal(a, b) for a, b in zip(now, kept, strict=False)) == (k < 2)
        kept = now


def test_a_capturable_step_follows_all_scalars_and_wants_its_buffers_made_before_a_capture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = []
    for capturable in (False, True):
        p, loss = regression()
        opt = SVAG([p], 0.05, l=4, momentum=0.9, weight_decay=DECAY, capturable=capturable)
        for k in range(4):
            opt.param_groups[0]["momentum"] = 0.9 - 0.1 * k
            grads = [torch.autograd.grad(loss(p, 2 * k + i), p)[0] for i in (0, 1)]
            two_batch_step(opt, [p], grads[:1], grads[1:])
        results.append([p.detach(), opt.state[p]["momentum_buffer"]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    fresh = SVAG([p], 0.05, momentum=0.9, capturable=True)
    p.grad = torch.ones_like(p)
    before = p.detach().clone()
    monkeypatch.setattr(optim_module, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="take a step before the capture"):
        fresh.step()
    assert torch.equal(p.detach(), before)


def test_a_copy_has_its_own_buffer() -> None:
    p = nn.Parameter(torch.ones(3))
    opt = SVAG([p], 0.1, momentum=0.9)
    p.grad = torch.ones(3)
    opt.step()
    other = copy.deepcopy(opt)
    opt.step()
    (q,) = other.param_groups[0]["params"]
    assert other.state[q]["momentum_buffer"].tolist() == [1, 1, 1]
