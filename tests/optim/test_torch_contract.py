"""torch.optim's contract as a table: what torch's optimizer does in each case, really run, and what ours does at l = 1.

A row is a function of an optimizer class; its answer is what it returns or raises. ``ours`` is None where ours must
give torch's answer (an error: its type, and its text where torch's begins ours), else it says where we differ, and how.
"""

from __future__ import annotations

import copy
import io
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedules
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import SWALR, AveragedModel

from svag_fast import SVAG, SVAGAdam, SVAGRMSprop
from svag_fast.ops.step_stats import StepStats

PEERS = {"SVAG": (torch.optim.SGD, SVAG), "SVAGAdam": (torch.optim.Adam, SVAGAdam)}
PEERS["SVAGRMSprop"] = (torch.optim.RMSprop, SVAGRMSprop)
Answer = Callable[[Any], Any]


class Row(NamedTuple):
    answer: Answer
    ours: Any = None
    only: tuple[str, ...] = tuple(PEERS)


ROWS: dict[str, Row] = {}


def row(ours: Any = None, only: tuple[str, ...] = tuple(PEERS)) -> Callable[[Answer], Answer]:
    def add(answer: Answer) -> Answer:
        ROWS[answer.__name__.strip("_")] = Row(answer, ours, only)
        return answer

    return add


def param(*values: float, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values or (1.0, -2.0, 3.0), dtype=dtype))


def loss_of(*params: Tensor) -> Tensor:
    """Rosenbrock's valley along each parameter: no coordinate's gradient stays 0 or proportional to another's."""
    return torch.stack([((1 - p) ** 2).sum() + 0.1 * ((p[1:] - p[:-1] ** 2) ** 2).sum() for p in params]).sum()


def train(opt: torch.optim.Optimizer, *params: Tensor, steps: int = 4) -> list[list[float]]:
    for _ in range(steps):
        opt.zero_grad()
        loss_of(*params).backward()
        opt.step()
    return values(*params)


def values(*params: Tensor) -> list[list[float]]:
    return [p.detach().flatten().tolist() for p in params]


# ---- construction


@row()
def a_tensor_for_params(optimizer: Any) -> Any:
    return optimizer(param(), lr=0.1)


@row()
def an_empty_list(optimizer: Any) -> Any:
    return optimizer([], lr=0.1)


@row()
def a_set_of_params(optimizer: Any) -> Any:
    return optimizer([{"params": {param()}}], lr=0.1)


@row()
def what_is_no_tensor(optimizer: Any) -> Any:
    return optimizer([param(), 1.0], lr=0.1)


@row()
def what_is_no_leaf(optimizer: Any) -> Any:
    return optimizer([param() * 2], lr=0.1)


@row()
def a_group_that_is_no_dict(optimizer: Any) -> Any:
    optimizer([param()], lr=0.1).add_param_group([param()])


@row()
def a_parameter_in_two_groups(optimizer: Any) -> Any:
    p = param()
    return optimizer([{"params": [p]}, {"params": p}], lr=0.1)


@row()
def a_parameter_twice_in_a_group_warns(optimizer: Any) -> Any:
    p = param()
    with pytest.warns(UserWarning, match="duplicate parameters") as caught:
        optimizer([p, p], lr=0.1)
    return str(caught[0].message)


@row()
def a_negative_lr(optimizer: Any) -> Any:
    return optimizer([param()], lr=-1.0)


@row(ours=(ValueError, "Invalid learning rate: -1.0"))
def a_negative_lr_in_a_group(optimizer: Any) -> Any:
    return len(optimizer([{"params": [param()], "lr": -1.0}], lr=0.1).param_groups)


@row()
def a_negative_weight_decay(optimizer: Any) -> Any:
    return optimizer([param()], lr=0.1, weight_decay=-0.5)


@row()
def an_lr_of_two_elements(optimizer: Any) -> Any:
    return optimizer([param()], lr=torch.tensor([0.1, 0.2]))


@row(ours=(TypeError, "Invalid learning rate: '0.1' (str) (expected a number)"))
def an_lr_that_is_a_string(optimizer: Any) -> Any:
    return optimizer([param()], lr="0.1")


