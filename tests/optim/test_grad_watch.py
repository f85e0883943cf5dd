"""A step refuses two gradients of which one alone was changed or replaced, and no others."""

from __future__ import annotations

import copy
import gc
import multiprocessing.reduction
import warnings
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from started_rmsprop import SVAGRMSprop
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from svag_fast import SVAG, SVAGAdam, pair_pass
from svag_fast.optim.grad_watch import GradWatch, Seen

REFUSED = (
    r"gradient, or a part of it, was changed or replaced after its backward pass and the (held|second) one was not"
)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def loss(model: Callable[..., Tensor], k: int) -> Tensor:
    return 100 * model(torch.randn(5, 3, generator=torch.Generator().manual_seed(k))).square().mean()


def params_with_grad(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.grad is not None]


def replace(model: nn.Module) -> None:
    for p in params_with_grad(model):
        p.grad = 0.5 * p.grad


def set_data(model: nn.Module) -> None:
    for p in params_with_grad(model):
        p.grad.data = 0.5 * p.grad.data


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "norm": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1.0),
    "one layer's norm": lambda model: nn.utils.clip_grad_norm_(model[2].parameters(), 1e-3),
    "value": lambda model: nn.utils.clip_grad_value_(model.parameters(), 0.1),
    "scaled": lambda model: [p.grad.mul_(0.5) for p in params_with_grad(model)],
    "a part of one": lambda model: model[0].weight.grad[0].zero_(),
    "foreach": lambda model: torch._foreach_mul_([p.grad for p in params_with_grad(model)], 0.5),
    "replaced": replace,
    "data replaced": set_data,
}


def step(model: nn.Module, opt: Any, changes: tuple[Callable[..., Any] | None, ...], times: tuple[int, int]) -> Any:
    opt.zero_grad()
    for half, change in enumerate(changes):
        for k in range(times[half]):
            loss(model, 10 * half + k).backward()
        if change is not None:
            change(model)
        if half == 0:
            opt.hold_gradient()
    return opt.step()


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("times", [(1, 1), (3, 3), (1, 2), (2, 1)])
def test_a_change_of_one_alone_is_refused_in_the_first_step_and_later(
    change: Callable[..., Any], which: int, times: tuple[int, int]
) -> None:
    for warm in range(2):
        model = net()
        opt = SVAG(model.parameters(), lr=1e-4, l=2)
        for _ in range(warm):
            step(model, opt, (None, None), times)
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(RuntimeError, match=REFUSED):
            step(model, opt, (change, None) if which == 0 else (None, change), times)
        assert all(map(torch.equal, model.parameters(), before))
        opt.discard_gradient()
        step(model, opt, (None, None), times)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("optimizer", [SVAG, SVAGAdam, SVAGRMSprop])
def test_the_same_change_of_both_is_no_fault(change: Callable[..., Any], optimizer: Any) -> None:
    for times in ((1, 1), (3, 3), (2, 1)):
        model = net()
        opt = optimizer(model.parameters(), lr=1e-4, l=2)
        for _ in range(3):
            step(model, opt, (change, change), times)


@pytest.mark.parametrize("which", [0, 1])
def test_a_second_change_of_one_alone_after_ours_of_both_is_refused(which: int) -> None:
    model = net()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    opt = SVAG(model.parameters(), lr=1e-4, l=2)
    for half in range(2):
        scaler.scale(loss(model, half)).backward()
        if half == 0:
            opt.hold_gradient()
    opt.unscale_(scaler)
    if which:
        opt.clip_grad_norm_(0.5)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    with pytest.raises(RuntimeError, match=REFUSED):
        scaler.step(opt)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("how", ["views", "copies", "static", "unused"])
