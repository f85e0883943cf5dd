"""SVAG the optimizer: the formula, torch.optim's interface, AMP, and what it refuses."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from svag_fast import SVAG, svag_coefficients, svag_loss


def net(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def batches(count: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 5, generator=generator).to(dtype), torch.randint(3, (4,), generator=generator))
        for _ in range(count)
    ]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).float(), batch[1])


def two_batch_step(opt: SVAG, model: nn.Module, first: Any, second: Any) -> None:
    opt.zero_grad()
    loss(model, first).backward()
    opt.hold_gradient()
    loss(model, second).backward()
    opt.step()


def params_of(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("l", [1, 3, 64])
def test_a_step_is_the_formula_in_both_forms(l: int) -> None:
    data = batches(6)
    held, closed, plain = net(), net(), net()
    opt_held = SVAG(held.parameters(), lr=0.3, l=l, weight_decay=0.1)
    opt_closed = SVAG(closed.parameters(), lr=0.3, l=l, weight_decay=0.1)
    c1, c2 = svag_coefficients(l)
    for k in range(0, 6, 2):
        two_batch_step(opt_held, held, data[k], data[k + 1])
        queue = list(data[k : k + 2])

        def closure(queue: list[Any] = queue) -> Tensor:
            opt_closed.zero_grad()
            value = loss(closed, queue.pop(0))
            value.backward()
            return value

        opt_closed.step(closure)
        assert len(queue) == (1 if l == 1 else 0)
        g1 = torch.autograd.grad(loss(plain, data[k]), list(plain.parameters()))
        g2 = torch.autograd.grad(loss(plain, data[k + 1]), list(plain.parameters()))
        with torch.no_grad():
            for p, a, b in zip(plain.parameters(), g1, g2, strict=True):
                p -= 0.3 / l * (c1 * a + c2 * b + 0.1 * p)
    for p, q in zip(params_of(held), params_of(plain), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
    assert_same(params_of(held), params_of(closed))


def test_at_l_1_it_needs_no_second_batch_and_is_torch_sgd() -> None:
    ours, theirs = net(), net()
    opt, sgd = SVAG(ours.parameters(), lr=0.3, weight_decay=0.1), torch.optim.SGD(theirs.parameters(), 0.3, 0, 0, 0.1)
    for batch in batches(5):
        for model, optimizer in ((ours, opt), (theirs, sgd)):
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-15)
    assert opt.stats is not None
    assert opt.stats.noise_trace is None


def test_the_weighted_loss_gives_the_same_path_with_any_optimizer() -> None:
    data, l = batches(2), 16
    ours, theirs = net(), net()
    two_batch_step(SVAG(ours.parameters(), lr=0.3, l=l), ours, *data)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.3 / l)
    svag_loss(loss(theirs, data[0]), loss(theirs, data[1]), l).backward()
    sgd.step()
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def test_holding_makes_no_copy_and_clears_grad() -> None:
    model = net()
    opt = SVAG(model.parameters(), lr=0.1, l=2)
    loss(model, batches(1)[0]).backward()
    addresses = [p.grad.data_ptr() for p in model.parameters() if p.grad is not None]
    opt.hold_gradient()
    assert [g.data_ptr() for g in opt._pair.first()] == addresses
    assert all(p.grad is None for p in model.parameters())


def test_param_groups_have_their_own_lr_and_weight_decay() -> None:
    data, l = batches(2), 4
    model, plain = net(), net()
    groups = [{"params": model[0].parameters(), "lr": 0.5, "weight_decay": 0.2}, {"params": model[2].parameters()}]
    opt = SVAG(groups, lr=0.1, l=l)
    two_batch_step(opt, model, *data)
    for layer, lr, weight_decay in ((0, 0.5, 0.2), (2, 0.1, 0.0)):
        reference = net()
        two_batch_step(SVAG(reference.parameters(), lr=lr, l=l, weight_decay=weight_decay), reference, *data)
        assert_same(params_of(model[layer]), params_of(reference[layer]))
    whole = SVAG(plain.parameters(), lr=0.0, l=l)
    two_batch_step(whole, plain, *data)
    assert opt.stats is not None
    assert whole.stats is not None
    torch.testing.assert_close(opt.stats.raw, whole.stats.raw, rtol=1e-12, atol=0)


def test_add_param_group_joins_later_and_must_agree_on_l() -> None:
    model = net()
    opt = SVAG(model[0].parameters(), lr=0.1, l=2)
    with pytest.raises(ValueError, match=r"l must be 2\.0, as in the other param groups, got 4"):
        opt.add_param_group({"params": model[2].parameters(), "l": 4})
    assert len(opt.param_groups) == 1
    opt.add_param_group({"params": model[2].parameters(), "lr": 0.2})
    before = params_of(model)
    two_batch_step(opt, model, *batches(2))
    assert all(not torch.equal(a, b) for a, b in zip(before, params_of(model), strict=True))


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_saved_and_loaded_in_mid_run_continues_bit_for_bit(compensated: bool, dtype: torch.dtype) -> None:
    data = batches(12, dtype)
    models = [net(dtype=dtype), net(dtype=dtype)]
    opts = [SVAG(m.parameters(), lr=0.1, l=4, weight_decay=0.1, compensated=compensated) for m in models]
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in opts]
    for k in range(0, 6, 2):
        two_batch_step(opts[0], models[0], *data[k : k + 2])
        schedulers[0].step()
    file = io.BytesIO()
    state = {"net": models[0].state_dict(), "opt": opts[0].state_dict(), "lr": schedulers[0].state_dict()}
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    models[1].load_state_dict(loaded["net"])
    opts[1].load_state_dict(loaded["opt"])
    schedulers[1].load_state_dict(loaded["lr"])
    for k in range(6, 12, 2):
        for opt, model, scheduler in zip(opts, models, schedulers, strict=True):
            two_batch_step(opt, model, *data[k : k + 2])
            scheduler.step()
    assert_same(params_of(models[0]), params_of(models[1]))
    assert opts[0].time == opts[1].time == pytest.approx(sum(0.1 * 0.9**k / 4 for k in range(6)))
    assert opts[1].effective_steps == 1.5
    for p in models[1].parameters() if compensated else []:
        assert opts[1].state[p]["compensation"].dtype == torch.float32


def test_pickled_and_deep_copied_optimizers_step_alike() -> None:
    model = net()
    opt = SVAG(model.parameters(), lr=0.1, l=4, compensated=False)
    two_batch_step(opt, model, *batches(2))
    for double in (pickle.loads(pickle.dumps((model, opt))), copy.deepcopy((model, opt))):
        twin, twin_opt = double
        reference = copy.deepcopy(model)
        ref_opt = SVAG(reference.parameters(), lr=0.1, l=4)
        two_batch_step(twin_opt, twin, *batches(4)[2:])
        two_batch_step(ref_opt, reference, *batches(4)[2:])
        assert_same(params_of(twin), params_of(reference))
        assert twin_opt.effective_steps == 0.5


def test_schedulers_change_lr_and_a_tensor_lr_keeps_its_identity() -> None:
    lr = torch.tensor(0.4)
    model = net()
    opt = SVAG(model.parameters(), lr=lr, l=2)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.5)
    for k in range(2):
        two_batch_step(opt, model, *batches(2 * k + 2)[2 * k :])
        scheduler.step()
    assert opt.param_groups[0]["lr"] is lr
    assert float(lr) == pytest.approx(0.1)
    assert opt.time == pytest.approx((0.4 + 0.2) / 2)


def test_hooks_see_every_step() -> None:
    model = net()
    opt = SVAG(model.parameters(), lr=0.1, l=2)
    seen: list[str] = []
    opt.register_step_pre_hook(lambda *_: seen.append("pre"))
    opt.register_step_post_hook(lambda *_: seen.append("post"))
    two_batch_step(opt, model, *batches(2))
    assert seen == ["pre", "post"]


def test_hooks_for_every_optimizer_see_each_step_once() -> None:
    model = net()
    opt = SVAG(model.parameters(), lr=0.1, l=2)
    seen: list[object] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *args: seen.append(args[0])),
        register_optimizer_step_post_hook(lambda *args: seen.append(args[0])),
    ]
    try:
        two_batch_step(opt, model, *batches(2))
    finally:
        for handle in handles:
            handle.remove()
    two_batch_step(opt, model, *batches(2))
    assert seen == [opt, opt]


def test_profilers_see_the_step_under_torch_s_name() -> None:
    model = net()
    opt = SVAG(model.parameters(), lr=0.1, l=2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        two_batch_step(opt, model, *batches(2))
    assert [e.count for e in profiler.key_averages() if e.key == "Optimizer.step#SVAG.step"] == [1]


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_no_graph_is_recorded_where_gradients_have_one() -> None:
    p = nn.Parameter(torch.ones(3))
    opt = SVAG([p], lr=0.5, l=1)
    (p**2).sum().backward(create_graph=True)
    assert p.grad is not None
    assert p.grad.requires_grad
    opt.step()
    assert p.is_leaf
    assert torch.equal(p.detach(), torch.zeros(3))


def test_parameters_without_gradient_are_skipped_and_a_missing_one_counts_as_zero() -> None:
    a, b, c = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(3))
    opt = SVAG([a, b, c], lr=1.0, l=5, weight_decay=0.5)
    (2 * a).sum().backward()
    opt.hold_gradient()
    (1 * a + b).sum().backward()
    opt.step()
    c1, c2 = svag_coefficients(5)
    torch.testing.assert_close(a.detach(), torch.full_like(a, 1 - (2 * c1 + c2 + 0.5) / 5))
    torch.testing.assert_close(b.detach(), torch.full_like(b, 1 - (c2 + 0.5) / 5))
    assert torch.equal(c.detach(), torch.ones_like(c))


def test_step_without_any_gradient_does_nothing() -> None:
    model = net()
    before = params_of(model)
    opt = SVAG(model.parameters(), lr=0.1)
    assert bool(opt.step().finite)
    assert_same(before, params_of(model))


def test_compensated_low_precision_training_follows_float64() -> None:
    start = net(dtype=torch.bfloat16)
    models = {d: copy.deepcopy(start).to(d) for d in (torch.bfloat16, torch.float64)}
    plain = copy.deepcopy(start)
    opts = {
        torch.bfloat16: SVAG(models[torch.bfloat16].parameters(), lr=0.01, l=256, compensated=True),
        torch.float64: SVAG(models[torch.float64].parameters(), lr=0.01, l=256),
    }
    plain_opt = SVAG(plain.parameters(), lr=0.01, l=256)
    generator = torch.Generator().manual_seed(3)
    for _ in range(200):
        for p, q, r in zip(*(m.parameters() for m in models.values()), plain.parameters(), strict=True):
            g = torch.randn(p.shape, generator=generator).to(torch.bfloat16)
            p.grad, q.grad, r.grad = g, g.double(), g.clone()
        for opt in (*opts.values(), plain_opt):
            opt.hold_gradient()
        for p, q, r in zip(*(m.parameters() for m in models.values()), plain.parameters(), strict=True):
            g = torch.randn(p.shape, generator=generator).to(torch.bfloat16)
            p.grad, q.grad, r.grad = g, g.double(), g.clone()
        for opt in (*opts.values(), plain_opt):
            opt.step()
    worst = dict.fromkeys(("compensated", "plain"), 0.0)
    for p, q, r in zip(*(m.parameters() for m in models.values()), plain.parameters(), strict=True):
        compensated = p.detach().double() + opts[torch.bfloat16].state[p]["compensation"].double()
        worst["compensated"] = max(worst["compensated"], float((compensated - q.detach()).abs().max()))
        worst["plain"] = max(worst["plain"], float((r.detach().double() - q.detach()).abs().max()))
    assert worst["compensated"] < 200 * 2**-24
    assert worst["plain"] > 1e-3


def amp_step(opt: SVAG, scaler: torch.amp.GradScaler, model: nn.Module, first: Any, second: Any) -> None:
    opt.zero_grad()
    scaler.scale(loss(model, first)).backward()
    opt.hold_gradient()
    scaler.scale(loss(model, second)).backward()
    scaler.step(opt)
    scaler.update()


def test_grad_scaler_unscales_both_gradients_alike() -> None:
    data = batches(6, torch.float32)
    scaled, plain = net(dtype=torch.float32), net(dtype=torch.float32)
    opts = [SVAG(m.parameters(), lr=0.1, l=4, weight_decay=0.1) for m in (scaled, plain)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for k in range(0, 6, 2):
        amp_step(opts[0], scaler, scaled, *data[k : k + 2])
        two_batch_step(opts[1], plain, *data[k : k + 2])
        assert opts[0].stats is not None
        assert opts[1].stats is not None
        torch.testing.assert_close(opts[0].stats.raw, opts[1].stats.raw, rtol=1e-5, atol=1e-8)
    for p, q in zip(params_of(scaled), params_of(plain), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    assert opts[0].effective_steps == opts[1].effective_steps == 0.75


@pytest.mark.parametrize("which", [0, 1])
def test_grad_scaler_skips_an_overflow_in_either_gradient_and_lowers_its_scale(which: int) -> None:
    data = batches(4, torch.float32)
    model = net(dtype=torch.float32)
    opt = SVAG(model.parameters(), lr=0.1, l=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    amp_step(opt, scaler, model, *data[:2])
    before, time = params_of(model), opt.time
    bad = [(data[2][0].clone(), data[2][1]), (data[3][0].clone(), data[3][1])]
    bad[which][0][0, 0] = math.inf
    amp_step(opt, scaler, model, *bad)
    assert_same(before, params_of(model))
    assert (opt.effective_steps, opt.time) == (0.25, time)
    assert scaler.get_scale() == 512.0
    amp_step(opt, scaler, model, *data[2:])
    assert not torch.equal(before[0], params_of(model)[0])


@pytest.mark.parametrize("cleared", [None, True, False])
def test_an_overflow_in_the_very_first_held_gradient_lowers_the_scale(cleared: bool | None) -> None:
    """``cleared``: the loop clears the gradients between the two batches too, as a habit."""
    p = nn.Parameter(torch.ones(2))
    opt, scaler = SVAG([p], lr=0.1, l=2), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for scale in (512.0, 256.0):
        opt.zero_grad()
        scaler.scale((p * math.inf).sum()).backward()
        opt.hold_gradient()
        assert p.grad is None
        if cleared is not None:
            opt.zero_grad(set_to_none=cleared)
        scaler.scale((2 * p).sum()).backward()
        scaler.step(opt)
        scaler.update()
        assert scaler.get_scale() == scale
        assert p.tolist() == [1.0, 1.0]
        assert opt.effective_steps == 0


def test_clipping_both_with_the_scale_in_them_is_refused_from_the_first_step_on() -> None:
    model = net(dtype=torch.float32)
    opt, scaler = SVAG(model.parameters(), lr=0.1, l=4), torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = params_of(model)
    for _ in range(2):
        opt.zero_grad()
        opt.discard_gradient()
        for half, data in enumerate(batches(2, torch.float32)):
            scaler.scale(loss(model, data)).backward()
            if half == 0:
                opt.hold_gradient()
        opt.clip_grad_norm_(1.0)
        with pytest.raises(RuntimeError, match=r"call optimizer\.unscale_\(scaler\) before clip_grad_norm_"):
            scaler.step(opt)
    assert_same(before, params_of(model))


def test_unscaling_the_current_gradient_alone_is_refused() -> None:
    data = batches(2, torch.float32)
    model = net(dtype=torch.float32)
    opt = SVAG(model.parameters(), lr=0.1, l=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss(model, data[0])).backward()
    opt.hold_gradient()
    scaler.scale(loss(model, data[1])).backward()
    scaler.unscale_(opt)
    before = params_of(model)
    with pytest.raises(RuntimeError, match="has divided the current gradient alone"):
        scaler.step(opt)
    assert_same(before, params_of(model))


def test_step_with_nothing_held_says_what_to_do() -> None:
    model = net()
    opt = SVAG(model.parameters(), lr=0.1, l=4)
    loss(model, batches(1)[0]).backward()
    before = params_of(model)
    with pytest.raises(RuntimeError, match=r"l = 4 combines two batches.*hold_gradient\(\).*closure"):
        opt.step()
    assert_same(before, params_of(model))


def test_holding_twice_and_holding_nothing_are_refused() -> None:
    model = net()
    opt = SVAG(model.parameters(), lr=0.1, l=4)
    with pytest.raises(RuntimeError, match="no parameter has a gradient to hold"):
        opt.hold_gradient()
    loss(model, batches(1)[0]).backward()
    opt.hold_gradient()
    loss(model, batches(1)[0]).backward()
    with pytest.raises(RuntimeError, match=r"held already.*discard_gradient"):
        opt.hold_gradient()
    opt.discard_gradient()
    opt.hold_gradient()


def test_sparse_gradients_are_refused_and_nothing_moves() -> None:
    dense, table = nn.Parameter(torch.ones(2)), nn.Embedding(4, 2, sparse=True)
    opt = SVAG([dense, *table.parameters()], lr=0.1)
    (table(torch.tensor([1])).sum() + dense.sum()).backward()
    with pytest.raises(RuntimeError, match=r"sparse gradients are not supported .*\[4, 2\]"):
        opt.step()
    assert torch.equal(dense.detach(), torch.ones(2))


BAD_OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "backend": ({"lr": 0.1, "backend": "gpu"}, RuntimeError, "backend must be one of auto, cuda, triton, cpu,"),
    "float64 compensated": ({"lr": 0.1, "compensated": True}, TypeError, r"params\[0\] of the group must be"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_bad_options_are_refused(case: tuple[dict[str, Any], type[Exception], str]) -> None:
    options, error, message = case
    with pytest.raises(error, match=message):
        SVAG(net().parameters(), **options)


def test_a_parameter_in_two_groups_is_refused() -> None:
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        SVAG([{"params": [p]}, {"params": [p]}], lr=0.1)


def test_repeated_steps_notice_what_changes_between_them() -> None:
    """The short way of a repeated step is left when params move, shrink, change dtype or gradients their order."""
    model = nn.Linear(6, 4, bias=False)
    opt = SVAG(model.parameters(), lr=1.0, l=1)

    def step_with(grad: Tensor) -> None:
        model.weight.grad = grad
        before = model.weight.detach().clone()
        opt.step()
        torch.testing.assert_close(model.weight.detach(), before - grad, rtol=1e-2, atol=1e-2)

    step_with(torch.ones(4, 6))
    step_with(torch.randn(4, 6))
    step_with(torch.randn(6, 4).T)
    step_with(torch.ones(1, 1).expand(4, 6))
    model.weight.data = model.weight.data[:3]
    step_with(torch.randn(3, 6))
    step_with(torch.randn(3, 6))
    model.weight.data = torch.randn(4, 6)
    step_with(torch.randn(4, 6))
    model.weight.data = torch.randn(4, 6).bfloat16()
    step_with(torch.randn(4, 6).bfloat16())
    model.weight.data = torch.randn(6, 4).T
    step_with(torch.randn(4, 6))
    step_with(torch.randn(4, 6))


def test_parameters_with_and_without_memory_are_refused_before_one_is_stepped() -> None:
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, device="meta"))
    a.grad, b.grad = torch.ones(3), torch.ones(3, device="meta")
    for groups in ([a, b], [{"params": [a]}, {"params": [b]}]):
        with pytest.raises(ValueError, match="params must be all on meta or none of them, got some on cpu and meta"):
            SVAG(groups, lr=0.1).step()
        assert a.tolist() == [1, 1, 1]
    SVAG([b], lr=0.1).step()