@row(only=("SVAGAdam",))
def a_beta_of_one(optimizer: Any) -> Any:
    return optimizer([param()], betas=(0.9, 1.0))


@row(only=("SVAGAdam",))
def a_negative_beta(optimizer: Any) -> Any:
    return optimizer([param()], betas=(-0.1, 0.9))


@row(only=("SVAGRMSprop",))
def a_negative_alpha(optimizer: Any) -> Any:
    return optimizer([param()], alpha=-0.1)


@row(only=("SVAGAdam", "SVAGRMSprop"))
def a_negative_eps(optimizer: Any) -> Any:
    return optimizer([param()], eps=-1e-8)


@row(ours=(TypeError, "unexpected keyword argument 'foreach'"))
def the_flag_foreach(optimizer: Any) -> Any:
    return bool(optimizer([param()], lr=0.1, foreach=True))


@row(ours=(TypeError, "unexpected keyword argument 'differentiable'"))
def the_flag_differentiable(optimizer: Any) -> Any:
    return bool(optimizer([param()], lr=0.1, differentiable=True))


@row()
def an_option_that_there_is_not(optimizer: Any) -> Any:
    with pytest.raises(TypeError, match="unexpected keyword argument 'no_such'"):
        optimizer([param()], lr=0.1, no_such=1)


@row()
def named_params(optimizer: Any) -> Any:
    opt = optimizer([("a", param()), ("b", param(2.0))], lr=0.1)
    return opt.param_groups[0]["param_names"], values(*opt.param_groups[0]["params"])


@row()
def names_for_some_params(optimizer: Any) -> Any:
    return optimizer([("a", param()), param()], lr=0.1)


@row()
def names_in_some_groups(optimizer: Any) -> Any:
    return optimizer([{"params": [param()]}, {"params": [("a", param())]}], lr=0.1)


@row()
def named_params_go_into_the_state_and_out_of_it(optimizer: Any) -> Any:
    named, plain = optimizer([("a", param())], lr=0.1), optimizer([param()], lr=0.5)
    plain.load_state_dict(named.state_dict())
    return plain.param_groups[0]["param_names"], plain.param_groups[0]["lr"]


@row()
def group_dicts_are_the_callers_own(optimizer: Any) -> Any:
    groups: list[dict[str, Any]] = [{"params": [param()]}, {"params": iter([param()]), "lr": 0.5}]
    opt, added = optimizer(groups, lr=0.1), {"params": param()}
    opt.add_param_group(added)
    same = [a is b for a, b in zip(opt.param_groups, [*groups, added], strict=True)]
    return same, [type(g["params"]) for g in opt.param_groups], [g["lr"] for g in opt.param_groups]


@row()
def options_that_are_unknown_stay_in_a_group(optimizer: Any) -> Any:
    opt = optimizer([{"params": [param()], "layer": 3}], lr=0.1)
    opt.load_state_dict(opt.state_dict())
    return opt.param_groups[0]["layer"]


@row()
def defaults_are_the_options(optimizer: Any) -> Any:
    opt = optimizer([param()], lr=0.1, weight_decay=0.2)
    return opt.defaults["lr"], opt.defaults["weight_decay"]


@row()
def it_prints_its_groups(optimizer: Any) -> Any:
    text = repr(optimizer([{"params": [param()]}, {"params": [param()], "lr": 0.5}], lr=0.1))
    return re.findall(r"Parameter Group \d|    lr: .*", text), text.splitlines()[0].endswith(" (")


@row()
def frozen_parameters_of_any_dtype(optimizer: Any) -> Any:
    frozen = [torch.ones(2).to(d) for d in (torch.int8, torch.bool, torch.complex64, torch.float8_e5m2)]
    p = param()
    return train(optimizer([*frozen, p], lr=0.1), p)


# ---- the step


@row()
def a_path(optimizer: Any) -> Any:
    p = param()
    return train(optimizer([p], lr=0.02, weight_decay=0.1), p, steps=10)


