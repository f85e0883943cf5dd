"""What hold_gradient() keeps, and that two gradients were made where two are needed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from started_rmsprop import SVAGRMSprop
from torch import Tensor, nn

from svag_fast import SVAG, RunningNoise, SVAGAdam
from svag_fast.ops.step_stats import StepStats

OPTIMIZERS = (SVAG, SVAGAdam, SVAGRMSprop)


def net(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def batch(k: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(k), dtype=torch.float64).to(dtype)


def loss(model: Callable[..., Tensor], k: int) -> Tensor:
    return model(batch(k)).square().mean()


def grads(model: nn.Module, k: int) -> list[Tensor]:
    return list(torch.autograd.grad(loss(model, k), list(model.parameters())))


def noise_of(g1: list[Tensor], g2: list[Tensor]) -> float:
    return float(sum((a - b).square().sum() for a, b in zip(g1, g2, strict=True)) / 2)


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


# ---- memory that is not ours to keep


@pytest.mark.parametrize("keep", ["set_to_none", "zeros"])
@pytest.mark.parametrize("views", [True, False])
def test_buckets_of_distributed_data_parallel(one_rank: None, views: bool, keep: str) -> None:
    model = net()
    ddp = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=views)
    opt = SVAG(ddp.parameters(), lr=0.1, l=4)
    for k in range(0, 8, 2):  # the buckets are made again after the first backward pass
        expected = noise_of(grads(model, k), grads(model, k + 1))
        opt.zero_grad(set_to_none=keep == "set_to_none")
        loss(ddp, k).backward()
        opt.hold_gradient()
        loss(ddp, k + 1).backward()
        assert float(opt.step().noise_trace) == pytest.approx(expected, rel=1e-9)


def _bucket(params: list[nn.Parameter]) -> list[Tensor]:
    flat = torch.zeros(sum(p.numel() for p in params), dtype=torch.float64)
    return [v.view_as(p) for v, p in zip(flat.split([p.numel() for p in params]), params, strict=True)]


def _numpy(params: list[nn.Parameter]) -> list[Tensor]:
    return [torch.from_numpy(torch.zeros_like(p).numpy().copy()) for p in params]


def _views(params: list[nn.Parameter]) -> list[Tensor]:
    return [torch.zeros_like(p).view(p.shape) for p in params]


def _own(params: list[nn.Parameter]) -> list[Tensor]:
    return [torch.zeros_like(p) for p in params]


@pytest.mark.parametrize("buffers", [_bucket, _numpy, _views, _own])
def test_buffers_that_a_trainer_writes_again(buffers: Callable[..., list[Tensor]]) -> None:
    """As a captured graph does, which knows addresses alone."""
    model = net()
    params = list(model.parameters())
    opt = SVAG(params, lr=0.1, l=4)
    persistent = buffers(params)

    def backward(k: int) -> None:
        for p, buffer, g in zip(params, persistent, grads(model, k), strict=True):
            p.grad = buffer
            buffer.copy_(g)

    for k in range(0, 4, 2):
        expected = noise_of(grads(model, k), grads(model, k + 1))
        backward(k)
        opt.hold_gradient()
        backward(k + 1)
        assert float(opt.step().noise_trace) == pytest.approx(expected, rel=1e-9)


REFERENCES: dict[str, Callable[[Tensor], Any]] = {
    "the gradient": lambda g: g,
    "a view": lambda g: g.view(-1),
    "detached": lambda g: g.detach(),
    "its storage": lambda g: g.untyped_storage(),
    "numpy's": lambda g: g.numpy(),
}


@pytest.mark.parametrize("refer", REFERENCES.values(), ids=REFERENCES.keys())
def test_what_a_variable_refers_to_is_copied(refer: Callable[[Tensor], Any]) -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    opt = SVAG([p], lr=1.0, l=2)
    p.grad = torch.ones(3, dtype=torch.float64)
    kept = refer(p.grad)
    opt.hold_gradient()
    kept.fill(7) if refer is REFERENCES["numpy's"] else kept.fill_(7)
    assert opt._pair.first()[0].tolist() == [1, 1, 1]


def test_what_nobody_else_refers_to_is_not_copied() -> None:
    model = net()
    loss(model, 0).backward()
    addresses = [p.grad.data_ptr() for p in model.parameters()]
    opt = SVAG(model.parameters(), lr=0.1, l=2)
    opt.hold_gradient()
    assert [g.data_ptr() for g in opt._pair.first()] == addresses
    assert all(p.grad is None for p in model.parameters())


def test_expanded_gradients_and_those_of_two_parameters_are_copied() -> None:
    a, b, c = (nn.Parameter(torch.ones(3)) for _ in range(3))
    a.grad, b.grad = torch.ones(1).expand(3), torch.ones(3)
    c.grad = b.grad
    opt = SVAG([a, b, c], lr=0.1, l=2)
    opt.hold_gradient()
    held = opt._pair.first()
    assert len({g.untyped_storage().data_ptr() for g in held}) == 3
    assert all(g.is_contiguous() for g in held)


def test_a_held_gradient_that_is_the_current_one_is_refused() -> None:
    p = nn.Parameter(torch.ones(3))
    opt = SVAG([p], lr=0.1, l=2)
    p.grad = torch.ones(3)
    opt.hold_gradient()
    for again in (opt._pair.first()[0], opt._pair.first()[0].detach()):
        p.grad = again
        with pytest.raises(ValueError, match=r"grads2\[0\] must be in memory of its own, as a second batch's"):
            opt.step()
        assert p.tolist() == [1, 1, 1]


# ---- a second gradient that is not there


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("l", [1, 4])
def test_a_forgotten_second_backward_is_refused_and_can_be_made_good(optimizer: Any, l: float) -> None:
    model, other = net(), net()
    opt, reference = optimizer(model.parameters(), lr=0.01, l=l), optimizer(other.parameters(), lr=0.01, l=l)
    loss(model, 0).backward()
    opt.hold_gradient()
    before = values(model)
    with pytest.raises(RuntimeError, match="no parameter has one of the second batch"):
        opt.step()
    assert same(before, values(model))
    assert opt.effective_steps == 0
    loss(model, 1).backward()
    opt.step()
    loss(other, 0).backward()
    reference.hold_gradient()
    loss(other, 1).backward()
    reference.step()
    assert same(values(model), values(other))


def test_a_closure_that_does_nothing_is_refused_and_leaves_nothing_held() -> None:
    model = net()
    opt = SVAG(model.parameters(), lr=0.1, l=4)
    loss(model, 0).backward()
    with pytest.raises(RuntimeError, match="at each of its calls"):
        opt.step(lambda: None)
    with pytest.raises(RuntimeError, match="no parameter has a gradient to hold"):
        opt.step(lambda: None)


def test_a_closure_that_fails_at_its_second_call_leaves_nothing_held() -> None:
    """What it held would meet the next step's first batch, at other parameters."""
    model, calls = net(), []
    opt = SVAG(model.parameters(), lr=0.1, l=4)

    def closure() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        opt.zero_grad()
        loss(model, len(calls)).backward()

    with pytest.raises(KeyboardInterrupt):
        opt.step(closure)
    opt.step(closure)
    assert len(calls) == 4