def test_distributed_data_parallel(one_rank: None, how: str, which: int) -> None:
    """A bucket's views count each other's changes; the static graph's first pass ends later than others."""
    model = net()
    if how == "unused":
        model.register_parameter("unused", nn.Parameter(torch.ones(2)))
    ddp = nn.parallel.DistributedDataParallel(
        model,
        gradient_as_bucket_view=how != "copies",
        static_graph=how == "static",
        find_unused_parameters=how == "unused",
    )
    opt = SVAG(ddp.parameters(), lr=1e-4, l=2)
    clip = CHANGES["norm"]
    for _ in range(3):
        step(ddp, opt, (None, None), (1, 1))
        step(ddp, opt, (clip, clip), (1, 1))
    with pytest.raises(RuntimeError, match=REFUSED):
        step(ddp, opt, (clip, None) if which == 0 else (None, clip), (1, 1))


def test_gradients_by_hand_are_no_fault() -> None:
    """As by torch.autograd.grad, in one buffer or a new one, for one batch or both; and where they are set to zero."""
    model = net()
    opt = SVAG(model.parameters(), lr=1e-4, l=2)
    params = list(model.parameters())
    for by_hand in ((True, True), (True, False), (False, True), (False, False)):
        for clear in (True, False, None):
            for half in range(2):
                if half == 0 and clear is not None:
                    opt.zero_grad(set_to_none=clear)
                if by_hand[half]:
                    for p, g in zip(params, torch.autograd.grad(loss(model, half), params), strict=True):
                        p.grad = g
                else:
                    loss(model, half).backward()
                if half == 0:
                    opt.hold_gradient()
            opt.step()


def test_passes_for_something_else_between_are_no_fault() -> None:
    """A Hessian-vector product, another model, a graph kept for a second derivative, recomputed activations."""
    model, other = net(), nn.Linear(3, 1)
    opt = SVAG(model.parameters(), lr=1e-4, l=2)

    def around() -> None:
        other(torch.ones(1, 3)).sum().backward()
        first = torch.autograd.grad(loss(model, 5), model[0].weight, create_graph=True)[0]
        torch.autograd.grad(first.sum(), model[0].weight)

    def reentrant(x: Tensor) -> Tensor:
        return checkpoint(model, x.requires_grad_(), use_reentrant=True)

    for first, second in ((model, reentrant), (reentrant, model), (reentrant, reentrant)):
        opt.zero_grad()
        loss(first, 0).backward()
        around()
        opt.hold_gradient()
        around()
        loss(second, 1).backward()
        around()
        opt.step()
    opt.zero_grad()
    loss(model, 0).backward()
    opt.hold_gradient()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a cycle, as torch says
        loss(model, 1).backward(create_graph=True)
    opt.step()
    with pytest.raises(RuntimeError, match=REFUSED):  # the watched parameter's own change is no such pass
        step(model, opt, (lambda m: (CHANGES["norm"](m), around()), None), (1, 1))


@pytest.mark.parametrize("which", [0, 1])
def test_passes_that_the_hook_does_not_see_are_no_fault(which: int) -> None:
    """Accumulation over experts of which only some are reached, the hooked one's not in the last pass."""
    model = nn.ModuleList(nn.Linear(3, 2) for _ in range(2))
    opt = SVAG(model.parameters(), lr=1e-4, l=2)
    for _ in range(3):
        opt.zero_grad()
        for half in range(2):
            for experts in ((0, 1), (1,)) if half == which else ((1,), (1, 0)):
                sum(loss(model[i], half) for i in experts).backward()  # type: ignore[union-attr]
            if half == 0:
                opt.hold_gradient()
        opt.step()


def test_a_pass_that_fails_leaves_no_notes() -> None:
    model = net()
    opt = SVAG(model.parameters(), lr=1e-4, l=2)

    def fail(_: Tensor) -> None:
        raise KeyboardInterrupt

    loss(model, 0).backward()
    handle = model[0].weight.register_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        loss(model, 1).backward()
    handle.remove()
    loss(model, 2).backward()
    opt.hold_gradient()
    loss(model, 0).backward()
    opt.step()