@row()
def a_path_of_a_transposed_parameter(optimizer: Any) -> Any:
    base = torch.arange(12.0, dtype=torch.float64).reshape(6, 2) / 10
    p = nn.Parameter(base.T.contiguous().T)
    return train(optimizer([p], lr=0.02), p)


@row(ours=(ValueError, "got gaps or repeated elements"))
def a_path_of_a_parameter_with_gaps(optimizer: Any) -> Any:
    p = nn.Parameter(torch.ones(6, 2, dtype=torch.float64)[:, 0])
    return train(optimizer([p], lr=0.02), p)


@row(ours=(ValueError, "Invalid learning rate: -1.0"))
def an_lr_that_becomes_negative(optimizer: Any) -> Any:
    p = param()
    opt = optimizer([p], lr=0.1)
    opt.param_groups[0]["lr"] = -1.0
    return train(opt, p)


@row(ours=(TypeError, "must be torch.float64, got torch.float32"), only=("SVAGAdam", "SVAGRMSprop"))
def a_model_whose_dtype_changes_after_a_step(optimizer: Any) -> Any:
    p = param(dtype=torch.float32)
    opt = optimizer([p], lr=0.02)
    train(opt, p)
    p.grad, p.data = None, p.data.double()
    return train(opt, p)


@row()
def a_path_of_two_groups(optimizer: Any) -> Any:
    a, b = param(), param(0.3, 0.4)
    opt = optimizer([{"params": [a]}, {"params": [b], "lr": 0.05, "weight_decay": 0.1}], lr=0.01)
    return train(opt, a, b)


@row()
def a_path_in_float32(optimizer: Any) -> Any:
    p = param(dtype=torch.float32)
    return train(optimizer([p], lr=0.02), p)


@row()
def a_path_with_a_tensor_lr(optimizer: Any) -> Any:
    p, lr = param(), torch.tensor(0.02, dtype=torch.float64)
    opt = optimizer([p], lr=lr, **({} if optimizer.__module__.startswith("svag") else {"foreach": False}))
    schedule = schedules.ExponentialLR(opt, 0.5)
    path = train(opt, p)
    schedule.step()
    return path, opt.param_groups[0]["lr"] is lr, float(lr), train(opt, p)


@row(ours=(TypeError, "params[0] must be one of torch.float32, torch.float64, torch.bfloat16, torch.float16, got"))
def complex_parameters(optimizer: Any) -> Any:
    p = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    optimizer([p], lr=0.1).step()
    return True


@row(ours=(RuntimeError, "sparse gradients are not supported"))
def sparse_gradients(optimizer: Any) -> Any:
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer(table.parameters(), lr=0.1).step()
    return True


@row()
def no_gradient_at_all(optimizer: Any) -> Any:
    p = param()
    opt = optimizer([p], lr=0.1, weight_decay=0.5)
    opt.step()
    return values(p), len(opt.state)


@row()
def a_parameter_without_gradient(optimizer: Any) -> Any:
    a, b = param(), param()
    return train(optimizer([a, b], lr=0.02, weight_decay=0.1), a), values(b)


@row()
def a_closure_s_loss_is_returned(optimizer: Any) -> Any:
    p = param()
    opt, given = optimizer([p], lr=0.02), []

    def closure() -> Tensor:
        opt.zero_grad()
        given.append(loss_of(p))
        given[-1].backward()
        return given[-1]

    with torch.no_grad():
        returned = opt.step(closure)
    return returned is given[0], len(given), returned.requires_grad, values(p)


@row()
def a_closure_s_float_is_returned(optimizer: Any) -> Any:
    return optimizer([param()], lr=0.1).step(lambda: 1.5)


@row()
def a_closure_by_keyword(optimizer: Any) -> Any:
    return optimizer([param()], lr=0.1).step(closure=lambda: 1.5)


@row(ours=StepStats)
def nothing_to_return(optimizer: Any) -> Any:
    return optimizer([param()], lr=0.1).step()


@row(ours=StepStats)
def a_closure_without_value(optimizer: Any) -> Any:
    return optimizer([param()], lr=0.1).step(lambda: None)


