"""SVAGAdam and SVAGRMSprop: torch's own at l = 1, one SDE as l grows, and torch.optim's interface."""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from draws import normals, same_bits
from simd import AVAILABLE, simd_level
from started_rmsprop import SVAGRMSprop
from torch import Tensor, nn

import svag_fast
from svag_fast import SVAGAdam

PAIRS = [
    (SVAGAdam, torch.optim.Adam, {"lr": 0.01}),
    (SVAGAdam, torch.optim.Adam, {"lr": 0.03, "betas": (0.3, 0.9), "eps": 1e-3, "weight_decay": 0.1}),
    (SVAGRMSprop, torch.optim.RMSprop, {"lr": 0.01}),
    (SVAGRMSprop, torch.optim.RMSprop, {"lr": 0.03, "alpha": 0.6, "eps": 1e-3, "weight_decay": 0.1}),
]
SHAPES = [(1,), (), (17, 5), (1003,), (0, 3)]


def draw(seed: int, dtype: torch.dtype) -> list[Tensor]:
    return normals(dtype, seed, SHAPES)


def path(make: Any, dtype: torch.dtype, steps: int, options: Any, **more: Any) -> tuple[list[Tensor], list[Any]]:
    """Params and state after ``steps`` steps on made gradients; the third param gets its first gradient at step 3."""
    params = [nn.Parameter(p) for p in draw(0, dtype)]
    optimizer = make(params, **options, **more)
    for k in range(steps):
        for i, (p, g) in enumerate(zip(params, draw(k + 1, dtype), strict=True)):
            p.grad = None if i == 2 and k < 3 else g
        optimizer.step()
    return [p.detach() for p in params], [optimizer.state[p] for p in params]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("ours", "theirs", "options"), PAIRS)
def test_at_l_1_the_reference_is_torchs_optimizer_to_the_bit(
    ours: Any, theirs: Any, options: Any, dtype: torch.dtype
) -> None:
    params, states = path(ours, dtype, 12, options, backend="reference")
    expected, expected_states = path(theirs, dtype, 12, options, foreach=False)
    assert same_bits(params, expected)
    for state, other in zip(states, expected_states, strict=True):
        assert set(state) == set(other)
        assert all(torch.equal(state[name], other[name]) for name in state)


def one_step(ours: Any, theirs: Any, options: Any, dtype: torch.dtype) -> None:
    """One step from the same, made state: moments to the bit, params but for the rounding of torch's square root."""
    generator = torch.Generator().manual_seed(5)
    start, grad, m = (torch.randn(100_003, generator=generator).to(dtype) for _ in range(3))
    v = torch.rand(100_003, generator=generator).to(dtype)
    params = []
    for make, more in ((ours, {"backend": "cpu"}), (theirs, {"foreach": False})):
        p = nn.Parameter(start.clone())
        p.grad = grad.clone()
        optimizer = make([p], **options, **more)
        moments = (
            {"exp_avg": m.clone(), "exp_avg_sq": v.clone()} if "Adam" in make.__name__ else {"square_avg": v.clone()}
        )
        optimizer.state[p] = {"step": torch.tensor(6.0), **moments}
        optimizer.step()
        params.append((p.detach(), optimizer.state[p]))
    (mine, state), (expected, other) = params
    for name in state:
        assert torch.equal(state[name], other[name]), name
    ulp = torch.finfo(dtype).eps
    # MKL's root is up to one ulp off, and so the step by a relative ulp or two; then x + step is rounded.
    bound = 2 * ulp * (expected - start).abs() + ulp * expected.abs()
    assert ((mine - expected).abs() <= bound).all()
    assert (mine != expected).sum() < 0.02 * mine.numel()


# torch's own kernels fuse the multiply-add at AVX2 and AVX-512, ours at the same levels.
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="torch fuses no multiply-add"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("ours", "theirs", "options"), PAIRS)
@pytest.mark.parametrize("level", AVAILABLE[1:])
def test_at_l_1_the_cpu_kernel_has_torchs_moments_to_the_bit(
    ours: Any, theirs: Any, options: Any, dtype: torch.dtype, level: str
) -> None:
    with simd_level(level):
        one_step(ours, theirs, options, dtype)


def test_at_l_1_the_portable_kernel_agrees_with_torchs_portable_kernels() -> None:
    code = (
        "import torch, test_adaptive as t\n"
        "assert torch.backends.cpu.get_cpu_capability() == 'DEFAULT'\n"
        "for pair in t.PAIRS:\n"
        "    for dtype in (torch.float32, torch.float64): t.one_step(*pair, dtype)\n"
    )
    places = os.pathsep.join([os.path.dirname(__file__), *sys.path])  # noqa: PTH120
    env = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "SVAG_FAST_SIMD": "portable", "PYTHONPATH": places}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# ---- the limit: dx = -lr m/(s+ε) dt, dm = (1-β1)((a x - m) dt + s dW), RMSprop: dx = -lr (a x dt + s dW)/(s+ε)