def test_a_second_backward_under_a_scaler_is_not_taken_for_granted() -> None:
    model = net(dtype=torch.float32)
    opt, scaler = SVAG(model.parameters(), lr=0.1, l=2), torch.amp.GradScaler("cpu", init_scale=8.0)

    def backward(k: int) -> None:
        scaler.scale(model(batch(k, torch.float32)).square().mean()).backward()

    for forgotten in (False, True):
        opt.zero_grad()
        backward(0)
        opt.hold_gradient()
        if forgotten:
            with pytest.raises(RuntimeError, match="no parameter has one of the second batch"):
                scaler.step(opt)
            continue
        backward(1)
        scaler.step(opt)
        scaler.update()


def test_groups_added_while_a_gradient_is_held() -> None:
    model, other = net(), net()
    opt, whole = SVAG(model[0].parameters(), lr=0.1, l=4), SVAG(other.parameters(), lr=0.1, l=4)
    for m, o in ((model, opt), (other, whole)):
        loss(m, 0).backward()
        o.hold_gradient()
        if o is opt:
            opt.add_param_group({"params": model[2].parameters()})
        loss(m, 1).backward()
        o.step()
    assert same(values(model), values(other))


def test_a_group_added_after_the_second_backward_is_refused() -> None:
    model = net()
    opt = SVAG(model[0].parameters(), lr=0.1, l=4)
    loss(model, 0).backward()
    opt.hold_gradient()
    loss(model, 1).backward()
    with pytest.raises(RuntimeError, match="sum over both batches"):
        opt.add_param_group({"params": model[2].parameters()})
    assert len(opt.param_groups) == 1
    opt.step()