@row()
def reduce_on_plateau_takes_the_steps_loss(optimizer: Any) -> Any:
    p = param()
    opt = optimizer([p], lr=0.3)
    schedule = schedules.ReduceLROnPlateau(opt, factor=0.5, patience=0)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_of(p) * 0 + 1  # no gradient to go by: the rate must fall
        loss.backward()
        return loss.detach()

    for _ in range(3):
        schedule.step(opt.step(closure))
    return opt.param_groups[0]["lr"]


@row()
def zero_grad_both_ways(optimizer: Any) -> Any:
    p = param()
    opt = optimizer([p], lr=0.1)
    loss_of(p).backward()
    kept = p.grad
    opt.zero_grad(set_to_none=False)
    answers = [p.grad is kept, p.grad.tolist()]
    opt.zero_grad()
    return [*answers, p.grad]


@row()
def hooks_in_order(optimizer: Any) -> Any:
    p, seen = param(), []
    opt = optimizer([p], lr=0.1)
    opt.register_step_pre_hook(lambda *_: seen.append("pre"))
    opt.register_step_post_hook(lambda *_: seen.append("post"))
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: seen.append("global post")),
    ]
    try:
        train(opt, p, steps=1)
    finally:
        for handle in handles:
            handle.remove()
    train(opt, p, steps=1)
    return seen


@row()
def a_pre_hook_changes_the_arguments(optimizer: Any) -> Any:
    opt = optimizer([param()], lr=0.1)
    opt.register_step_pre_hook(lambda _, args, kwargs: ((args[0], lambda: 2.5), kwargs))
    return opt.step(lambda: 1.5)


@row()
def a_pre_hook_that_returns_nonsense(optimizer: Any) -> Any:
    opt = optimizer([param()], lr=0.1)
    opt.register_step_pre_hook(lambda *_: 3)
    with pytest.raises(RuntimeError, match=r"must return None or a tuple of \(new_args, new_kwargs\), but got 3"):
        opt.step()


@row()
def a_subclass_with_a_step_of_its_own(optimizer: Any) -> Any:
    class Sub(optimizer):  # type: ignore[misc]
        def step(self, closure: Any = None) -> Any:
            self.own = True
            return super().step(closure)

    p, seen = param(), []
    opt = Sub([p], lr=0.1)
    opt.register_step_post_hook(lambda *_: seen.append("post"))
    return train(opt, p, steps=2), seen, opt.own


@row()
def no_graph_is_left(optimizer: Any) -> Any:
    p = param()
    train(optimizer([p], lr=0.1), p)
    return p.is_leaf, p.grad_fn, p.requires_grad


@row()
def a_grad_scaler_s_path(optimizer: Any) -> Any:
    p = param(dtype=torch.float32)
    opt, scaler = optimizer([p], lr=0.02), torch.amp.GradScaler("cpu", init_scale=64.0)
    for _ in range(3):
        opt.zero_grad()
        scaler.scale(loss_of(p)).backward()
        scaler.step(opt)
        scaler.update()
    return values(p), scaler.get_scale()


@row()
def a_grad_scaler_after_unscale_and_clipping(optimizer: Any) -> Any:
    p = param(dtype=torch.float32)
    opt, scaler = optimizer([p], lr=0.02), torch.amp.GradScaler("cpu", init_scale=64.0)
    for _ in range(3):
        opt.zero_grad()
        scaler.scale(loss_of(p)).backward()
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_([p], 1.0)
        scaler.step(opt)
        scaler.update()
    return values(p)


@row()
def a_grad_scaler_skips_an_overflow(optimizer: Any) -> Any:
    p = param(dtype=torch.float32)
    opt, scaler = optimizer([p], lr=0.02), torch.amp.GradScaler("cpu", init_scale=64.0)
    (scaler.scale(loss_of(p)) * torch.inf).backward()
    scaler.step(opt)
    scaler.update()
    return values(p), scaler.get_scale()