def test_both_of_a_pair_pass_or_neither() -> None:
    model = net()
    opt = SVAG(model.parameters(), lr=1e-4, l=2)
    for change in (None, *CHANGES.values()):
        with pair_pass(model, opt) as pair:
            pair.backward(model(torch.randn(8, 3)).square().sum(1))
        if change is None:
            opt.clip_grad_norm_(0.1)
            opt.step()
            continue
        change(model)
        with pytest.raises(RuntimeError, match=REFUSED):
            opt.step()
        opt.discard_gradient()


class Unused(nn.Module):
    """The first layer, of which the others' passes tell nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.net = nn.Linear(2, 2), net()

    def forward(self, x: Tensor) -> Tensor:
        """The net's output."""
        out: Tensor = self.net(x)
        return out


@pytest.mark.parametrize(("build", "way"), [(net, "joint"), (Unused, "halves")])
def test_a_pair_pass_is_seen_that_does_not_reach_the_watched_parameter(
    build: Callable[[], nn.Module], way: Literal["joint", "halves"]
) -> None:
    """Layers whose input has a gradient have no parameter in a joint pass's graph."""
    model = build()
    opt = SVAG(model.parameters(), lr=1e-4, l=2)
    for changed in (False, True):
        with pair_pass(model, opt, way=way) as pair:
            pair.backward(model(torch.randn(8, 3, requires_grad=True)).square().sum(1))
        if changed:
            params_with_grad(model)[-1].grad.mul_(0.5)
            with pytest.raises(RuntimeError, match=REFUSED):
                opt.step()
        else:
            opt.step()


def hooks(model: nn.Module) -> int:
    return sum(len(p._backward_hooks or ()) for p in model.parameters())


def test_one_hook_is_on_the_parameters_and_goes_with_the_optimizer() -> None:
    model = net()
    opt = SVAG(model.parameters(), lr=1e-4, l=2)
    for _ in range(2):
        step(model, opt, (None, None), (1, 1))
        assert hooks(model) == 1
    assert hooks(copy.deepcopy(model)) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of hooks that are lost
        multiprocessing.reduction.ForkingPickler.dumps(next(model.parameters()))
    other = copy.deepcopy(opt)
    step(model, opt, (None, None), (1, 1))
    assert hooks(model) == 1
    del opt, other
    gc.collect()
    assert hooks(model) == 0
    plain = SVAG(model.parameters(), lr=1e-4)
    assert plain.l == 1
    assert hooks(model) == 0  # no second gradient is needed


def test_the_hook_is_no_users_hook(recwarn: pytest.WarningsRecorder) -> None:
    """Which would keep pair_pass from its joint way, and the norms from being checked without a second look."""
    model = net()
    opt = SVAG(model.parameters(), lr=1e-4, l=2)
    assert hooks(model) == 1
    for _ in range(2):
        with pair_pass(model, opt, way="joint", norms=True) as pair:
            pair.backward(model(torch.randn(8, 3)).square().sum(1))
        opt.step()
    assert not recwarn.list


def test_the_hook_goes_to_a_parameter_that_is_reached() -> None:
    model = net()
    model[0].requires_grad_(requires_grad=False)
    opt = SVAG(model.parameters(), lr=1e-4, l=2)
    assert opt._pair.watch.hooked is model[2].weight
    model[0].requires_grad_()
    model[2].requires_grad_(requires_grad=False)
    step(model, opt, (None, None), (1, 1))
    assert opt._pair.watch.hooked is model[0].weight
    with pytest.raises(RuntimeError, match=REFUSED):
        step(model, opt, (CHANGES["norm"], None), (1, 1))


def test_unseen_passes_are_counted() -> None:
    p, q = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    watch = GradWatch()
    watch.follow([p, q])
    seen: list[Seen] = []
    for reached in ([p], [p, q], [q], [p]):
        sum(x.sum() for x in reached).backward()  # type: ignore[union-attr]
        seen.append(watch.seen)
    assert [s.passes for s in seen] == [1, 2, 2, 3]
    assert not watch.unseen(seen[0], seen[1])
    assert watch.unseen(seen[1], seen[3])
    assert not watch.unseen(seen[3])
    q.sum().backward()
    assert watch.unseen(seen[3])
