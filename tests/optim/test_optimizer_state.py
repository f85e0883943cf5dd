"""Options, clocks and checkpoints of the optimizers: refused before anything changes, exact, and carried over."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from started_rmsprop import SVAGRMSprop
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from svag_fast import SVAG, SVAGAdam
from svag_fast.ops.backends import BackendError

OPTIMIZERS = (SVAG, SVAGAdam, SVAGRMSprop)


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    p = nn.Parameter(torch.ones(*shape, dtype=dtype))
    p.grad = torch.ones_like(p)
    return p


def step(opt: Any, *params: Tensor, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for half in range(2 if opt.l != 1 else 1):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        if half == 0 and opt.l != 1:
            opt.hold_gradient()
    opt.step()


# ---- a refused step has written nothing, in no group


def _overlapping(a: nn.Parameter) -> tuple[list[nn.Parameter], dict[str, Any]]:
    base = torch.ones(6)
    pair = [nn.Parameter(base[:4]), nn.Parameter(base[2:])]
    for p in pair:
        p.grad = torch.ones(4)
    return pair, {}


def _across(a: nn.Parameter) -> tuple[list[nn.Parameter], dict[str, Any]]:
    p = nn.Parameter(a.data[1:])
    p.grad = torch.ones(3)
    return [p], {}


def _sparse(a: nn.Parameter) -> tuple[list[nn.Parameter], dict[str, Any]]:
    p = ones(4)
    p.grad = p.grad.to_sparse()
    return [p], {}


def _int8(a: nn.Parameter) -> tuple[list[nn.Parameter], dict[str, Any]]:
    p = nn.Parameter(torch.ones(4, dtype=torch.int8), requires_grad=False)
    p.grad = torch.ones(4, dtype=torch.int8)
    return [p], {}


def _other_shape(a: nn.Parameter) -> tuple[list[nn.Parameter], dict[str, Any]]:
    p = ones(4)
    p.data = torch.ones(3)
    return [p], {}


def _options(**options: Any) -> Callable[[nn.Parameter], tuple[list[nn.Parameter], dict[str, Any]]]:
    return lambda a: ([ones(4)], options)


SECOND_GROUPS: dict[str, tuple[Any, type[Exception], str]] = {
    "overlap": (_overlapping, ValueError, r"params\["),
    "overlap with the first group": (_across, ValueError, r"params\["),
    "no such backend here": (_options(backend="triton"), BackendError, "triton"),
    "unknown backend": (_options(backend="gpu"), BackendError, "backend must be one of auto, cuda, triton, cpu,"),
    "sparse": (_sparse, RuntimeError, "sparse gradients"),
    "int8": (_int8, TypeError, "torch.int8"),
    "another shape": (_other_shape, ValueError, "shape"),
    "lr string": (_options(lr="0.1"), TypeError, "Invalid learning rate: '0.1'"),
    "lr negative": (_options(lr=-1.0), ValueError, "Invalid learning rate: -1.0"),
    "lr nan": (_options(lr=math.nan), ValueError, "Invalid learning rate: nan"),
    "lr of two elements": (_options(lr=torch.ones(2)), ValueError, "Tensor lr must be 1-element"),
    "l of zero": (_options(l=0), ValueError, "l must be 1.0, as in the other param groups, got 0"),
    "l string": (_options(l="1"), TypeError, r"l must be a number, got '1' \(str\)"),
    "another l": (_options(l=2), ValueError, "l must be 1.0, as in the other param groups, got 2"),
    "weight_decay": (_options(weight_decay="x"), TypeError, "Invalid weight_decay value: 'x'"),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", SECOND_GROUPS.values(), ids=SECOND_GROUPS.keys())
def test_what_a_later_group_is_refused_for_leaves_the_first_as_it_was(optimizer: Any, case: Any) -> None:
    make, error, message = case
    a = ones(4)
    params, options = make(a)
    if "shape" in message:  # autograd lets no gradient of another shape in
        params[0].data = torch.ones(4)
        opt = optimizer([{"params": [a]}, {"params": params}], lr=0.1)
        params[0].data = torch.ones(3)
    else:
        opt = optimizer([{"params": [a]}, {"params": params}], lr=0.1)
    opt.param_groups[1] |= options
    with pytest.raises(error, match=message):
        opt.step()
    assert a.tolist() == [1, 1, 1, 1]
    assert not opt.state
    assert [g["steps"] for g in opt.param_groups] == [0, 0]


@pytest.mark.parametrize("option", [{"betas": (0.9, "x")}, {"betas": 0.9}, {"eps": "1e-8"}], ids=str)
def test_adams_options_are_checked_at_the_step(option: dict[str, Any]) -> None:
    a, b = ones(4), ones(4)
    opt = SVAGAdam([{"params": [a]}, {"params": [b]}])
    opt.param_groups[1] |= option
    with pytest.raises((TypeError, ValueError), match=r"Invalid|must be"):
        opt.step()
    assert a.tolist() == [1, 1, 1, 1]


def test_a_group_without_adams_kernel_leaves_the_other() -> None:
    a, b = ones(4), ones(4, dtype=torch.bfloat16)
    opt = SVAGAdam([{"params": [a]}, {"params": [b], "backend": "cpu"}])
    with pytest.raises(BackendError, match="bfloat16"):
        opt.step()
    assert a.tolist() == [1, 1, 1, 1]
    assert not opt.state


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("l", [1, 2])
def test_a_refused_scaler_step_can_be_made_again(optimizer: Any, l: float) -> None:
    paths = []
    for refused in (False, True):
        a = nn.Parameter(torch.ones(4))
        opt, scaler = optimizer([a], lr=0.1, l=l), torch.amp.GradScaler("cpu", init_scale=4.0)
        for half in range(2):
            scaler.scale((a * (1 + half)).sum()).backward()
            if half == 0 and l != 1:
                opt.hold_gradient()
        if refused:
            opt.param_groups[0]["weight_decay"] = -1.0
            with pytest.raises(ValueError, match="weight_decay"):
                scaler.step(opt)
            opt.param_groups[0]["weight_decay"] = 0.0
        scaler.step(opt)
        scaler.update()
        paths.append(a.tolist())
    assert paths[0] == paths[1] != [1, 1, 1, 1]


# ---- parameters in shards


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_sharded_parameters_are_refused_by_name(one_rank: None, optimizer: Any) -> None:
    from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

    sharded = nn.Parameter(distribute_tensor(torch.ones(4), DeviceMesh("cpu", [0]), [Shard(0)]))
    opt = optimizer([ones(4)], lr=0.1)
    with pytest.raises(TypeError, match=r"params\[0\] of the group must be a whole tensor for SVAG"):
        opt.add_param_group({"params": [sharded]})
    assert len(opt.param_groups) == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("original", [True, False])
def test_fully_sharded_data_parallel_is_refused(one_rank: None, original: bool) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    wrapped = FullyShardedDataParallel(nn.Linear(3, 2), use_orig_params=original, device_id=torch.device("cpu"))
    with pytest.raises(TypeError, match="FullyShardedDataParallel shard"):
        SVAG(wrapped.parameters(), lr=0.1)


# ---- clocks


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_effective_steps_and_time_are_summed_as_they_pass(optimizer: Any) -> None:
    p = ones(3)
    opt = optimizer([p], lr=0.5, l=4)
    step(opt, p)
    opt.param_groups[0].update(l=8, lr=0.25)
    step(opt, p)
    assert opt.effective_steps == 1 / 4 + 1 / 8
    power = 1 if optimizer is SVAG else 2  # the square-root rule's step of time is lr²/l
    assert opt.time == 0.5**power / 4 + 0.25**power / 8


def test_sums_of_many_steps_are_exact_to_an_ulp() -> None:
    from svag_fast.optim.group_options import start_clocks
    from svag_fast.optim.two_batch import count

    group: dict[str, Any] = {"l": 1000, "params": []}
    start_clocks(group)
    terms = [0.1 / 1000 * (1 + k % 7) for k in range(7)]
    steps = 100_000
    for k in range(steps):
        count(group, 1, 1000, terms[k % 7])
    exact = sum(Fraction(terms[k]) * (steps // 7 + (k < steps % 7)) for k in range(7))
    assert (group["steps"], group["effective_steps"]) == (steps, 100.0)
    assert abs(Fraction(group["time"]) - exact) <= Fraction(math.ulp(group["time"]))


@pytest.mark.parametrize(
    ("lr", "capturable"),
    [(0.1, False), (torch.tensor(0.1), False), (torch.tensor([0.1]), False), (0.1, True), (torch.tensor(0.1), True)],
    ids=str,
)
def test_every_kind_of_lr_keeps_time_in_float64(lr: Any, capturable: bool) -> None:
    p = ones(1)
    opt = SVAG([p], lr=lr, l=1000, capturable=capturable)
    opt.param_groups[0]["time"] = opt.param_groups[0]["time"] + 1e6  # where float32 no longer sees a step
    for _ in range(5):
        step(opt, p)
    assert opt.time - 1e6 == pytest.approx(5 * float(lr) / 1000, rel=1e-5)
    assert opt.effective_steps == pytest.approx(0.005, rel=1e-15)


def test_a_scalers_steps_are_counted_in_float64() -> None:
    p = nn.Parameter(torch.ones(1))
    opt, scaler = SVAG([p], lr=0.1, l=1), torch.amp.GradScaler("cpu", init_scale=2.0)
    opt.param_groups[0]["time"] = 1e6
    for _ in range(5):
        opt.zero_grad()
        scaler.scale(p.sum()).backward()
        scaler.step(opt)
        scaler.update()
    assert opt.time - 1e6 == pytest.approx(0.5, rel=1e-5)


def test_an_old_checkpoint_without_the_new_clocks_is_loaded() -> None:
    p = ones(3)
    opt = SVAG([p], lr=0.1, l=4)
    for _ in range(3):
        step(opt, p)
    state = opt.state_dict()
    for name in ("effective_steps", "effective_steps_lost", "time_lost"):
        del state["param_groups"][0][name]
    opt.load_state_dict(state)
    assert (opt.effective_steps, opt.time) == (0.75, pytest.approx(0.075))


def test_adam_counts_beyond_the_last_float32_integer() -> None:
    p = ones(3)
    opt = SVAGAdam([p], l=64)
    step(opt, p)
    state = opt.state_dict()
    state["state"][0]["step"] = torch.tensor(2.0**24)  # as torch's Adam would have saved it
    opt.load_state_dict(state)
    step(opt, p)
    assert float(opt.state[p]["step"]) == 2**24 + 1


# ---- checkpoints


def everything(opt: torch.optim.Optimizer) -> str:
    return repr(opt.state_dict())


LOADED: dict[str, tuple[dict[str, Any], str]] = {
    "l string": ({"l": "4"}, r"param group 0 of the loaded state: l must be a number, got '4' \(str\)"),
    "l below 1": ({"l": 0.5}, r"param group 0 of the loaded state: l must be a finite number >= 1, got 0\.5"),
    "lr nan": ({"lr": math.nan}, "Invalid learning rate: nan"),
    "lr string": ({"lr": "0.1"}, "Invalid learning rate: '0.1'"),
    "weight_decay": ({"weight_decay": None}, "Invalid weight_decay value: None"),
    "steps": ({"steps": "3"}, r"param group 0 of the loaded state: steps must be a number, got '3' \(str\)"),
    "time": ({"time": math.nan}, "param group 0 of the loaded state: time must be a finite number >= 0, got nan"),
    "another's options": ({"betas": (0.9, 0.99), "alpha": 0.9}, "another optimizer's"),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", LOADED.values(), ids=LOADED.keys())
def test_a_state_out_of_range_is_refused_before_anything_is_replaced(optimizer: Any, case: Any) -> None:
    change, message = case
    p = ones(3)
    opt = optimizer([p], lr=0.1, l=2)
    step(opt, p)
    state, before = copy.deepcopy(opt.state_dict()), everything(opt)
    state["param_groups"][0] |= change
    with pytest.raises((ValueError, TypeError), match=message):
        opt.load_state_dict(state)
    assert everything(opt) == before


MOMENTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "step nan": (lambda s: s.update(step=math.nan), "state 0 of the loaded state: step must be a finite number >="),
    "step string": (lambda s: s.update(step="1"), "state 0 of the loaded state: step must be a number, got '1'"),
    "a moment is missing": (lambda s: s.pop("exp_avg_sq"), "state 0 of the loaded state must be complete, got one"),
    "another shape": (lambda s: s.update(exp_avg=torch.zeros(2)), "state 0 of the loaded state: exp_avg must be of"),
    "no tensor": (lambda s: s.update(exp_avg=0.5), "state 0 of the loaded state: exp_avg must be a tensor, got a"),
    "complex": (lambda s: s.update(exp_avg=torch.zeros(3, dtype=torch.complex64)), "state 0 of the loaded state:"),
    "integers": (lambda s: s.update(exp_avg=torch.zeros(3, dtype=torch.int64)), "state 0 of the loaded state:"),
    "sparse": (lambda s: s.update(exp_avg_sq=torch.zeros(3).to_sparse()), "state 0 of the loaded state: exp_avg_sq"),
    "no values": (lambda s: s.update(exp_avg_sq=torch.zeros(3, device="meta")), "state 0 of the loaded state:"),
    "a negative square": (lambda s: s.update(exp_avg_sq=torch.tensor([1.0, -1e-9, 1.0])), "state 0 of the loaded"),
}


@pytest.mark.parametrize("case", MOMENTS.values(), ids=MOMENTS.keys())
def test_moments_that_do_not_fit_are_refused(case: Any) -> None:
    change, message = case
    p = ones(3)
    opt = SVAGAdam([p], l=2)
    step(opt, p)
    state, before = copy.deepcopy(opt.state_dict()), everything(opt)
    change(state["state"][0])
    with pytest.raises((ValueError, TypeError), match=message):
        opt.load_state_dict(state)
    assert everything(opt) == before


FORMS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a state of no parameter": (lambda s: s["state"].update({7: s["state"][0]}), "a state of no parameter: 7"),
    "one number twice": (lambda s: s["param_groups"][0].update(params=[0, 0]), "the loaded state must be one with"),
    "states in a list": (lambda s: s.update(state=[]), "the loaded state must be an optimizer's, its state a dict,"),
    "no groups": (lambda s: s.pop("param_groups"), "the loaded state must be an optimizer's, its param_groups a"),
    "a group that is none": (lambda s: s.update(param_groups=[5]), "the loaded state must be an optimizer's, each"),
    "a state that is none": (lambda s: s["state"].update({0: [1]}), "state 0 of the loaded state must be a dict,"),
    "another order": (lambda s: s["param_groups"][0].update(param_names=["b", "a"]), "the loaded state's param"),
}


@pytest.mark.parametrize("case", FORMS.values(), ids=FORMS.keys())
def test_a_state_that_is_not_of_these_parameters_is_refused(case: Any) -> None:
    change, message = case
    p, q = ones(3), ones(3)
    opt = SVAGAdam([("a", p), ("b", q)], l=2)
    q.grad = torch.zeros(3)
    step(opt, p)
    state, before = copy.deepcopy(opt.state_dict()), everything(opt)
    change(state)
    with pytest.raises((ValueError, TypeError), match=message):
        opt.load_state_dict(state)
    assert everything(opt) == before
    renamed = copy.deepcopy(opt.state_dict())
    renamed["param_groups"][0]["param_names"] = ["module.a", "module.b"]  # as torch's, which goes by the order
    opt.load_state_dict(renamed)


PEERS: list[tuple[Any, Any, dict[str, Any]]] = [
    (SVAG, torch.optim.SGD, {"lr": 0.3, "weight_decay": 0.1}),
    (SVAG, torch.optim.SGD, {"lr": 0.3, "weight_decay": 0.1, "momentum": 0.9}),
    (SVAGAdam, torch.optim.Adam, {"lr": 0.3, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}),
    (SVAGRMSprop, torch.optim.RMSprop, {"lr": 0.3, "alpha": 0.9, "eps": 1e-6, "weight_decay": 0.1}),
]


@pytest.mark.parametrize(("ours", "theirs", "options"), PEERS)
def test_a_checkpoint_of_torchs_own_optimizer_is_continued(ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    a = ones(3, dtype=torch.float64)
    peer = theirs([a], **options, foreach=False)
    for seed in range(3):
        a.grad = torch.randn(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        peer.step()
    b = nn.Parameter(a.detach().clone())
    opt = ours([b], lr=0.9)
    opt.load_state_dict(copy.deepcopy(peer.state_dict()))
    assert opt.param_groups[0]["weight_decay"] == 0.1
    for _ in range(2):
        for p, optimizer in ((a, peer), (b, opt)):
            p.grad = torch.full((3,), 0.5, dtype=torch.float64)
            optimizer.step()
    torch.testing.assert_close(b, a, rtol=1e-12, atol=0)


def test_sgds_checkpoint_leaves_svags_own_options() -> None:
    p = ones(3)
    opt = SVAG([p], lr=0.9, l=4, compensated=True, backend="cpu")
    opt.load_state_dict(torch.optim.SGD([p], lr=0.3).state_dict())
    group = opt.param_groups[0]
    assert (group["lr"], group["l"], group["compensated"], group["backend"]) == (0.3, 4, True, "cpu")


def test_maximize_is_taken_over() -> None:
    p = ones(3)
    opt = SVAG([p], lr=0.9)
    opt.load_state_dict(torch.optim.SGD([p], lr=0.3, maximize=True).state_dict())
    assert opt.param_groups[0]["maximize"] is True


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "Nesterov": (SVAG, lambda p: torch.optim.SGD([p], lr=0.1, momentum=0.9, nesterov=True), "the loaded state must"),
    "dampening": (SVAG, lambda p: torch.optim.SGD([p], lr=0.1, momentum=0.9, dampening=0.5), "the loaded state"),
    "Adam for SVAG": (SVAG, lambda p: torch.optim.Adam([p]), "the loaded state must be SVAG's, got another"),
    "AMSGrad": (SVAGAdam, lambda p: torch.optim.Adam([p], amsgrad=True), "the loaded state must be without"),
    "AdamW": (SVAGAdam, lambda p: torch.optim.AdamW([p]), "decoupled_weight_decay=True|another optimizer's"),
    "SGD for SVAGAdam": (SVAGAdam, lambda p: torch.optim.SGD([p], lr=0.1), "the loaded state must be SVAGAdam's,"),
    "SVAG for SVAGAdam": (SVAGAdam, lambda p: SVAG([p], lr=0.1), "the loaded state must be SVAGAdam's, got another"),
    "SVAGAdam for SVAG": (SVAG, lambda p: SVAGAdam([p]), "the loaded state must be SVAG's, got another"),
    "centered": (SVAGRMSprop, lambda p: torch.optim.RMSprop([p], centered=True), "the loaded state must be without"),
    "SVAGAdam for SVAGRMSprop": (SVAGRMSprop, lambda p: SVAGAdam([p]), "another optimizer's"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_another_optimizers_checkpoint_is_refused(case: Any) -> None:
    ours, make, message = case
    p = ones(3)
    opt, other = ours([p], lr=0.1), make(ones(3))
    step(opt, p)
    other.step()
    before = everything(opt)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(other.state_dict())
    assert everything(opt) == before


@pytest.mark.parametrize(
    ("ours", "theirs", "options"), [(SVAGAdam, torch.optim.Adam, {}), (SVAG, torch.optim.SGD, {"momentum": 0.9})]
)
def test_moments_of_torchs_checkpoint_are_refused_at_another_l(ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    p = ones(3)
    opt = ours([p], lr=0.1, l=4)
    with pytest.raises(ValueError, match="the loaded state must be of moments at l = 4, got torch's "):
        opt.load_state_dict(theirs([p], lr=0.1, **options).state_dict())


def test_buffers_of_sgds_checkpoint_go_with_the_groups_that_have_momentum() -> None:
    """torch keeps the buffer of a group whose momentum has become 0."""
    params = [ones(2), ones(2), ones(2)]
    peer = torch.optim.SGD([{"params": [p]} for p in params], lr=0.1, momentum=0.9)
    params[2].grad = None
    peer.step()
    peer.param_groups[1]["momentum"] = 0.0
    opt = SVAG([{"params": [p]} for p in params], lr=0.5)
    opt.load_state_dict(peer.state_dict())
    assert [group["momentum"] for group in opt.param_groups] == [0.9, 0.0, 0.9]
    assert [list(opt.state.get(p, {})) for p in params] == [["momentum_buffer"], [], []]


def test_rmsprops_checkpoint_brings_no_option_that_ours_lacks() -> None:
    p = ones(3)
    opt = SVAGRMSprop([p], lr=0.1)
    before = set(opt.param_groups[0])
    opt.load_state_dict(torch.optim.RMSprop([p], lr=0.1).state_dict())
    assert set(opt.param_groups[0]) == before


# ---- torch.distributed.checkpoint, which steps as a formality

FORMAL: list[tuple[Any, dict[str, Any]]] = [
    (SVAG, {}),
    (SVAG, {"compensated": True}),
    (SVAG, {"momentum": 0.9, "weight_decay": 0.1}),
    (SVAG, {"capturable": True}),
    (SVAGAdam, {}),
    (SVAGRMSprop, {}),
    (SVAGRMSprop, {"initial_square_avg": "measure"}),
]


@pytest.mark.parametrize("l", [1, 4])
@pytest.mark.parametrize(("optimizer", "options"), FORMAL, ids=str)
def test_a_distributed_checkpoint_of_a_fresh_or_trained_optimizer(
    optimizer: Any, options: dict[str, Any], l: float
) -> None:
    def fresh() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2).bfloat16() if options.get("compensated") else nn.Linear(3, 2)
        return model, optimizer(model.parameters(), lr=0.1, l=l, **options)

    model, opt = fresh()
    empty = get_optimizer_state_dict(model, opt)
    assert all(float(s["step"]) == 0 for s in empty["state"].values() if "step" in s)
    assert (opt.effective_steps, opt.time, opt.stats) == (0, 0, None)
    for seed in range(3):
        step(opt, *model.parameters(), seed=seed)
        opt.zero_grad()
    clocks = opt.effective_steps, opt.time
    saved = [copy.deepcopy(get_optimizer_state_dict(model, opt)) for _ in range(2)][-1]
    assert (opt.effective_steps, opt.time) == clocks
    other, twin = fresh()
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, twin, saved)
    assert (twin.effective_steps, twin.time) == clocks
    for m, o in ((model, opt), (other, twin)):
        step(o, *m.parameters(), seed=9)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert (twin.effective_steps, twin.time) == (opt.effective_steps, opt.time)


def test_a_distributed_checkpoint_between_the_two_backwards_leaves_what_is_held() -> None:
    model = nn.Linear(3, 2)
    opt = SVAG(model.parameters(), lr=0.1, l=4)
    model(torch.ones(1, 3)).sum().backward()
    opt.hold_gradient()
    get_optimizer_state_dict(model, opt)
    assert len(opt._pair.first()) == 2
    model(torch.zeros(1, 3)).square().sum().backward()
    opt.step()
    assert opt.effective_steps == 0.25


@pytest.mark.parametrize(
    ("ours", "torchs", "options"),
    [
        (SVAG, torch.optim.SGD, {"momentum": 0.9}),
        (SVAG, torch.optim.SGD, {}),
        (SVAGAdam, torch.optim.Adam, {}),
        (SVAGRMSprop, torch.optim.RMSprop, {}),
    ],
)
@pytest.mark.parametrize("first", [0.0, 1.0])
def test_a_step_at_lr_0_with_zero_gradients_is_torchs(
    ours: Any, torchs: Any, options: dict[str, Any], first: float
) -> None:
    """A warm-up, where no sample is in the margin: moments decay, and the step is counted."""
    params = [ones(3, dtype=torch.float64) for _ in range(2)]
    opts = [kind([p], lr=0.1, **options) for kind, p in zip((ours, torchs), params, strict=True)]
    for lr, g in ((0.1 * first, first), (0.0, 0.0), (0.1, 1.0), (0.1, 0.0)):
        for p, opt in zip(params, opts, strict=True):
            opt.param_groups[0]["lr"] = lr
            p.grad = torch.full_like(p, g)
            opt.step()
    torch.testing.assert_close(params[0], params[1], rtol=1e-12, atol=0)
    assert opts[0].effective_steps == 4


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("g1", "g2"), [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_a_step_at_lr_0_of_two_batches_takes_what_is_held(optimizer: Any, g1: float, g2: float) -> None:
    p = ones(3)
    opt = optimizer([p], lr=0.0, l=2, **({"initial_square_avg": 1.0} if optimizer is SVAGRMSprop else {}))
    for k in (1, 2):
        p.grad = torch.full_like(p, g1)
        opt.hold_gradient()
        p.grad = torch.full_like(p, g2)
        stats = opt.step()
        assert [float(stats.sq_norm1), float(stats.sq_norm2)] == [3 * g1, 3 * g2]
        assert opt.effective_steps == k / 2
        opt.zero_grad()


def test_a_warmup_that_starts_at_lr_0_is_counted() -> None:
    p = ones(3)
    opt = SVAG([p], lr=0.0)
    step(opt, p)
    assert opt.effective_steps == 1


# ---- torch.compile


@pytest.mark.parametrize("optimizer", [SVAG, SVAGRMSprop, pytest.param(SVAGAdam, marks=pytest.mark.nightly)])
def test_compiled_methods_keep_clock_statistics_and_held_gradient(optimizer: Any) -> None:
    torch._dynamo.reset()
    models = [nn.Linear(3, 2), nn.Linear(3, 2)]
    models[1].load_state_dict(models[0].state_dict())
    opts = [optimizer(m.parameters(), lr=0.01, l=2) for m in models]
    compiled = torch.compile(opts[0].step, backend="eager")
    for k in range(3):
        for model, opt, take_step in zip(models, opts, (compiled, opts[1].step), strict=True):
            opt.zero_grad()
            for half in range(2):
                x = torch.randn(4, 3, generator=torch.Generator().manual_seed(2 * k + half))
                model(x).square().mean().backward()
                if half == 0:
                    opt.hold_gradient()
            take_step()
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
    assert opts[0].effective_steps == opts[1].effective_steps == 1.5
    assert torch.equal(opts[0].stats.raw, opts[1].stats.raw)


@pytest.mark.nightly
def test_a_compiled_training_step() -> None:
    """With the default backend, hold_gradient and step inside the compiled function."""
    torch._dynamo.reset()
    model = nn.Linear(3, 2)
    opt = SVAG(model.parameters(), lr=0.1, l=2)

    @torch.compile
    def train(x1: Tensor, x2: Tensor) -> None:
        opt.zero_grad()
        model(x1).square().mean().backward()
        opt.hold_gradient()
        model(x2).square().mean().backward()
        opt.step()

    for _ in range(4):
        train(torch.randn(4, 3), torch.randn(4, 3))
    assert opt.effective_steps == 2
    assert float(opt.stats.noise_trace) > 0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_state_loaded_in_one_process_is_a_copy(optimizer: Any) -> None:
    """torch's own loading keeps the tensors that it is given, and two optimizers step with the same moments."""
    options = {"lr": 0.1, "l": 2} | ({"momentum": 0.9, "compensated": True} if optimizer is SVAG else {})
    first, second = ([nn.Parameter(torch.ones(3))] for _ in range(2))
    one, other = optimizer(first, **options), optimizer(second, **options)

    def step() -> None:
        for value in (1.0, 2.0):
            first[0].grad = torch.full((3,), value)
            if value == 1:
                one.hold_gradient()
        one.step()

    step()
    other.load_state_dict(one.state_dict())
    before = copy.deepcopy(other.state_dict())
    step()
    for name, value in other.state_dict()["state"][0].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(before["state"][0][name])), name
    assert str(other.state_dict()["param_groups"]) == str(before["param_groups"])