@row()
def an_averaged_model_and_swalr(optimizer: Any) -> Any:
    model = nn.Linear(2, 1, bias=False).double()
    nn.init.constant_(model.weight, 0.5)
    opt = optimizer(model.parameters(), lr=0.1)
    average, schedule = AveragedModel(model), SWALR(opt, swa_lr=0.01, anneal_epochs=2)
    for _ in range(3):
        train(opt, model.weight[0].detach().requires_grad_(), steps=0)
        opt.zero_grad()
        model(torch.ones(4, 2, dtype=torch.float64)).square().mean().backward()
        opt.step()
        average.update_parameters(model)
        schedule.step()
    return values(*average.parameters()), opt.param_groups[0]["lr"]


# ---- schedulers: the rates and the path

SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda opt: schedules.LambdaLR(opt, lambda k: 0.9**k),
    "MultiplicativeLR": lambda opt: schedules.MultiplicativeLR(opt, lambda k: 0.8),
    "StepLR": lambda opt: schedules.StepLR(opt, 2),
    "MultiStepLR": lambda opt: schedules.MultiStepLR(opt, [1, 3]),
    "ConstantLR": lambda opt: schedules.ConstantLR(opt, 0.5, 2),
    "LinearLR": lambda opt: schedules.LinearLR(opt, 0.1, total_iters=4),
    "ExponentialLR": lambda opt: schedules.ExponentialLR(opt, 0.9),
    "PolynomialLR": lambda opt: schedules.PolynomialLR(opt, 4),
    "CosineAnnealingLR": lambda opt: schedules.CosineAnnealingLR(opt, 4),
    "CosineAnnealingWarmRestarts": lambda opt: schedules.CosineAnnealingWarmRestarts(opt, 2),
    "CyclicLR": lambda opt: schedules.CyclicLR(opt, 0.01, 0.1, 2, cycle_momentum=False),
    "OneCycleLR": lambda opt: schedules.OneCycleLR(opt, 0.1, 6, cycle_momentum=False),
    "SequentialLR": lambda opt: schedules.SequentialLR(
        opt, [schedules.ConstantLR(opt, 0.1, 2), schedules.ExponentialLR(opt, 0.9)], [2]
    ),
    "ChainedScheduler": lambda opt: schedules.ChainedScheduler(
        [schedules.ConstantLR(opt, 0.1, 2), schedules.ExponentialLR(opt, 0.9)], opt
    ),
}


def under_schedule(make: Callable[[torch.optim.Optimizer], Any]) -> Answer:
    def answer(optimizer: Any) -> Any:
        p = param()
        opt = optimizer([p], lr=0.02)
        schedule, rates = make(opt), []
        for _ in range(5):
            train(opt, p, steps=1)
            schedule.step()
            rates.append(opt.param_groups[0]["lr"])
        return rates, values(p)

    return answer


ROWS |= {f"schedule {name}": Row(under_schedule(make)) for name, make in SCHEDULES.items()}


# ---- state


def resumed(way: Callable[[Any, Tensor, Any], tuple[Any, Tensor]]) -> Answer:
    def answer(optimizer: Any) -> Any:
        p = param()
        opt = optimizer([p], lr=0.02)
        train(opt, p)
        opt, p = way(opt, p, optimizer)
        return train(opt, p)

    return answer


def _loaded(opt: Any, p: Tensor, optimizer: Any) -> tuple[Any, Tensor]:
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    other = nn.Parameter(p.detach().clone())
    fresh = optimizer([other], lr=0.5)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh, other


def _copied(opt: Any, p: Tensor, optimizer: Any) -> tuple[Any, Tensor]:
    twin = copy.deepcopy(opt)
    return twin, twin.param_groups[0]["params"][0]


def _pickled(opt: Any, p: Tensor, optimizer: Any) -> tuple[Any, Tensor]:
    twin = pickle.loads(pickle.dumps(opt))
    return twin, twin.param_groups[0]["params"][0]


def _step_as_float(opt: Any, p: Tensor, optimizer: Any) -> tuple[Any, Tensor]:
    state = copy.deepcopy(opt.state_dict())
    for values in state["state"].values():
        if "step" in values:
            values["step"] = float(values["step"])
    opt.load_state_dict(state)
    return opt, p