def test_parameters_exchanged_while_a_gradient_is_held_are_refused() -> None:
    model = net()
    opt = SVAG(model.parameters(), lr=0.1, l=4)
    loss(model, 0).backward()
    opt.hold_gradient()
    loss(model, 1).backward()
    opt.param_groups[0]["params"].pop()
    with pytest.raises(RuntimeError, match="the parameters are others"):
        opt.step()


# ---- the same batch twice


def one_batch_steps(optimizer: Any, noise: RunningNoise, l: float, count: int = 3) -> Any:
    model = net()
    opt = optimizer(model.parameters(), lr=0.01, l=l)

    def closure() -> None:
        opt.zero_grad()
        loss(model, 0).backward()

    for _ in range(count):
        opt.step(closure)
        noise.update(opt.stats)
    return opt


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_batch_twice_warns_once_and_raises_where_it_is_read(optimizer: Any) -> None:
    noise = RunningNoise()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt = one_batch_steps(optimizer, noise, 8)
    assert len(caught) == 1
    assert str(caught[0].message).startswith(f"{optimizer.__name__}: both gradients are the same to the bit")
    assert caught[0].filename == __file__
    for name in ("grad_sq_norm", "noise_trace", "nsr"):
        with pytest.raises(RuntimeError, match="the same to the bit"):
            getattr(opt.stats, name)
        with pytest.raises(RuntimeError, match=r"in 3 of 3 steps both gradients are the same"):
            getattr(noise, name)
    assert float(opt.stats.inner) == float(opt.stats.sq_norm1) > 0
    assert "no estimates: in 3 of 3 steps" in repr(noise)
    restored = RunningNoise()
    restored.load_state_dict(noise.state_dict())
    with pytest.raises(RuntimeError, match="in 3 of 3"):
        _ = restored.nsr


def test_where_no_second_batch_is_asked_for_the_same_gradient_is_no_fault() -> None:
    """At l = 1 a gradient without noise is held twice to measure it; gradients that are zero have no noise either."""
    p = nn.Parameter(torch.ones(3))
    for l, value in ((1, 1.0), (4, 0.0)):
        opt = SVAG([p], lr=0.1, l=l)
        p.grad = torch.full((3,), value)
        opt.hold_gradient()
        p.grad = torch.full((3,), value)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert float(opt.step().noise_trace) == 0


def test_on_a_device_nothing_waits_and_the_estimates_are_nan() -> None:
    raw = torch.tensor([3.0, 3, 3, 1, 1], dtype=torch.float64)

    class OnDevice(StepStats):
        def _on_cpu(self) -> bool:
            return False

    one, two = OnDevice(raw, True, True), OnDevice(torch.tensor([3.0, 3, 1, 1, 1]).double(), True, True)
    assert [float(s.noise_trace) for s in (one, two)] == pytest.approx([float("nan"), 2], nan_ok=True)
    assert [float(s.nsr) for s in (one, two)] == pytest.approx([float("nan"), 2], nan_ok=True)
    with pytest.raises(AttributeError):  # still a frozen record
        one.raw = raw  # type: ignore[misc]


# ---- one gradient clipped, or both


def both_backward(model: nn.Module, opt: Any, scale: Callable[[Tensor], Tensor] = lambda x: x, times: int = 1) -> None:
    for half in range(2):
        for k in range(times):
            scale(100 * model(batch(10 * half + k, next(model.parameters()).dtype)).square().mean()).backward()
        if half == 0:
            opt.hold_gradient()


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "norm": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1.0),
    "one layer's norm": lambda model: nn.utils.clip_grad_norm_(model[2].parameters(), 1e-3),
    "value": lambda model: nn.utils.clip_grad_value_(model.parameters(), 0.1),
    "scaled": lambda model: [p.grad.mul_(0.5) for p in model.parameters()],
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("times", [1, 3])
def test_clipping_the_second_alone_is_refused(optimizer: Any, change: Callable[..., Any], times: int) -> None:
    model = net()
    opt = optimizer(model.parameters(), lr=0.1, l=2)
    both_backward(model, opt, times=times)
    change(model)
    before = values(model)
    with pytest.raises(RuntimeError, match=r"optimizer\.clip_grad_norm_\(max_norm\) before step\(\)"):
        opt.step()
    assert same(before, values(model))