CURVATURE, NOISE, TIME = 1.0, 0.5, 10.0
LIMIT_OPTIONS: dict[Any, dict[str, Any]] = {
    SVAGAdam: {"lr": 0.1, "betas": (0.7, 0.9), "eps": 0.1},
    SVAGRMSprop: {"lr": 0.1, "alpha": 0.9, "eps": 0.1, "initial_square_avg": NOISE**2},
}


def limit_moments(optimizer: Any) -> tuple[float, float]:
    """Mean and variance of x at TIME from x = 1, m = 0, of the linear SDE (Van Loan's matrix exponential)."""
    options = LIMIT_OPTIONS[optimizer]
    pace = options["lr"] / (NOISE + options["eps"])
    if optimizer is SVAGAdam:
        b = 1 - options["betas"][0]
        drift, kick = np.array([[0, -pace], [b * CURVATURE, -b]]), np.array([0, b * NOISE])
    else:
        drift, kick = np.array([[-pace * CURVATURE]]), np.array([pace * NOISE])
    d = len(kick)
    block = np.block([[-drift, np.outer(kick, kick)], [np.zeros((d, d)), drift.T]])
    whole = scipy.linalg.expm(block * TIME)
    flow = whole[d:, d:].T
    return float(flow[0, 0]), float((flow @ whole[:d, d:])[0, 0])


def sampled_moments(optimizer: Any, l: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance over particles, one an element of the parameter, and their standard errors."""
    particles = 20_000
    generator = torch.Generator().manual_seed(seed)
    p = nn.Parameter(torch.ones(particles, dtype=torch.float64))
    opt = optimizer([p], l=l, **LIMIT_OPTIONS[optimizer])
    if optimizer is SVAGAdam:
        # At its fixed point the second moment is that of the noise, l s²; far into the run no bias is corrected.
        moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.full_like(p, l * NOISE**2)}
        opt.state[p] = {"step": torch.tensor(1e6), **moments}
    for _ in range(int(TIME) * l):
        gradients = [
            CURVATURE * p.detach() + NOISE * torch.randn(particles, generator=generator, dtype=torch.float64)
            for _ in range(2)
        ]
        p.grad = gradients[0]
        opt.hold_gradient()
        p.grad = gradients[1]
        opt.step()
    x = p.detach().numpy()
    deviations = (x - x.mean()) ** 2
    errors = np.array([x.std(), deviations.std()]) / math.sqrt(particles)
    return np.array([x.mean(), deviations.mean()]), errors


@pytest.mark.parametrize("optimizer", [SVAGAdam, SVAGRMSprop])
def test_moments_at_equal_time_converge_to_the_sde_as_l_grows(optimizer: Any) -> None:
    """Order 1/l: the error falls from l to l, and Richardson's 2 m(2l) - m(l) meets the closed form within z = 4."""
    exact = np.array(limit_moments(optimizer))
    found = {l: sampled_moments(optimizer, l, seed=l) for l in (1, 4, 16, 32)}
    plain, plain_error = found[1]
    assert (np.abs(plain - exact) / plain_error).max() > 20  # the plain optimizer is far from its SDE here
    error = {l: np.abs((moments - exact) / exact).max() for l, (moments, _) in found.items()}
    assert error[4] < error[1] / 2
    assert error[16] < error[4] / 2
    extrapolated = 2 * found[32][0] - found[16][0]
    z = (extrapolated - exact) / np.hypot(2 * found[32][1], found[16][1])
    assert np.abs(z).max() < 4


# ---- torch.optim's interface


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def loss(model: nn.Module, k: int) -> Tensor:
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    return nn.functional.cross_entropy(model(x), torch.randint(3, (4,), generator=generator))


def advance(model: nn.Module, opt: Any, first: int, count: int) -> None:
    for k in range(first, first + count):
        opt.zero_grad()
        loss(model, 2 * k).backward()
        opt.hold_gradient()
        loss(model, 2 * k + 1).backward()
        opt.step()


def same(a: nn.Module, b: nn.Module) -> bool:
    return same_bits(a.parameters(), b.parameters())


OPTIMIZERS = [SVAGAdam, SVAGRMSprop]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_closure_is_called_for_both_batches(optimizer: Any) -> None:
    held, closed = net(), net()
    opt = optimizer(closed.parameters(), l=4)
    advance(held, optimizer(held.parameters(), l=4), 0, 3)
    calls = iter(range(6))

    def closure() -> Tensor:
        opt.zero_grad()
        value = loss(closed, next(calls))
        value.backward()
        return value

    for _ in range(3):
        opt.step(closure)
    assert same(held, closed)
    assert float(opt.stats.noise_trace) > 0
    assert opt.effective_steps == 3 / 4


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("way", ["state_dict", "torch.save", "pickle", "deepcopy"])
def test_a_run_resumed_in_the_middle_is_the_uninterrupted_one(optimizer: Any, way: str) -> None:
    whole, part = net(), net()
    advance(whole, optimizer(whole.parameters(), lr=0.02, l=8), 0, 6)
    opt = optimizer(part.parameters(), lr=0.02, l=8)
    advance(part, opt, 0, 3)
    if way in ("state_dict", "torch.save"):
        state = copy.deepcopy(opt.state_dict())
        if way == "torch.save":
            buffer = io.BytesIO()
            torch.save(state, buffer)
            buffer.seek(0)
            state = torch.load(buffer, weights_only=True)
        opt = optimizer(part.parameters(), lr=0.5, l=8)
        opt.load_state_dict(state)
    else:
        pair = (part, opt)
        part, opt = pickle.loads(pickle.dumps(pair)) if way == "pickle" else copy.deepcopy(pair)
    advance(part, opt, 3, 3)
    assert same(whole, part)
    assert opt.effective_steps == 6 / 8


def test_a_state_of_torchs_own_adam_can_be_continued() -> None:
    ours, theirs = net(), net()
    adam = torch.optim.Adam(theirs.parameters(), lr=0.02, foreach=False)
    for model_step in range(3):
        adam.zero_grad()
        loss(theirs, model_step).backward()
        adam.step()
    ours.load_state_dict(theirs.state_dict())
    opt = SVAGAdam(ours.parameters(), lr=0.02, backend="reference")
    state = opt.state_dict()
    state["state"] = copy.deepcopy(adam.state_dict()["state"])
    opt.load_state_dict(state)
    for model, optimizer in ((theirs, adam), (ours, opt)):
        optimizer.zero_grad()
        loss(model, 9).backward()
        optimizer.step()
    assert same(ours, theirs)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_param_groups_have_their_own_options(optimizer: Any) -> None:
    name, values = ("betas", (0.5, 0.6)) if optimizer is SVAGAdam else ("alpha", 0.6)
    model, alone = net(), net()
    groups = [
        {"params": model[0].parameters()},
        {"params": model[2].parameters(), "lr": 0.5, "eps": 0.1, "weight_decay": 0.3, name: values},
    ]
    advance(model, optimizer(groups, lr=0.01, l=4), 0, 1)
    advance(alone, optimizer(alone.parameters(), lr=0.5, eps=0.1, weight_decay=0.3, l=4, **{name: values}), 0, 1)
    assert same_bits(model[2].parameters(), alone[2].parameters())
    assert not torch.equal(model[0].weight, alone[0].weight)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_schedulers_change_lr(optimizer: Any) -> None:
    model, plain = net(), net()
    opt = optimizer(model.parameters(), lr=0.2, l=2)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.0)
    advance(model, opt, 0, 1)
    scheduler.step()
    before = copy.deepcopy(model)
    advance(model, opt, 1, 1)
    assert same(model, before)  # at lr 0 nothing moves
    tensor_lr = optimizer(plain.parameters(), lr=torch.tensor(0.2, dtype=torch.float64), l=2)
    advance(plain, tensor_lr, 0, 1)
    assert same(plain, before)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_grad_scaler_skips_a_step_with_an_inf_whole(optimizer: Any) -> None:
    model = net().float()
    opt = optimizer(model.parameters(), l=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for k, bad in enumerate((False, True, False)):
        before = copy.deepcopy((model.state_dict(), opt.state_dict()["state"]))
        opt.zero_grad()
        for batch in range(2):
            x = torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * k + batch))
            scaler.scale(model(x).square().mean() * (math.inf if bad and batch else 1.0)).backward()
            if batch == 0:
                opt.hold_gradient()
        scaler.step(opt)
        scaler.update()
        unchanged = same_bits(before[0].values(), model.state_dict().values())
        assert unchanged == bad
        if bad:
            state = opt.state_dict()["state"]
            assert all(torch.equal(before[1][i][name], state[i][name]) for i in state for name in state[i])
    assert float(opt.state[model[0].weight]["step"]) == 2