for _name, _way in (("saved", _loaded), ("copied", _copied), ("pickled", _pickled), ("step as float", _step_as_float)):
    ROWS[f"resumed: {_name}"] = Row(resumed(_way))


@row()
def a_state_with_another_number_of_groups(optimizer: Any) -> Any:
    two = optimizer([{"params": [param()]}, {"params": [param()]}], lr=0.1).state_dict()
    optimizer([param()], lr=0.1).load_state_dict(two)


@row()
def a_state_with_another_number_of_params(optimizer: Any) -> Any:
    optimizer([param()], lr=0.1).load_state_dict(optimizer([param(), param()], lr=0.1).state_dict())


@row()
def state_hooks_in_order(optimizer: Any) -> Any:
    seen: list[Any] = []
    opt = optimizer([param()], lr=0.1)
    opt.register_state_dict_pre_hook(lambda _: seen.append("pre"))
    opt.register_state_dict_post_hook(lambda _, state: seen.append("post") or {**state, "more": 1})
    return "more" in opt.state_dict(), seen


@row()
def load_hooks_see_and_change_what_is_loaded(optimizer: Any) -> Any:
    seen: list[Any] = []
    opt = optimizer([param()], lr=0.1)

    def halve(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        seen.append("pre")
        groups = [{**group, "lr": group["lr"] / 2} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    opt.register_load_state_dict_pre_hook(halve)
    opt.register_load_state_dict_post_hook(lambda o: seen.append(o.param_groups[0]["lr"]))
    given = optimizer([param()], lr=0.8).state_dict()
    opt.load_state_dict(given)
    return seen, given["param_groups"][0]["lr"], opt.param_groups[0]["lr"]


@row()
def the_state_is_the_same_twice_and_loading_leaves_it(optimizer: Any) -> Any:
    p = param()
    opt = optimizer([p], lr=0.02)
    train(opt, p)
    state = opt.state_dict()
    before = copy.deepcopy(state)
    optimizer([param()], lr=0.1).load_state_dict(state)
    return str(state) == str(before) == str(opt.state_dict())


@row()
def copies_have_all_public_attributes(optimizer: Any) -> Any:
    opt = optimizer([param()], lr=0.1)
    return {k for k in vars(opt) if not k.startswith("_")} == {k for k in vars(copy.deepcopy(opt)) if k[0] != "_"}


@row()
def groups_added_later_are_stepped(optimizer: Any) -> Any:
    a, b = param(), param(0.5, 0.5)
    opt = optimizer([a], lr=0.02)
    train(opt, a)
    opt.add_param_group({"params": b, "lr": 0.01})
    return train(opt, a, b)


def answer_of(case: Answer, optimizer: Any) -> Any:
    try:
        return case(optimizer)
    except (TypeError, ValueError, RuntimeError) as error:
        return error


def close(theirs: Any, ours: Any) -> bool:
    """Equal; floats to rounding, since torch's own foreach and fused steps differ by as much."""
    if isinstance(theirs, float) and not isinstance(theirs, bool):
        return bool(ours == pytest.approx(theirs, rel=1e-5, abs=1e-7))
    if isinstance(theirs, list | tuple):
        return len(theirs) == len(ours) and all(map(close, theirs, ours))
    return bool(theirs == ours)


@pytest.mark.parametrize(("name", "peer"), [(name, peer) for name in ROWS for peer in ROWS[name].only])
def test_ours_answers_as_torch_does(name: str, peer: str) -> None:
    case, differs, _ = ROWS[name]
    theirs, ours = (answer_of(case, optimizer) for optimizer in PEERS[peer])
    if isinstance(differs, type):
        assert isinstance(ours, differs)
        assert not isinstance(theirs, differs)
    elif differs is not None:
        assert type(ours) is differs[0]
        assert differs[1] in str(ours)
        assert str(theirs) != str(ours)
    elif isinstance(theirs, Exception):
        assert type(ours) is type(theirs), ours
        assert str(ours).startswith(str(theirs))
    else:
        assert close(theirs, ours), (theirs, ours)