def test_clipping_the_second_alone_under_a_scaler_is_refused() -> None:
    model = net(dtype=torch.float32)
    opt, scaler = SVAG(model.parameters(), lr=0.1, l=2), torch.amp.GradScaler("cpu", init_scale=8.0)
    for clipped in (False, True):
        opt.zero_grad()
        both_backward(model, opt, scaler.scale)
        before = values(model)
        if clipped:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            with pytest.raises(RuntimeError, match=r"after optimizer\.unscale_\(scaler\)"):
                scaler.step(opt)
            assert same(before, values(model))
            continue
        scaler.step(opt)
        scaler.update()
        assert not same(before, values(model))


def _each(model: nn.Module, opt: Any, zeros: bool) -> None:
    opt.zero_grad(set_to_none=not zeros)
    for k in range(2):
        for micro in range(3):
            loss(model, 10 * k + micro).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        if k == 0:
            opt.hold_gradient()


@pytest.mark.parametrize("zeros", [True, False])
def test_clipping_each_after_its_own_backward_is_no_fault(zeros: bool) -> None:
    """Nor is accumulation over several backward passes, nor gradients set to zero in place, nor tied weights."""
    model = net()
    model.append(nn.Linear(2, 3, dtype=torch.float64)).append(model[0])
    opt = SVAG(model.parameters(), lr=0.1, l=2)
    for _ in range(3):
        _each(model, opt, zeros)
        stats = opt.step()
        assert float(stats.sq_norm1) == pytest.approx(1e-4, rel=1e-3)
        assert float(stats.sq_norm2) == pytest.approx(1e-4, rel=1e-3)


def test_batches_of_other_lengths_are_no_clipping() -> None:
    """Autograd adds up a recurrent cell's gradients in place: as often as the sequences are long."""
    torch.manual_seed(0)
    cell = nn.GRUCell(3, 4)
    opt = SVAG(cell.parameters(), lr=0.1, l=2)
    for lengths in ((2, 6), (6, 2)):
        opt.zero_grad()
        for k, length in enumerate(lengths):
            h = torch.zeros(2, 4)
            for _ in range(length):
                h = cell(torch.randn(2, 3), h)
            h.square().sum().backward()
            if k == 0:
                opt.hold_gradient()
        opt.step()


def test_experts_that_few_batches_reach_are_no_clipping() -> None:
    model = nn.ModuleList(nn.Linear(4, 3, dtype=torch.float64) for _ in range(3))
    opt = SVAG(model.parameters(), lr=0.1, l=2)
    for routes in ([(0, 1), (0, 2, 1), (0, 1), (0, 1, 2)], [(0, 2), (0, 1), (0, 1, 2), (0, 1, 2)]):
        opt.zero_grad()
        for micro, experts in enumerate(routes):
            x = torch.randn(5, 4, dtype=torch.float64)
            sum(model[i](x).square().sum() for i in experts).backward()  # type: ignore[union-attr]
            if micro == 1:
                opt.hold_gradient()
        opt.step()


@pytest.mark.filterwarnings("error")
def test_parameters_that_move_between_the_two_gradients_are_told() -> None:
    """As where another optimizer steps, or averaged weights are put in, between the two backward passes."""
    model = net()
    opt, other = SVAG(model.parameters(), lr=0.1, l=2), torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        opt.zero_grad()
        both_backward(model, opt)
        opt.step()
    opt.zero_grad()
    loss(model, 0).backward()
    other.step()
    opt.hold_gradient()
    loss(model, 1).backward()
    opt.step()
    opt.zero_grad()
    loss(model, 0).backward()
    opt.hold_gradient()
    loss(model, 1).backward()
    other.step()
    with pytest.warns(UserWarning, match="gradients are of different points"):
        opt.step()


@pytest.mark.parametrize("max_norm", [-1.0, float("nan"), "1"])
def test_a_max_norm_that_is_none_is_refused(max_norm: Any) -> None:
    """torch's own turns the gradients round for a negative one."""
    model = net()
    opt = SVAG(model.parameters(), lr=0.1, l=2)
    both_backward(model, opt)
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    with pytest.raises((TypeError, ValueError), match="max_norm"):
        opt.clip_grad_norm_(max_norm)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    opt.clip_grad_norm_(float("inf"))