def test_the_state_is_left_empty_by_a_refused_step() -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    opt = SVAGAdam([p], backend="cpu")
    p.grad = torch.ones_like(p)
    with pytest.raises(svag_fast.ops.backends.BackendError):
        opt.step()
    assert not opt.state
    assert torch.equal(p, torch.ones_like(p))


def test_l_above_1_needs_two_batches() -> None:
    model = net()
    opt = SVAGAdam(model.parameters(), l=4)
    loss(model, 0).backward()
    with pytest.raises(RuntimeError, match="SVAGAdam with l = 4 combines two batches"):
        opt.step()


@pytest.mark.parametrize(
    ("optimizer", "options", "message"),
    [
        (SVAGAdam, {"betas": (0.9,)}, "betas must be"),
        (SVAGAdam, {"l": 0.5}, r"l must be a finite number >= 1, got 0\.5"),
        (SVAGAdam, {"l": 1e18}, "rounds to 1"),
        (SVAGRMSprop, {"alpha": 1.0}, "Invalid alpha value: 1.0"),
        (SVAGRMSprop, {"lr": math.nan}, "Invalid learning rate: nan"),
        (SVAGRMSprop, {"eps": math.inf}, "Invalid epsilon value: inf"),
    ],
)
def test_bad_options_are_refused_in_torchs_words(optimizer: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimizer(net().parameters(), **options)
