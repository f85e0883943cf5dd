"""RMSprop's start: the variance of a step doesn't grow with l, "measure" is the mean of the first squared gradients."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from svag_fast import SVAGRMSprop
from svag_fast.ops import svag_coefficients
from svag_fast.optim.initial_square_avg import MEASURED_STEPS, second_moment

PARTICLES, LR = 5_000, 0.01


def draw(seed: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)


def take(opt: Any, params: list[nn.Parameter], k: int, *, mean: float = 0.0) -> None:
    """One step on two made gradients, of the pair k."""
    for batch in range(2):
        for i, p in enumerate(params):
            p.grad = draw(1000 * k + 2 * i + batch, p) + mean
        if batch == 0:
            opt.hold_gradient()
    opt.step()


def spread(l: int, start: Any, *, zero: bool = False) -> tuple[float, float]:
    """Variance of the entries, in lr², one effective step after the first move, and its standard error."""
    p = nn.Parameter(torch.zeros(PARTICLES, dtype=torch.float64))
    opt = SVAGRMSprop([p], lr=LR, l=l, initial_square_avg=start)
    if zero:
        opt.state[p] = {"step": torch.tensor(0.0, dtype=torch.float64), "square_avg": torch.zeros_like(p)}
    k = 0
    while opt.effective_steps < 1:
        k += 1
        take(opt, [p], k + 100_000 * l)
    assert k == l + (MEASURED_STEPS if start == "measure" else 0)
    squares = (p.detach() / LR).square()
    return squares.mean().item(), squares.std().item() / math.sqrt(PARTICLES)


@pytest.mark.parametrize("start", [1.0, "measure"])
def test_variance_after_one_effective_step_does_not_grow_with_l(start: Any) -> None:
    """1 at every l within z = 5 and 3 %: measured second moments have 100 squares or more, whose E 1/v is 100/98."""
    for l in (1, 16, 64):
        variance, error = spread(l, start)
        assert abs(variance - 1) < 0.03 + 5 * error, l


def test_from_zero_it_grows_like_log_l() -> None:
    """What the start is there for, by the same measure: (1 + 1/2 + ... + 1/l)/(1 - α), and 3 % for what α forgets."""
    for l in (1, 16, 64):
        variance, error = spread(l, 1.0, zero=True)
        expected = 100 * sum(1 / k for k in range(1, l + 1))
        assert abs(variance - expected) < 0.03 * expected + 5 * error, l
    assert abs(spread(1, None)[0] - 100) < 0.01  # torch's default at l = 1


@pytest.mark.parametrize("l", [1.0, 2.5, 64.0])
@pytest.mark.parametrize("maximize", [False, True])
def test_second_moment_is_unbiased_for_what_square_avg_averages(l: float, maximize: bool) -> None:
    """Over all pairs of batches its mean is (∇L + λx)² + l Σ_ii (maximize: -∇L), to rounding."""
    batches = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x, decay = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64), 0.2
    found = [second_moment(x, g1, g2, l, decay, maximize) for g1, g2 in itertools.product(batches, repeat=2)]
    mean = -batches.mean(0) if maximize else batches.mean(0)
    expected = (mean + decay * x).square() + l * batches.var(0, correction=0)
    torch.testing.assert_close(torch.stack(found).mean(0), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("l", [1, 2.5, 16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_measure_is_the_mean_of_the_first_squares_and_moves_nothing(l: float, dtype: torch.dtype, backend: str) -> None:
    if dtype == torch.bfloat16 and backend == "cpu":
        pytest.skip("the CPU kernel serves float32 and float64")
    shapes = [(3, 5), (1,), (), (0, 2), (17,)]
    params = [nn.Parameter(draw(i, torch.empty(s, dtype=dtype))) for i, s in enumerate(shapes)]
    params[0].data = params[0].data.t().contiguous().t()
    before = copy.deepcopy(params)
    options: dict[str, Any] = {"weight_decay": 0.1, "l": l, "initial_square_avg": "measure", "backend": backend}
    opt = SVAGRMSprop(params, lr=LR, **options)
    c1, c2 = svag_coefficients(l)
    expected = [torch.zeros_like(p, dtype=torch.float64) for p in params]
    for k in range(MEASURED_STEPS):
        take(opt, params, k, mean=0.2)
        for i, (p, total) in enumerate(zip(params, expected, strict=True)):
            g1, g2 = ((draw(1000 * k + 2 * i + batch, p) + 0.2).double() for batch in range(2))
            x = 0.1 * p.detach().double()
            total += ((c1 * g1 + c2 * g2 + x).square() + (c2 * g1 + c1 * g2 + x).square()) / 2 / MEASURED_STEPS
    assert all(map(torch.equal, params, before))
    assert (opt.param_groups[0]["steps"], opt.effective_steps, opt.time) == (0, 0, 0)
    assert opt.stats is not None
    assert float(opt.stats.noise_trace) > 0
    found = [opt.state[p]["square_avg"] for p in params]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.06}[dtype]
    for p, v, right in zip(params, found, expected, strict=True):
        assert v.dtype == dtype
        assert v.stride() == p.stride()
        torch.testing.assert_close(v.double(), right, rtol=tolerance, atol=0)
    twin = SVAGRMSprop(before, lr=LR, **options)
    for p, v in zip(before, found, strict=True):
        twin.state[p] = {"step": torch.tensor(0.0, dtype=torch.float64), "square_avg": v.clone()}
    for o, listed in ((opt, params), (twin, before)):
        take(o, listed, MEASURED_STEPS)
    assert all(map(torch.equal, params, before))
    assert not torch.equal(params[0].detach(), draw(0, params[0]))
    assert opt.effective_steps == 1 / l


def test_at_l_1_one_gradient_a_step_is_measured() -> None:
    p = nn.Parameter(torch.ones(4, dtype=torch.float64))
    opt = SVAGRMSprop([p], lr=LR, initial_square_avg="measure")
    for k in range(MEASURED_STEPS):
        p.grad = draw(k, p)
        opt.step()
    expected = torch.stack([draw(k, p).square() for k in range(MEASURED_STEPS)]).mean(0)
    torch.testing.assert_close(opt.state[p]["square_avg"], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("at", [40, MEASURED_STEPS, MEASURED_STEPS + 1])
@pytest.mark.parametrize("way", ["state_dict", "pickle"])
def test_a_run_resumed_while_measuring_is_the_uninterrupted_one(way: str, at: int) -> None:
    whole, part = (nn.Parameter(torch.ones(5)) for _ in range(2))
    options: dict[str, Any] = {"lr": LR, "l": 4, "initial_square_avg": "measure"}
    opts = [SVAGRMSprop([p], **options) for p in (whole, part)]
    for k in range(MEASURED_STEPS + 3):
        if k == at:
            if way == "pickle":
                part, opts[1] = pickle.loads(pickle.dumps((part, opts[1])))
            else:
                state = copy.deepcopy(opts[1].state_dict())
                opts[1] = SVAGRMSprop([part], **options)
                opts[1].load_state_dict(state)
        take(opts[0], [whole], k)
        take(opts[1], [part], k)
    assert torch.equal(whole, part)
    assert not torch.equal(part.detach(), torch.ones(5))
    assert opts[0].effective_steps == opts[1].effective_steps == 3 / 4


def test_a_parameter_that_comes_later_measures_alone() -> None:
    """The first group moves on and counts; the new one starts when it has measured."""
    p, late = (nn.Parameter(torch.ones(3)) for _ in range(2))
    opt = SVAGRMSprop([p], lr=LR, l=2, initial_square_avg=1.0)
    take(opt, [p], 0)
    opt.add_param_group({"params": [late], "initial_square_avg": "measure"})
    for k in range(1, MEASURED_STEPS + 1):
        before = p.detach().clone()
        take(opt, [p, late], k)
        assert not torch.equal(p, before)
    assert torch.equal(late.detach(), torch.ones(3))
    assert [g["steps"] for g in opt.param_groups] == [MEASURED_STEPS + 1, 0]
    take(opt, [p, late], MEASURED_STEPS + 1)
    assert not torch.equal(late.detach(), torch.ones(3))
    assert [g["steps"] for g in opt.param_groups] == [MEASURED_STEPS + 2, 1]


def test_a_number_is_plain_rmsprops_and_each_groups_own() -> None:
    p, q = (nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(2))
    groups = [{"params": [p]}, {"params": [q], "initial_square_avg": 4.0}]
    opt = SVAGRMSprop(groups, lr=LR, alpha=0.9, eps=0.0, l=16, initial_square_avg=0.25)
    take(opt, [p, q], 3)
    c1, c2 = svag_coefficients(16)
    for i, (x, start) in enumerate(((p, 0.25), (q, 4.0))):
        g = c1 * draw(3000 + 2 * i, x) + c2 * draw(3001 + 2 * i, x)
        v = (1 - 0.1 / 16) * 16 * start + 0.1 / 16 * g.square()
        torch.testing.assert_close(opt.state[x]["square_avg"], v, rtol=1e-12, atol=0)
        torch.testing.assert_close(x.detach(), -LR / 4 * g / v.sqrt(), rtol=1e-12, atol=0)


def test_a_grad_scaler_skips_an_inf_while_measuring() -> None:
    model = nn.Linear(3, 2)
    opt = SVAGRMSprop(model.parameters(), lr=LR, l=2, initial_square_avg="measure")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for k, bad in enumerate((False, True, False)):
        before = copy.deepcopy(opt.state_dict()["state"])
        opt.zero_grad()
        for batch in range(2):
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * k + batch))
            scaler.scale(model(x).square().mean() * (math.inf if bad and batch else 1.0)).backward()
            if batch == 0:
                opt.hold_gradient()
        scaler.step(opt)
        scaler.update()
        if bad:
            now = opt.state_dict()["state"]
            assert all(torch.equal(before[i]["square_avg"], now[i]["square_avg"]) for i in before)
    assert [opt.state[p]["measured"] for p in model.parameters()] == [2, 2]
    assert float(opt.state[model.weight]["square_avg"].max()) < 100  # unscaled


def test_entries_that_no_gradient_reached_get_the_mean_of_the_others() -> None:
    rows = nn.Parameter(torch.ones(4, 2, dtype=torch.float64))
    opt = SVAGRMSprop([rows], lr=LR, l=4, initial_square_avg="measure")
    mask = torch.tensor([[1.0], [1.0], [0.0], [1.0]], dtype=torch.float64)
    for k in range(MEASURED_STEPS):
        for batch in range(2):
            rows.grad = draw(2 * k + batch, rows) * mask
            if batch == 0:
                opt.hold_gradient()
        opt.step()
    v = opt.state[rows]["square_avg"]
    torch.testing.assert_close(v[2], v[[0, 1, 3]].mean().expand(2))


def test_what_can_not_be_measured_is_refused_and_nothing_written() -> None:
    """A gradient that is zero in all steps, and one that is not finite: in no group."""
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    opt = SVAGRMSprop([{"params": [p]}, {"params": [q]}], lr=LR, l=4, initial_square_avg="measure")

    def pair(k: int, second: float) -> None:
        for batch in range(2):
            p.grad, q.grad = draw(2 * k + batch, p), torch.full((3,), second)
            if batch == 0:
                opt.hold_gradient()

    pair(0, math.nan)
    with pytest.raises(RuntimeError, match="not finite while square_avg is measured"):
        opt.step()
    assert not opt.state
    opt.discard_gradient()
    for k in range(MEASURED_STEPS):
        pair(k, 0.0)
        if k + 1 == MEASURED_STEPS:
            before = copy.deepcopy(opt.state_dict())
            with pytest.raises(RuntimeError, match=r"zero in all 100 steps.*give initial_square_avg a number"):
                opt.step()
        else:
            opt.step()
    now = opt.state_dict()
    assert now["param_groups"] == before["param_groups"]
    for i in (0, 1):
        assert now["state"][i]["measured"] == MEASURED_STEPS - 1
        assert torch.equal(now["state"][i]["square_avg"], before["state"][i]["square_avg"])


REFUSED = [
    ({"l": 4}, ValueError, r'must be "measure" or a number at l = 4, got None'),
    ({"l": 4, "initial_square_avg": 0.0}, ValueError, r"must be > 0 at l = 4, got 0\.0"),
    ({"initial_square_avg": -1.0}, ValueError, r"-1\.0"),
    ({"initial_square_avg": math.nan}, ValueError, "nan"),
    ({"initial_square_avg": math.inf}, ValueError, "inf"),
    ({"initial_square_avg": "first"}, ValueError, r"must be None, a number or \"measure\", got 'first'"),
    ({"initial_square_avg": [1.0]}, TypeError, r"\[1\.0\]"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED, ids=str)
def test_bad_starts_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    """By the constructor, a later group, one set by hand, and a loaded state."""
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(error, match=f"initial_square_avg.*{message}"):
        SVAGRMSprop([p], **options)
    opt = SVAGRMSprop([p], l=options.get("l", 1), initial_square_avg=1.0)
    bad = {"initial_square_avg": options.get("initial_square_avg")}
    with pytest.raises(error, match=message):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], **bad})
    state = opt.state_dict()
    state["param_groups"][0].update(bad)
    with pytest.raises(error, match=message):
        opt.load_state_dict(state)
    assert len(opt.param_groups) == 1
    assert opt.param_groups[0]["initial_square_avg"] == 1.0
    opt.param_groups[0].update(bad)
    p.grad = torch.ones(3)
    with pytest.raises(error, match=message):
        opt.step()
    assert torch.equal(p.detach(), torch.ones(3))
    assert not opt.state


@pytest.mark.parametrize("start", [1e5, 1e-12])
def test_a_start_that_the_dtype_lacks_is_refused(start: float) -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.float16))
    opt = SVAGRMSprop([p], l=2, initial_square_avg=start)
    with pytest.raises(ValueError, match=r"in torch.float16, the dtype of a parameter of shape \[3\]"):
        take(opt, [p], 0)
    assert torch.equal(p.detach(), torch.ones(3, dtype=torch.float16))


@pytest.mark.parametrize("measured", [-1, "some", math.nan])
def test_a_loaded_count_out_of_range_is_refused(measured: Any) -> None:
    p = nn.Parameter(torch.ones(3))
    opt = SVAGRMSprop([p], l=2, initial_square_avg="measure")
    take(opt, [p], 0)
    state = copy.deepcopy(opt.state_dict())
    state["state"][0]["measured"] = measured
    with pytest.raises((TypeError, ValueError), match="state 0 of the loaded state: measured must be a "):
        opt.load_state_dict(state)
    assert opt.state[p]["measured"] == 1


def test_what_was_pickled_before_there_was_a_start_continues_from_its_state() -> None:
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    opts = [SVAGRMSprop([x], lr=LR, l=4, initial_square_avg=1.0) for x in (p, q)]
    for o, x in zip(opts, (p, q), strict=True):
        take(o, [x], 0)
    old = opts[1].__getstate__()
    for group in old["param_groups"]:
        del group["initial_square_avg"]
    q, opts[1] = pickle.loads(pickle.dumps((q, opts[1])))
    for o, x in zip(opts, (p, q), strict=True):
        take(o, [x], 1)
    assert torch.equal(p, q)