@pytest.mark.parametrize("scaled", [False, True])
def test_both_are_clipped_each_by_its_own_norm(scaled: bool) -> None:
    model, reference = net(dtype=torch.float32), net(dtype=torch.float32)
    opt, other = SVAG(model.parameters(), lr=0.1, l=2), SVAG(reference.parameters(), lr=0.1, l=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=scaled)
    for _ in range(2):
        opt.zero_grad()
        both_backward(model, opt, scaler.scale)
        if scaled:
            opt.unscale_(scaler)
        norms = opt.clip_grad_norm_(0.5)
        scaler.step(opt)
        scaler.update()
        assert norms.shape == (2,)
        assert bool((norms > 1).all())
        assert float(opt.stats.sq_norm1) == pytest.approx(0.25, rel=1e-4)
        assert float(opt.stats.sq_norm2) == pytest.approx(0.25, rel=1e-4)
        other.zero_grad()
        for k in range(2):
            (100 * reference(batch(10 * k, torch.float32)).square().mean()).backward()
            nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
            if k == 0:
                other.hold_gradient()
        other.step()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_at_l_1_one_gradient_is_clipped() -> None:
    model = net()
    opt = SVAG(model.parameters(), lr=0.1)
    loss(model, 0).backward()
    assert opt.clip_grad_norm_(1e-3).shape == (1,)
    assert float(opt.step().sq_norm1) == pytest.approx(1e-6, rel=1e-3)


@pytest.mark.parametrize("which", [0, 1])
def test_unscaling_both_shows_the_scaler_an_overflow_in_either(which: int) -> None:
    model = net(dtype=torch.float32)
    opt, scaler = SVAG(model.parameters(), lr=0.1, l=2), torch.amp.GradScaler("cpu", init_scale=64.0)
    before = values(model)
    for half in range(2):
        x = model(batch(half, torch.float32)).square().mean() * (torch.inf if half == which else 1)
        scaler.scale(x).backward()
        if half == 0:
            opt.hold_gradient()
    opt.unscale_(scaler)
    scaler.step(opt)
    scaler.update()
    assert same(before, values(model))
    assert scaler.get_scale() == 32.0
    assert opt.effective_steps == 0
    assert len(opt.param_groups) == 1


def test_unscaling_and_clipping_wait_for_the_second_gradient() -> None:
    model = net(dtype=torch.float32)
    opt, scaler = SVAG(model.parameters(), lr=0.1, l=2), torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(model(batch(0, torch.float32)).sum()).backward()
    opt.hold_gradient()
    held = [g.clone() for g in opt._pair.first()]
    for early in (lambda: opt.unscale_(scaler), lambda: opt.clip_grad_norm_(0.1)):
        with pytest.raises(RuntimeError, match="no parameter has one of the second batch"):
            early()
    assert same(held, opt._pair.first())


@pytest.mark.parametrize("times", [1, 3])
def test_a_scalers_own_pass_over_the_second_gradient_is_no_clipping(times: int) -> None:
    p = nn.Parameter(torch.ones(3))
    opt, scaler = SVAG([p], lr=0.01, l=2), torch.amp.GradScaler("cpu", init_scale=8.0)
    for _ in range(3):
        opt.zero_grad()
        for half in range(2):
            for _ in range(times):
                scaler.scale(((2 + half) * p).sum()).backward()
            if half == 0:
                opt.hold_gradient()
        scaler.step(opt)
        scaler.update()
        assert [float(opt.stats.sq_norm1), float(opt.stats.sq_norm2)] == [12 * times**2, 27 * times**2]


def test_both_closures_losses_are_averaged_for_the_log() -> None:
    p = nn.Parameter(torch.ones(3))
    opt = SVAG([p], lr=0.01, l=4)

    def returning(*losses: Any) -> Callable[[], Any]:
        queue = list(losses)

        def closure() -> Any:
            opt.zero_grad()
            ((1 + len(queue)) * p).sum().backward()
            return queue.pop(0)

        return closure

    mean = opt.step(returning((2 * p).sum(), (4 * p).sum()))
    assert float(mean) == pytest.approx(9.0)
    assert not mean.requires_grad
    assert opt.step(returning(1.0, 2)) == 1.5
    assert opt.step(returning({"loss": 1}, {"loss": 3})) == {"loss": 1}
    assert opt.step(returning(None, 2.0)) == 2.0
    assert opt.step(returning(None, None)) is opt.stats
